"""The main job: many calls of a recipe's run.sh; each starts when its inputs exist, and several may run at a time."""
