"""Commands: thin entry points, one per verb."""
