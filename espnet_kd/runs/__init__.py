"""The main job: many calls of a recipe's run.sh, each when what it needs is there, so many of them side by side."""
