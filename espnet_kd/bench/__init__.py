"""What distillation costs on the machine at hand, as ratios: see ``espnet_kd.bin.asr_kd_bench``."""
