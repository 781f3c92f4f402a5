"""Distillation: method pages, objectives, KD stages, the KD model."""
