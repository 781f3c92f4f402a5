"""The protocol of teachers, and the average of several teachers as one."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from espnet_kd.backend import without_gradient
from espnet_kd.cli import UserError
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.late import LateCheck
from espnet_kd.losses.common import full_precision


@dataclass(frozen=True)
class Needs:
    """The outputs of a teacher that an objective reads."""

    tokens_on: str = "nonblank"  #: frames whose tokens it reads: ``nonblank`` or ``all``
    temperatures: Tuple[float, ...] = ()  #: temperatures other than 1 at which it reads posteriors
    taps: Tuple[str, ...] = ()  #: taps of hidden states; ``decoder`` for an attention decoder's outputs


class Teacher(Protocol):
    """A source of targets."""

    name: str
    token_list: List[str]
    sampling_rate: float  #: Hz
    frame_shift: float  #: seconds

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""

    def check(self, needed: Needs) -> None:
        """Refuse outputs that this teacher cannot give (:class:`UserError`)."""

    def probe(self, speech: Tensor, speech_lengths: Tensor) -> EncoderOutputs:
        """Lengths for a test signal; the other outputs have no meaning."""

    def state_dict(self) -> Dict[str, Tensor]:
        """Its parameters and buffers by name."""

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device or type."""

    def targets(
        self,
        utt_ids: Sequence[str],
        speech: Tensor,
        speech_lengths: Tensor,
        taps: Sequence[str] = (),
        text: Optional[Tensor] = None,
        text_lengths: Optional[Tensor] = None,
    ) -> EncoderOutputs:
        """Its outputs for a batch (see :meth:`espnet_kd.targets.online.OnlineTeacher.targets`)."""


class SeveralTeachers:
    """The weighted average of several teachers' probabilities (not of their logits); hidden states are the first's.

    Args:
        teachers: with the same tokens, sampling rate and frame shift.
        weights: a weight above 0 for each teacher, normalised to sum 1; default: equal weights.

    Raises:
        UserError: the teachers differ, or the number of weights is another one.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] = ()):
        self.teachers = list(teachers)
        first = self.teachers[0]
        for other in self.teachers[1:]:
            if other.token_list != first.token_list:
                raise UserError(f"the teachers {first.name} and {other.name} have different token lists")
            for what, unit, mine, theirs in (
                ("frame shifts", "ms", first.frame_shift * 1000, other.frame_shift * 1000),
                ("sampling rates", "Hz", first.sampling_rate, other.sampling_rate),
            ):
                if abs(mine - theirs) > 1e-6 * mine:
                    raise UserError(
                        f"the teachers have different {what}: "
                        f"{first.name} {mine:g} {unit}, {other.name} {theirs:g} {unit}"
                    )
        if weights and len(weights) != len(self.teachers):
            raise UserError(f"teacher_weights has {len(weights)} numbers for {len(self.teachers)} teachers")
        weights = list(weights) or [1.0] * len(self.teachers)
        self.weights = [w / sum(weights) for w in weights]
        self.name = ", ".join(t.name for t in self.teachers)
        self._check_lengths = LateCheck()
        self.token_list, self.sampling_rate, self.frame_shift = first.token_list, first.sampling_rate, first.frame_shift

    @property
    def hidden_size(self) -> int:
        """Width of the first teacher's hidden states."""
        return self.teachers[0].hidden_size

    def check(self, needed: Needs) -> None:
        """See :class:`Teacher`."""
        self.teachers[0].check(needed)
        if "decoder" in needed.taps:
            for teacher in self.teachers[1:]:
                teacher.check(Needs(taps=("decoder",)))

    def probe(self, speech: Tensor, speech_lengths: Tensor) -> EncoderOutputs:
        """See :class:`Teacher`."""
        return self._together([teacher.probe(speech, speech_lengths) for teacher in self.teachers])

    def state_dict(self) -> Dict[str, Tensor]:
        """The first teacher's parameters and buffers."""
        return self.teachers[0].state_dict()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Teacher`."""
        for teacher in self.teachers:
            teacher.move(fn)

    @without_gradient
    def targets(
        self,
        utt_ids: Sequence[str],
        speech: Tensor,
        speech_lengths: Tensor,
        taps: Sequence[str] = (),
        text: Optional[Tensor] = None,
        text_lengths: Optional[Tensor] = None,
    ) -> EncoderOutputs:
        """Log of the averaged probabilities as logits, over the frames that all teachers have."""
        decoder = [tap for tap in taps if tap == "decoder"]
        return self._together(
            [
                teacher.targets(utt_ids, speech, speech_lengths, taps if i == 0 else decoder, text, text_lengths)
                for i, teacher in enumerate(self.teachers)
            ]
        )

    def _together(self, each: Sequence[EncoderOutputs]) -> EncoderOutputs:
        """Combine the outputs of several teachers into those of one."""
        frames = min(s.logits.size(1) for s in each)
        decoders = [s.decoder for s in each if s.decoder is not None]
        # The padding differs if only some of the teachers keep this batch in memory.
        labels = min((d.size(1) for d in decoders), default=0)
        lengths = torch.stack([s.lengths for s in each])
        apart = (lengths.max(0).values - lengths.min(0).values).max() > 2
        try:
            self._check_lengths(
                apart, lambda: f"the teachers {self.name} differ by more than two frames: {lengths.tolist()}"
            )
        except ValueError as e:
            raise UserError(str(e)) from e
        return EncoderOutputs(
            self._average([s.logits[:, :frames] for s in each]),
            lengths.min(0).values.clamp(max=frames),
            self.frame_shift,
            {tap: h[:, :frames] for tap, h in each[0].hidden.items()},
            self._average([d[:, :labels] for d in decoders]) if decoders else None,
        )

    def _average(self, logits: Sequence[Tensor]) -> Tensor:
        """log Σ w · softmax, in float32 or better."""
        each = [full_precision(x).log_softmax(-1) + math.log(w) for w, x in zip(self.weights, logits)]
        return functools.reduce(torch.logaddexp, each)
