"""Distil ESPnet speech recognisers into small, fast ones."""

__version__ = "0.1.0"
