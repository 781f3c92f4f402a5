"""Objectives on hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Optional, Sequence, Tuple

import torch
from torch import Tensor

from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives.base import Batch, Objective
from espnet_kd.distill.schedule import Position
from espnet_kd.inference.encode import StudentOutputs, TeacherOutputs
from espnet_kd.targets.teacher import Teacher

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


@dataclass(kw_only=True)
class Representation(Objective):
    """Hidden states at pairs of taps, through a linear projection per pair; the loss is the mean over the pairs."""

    tokens_on = "nonblank"  # of the posterior, argmax and p(blank) are used

    #: Pairs of a student's and a teacher's tap.
    taps: Sequence[Sequence[str]] = (("encoder", "encoder"),)

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        if not self.taps or any(isinstance(pair, str) or len(pair) != 2 for pair in self.taps):
            raise UserError(f"taps: must be pairs [student tap, teacher tap], not {self.taps!r}")
        if any("decoder" in pair for pair in self.taps):
            raise UserError("taps: decoder has no frames to match; attention_kl is for decoders")
        self.student_taps = tuple(s for s, _ in self.taps)
        self.teacher_taps = tuple(t for _, t in self.taps)

    def build(self, student: ESPnetASRModel, teacher: Optional[Teacher]) -> torch.nn.ModuleList:
        """One linear projection per pair, from the student's width to the teacher's."""
        assert teacher is not None
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(student.encoder.output_size(), teacher.hidden_size) for _ in self.teacher_taps
        )
        return self.heads

    def compute(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        assert target is not None
        each = [
            self.distance_of(head(student.hidden[s]), target.hidden[t], target)
            for head, (s, t) in zip(self.heads, zip(self.student_taps, self.teacher_taps))
        ]
        return torch.stack(each).mean(), target.lengths.sum()

    def distance_of(self, student: Tensor, teacher: Tensor, target: TeacherOutputs) -> Tensor:
        """The loss of one pair, (B, T, D) each."""
        # Abstract: each kind of representation has its own distance.
        raise NotImplementedError(f"{type(self).__name__} needs a distance_of method")


@dataclass(kw_only=True)
class FactorizedRepresentation(Representation):
    """Hidden states, matched separately on non-blank and on blank frames: KD stage 2 of the progressive method."""

    distance: Literal["cosine", "l2"] = "cosine"

    def distance_of(self, student: Tensor, teacher: Tensor, target: TeacherOutputs) -> Tensor:
        """See :class:`Representation`."""
        return losses.factorized_representation(student, teacher, target.logits, target.lengths, distance=self.distance)


@dataclass(kw_only=True)
class WeightedRepresentation(Representation):
    """Hidden states, with a weight per frame: step 1 of TutorNet."""

    #: The weight: the teacher's non-blank probability, or the mean square of its hidden state.
    weights: Literal["nonblank", "energy"] = "nonblank"

    def distance_of(self, student: Tensor, teacher: Tensor, target: TeacherOutputs) -> Tensor:
        """See :class:`Representation`."""
        weights = (
            losses.nonblank_mass(target.logits) if self.weights == "nonblank" else losses.activation_energy(teacher)
        )
        return losses.weighted_representation(student, teacher, target.lengths, weights=weights)
