"""Experiment directories: what they hold, how it is found, loaded safely and kept whole."""
