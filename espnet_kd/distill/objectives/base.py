"""The base classes of all objectives: the options that they share, and the data that an objective gets for a batch.

The options of an objective are the fields of its dataclass. Their names and types are checked where a method page is
read (:mod:`espnet_kd.distill.page`), so that a field with a ``Literal`` type needs no code; a range that a type cannot
express is checked in ``__post_init__``, which raises a :class:`~espnet_kd.cli.UserError` that names the option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Dict, List, Literal, Optional, Sequence, Tuple

import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Position
from espnet_kd.inference.encode import StudentOutputs, TeacherOutputs, depth_of
from espnet_kd.targets.nbest import Hypotheses
from espnet_kd.targets.teacher import Needs

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

    from espnet_kd.targets.teacher import Teacher


@dataclass
class Batch:
    """The data of one batch that an objective may use beside the outputs of student and teacher."""

    utt_ids: Sequence[str]
    text: Optional[Tensor] = None  #: (B, L); None in training without labels
    text_lengths: Optional[Tensor] = None  #: (B,); 0 where an utterance is not transcribed
    #: The N-best of each utterance: (score in nats, token ids), best first.
    nbest: Optional[List[Hypotheses]] = None
    #: Number of differently augmented copies of each utterance in the batch, copy after copy; 1 in validation.
    views: int = 1
    #: ctc(log_probs (B, T, V), lengths) → scalar on the scale of the page's ``ctc: per``, over the transcribed
    #: utterances; ctc(…, text, text_lengths, weights (B,)) with other labels, weighted.
    ctc: Optional[Callable[..., Tensor]] = None
    #: The student's own CTC head: hidden states (B, T, D) → log-probabilities (B, T, V).
    ctc_head: Optional[Callable[[Tensor], Tensor]] = None


@dataclass
class Objective:
    """Base of all objectives. A subclass defines ``compute``, and overrides what else it needs of this class.

    Options are fields of the subclass, which is then a dataclass too: ``@dataclass(kw_only=True)``.
    """

    #: Whether the objective needs a teacher; if so, a page with ``teacher: none`` refuses it.
    needs_teacher: ClassVar[bool] = True
    #: Whether an objective that needs a teacher also uses the teacher's outputs for each batch.
    reads_target: ClassVar[bool] = True
    #: Whether the objective uses transcripts.
    needs_text: ClassVar[bool] = False
    #: Names of the statistics that are logged beside the loss.
    statistics: ClassVar[Tuple[str, ...]] = ()
    #: Number of differently augmented views of each utterance that the student is given.
    views: ClassVar[int] = 1
    #: The branch of a hybrid student whose weight multiplies the objective.
    branch: ClassVar[Literal["ctc", "attention"]] = "ctc"

    #: Scale of the loss: ``utterance`` (mean per frame × frames counted / B, the scale of ESPnet's CTC, which is a sum
    #: over the utterance averaged over the batch) or ``frame`` (mean per frame).
    per: Literal["utterance", "frame"] = "utterance"

    #: Number of hypotheses per utterance that are used of the teacher's N-best.
    nbest: int = field(init=False, default=0)
    #: Taps that are read, of the student and of the teacher.
    student_taps: Tuple[str, ...] = field(init=False, default=())
    teacher_taps: Tuple[str, ...] = field(init=False, default=())
    #: What a target cache has to keep: the frames on which the objective reads the teacher's tokens (``nonblank`` is
    #: enough for their argmax on all frames), and the temperatures other than 1 at which it reads posteriors.
    tokens_on: Literal["all", "nonblank"] = field(init=False, default="all")
    temperatures: Tuple[float, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        """Check the options (UserError: a value out of range), and derive from them what the objective needs."""

    def place(self, student: ESPnetASRModel) -> None:
        """Resolve what depends on the student, such as taps (UserError: the student does not fit)."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher has to run for this objective. The teacher runs if this is true of any objective."""
        return self.needs_teacher and self.reads_target

    def needs(self) -> Needs:
        """The teacher's outputs that this objective uses."""
        if not self.uses_teacher:
            return Needs()
        return Needs(self.tokens_on, self.temperatures, self.teacher_taps)

    def init_student(self, student: ESPnetASRModel, teacher: Optional[Teacher]) -> None:
        """Initialise the student's parameters before training (UserError: student and teacher do not fit)."""

    def build(self, student: ESPnetASRModel, teacher: Optional[Teacher]) -> Optional[torch.nn.Module]:
        """Return a module to train with the student, or None. It is stored under ``kd_heads``, and not exported."""

    def compute(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Tensor]:
        """Return the mean loss per frame and the number of frames in that mean, both scalars.

        ``target`` is None where the objective uses no teacher. It is aligned with the student's frames already, and its
        ``lengths`` count the frames that both have.
        """
        # Abstract: the message names a class from outside the package that lacks the method.
        raise NotImplementedError(f"{type(self).__name__} needs a compute method")

    def __call__(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Return the loss on the scale of ``per``, and statistics to log."""
        loss, counted = self.compute(student, target, batch, progress)
        return self.scale(loss, counted, student), {}

    def scale(self, loss: Tensor, counted: Tensor, student: StudentOutputs) -> Tensor:
        """Convert a mean per frame to the scale of ``per``."""
        return loss * (counted / student.lengths.size(0)) if self.per == "utterance" else loss

    @classmethod
    def export(
        cls, key: str, options: Dict[str, Any], config: Dict[str, Any], state: Dict[str, Tensor]
    ) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
        """Convert configuration and parameters of the trained model to those of the plain student.

        Args:
            key: the objective's name under ``kd_heads``.
            options: the objective's options on the page.
            config: contents of config.yaml.
            state: all parameters, heads included; the caller drops what is left under ``kd_heads``.
        """
        return config, state


@dataclass(kw_only=True)
class SoftenedObjective(Objective):
    """An objective on softmaxes at a temperature."""

    temperature: float = 1.0  #: τ of all softmaxes, above 0

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        if not 0 < self.temperature <= 1000:
            raise UserError(f"temperature: must be a number above 0, at most 1000, not {self.temperature}")
        self.temperatures = () if self.temperature == 1 else (float(self.temperature),)


@dataclass(kw_only=True)
class ScaledObjective(SoftenedObjective):
    """An objective on softmaxes whose loss can be multiplied by τ²."""

    tau_squared: bool = False  #: multiply the loss by τ², so that its gradient keeps its size

    @property
    def factor(self) -> float:
        """The number that multiplies the loss."""
        return self.temperature**2 if self.tau_squared else 1.0


def resolve_layer(layer: float, depth: int) -> int:
    """The number of a layer below the last, given as a number or as a share of the depth (0.5: the middle).

    Raises:
        UserError: the encoder has no such layer below its last.
    """
    if depth < 2:
        raise UserError("this student's encoder has no layers to tap below the last (an RNN, or a single layer)")
    number = min(max(round(layer * depth), 1), depth - 1) if 0 < layer < 1 else layer
    if number != int(number) or not 1 <= number < depth:
        raise UserError(f"layer {layer:g}: the student has layers 1 to {depth - 1} below its last")
    return int(number)


def check_weights(**weights: float) -> None:
    """Refuse weights below 0, with which a student would be trained away from its teacher (:class:`UserError`)."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"{name}: must be a number, 0 or more, not {weight}")


def check_layers(layers: Sequence[float]) -> None:
    """Refuse anything but a list of numbers above 0 (:class:`UserError`)."""
    numbers = [n for n in layers if isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < math.inf]
    if not layers or len(numbers) < len(layers):
        raise UserError(f"layers: must be a list of layer numbers, or of shares of the depth, not {list(layers)!r}")


def taps_at(layers: Sequence[float], student: ESPnetASRModel) -> Tuple[str, ...]:
    """The student's taps at some layers (see :func:`resolve_layer`), sorted and without duplicates."""
    depth = depth_of(student.encoder)
    return tuple(f"encoder.{n}" for n in sorted({resolve_layer(n, depth) for n in layers}))


def lay_on(
    student: StudentOutputs, target: TeacherOutputs, pool: str, utt_ids: Sequence[str] = ()
) -> TeacherOutputs:
    """The teacher's outputs, aligned with the student's frames (see :func:`espnet_kd.frames.align`)."""
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
