"""Objectives on hidden states."""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives.base import Batch, Objective
from espnet_kd.distill.schedule import Progress
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.targets.teacher import Teacher


class Representation(Objective):
    """Hidden states at pairs of taps, through a linear projection per pair; the loss is the mean over the pairs.

    Args:
        taps: pairs of a student's and a teacher's tap.
        per: see :class:`Objective`.
    """

    tokens_on = "nonblank"  # of the posterior, argmax and p(blank)

    def __init__(self, taps: Sequence[Sequence[str]] = (("encoder", "encoder"),), per: str = "utterance"):
        super().__init__(per)
        for pair in taps or [None]:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(tap, str) for tap in pair):
                raise UserError(f"taps: must be pairs [student tap, teacher tap], not {taps!r}")
            if "decoder" in pair:
                raise UserError("taps: decoder has no frames to match; attention_kl is for decoders")
        self.pairs: List[Tuple[str, str]] = [(s, t) for s, t in taps]
        self.student_taps = tuple(s for s, _ in self.pairs)
        self.teacher_taps = tuple(t for _, t in self.pairs)

    def build(self, student: torch.nn.Module, teacher: Optional[Teacher]) -> torch.nn.ModuleList:
        """One linear projection per pair, from the student's width to the teacher's."""
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(student.encoder.output_size(), teacher.hidden_size) for _ in self.pairs
        )
        return self.heads

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        total = sum(
            self.distance_of(head(student.hidden[s]), target.hidden[t], target)
            for head, (s, t) in zip(self.heads, self.pairs)
        )
        return total / len(self.pairs), target.lengths.sum()

    def distance_of(self, student: Tensor, teacher: Tensor, target: EncoderOutputs) -> Tensor:
        """The loss of one pair, (B, T, D) each."""
        # Abstract: each kind of representation has its own.
        raise NotImplementedError(f"{type(self).__name__} needs a distance_of method")


class FactorizedRepresentation(Representation):
    """Hidden states matched on non-blank and on blank frames apart: stage 2 of the progressive method.

    Args:
        distance: ``cosine`` or ``l2``.
        others: see :class:`Representation`.
    """

    def __init__(
        self,
        taps: Sequence[Sequence[str]] = (("encoder", "encoder"),),
        distance: str = "cosine",
        per: str = "utterance",
    ):
        super().__init__(taps, per)
        if distance not in ("cosine", "l2"):
            raise UserError(f"distance: must be cosine or l2, not {distance!r}")
        self.distance = distance

    def distance_of(self, student: Tensor, teacher: Tensor, target: EncoderOutputs) -> Tensor:
        """See :class:`Representation`."""
        return losses.factorized_representation(student, teacher, target.logits, target.lengths, distance=self.distance)


class WeightedRepresentation(Representation):
    """Hidden states, each frame weighted by how much the teacher looks there: step 1 of TutorNet.

    Args:
        weights: ``nonblank`` (the teacher's non-blank mass) or ``energy`` (its activations' mean square).
        others: see :class:`Representation`.
    """

    def __init__(
        self,
        taps: Sequence[Sequence[str]] = (("encoder", "encoder"),),
        weights: str = "nonblank",
        per: str = "utterance",
    ):
        super().__init__(taps, per)
        if weights not in ("nonblank", "energy"):
            raise UserError(f"weights: must be nonblank or energy, not {weights!r}")
        self.weights = weights

    def distance_of(self, student: Tensor, teacher: Tensor, target: EncoderOutputs) -> Tensor:
        """See :class:`Representation`."""
        weights = (
            losses.nonblank_mass(target.logits) if self.weights == "nonblank" else losses.activation_energy(teacher)
        )
        return losses.weighted_representation(student, teacher, target.lengths, weights=weights)
