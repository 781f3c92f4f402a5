"""What is refused before training begins: students, teachers and pages that don't fit each other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

import torch

from espnet_kd.cli import UserError
from espnet_kd.distill.objectives import Objective, lay_on
from espnet_kd.distill.plan import Phase
from espnet_kd.inference.encode import EncoderOutputs, check_taps, probe
from espnet_kd.targets.teacher import Teacher

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


def check_objective(objective: Objective, student: ESPnetASRModel, teacher: Optional[Teacher], has_nbest: bool) -> None:
    """Refuse an objective that lacks what it needs of student, teacher or N-best.

    Raises:
        UserError: naming what is missing.
    """
    if teacher is None and objective.needs_teacher:
        raise UserError("needs a teacher, but the page has teacher: none")
    if objective.nbest and not has_nbest:
        raise UserError("needs the teacher's N-best: give --nbest FILE (stage 7 of run.sh writes it)")
    if objective.branch == "attention" and student.ctc_weight == 1.0:
        raise UserError("the student has no attention decoder (ctc_weight: 1.0)")
    check_taps(student, objective.student_taps, "student")
    if teacher is not None:
        teacher.check(objective.needs())


def check_phase(phase: Phase, student: ESPnetASRModel, page: Path) -> None:
    """Refuse a KD stage in which nothing is trained: without objective, and with weights 0 (:class:`UserError`)."""
    stage = phase.stage
    weights = [stage.ctc_weight, *([stage.attention_weight] if student.ctc_weight < 1.0 else [])]
    if not phase.terms and all(weight == 0.0 for weight in weights):
        raise UserError(
            f"{page}: KD stage {stage.number} ({stage.name}) trains nothing: the weight of CTC is 0, and there is no "
            "objective"
        )


def warn_of_time_warp(student: ESPnetASRModel, objectives: Sequence[Objective]) -> None:
    """Log that time warping moves the student's frames against those of the teacher, whose audio is not warped, or
    against those of another view, which ESPnet warps differently if the lengths in a batch differ.
    """
    warp = getattr(student.specaug, "time_warp", None)
    if warp is not None and any(objective.views > 1 for objective in objectives):
        logging.warning(
            "specaug_conf: time warping moves the frames of each view of an utterance differently, by up to %d frames "
            "of its features, so that their outputs are for other moments; set apply_time_warp: false",
            warp.window,
        )
    if warp is not None and any(objective.uses_teacher for objective in objectives):
        logging.warning(
            "specaug_conf: time warping moves the student's frames by up to %d frames of its features, so that the "
            "teacher's outputs are for other moments; set apply_time_warp: false",
            warp.window,
        )


def check_rates(student: ESPnetASRModel, frame_shift: float, teacher: Teacher, rate: float) -> None:
    """Refuse a teacher whose frames cannot be laid beside the student's: tried on a test signal.

    Raises:
        UserError: naming lengths and frame shifts of both.
    """
    speech, lengths, frames = probe(student, rate, 3.0)
    logits = speech.new_zeros(1, frames, 1)
    try:
        lay_on(
            EncoderOutputs(logits, torch.tensor([frames], device=speech.device), frame_shift),
            teacher.probe(speech, lengths),
            pool="least_blank",
        )
    except ValueError as e:
        raise UserError(f"teacher {teacher.name}: {e}") from e


def check_pair(student: ESPnetASRModel, teacher: Teacher, rate: float) -> None:
    """Refuse a teacher whose tokens or sampling rate are not the student's.

    Raises:
        UserError: naming the tokens or the rates that differ.
    """
    if rate != teacher.sampling_rate:
        other = f"{teacher.name} of {teacher.sampling_rate:g} Hz"
        raise UserError(f"the student takes audio of {rate:g} Hz, the teacher {other}; give the student that rate")
    mine, theirs = list(student.token_list), teacher.token_list
    if mine == theirs:
        return
    only_mine = [t for t in mine if t not in set(theirs)][:5]
    only_theirs = [t for t in theirs if t not in set(mine)][:5]
    moved = [f"{t!r} is {i} / {theirs.index(t)}" for i, t in enumerate(mine) if t in theirs and theirs.index(t) != i]
    raise UserError(
        f"the token lists differ: student {len(mine)} tokens, teacher {teacher.name} {len(theirs)}; "
        f"only the student has {only_mine}, only the teacher {only_theirs}, moved {moved[:3]}. "
        "Train the student with the teacher's token list (and BPE model), or by the teacher's text: sequence_kd with "
        "asr_kd_nbest --token_list, or asr_kd_pseudo"
    )
