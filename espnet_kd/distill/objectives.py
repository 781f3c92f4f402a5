"""Objectives: what pulls the student toward the teacher. One class each, looked up by name in a method page.

A new one is a subclass of :class:`Objective` with ``compute``, and a line in ``OBJECTIVES`` (or, from outside the
package, a dotted path in the page).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from espnet2.train.class_choices import ClassChoices
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Progress
from espnet_kd.targets.encode import EncoderOutputs

if TYPE_CHECKING:
    from espnet_kd.targets.online import OnlineTeacher


@dataclass
class Batch:
    """What an objective may see beside the two models' outputs."""

    utt_ids: Sequence[str]
    text: Optional[Tensor] = None  #: (B, L)
    text_lengths: Optional[Tensor] = None  #: (B,)


class Objective:
    """Base of all objectives.

    Args:
        per: ``utterance`` (mean per frame × frames counted / B, the scale of ESPnet's CTC, which is a sum over the
            utterance averaged over the batch) or ``frame`` (mean per frame).
    """

    #: Whether it reads the target; one that does is refused on a page with ``teacher: none``.
    needs_teacher: bool = True
    #: Taps it reads, of the student and of the teacher.
    student_taps: Tuple[str, ...] = ()
    teacher_taps: Tuple[str, ...] = ()

    def __init__(self, per: str = "utterance"):
        if per not in ("frame", "utterance"):
            raise UserError(f"per: must be frame or utterance, not {per!r}")
        self.per = per

    def build(self, student: torch.nn.Module, teacher: Optional[OnlineTeacher]) -> Optional[torch.nn.Module]:
        """Make what is trained beside the student (registered under ``kd_heads``, dropped at export), if anything."""

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """Return the mean loss per frame and the number of frames that counted; both scalars.

        ``target`` is laid on the student's frames already; its ``lengths`` are the frames both have.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a compute method")

    def __call__(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Return the loss on the scale of ``per`` and statistics to log."""
        loss, counted = self.compute(student, target, batch, progress)
        if self.per == "utterance":
            loss = loss * (counted / student.lengths.size(0))
        return loss, {}


class PosteriorObjective(Objective):
    """An objective on the CTC posteriors of all valid frames, by one of the functions of ``espnet_kd.losses``.

    Args:
        temperature: τ of both softmaxes.
        tau_squared: multiply by τ², so that the gradient keeps its size.
        per: see :class:`Objective`.
    """

    loss: Callable[..., Tensor]

    def __init__(self, temperature: float = 1.0, tau_squared: bool = False, per: str = "utterance", **options: float):
        super().__init__(per)
        if temperature <= 0:
            raise UserError(f"temperature: must be above 0, not {temperature}")
        self.options = dict(options, temperature=temperature)
        self.factor = temperature**2 if tau_squared else 1.0

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        # The model hands over token lists with the blank where it belongs; ESPnet's blank is token 0.
        value = type(self).loss(student.logits, target.logits, target.lengths, **self.options)
        return self.factor * value, target.lengths.sum()


class KL(PosteriorObjective):
    """Plain KL on every valid frame."""

    loss = staticmethod(losses.kl)


class BlankKL(PosteriorObjective):
    """Binary KL, blank or not: stage 1 of the progressive method."""

    loss = staticmethod(losses.blank_kl)


class FactorizedKL(PosteriorObjective):
    """Factorized KL: stage 3 of the progressive method."""

    loss = staticmethod(losses.factorized_kl)

    def __init__(
        self,
        blank_weight: float = 1.0,
        nonblank_weight: float = 1.0,
        nonblank_on_blank_weight: float = 0.0,
        temperature: float = 1.0,
        tau_squared: bool = False,
        per: str = "utterance",
    ):
        super().__init__(
            temperature,
            tau_squared,
            per,
            blank_weight=blank_weight,
            nonblank_weight=nonblank_weight,
            nonblank_on_blank_weight=nonblank_on_blank_weight,
        )


class FactorizedRepresentation(Objective):
    """Hidden states matched on non-blank and on blank frames apart: stage 2 of the progressive method.

    Args:
        taps: pairs of a student's and a teacher's tap; the loss is the mean over the pairs.
        distance: ``cosine`` or ``l2``.
        per: see :class:`Objective`.
    """

    def __init__(
        self,
        taps: Sequence[Sequence[str]] = (("encoder", "encoder"),),
        distance: str = "cosine",
        per: str = "utterance",
    ):
        super().__init__(per)
        if distance not in ("cosine", "l2"):
            raise UserError(f"distance: must be cosine or l2, not {distance!r}")
        if not taps or any(isinstance(pair, str) or len(pair) != 2 for pair in taps):
            raise UserError(f"taps: must be pairs [student tap, teacher tap], not {taps!r}")
        self.pairs: List[Tuple[str, str]] = [(s, t) for s, t in taps]
        self.student_taps = tuple(s for s, _ in self.pairs)
        self.teacher_taps = tuple(t for _, t in self.pairs)
        self.distance = distance

    def build(self, student: torch.nn.Module, teacher: Optional[OnlineTeacher]) -> torch.nn.ModuleList:
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
            losses.factorized_representation(
                head(student.hidden[s]), target.hidden[t], target.logits, target.lengths, distance=self.distance
            )
            for head, (s, t) in zip(self.heads, self.pairs)
        )
        return total / len(self.pairs), target.lengths.sum()


OBJECTIVES = ClassChoices(
    "kd_objective",
    classes=dict(
        kl=KL,
        blank_kl=BlankKL,
        factorized_kl=FactorizedKL,
        factorized_representation=FactorizedRepresentation,
    ),
    type_check=Objective,
    default=None,
)


def lay_on(student: EncoderOutputs, target: EncoderOutputs, pool: str) -> EncoderOutputs:
    """The teacher's outputs on the student's frames (see :func:`espnet_kd.frames.align`)."""
    logits, hidden, lengths = fr.align(
        target.logits,
        target.hidden,
        target.lengths,
        target.frame_shift,
        student.logits.size(1),
        student.lengths,
        student.frame_shift,
        pool=pool,
    )
    return replace(target, logits=logits, hidden=hidden, lengths=lengths, frame_shift=student.frame_shift)
