"""Everything that is checked before a training, called from two places: before ESPnet starts, and with the models made.

Options and method pages are checked where they are parsed: :mod:`espnet_kd.distill.checks.configuration`,
:mod:`espnet_kd.distill.page`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Optional

from espnet_kd.cli import UserError, check_gpus
from espnet_kd.distill.checks.data import check_files, check_teachers
from espnet_kd.distill.checks.options import check_ranges, check_requirements
from espnet_kd.distill.checks.training import (
    check_criteria,
    check_disk,
    check_frozen,
    check_teacher_recognises,
    check_text_lengths,
)
from espnet_kd.distill.plan import Plan
from espnet_kd.experiments.audio_options import sampling_rate
from espnet_kd.experiments.models import load_state
from espnet_kd.inference.encode import input_width, measure_frame_shift
from espnet_kd.targets.teacher import Teacher

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


def check_command(args: argparse.Namespace) -> None:
    """Check what a training command names, in seconds, before ESPnet starts.

    In this order: the number of GPUs and of epochs; the ranges of other numbers; data and shape files, their
    utterances, audio files and sampling rate; the teachers' audio options against the student's; packages, statistics,
    token list and ``--init_param``.

    Raises:
        UserError: naming the option, the file and the utterances.
    """
    if args.dist_launcher is None:
        check_gpus(args.ngpu)
    if args.max_epoch < 1:
        raise UserError(f"--max_epoch is {args.max_epoch}; it must be 1 or more")
    check_ranges(args)
    check_files(args)
    check_teachers(args)
    check_requirements(args)
    for given in args.init_param:
        load_state(given.split(":")[0])  # ESPnet would load it with all that it holds


def check_models(
    args: argparse.Namespace,
    student: ESPnetASRModel,
    model: ESPnetASRModel,
    plan: Optional[Plan] = None,
    teacher: Optional[Teacher] = None,
) -> None:
    """Check a training whose models are made, before its first step.

    In this order: the teacher's outputs on some training utterances; the criteria of the best model, of early stopping
    and of the learning rate against the statistics that an epoch will have; transcripts against the student's frames;
    room on the disk. Whether student, teacher, targets and page fit each other is checked when the KD model is made
    (:mod:`espnet_kd.distill.checks.pairs`), the statistics of its features when the student is.

    Args:
        student: the plain student.
        model: what is trained, the student or the KD model around it.

    Raises:
        UserError: naming the option, the file or the utterances.
    """
    if teacher is not None:
        check_teacher_recognises(args, teacher)
    check_criteria(args, model, plan)
    check_frozen(args, model)
    if not input_width(student):
        check_text_lengths(args, measure_frame_shift(student, sampling_rate(args)), sampling_rate(args))
    check_disk(args, model, 0 if plan is None else len(plan.phases))
