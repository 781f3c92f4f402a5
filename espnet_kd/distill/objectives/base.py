"""What every objective is, and what it may see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Progress
from espnet_kd.inference.encode import EncoderOutputs, depth_of
from espnet_kd.targets.teacher import Needs

if TYPE_CHECKING:
    from espnet_kd.targets.teacher import Teacher


@dataclass
class Batch:
    """What an objective may see beside the two models' outputs."""

    utt_ids: Sequence[str]
    text: Optional[Tensor] = None  #: (B, L); None in training without labels
    text_lengths: Optional[Tensor] = None  #: (B,); 0 where an utterance is not transcribed
    #: Per utterance its N-best: (score in nats, token ids), best first.
    nbest: Optional[List[List[Tuple[float, Sequence[int]]]]] = None
    #: How often each utterance stands in the batch, differently augmented; view after view. 1 in validation.
    views: int = 1
    #: ctc(log_probs (B, T, V), lengths) → scalar on the scale of the page's ``ctc: per``, over the transcribed
    #: utterances; ctc(…, text, text_lengths, weights (B,)) with other labels, weighted.
    ctc: Optional[Callable[..., Tensor]] = None
    #: The student's own CTC head: hidden states (B, T, D) → log-probabilities (B, T, V).
    ctc_head: Optional[Callable[[Tensor], Tensor]] = None


class Objective:
    """Base of all objectives: a subclass needs ``compute``, and what else of this it uses.

    Args:
        per: ``utterance`` (mean per frame × frames counted / B, the scale of ESPnet's CTC, which is a sum over the
            utterance averaged over the batch) or ``frame`` (mean per frame).
    """

    #: Whether it needs a teacher; one that does is refused on a page with ``teacher: none``.
    needs_teacher: bool = True
    #: Whether one that needs a teacher reads what it says of a batch.
    reads_target: bool = True
    #: Whether it reads transcripts.
    needs_text: bool = False
    #: Hypotheses per utterance that it reads of the teacher's N-best.
    nbest: int = 0
    #: Names of what it logs beside its loss.
    statistics: Tuple[str, ...] = ()
    #: How many differently augmented views of each utterance the student is to hear.
    views: int = 1
    #: ``ctc`` or ``attention``: the branch of a hybrid student whose weight it takes.
    branch: str = "ctc"
    #: Taps it reads, of the student and of the teacher.
    student_taps: Tuple[str, ...] = ()
    teacher_taps: Tuple[str, ...] = ()
    #: Frames on which it reads the teacher's tokens, ``nonblank`` (enough for their argmax everywhere) or ``all``, and
    #: temperatures other than 1 at which it reads posteriors: what a target cache has to keep.
    tokens_on: str = "all"
    temperatures: Tuple[float, ...] = ()

    def __init__(self, per: str = "utterance"):
        if per not in ("frame", "utterance"):
            raise UserError(f"per: must be frame or utterance, not {per!r}")
        self.per = per

    def place(self, student: torch.nn.Module) -> None:
        """Look at the student, before its taps are asked for (UserError: it does not fit)."""

    @property
    def hears_teacher(self) -> bool:
        """Whether a teacher must run for it; where this is so of no objective, none does."""
        return self.needs_teacher and self.reads_target

    def needs(self) -> Needs:
        """What it reads of the teacher."""
        if not self.hears_teacher:
            return Needs()
        return Needs(self.tokens_on, self.temperatures, self.teacher_taps)

    def init_student(self, student: torch.nn.Module, teacher: Optional[Teacher]) -> None:
        """Set the student's parameters where its training begins (UserError: it can't be done)."""

    def build(self, student: torch.nn.Module, teacher: Optional[Teacher]) -> Optional[torch.nn.Module]:
        """Make what is trained beside the student (registered under ``kd_heads``, dropped at export), if anything."""

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """Return the mean loss per frame and the number of frames that counted; both scalars.

        ``target`` is laid on the student's frames already; its ``lengths`` are the frames both have.
        """
        # Abstract: an objective from outside that lacks it is told so by name.
        raise NotImplementedError(f"{type(self).__name__} needs a compute method")

    def __call__(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Return the loss on the scale of ``per`` and statistics to log."""
        loss, counted = self.compute(student, target, batch, progress)
        return self.scale(loss, counted, student), {}

    def scale(self, loss: Tensor, counted: Tensor, student: EncoderOutputs) -> Tensor:
        """A mean per frame on the scale of ``per``."""
        return loss * (counted / student.lengths.size(0)) if self.per == "utterance" else loss

    @classmethod
    def export(
        cls, key: str, options: Dict[str, Any], config: Dict[str, Any], state: Dict[str, Tensor]
    ) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
        """From what was trained to the plain student.

        Args:
            key: the objective's name under ``kd_heads``.
            options: its options on the page.
            config: contents of config.yaml.
            state: the whole model, heads and all; what is left under ``kd_heads`` is dropped afterwards.
        """
        return config, state


def resolve_layer(layer: float, depth: int) -> int:
    """A layer from its number, or from its depth as a share of all (0.5: the middle), below the last.

    Raises:
        UserError: no such layer below the last.
    """
    if depth < 2:
        raise UserError("this student's encoder has no layers to tap below the last (an RNN, or a single layer)")
    number = min(max(round(layer * depth), 1), depth - 1) if 0 < layer < 1 else layer
    if number != int(number) or not 1 <= number < depth:
        raise UserError(f"layer {layer:g}: the student has layers 1 to {depth - 1} below its last")
    return int(number)


def check_layers(layers: Sequence[float]) -> None:
    """Refuse anything but a list of numbers above 0 (:class:`UserError`)."""
    numbers = [n for n in layers if isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < math.inf]
    if not layers or len(numbers) < len(layers):
        raise UserError(f"layers: must be a list of layer numbers, or of shares of the depth, not {list(layers)!r}")


def taps_at(layers: Sequence[float], student: torch.nn.Module) -> Tuple[str, ...]:
    """The student's taps at layers as in :func:`resolve_layer`, each once, in order."""
    depth = depth_of(student.encoder)
    return tuple(f"encoder.{n}" for n in sorted({resolve_layer(n, depth) for n in layers}))


def check_temperature(temperature: float) -> Tuple[float, ...]:
    """Refuse one that is no temperature (:class:`UserError`); it alone, where it isn't 1 (`Objective.temperatures`)."""
    if not 0 < temperature <= 1000:
        raise UserError(f"temperature: must be a number above 0, at most 1000, not {temperature}")
    return () if temperature == 1 else (float(temperature),)


def lay_on(
    student: EncoderOutputs, target: EncoderOutputs, pool: str, utt_ids: Sequence[str] = ()
) -> EncoderOutputs:
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
        utt_ids=utt_ids,
    )
    return replace(target, logits=logits, hidden=hidden, lengths=lengths, frame_shift=student.frame_shift)
