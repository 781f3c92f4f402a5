"""Measurements of the costs of distillation as ratios (see ``espnet_kd.bin.asr_kd_bench``)."""
