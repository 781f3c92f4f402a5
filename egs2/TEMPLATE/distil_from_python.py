"""Distil a student from Python: python distil_from_python.py TEACHER DUMP TOKENS OUTPUT

TEACHER: a finished ESPnet experiment; DUMP: a directory with train/ and valid/, each with wav.scp and text;
TOKENS: the teacher's tokens, one a line; OUTPUT: gets statistics and student. In a notebook, call main().
"""

import sys

from espnet2.bin.asr_inference import Speech2Text

from espnet_kd import cli
from espnet_kd.ez import Distiller

STUDENT = {  # a plain ESPnet configuration; a real one has more layers, more epochs, a warm-up
    "encoder": "conformer",
    "encoder_conf": {"output_size": 64, "attention_heads": 2, "linear_units": 128, "num_blocks": 2},
    "model_conf": {"ctc_weight": 1.0},
    "optim": "adam",
    "optim_conf": {"lr": 0.002},
    "batch_type": "numel",
    "batch_bins": 2000000,
    "best_model_criterion": [["valid", "loss_ctc", "min"]],
}


def main(teacher: str, dump: str, tokens: str, output: str, **options) -> Speech2Text:
    """Train and export; return the student, ready to recognise: ``student(samples)[0][0]`` is a text."""
    data = {"speech": ("wav.scp", "sound"), "text": ("text", "text")}
    distiller = Distiller(
        STUDENT, f"{output}/student", f"{output}/stats", teacher=teacher, method="progressive_fkl", data_info=data,
        train_dump_dir=f"{dump}/train", valid_dump_dir=f"{dump}/valid", token_list=tokens, token_type="char",
        normalize="global_mvn", normalize_conf={"stats_file": f"{output}/stats/train/feats_stats.npz"}, **options,
    )  # fmt: skip
    distiller.collect_stats()
    export = distiller.train()
    return Speech2Text(f"{export}/config.yaml", f"{export}/model.pth", ctc_weight=1.0, beam_size=5)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        print(__doc__, end="", file=sys.stderr)
        sys.exit(2)
    cli.run(lambda _: main(*sys.argv[1:], max_epoch=10))
