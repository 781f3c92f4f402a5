"""Objectives on the frame posteriors of the CTC branch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives.base import Batch, ScaledObjective, SoftenedObjective, check_weights
from espnet_kd.distill.schedule import Position
from espnet_kd.inference.encode import StudentOutputs, TeacherOutputs
from espnet_kd.topk import NotKept, Posterior, TopK

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel


class Selection:
    """The frame selection of a page, ``frames: {rule: …, option: …}``; without a rule every valid frame counts.

    ``log_prior`` (rule ``elimination``) is the path of a .npy file with (V,) log-probabilities.

    Raises:
        UserError: unknown rule or option, a value out of range, an unreadable prior.
    """

    def __init__(self, frames: Dict[str, Any]):
        self.options = dict(frames)
        self.rule = self.options.pop("rule", "all" if not self.options else None)
        if isinstance(self.options.get("log_prior"), str):
            path = Path(self.options["log_prior"])
            try:
                self.options["log_prior"] = torch.from_numpy(np.load(path, allow_pickle=False)).float()
            except (OSError, ValueError, TypeError, EOFError, AttributeError) as e:
                raise UserError(f"frames: log_prior {path}: {e}; it must be a .npy file of V numbers") from e
        try:
            fr.check_rule(self.rule, self.options)
        except (ValueError, TypeError) as e:
            raise UserError(f"frames: {e}") from e

    @property
    def nonblank_only(self) -> bool:
        """Whether it can never select a blank frame."""
        return self.rule == "elimination" and not self.reads_all_tokens

    @property
    def reads_all_tokens(self) -> bool:
        """Whether it reads tokens on blank frames too: after subtracting a prior, a token may win there."""
        return self.options.get("log_prior") is not None

    def check(self, student: ESPnetASRModel) -> None:
        """Refuse a prior whose length is not the student's vocabulary size (:class:`UserError`)."""
        prior = self.options.get("log_prior")
        if prior is not None and len(prior) != len(student.token_list):
            raise UserError(f"frames: log_prior has {len(prior)} numbers, the student {len(student.token_list)} tokens")

    def __call__(self, logits: Posterior, lengths: Tensor) -> Tensor:
        """The selected frames (B, T) bool, chosen by the teacher's logits (B, T, V)."""
        # The prior is moved once; copying it from the CPU's memory in every step would make the host wait.
        self.options = {k: v.to(logits.device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return fr.select(logits, lengths, self.rule, **self.options)


@dataclass(kw_only=True)
class FrameObjective(ScaledObjective):
    """An objective on the softmaxes of selected frames."""

    #: Frame selection, for example ``{rule: symmetric, n: 2}``; default: all valid frames.
    frames: Dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        self.selection = Selection(self.frames)

    def place(self, student: ESPnetASRModel) -> None:
        """See :class:`Objective`."""
        self.selection.check(student)


@dataclass(kw_only=True)
class PosteriorObjective(FrameObjective):
    """Base of the objectives that apply one function of ``espnet_kd.losses`` to the CTC posteriors.

    A subclass names the function as ``loss``. Its own fields are passed to the function as keyword arguments.
    """

    # Not Callable[..., Tensor]: the annotations are evaluated where a page is checked, which must not import torch.
    loss: ClassVar[Callable[..., Any]]
    nonblank_only = False  #: whether the loss reads tokens on non-blank frames alone

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        shared = {f.name for f in fields(FrameObjective)}
        own = [f.name for f in fields(self) if f.init and f.name not in shared]
        self.options = {name: getattr(self, name) for name in ("temperature", *own)}
        if (self.nonblank_only or self.selection.nonblank_only) and not self.selection.reads_all_tokens:
            self.tokens_on = "nonblank"

    def compute(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        assert target is not None
        # The model has moved the blank of both token lists to token 0, where ESPnet has it.
        frames = self.selection(target.logits, target.lengths)
        try:
            value = type(self).loss(student.logits, target.logits, target.lengths, frames=frames, **self.options)
        except (TypeError, AttributeError) as e:
            if not isinstance(target.logits, TopK):
                raise
            # a loss from outside this package that takes tensors alone
            raise NotKept(f"the loss takes no targets of a cache ({e}); give --teacher without --target_cache") from e
        return self.factor * value, self.count(frames, target)

    def count(self, frames: Tensor, target: TeacherOutputs) -> Tensor:
        """The number of frames that the loss is a mean of."""
        return frames.sum()


class KL(PosteriorObjective):
    """KL divergence. Cross-entropy with soft targets differs from it by the teacher's entropy, a constant."""

    loss = staticmethod(losses.kl)


class SoftmaxL2(PosteriorObjective):
    """Squared distance of the softmaxes. It is bounded, and stable where posteriors are peaky."""

    loss = staticmethod(losses.softmax_l2)


class BlankKL(PosteriorObjective):
    """Binary KL of blank against non-blank: KD stage 1 of the progressive method."""

    loss = staticmethod(losses.blank_kl)
    nonblank_only = True


@dataclass(kw_only=True)
class GuidedCTC(PosteriorObjective):
    """Guided CTC: the student's posterior of the guide's token on the guide's non-blank frames."""

    loss = staticmethod(losses.guided_ctc)
    nonblank_only = True

    log: bool = False  #: the log of the posterior instead (a common variant)
    tau_squared: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        self.temperatures = ()  # τ is applied to the student alone; of the guide only the argmax is used

    def count(self, frames: Tensor, target: TeacherOutputs) -> Tensor:
        """The number of non-blank frames among those selected."""
        return fr.nonblank(target.logits, frames).sum()


@dataclass(kw_only=True)
class FactorizedKL(PosteriorObjective):
    """Factorized KL: KD stage 3 of the progressive method."""

    loss = staticmethod(losses.factorized_kl)

    blank_weight: float = 1.0
    nonblank_weight: float = 1.0
    nonblank_on_blank_weight: float = 0.0

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        check_weights(
            blank_weight=self.blank_weight,
            nonblank_weight=self.nonblank_weight,
            nonblank_on_blank_weight=self.nonblank_on_blank_weight,
        )
        self.nonblank_only = self.nonblank_on_blank_weight == 0
        super().__post_init__()


@dataclass(kw_only=True)
class DelayedKL(PosteriorObjective):
    """KL for a streaming student, whose outputs may follow the teacher's up to ``max_delay`` frames later."""

    loss = staticmethod(losses.delayed_kl)

    max_delay: int = 4  #: frames of the student

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        if self.max_delay < 0:
            raise UserError(f"max_delay: must be 0 or more, not {self.max_delay}")


class Consistency(SoftenedObjective):
    """CR-CTC: symmetric KL between two differently augmented views of an utterance, without a teacher.

    CTC is then the mean over both views. In validation there is one view, and this loss is 0.
    """

    needs_teacher = False
    views = 2

    def compute(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        if batch.views == 1:
            return student.logits[..., :0].sum(), student.lengths.sum()
        first, second = student.logits.chunk(batch.views)[:2]
        lengths = student.lengths[: len(first)]
        # The frames of both views count, because `per: utterance` divides by a batch that holds both.
        value = losses.consistency(first, second, lengths, temperature=self.temperature)
        return value, student.lengths.sum()


class AttentionKL(ScaledObjective):
    """KL of the attention decoders of a hybrid student and teacher, per label (with teacher forcing).

    ``per`` counts labels instead of frames here.
    """

    branch = "attention"
    needs_text = True
    tokens_on = "nonblank"
    student_taps = teacher_taps = ("decoder",)

    def __post_init__(self) -> None:
        """See :class:`Objective`."""
        super().__post_init__()
        self.temperatures = ()  # of the CTC posteriors none is used

    def compute(
        self, student: StudentOutputs, target: Optional[TeacherOutputs], batch: Batch, progress: Position
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        if student.decoder is None:  # nothing in this batch is transcribed
            return student.logits[..., :0].sum(), student.lengths.new_zeros(())
        assert target is not None and target.decoder is not None and batch.text_lengths is not None
        # The student's decoder ran for the transcribed rows alone. Sorting brings them to the front; choosing them by a
        # mask would make the host wait for the GPU.
        rows = (batch.text_lengths == 0).to(torch.uint8).argsort(stable=True)[: student.decoder.size(0)]
        lengths = batch.text_lengths[rows] + 1  # <sos/eos> too
        # Targets that were kept in memory may have the padding of an earlier batch with longer texts.
        outputs = target.decoder[rows, : student.decoder.size(1)]
        value = losses.kl(student.decoder, outputs, lengths, temperature=self.temperature)
        return self.factor * value, lengths.sum()
