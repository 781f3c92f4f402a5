"""Experiment directories: finding their files, loading them safely and keeping them complete."""
