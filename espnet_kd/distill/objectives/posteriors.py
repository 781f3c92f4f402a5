"""Objectives on the frame posteriors of the CTC branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives.base import Batch, Objective, check_temperature
from espnet_kd.distill.schedule import Progress
from espnet_kd.inference.encode import EncoderOutputs


class Selection:
    """A page's ``frames: {rule: …, option: …}``; without a rule every valid frame counts.

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
        """Whether no blank frame can be among those it selects."""
        return self.rule == "elimination" and not self.reads_all_tokens

    @property
    def reads_all_tokens(self) -> bool:
        """Whether it looks at tokens on blank frames too: of one that the prior favours, a token may win."""
        return self.options.get("log_prior") is not None

    def check(self, student: torch.nn.Module) -> None:
        """Refuse a prior of another vocabulary (:class:`UserError`)."""
        prior = self.options.get("log_prior")
        if prior is not None and len(prior) != len(student.token_list):
            raise UserError(f"frames: log_prior has {len(prior)} numbers, the student {len(student.token_list)} tokens")

    def __call__(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) bool of the frames that the teacher's logits (B, T, V) select."""
        # Moved once: from a CPU's memory it would be a wait in every step.
        self.options = {k: v.to(logits.device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return fr.select(logits, lengths, self.rule, **self.options)


class PosteriorObjective(Objective):
    """An objective on the CTC posteriors of the selected frames, by one of the functions of ``espnet_kd.losses``.

    Args:
        temperature: τ of both softmaxes.
        tau_squared: multiply by τ², so that the gradient keeps its size.
        frames: selection, e.g. ``{rule: symmetric, n: 2}``; default all valid frames.
        per: see :class:`Objective`.
        options: further options of the loss.
    """

    loss: Callable[..., Tensor]
    #: Whether the loss reads tokens on non-blank frames alone.
    nonblank_only: bool = False

    def __init__(
        self,
        temperature: float = 1.0,
        tau_squared: bool = False,
        frames: Dict[str, Any] = {},  # noqa: B006 (never written to; the page reader takes its type)
        per: str = "utterance",
        **options: Any,
    ):
        super().__init__(per)
        self.temperatures = check_temperature(temperature)
        self.options = dict(options, temperature=temperature)
        self.factor = temperature**2 if tau_squared else 1.0
        self.selection = Selection(frames)
        if (self.nonblank_only or self.selection.nonblank_only) and not self.selection.reads_all_tokens:
            self.tokens_on = "nonblank"

    def place(self, student: torch.nn.Module) -> None:
        """See :class:`Objective`."""
        self.selection.check(student)

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        # The model hands over token lists with the blank where it belongs; ESPnet's blank is token 0.
        frames = self.selection(target.logits, target.lengths)
        value = type(self).loss(student.logits, target.logits, target.lengths, frames=frames, **self.options)
        return self.factor * value, self.count(frames, target)

    def count(self, frames: Tensor, target: EncoderOutputs) -> Tensor:
        """How many frames the loss is a mean of."""
        return frames.sum()


class KL(PosteriorObjective):
    """KL. Cross-entropy with soft targets differs from it by the teacher's entropy, a constant."""

    loss = staticmethod(losses.kl)


class SoftmaxL2(PosteriorObjective):
    """Squared distance of the softmaxes: bounded, and steady where posteriors are peaky."""

    loss = staticmethod(losses.softmax_l2)


class GuidedCTC(PosteriorObjective):
    """Guided CTC: the student's posterior of the guide's token on its non-blank frames.

    Args:
        log: the log of the posterior instead (a common variant).
        others: see :class:`PosteriorObjective`.
    """

    loss = staticmethod(losses.guided_ctc)
    nonblank_only = True

    def __init__(
        self,
        log: bool = False,
        temperature: float = 1.0,
        frames: Dict[str, Any] = {},  # noqa: B006
        per: str = "utterance",
    ):
        super().__init__(temperature, False, frames, per, log=log)
        self.temperatures = ()  # τ is the student's alone; of the guide it reads the argmax

    def count(self, frames: Tensor, target: EncoderOutputs) -> Tensor:
        """The non-blank frames among those selected."""
        return fr.nonblank(target.logits, frames).sum()


class BlankKL(PosteriorObjective):
    """Binary KL, blank or not: stage 1 of the progressive method."""

    loss = staticmethod(losses.blank_kl)
    nonblank_only = True


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
        frames: Dict[str, Any] = {},  # noqa: B006
        per: str = "utterance",
    ):
        self.nonblank_only = nonblank_on_blank_weight == 0
        super().__init__(
            temperature,
            tau_squared,
            frames,
            per,
            blank_weight=blank_weight,
            nonblank_weight=nonblank_weight,
            nonblank_on_blank_weight=nonblank_on_blank_weight,
        )


class DelayedKL(PosteriorObjective):
    """KL for a streaming student, which may say the same up to ``max_delay`` frames later.

    Args:
        max_delay: in frames of the student.
        others: see :class:`PosteriorObjective`.
    """

    loss = staticmethod(losses.delayed_kl)

    def __init__(
        self,
        max_delay: int = 4,
        temperature: float = 1.0,
        tau_squared: bool = False,
        frames: Dict[str, Any] = {},  # noqa: B006
        per: str = "utterance",
    ):
        if max_delay < 0:
            raise UserError(f"max_delay: must be 0 or more, not {max_delay}")
        super().__init__(temperature, tau_squared, frames, per, max_delay=max_delay)


class Consistency(Objective):
    """CR-CTC: symmetric KL between two differently augmented views of an utterance (no teacher).

    CTC is the mean over both views then. In validation there is one view, and this is 0.

    Args:
        temperature: τ of both softmaxes.
        per: see :class:`Objective`.
    """

    needs_teacher = False
    views = 2

    def __init__(self, temperature: float = 1.0, per: str = "utterance"):
        super().__init__(per)
        check_temperature(temperature)
        self.temperature = temperature

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        if batch.views == 1:
            return student.logits[..., :0].sum(), student.lengths.sum()
        first, second = student.logits.chunk(batch.views)[:2]
        lengths = student.lengths[: len(first)]
        # Counted over both views, as the batch that it is divided by holds both.
        value = losses.consistency(first, second, lengths, temperature=self.temperature)
        return value, student.lengths.sum()


class AttentionKL(Objective):
    """KL on the outputs of the attention decoders of a hybrid student and teacher, per label (with teacher forcing).

    Args:
        temperature: τ of both softmaxes.
        tau_squared: multiply by τ².
        per: see :class:`Objective`; its frames are labels here.
    """

    branch = "attention"
    tokens_on = "nonblank"
    needs_text = True
    student_taps = teacher_taps = ("decoder",)

    def __init__(self, temperature: float = 1.0, tau_squared: bool = False, per: str = "utterance"):
        super().__init__(per)
        check_temperature(temperature)
        self.temperature = temperature
        self.factor = temperature**2 if tau_squared else 1.0

    def compute(
        self, student: EncoderOutputs, target: Optional[EncoderOutputs], batch: Batch, progress: Progress
    ) -> Tuple[Tensor, Tensor]:
        """See :class:`Objective`."""
        if student.decoder is None:  # nothing in this batch is transcribed
            return student.logits[..., :0].sum(), student.lengths.new_zeros(())
        # The student's decoder ran for the transcribed rows alone; sorted to the front rather than chosen by a mask,
        # which would be a wait on a GPU.
        rows = (batch.text_lengths == 0).to(torch.uint8).argsort(stable=True)[: student.decoder.size(0)]
        lengths = batch.text_lengths[rows] + 1  # <sos/eos> too
        value = losses.kl(student.decoder, target.decoder[rows], lengths, temperature=self.temperature)
        return self.factor * value, lengths.sum()
