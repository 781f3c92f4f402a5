"""Train a student with a method page: in all of its KD stages, or up to one of them.

Example:
    python -m espnet_kd.bin.asr_kd_train --config conf/train_student.yaml \\
        --teacher exp/teacher --kd_config progressive_fkl --output_dir exp/student_fkl \\
        <everything else that espnet2.bin.asr_train takes>

The KD stages are phases of one training in OUTPUT_DIR. --kd_stage K stops at the end of the epoch in which KD stage
K ends; the student at the end of each KD stage is kept in OUTPUT_DIR/kd_stage<K>. The same command resumes a training
that was stopped; a finished training continues if --max_epoch is raised.
"""

from __future__ import annotations

import argparse
import sys
from typing import Optional, Sequence

from espnet_kd import cli


def get_parser() -> argparse.ArgumentParser:
    """The parser of ``espnet2.bin.asr_train`` with this task's options (ESPnet's tools look for this function)."""
    from espnet_kd.tasks.asr_kd import ASRKDTask

    parser = ASRKDTask.get_parser()
    parser.usage = "%(prog)s --config YAML --teacher EXP --kd_config PAGE --output_dir DIR [option ...]"
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Train (see the module's docstring)."""
    from espnet_kd.tasks.training import train_student

    cmd = list(sys.argv[1:] if cmd is None else cmd)
    if {"-h", "--help"} & set(cmd):
        get_parser().parse_args(cmd)
    train_student(cmd)


if __name__ == "__main__":
    cli.run(main)
