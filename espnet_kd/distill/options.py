"""The options that the task ``asr_kd`` adds to ESPnet's: name to the arguments of ``add_argument``.

An exported config.yaml has none of them.
"""

from __future__ import annotations

from typing import Any, Dict

from espnet2.utils.types import str2bool, str_or_none

KD_OPTIONS: Dict[str, Dict[str, Any]] = {
    "teacher": {
        "nargs": "*",
        "default": [],
        "metavar": "EXP[/FILE.pth]",
        "help": "Finished ESPnet ASR experiments, exports, or zip files of espnet2.bin.pack; the posteriors of several "
        "are averaged",
    },
    "target_cache": {
        "type": str_or_none,
        "metavar": "DIR",
        "help": "The teacher's outputs on disk (asr_kd_cache), instead of a running teacher; a --teacher beside it "
        "must be the cache's",
    },
    "kd_config": {"type": str_or_none, "help": "Method page: a name in conf/methods, or a path"},
    "kd_stage": {"type": int, "help": "Train up to the end of this KD stage, and stop"},
    "kd_stages": {
        "type": int,
        "nargs": "+",
        "help": "Use only these KD stages of the page; the last one gets the share of those left out",
    },
    "teacher_memory": {
        "type": float,
        "default": 1000.0,
        "metavar": "MB",
        "help": "Keep the outputs of an online teacher in memory, up to this size; on a small corpus the teacher then "
        "runs in the first epoch only",
    },
    "nbest": {"type": str_or_none, "help": "N-best lists of the teacher for training and validation (asr_kd_nbest)"},
    "augmented_teacher": {
        "type": str2bool,
        "default": False,
        "help": "Give an online teacher the audio with the noise and reverberation that the data loader adds",
    },
    "blank_teacher": {
        "type": str2bool,
        "default": False,
        "help": "Train also with a teacher that outputs blank on nearly all frames of the training data",
    },
    "max_nonfinite": {
        "type": int,
        "default": 20,
        "metavar": "N",
        "help": "Stop if more batches of an epoch than this have a loss that is not finite; the log names each of them",
    },
}
