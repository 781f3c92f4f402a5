"""Shared code of the losses: precision, masks, means of no frames, and p(blank) without cancellation."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.backend import may_look
from espnet_kd.topk import Posterior, TopK


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in: float32, or float64 if ``x`` has it."""
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(x: Tensor) -> Tensor:
    """Convert half types to float32; float32 and float64 stay as they are."""
    return x.to(compute_dtype(x))


class Counted:
    """The frames that a loss is computed on: those inside ``lengths``, and of these the ones in ``frames`` if given.

    Args:
        mask: (B, T) bool.
    """

    def __init__(self, mask: Tensor):
        self.mask = mask
        #: True: rows of other frames are removed; N counts the rest. False: N = B·T, and means ignore other frames.
        self.compact = may_look(mask)

    @classmethod
    def of(cls, student: Tensor, teacher: Posterior, lengths: Tensor, frames: Optional[Tensor]) -> Counted:
        """The frames of a student and a teacher (B, T, …). Padding never counts, even if ``frames`` includes it.

        Raises:
            ValueError: the sizes differ.
        """
        check_sizes(student, teacher, lengths, frames)
        inside = fr.valid(lengths.to(student.device, non_blocking=True), student.size(1))
        return cls(inside if frames is None else inside & frames.to(student.device, non_blocking=True))

    @overload
    def take(self, x: Tensor, delay: Optional[Tensor] = None) -> Tensor: ...
    @overload
    def take(self, x: Posterior, delay: Optional[Tensor] = None) -> Posterior: ...
    def take(self, x: Posterior, delay: Optional[Tensor] = None) -> Posterior:
        """Select rows (N, …) of (B, T, …). Other frames are removed, or replaced by 0, before any arithmetic.

        With ``delay`` (B,) in frames, the row of frame t is taken from frame t + delay, which must be inside.
        """
        if isinstance(x, TopK):
            return x.map(self.take)
        if self.compact:
            if delay is None:
                return x[self.mask]
            b, t = self.mask.nonzero(as_tuple=True)
            return x[b, t + delay[b]]
        if delay is not None:
            t = torch.arange(x.size(1), device=x.device) + delay[:, None]
            x = x[torch.arange(x.size(0), device=x.device)[:, None], t.clamp(max=x.size(1) - 1)]
        # where instead of a product, which would keep NaN in values and gradients.
        zero = x.new_zeros(())
        return torch.where(self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2)), x, zero).flatten(0, 1)

    def spread(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`take`: (B, T) from (N,), with 0 on all other frames."""
        if not self.compact:
            return values.masked_fill(~self.mask.flatten(), 0.0).unflatten(0, self.mask.shape)
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def mean(self, values: Tensor, student: Tensor, where: Optional[Tensor] = None) -> Tensor:
        """Mean of ``values`` (N,), or of those at ``where`` (N,) bool; 0 with a gradient path if there are none."""
        if self.compact:
            values = values if where is None else values[where]
            # An empty slice rather than 0 * student, which would be NaN if the student has an infinity.
            return values.mean() if values.numel() else student[..., :0].sum().to(values.dtype)
        there = self.mask.flatten() if where is None else self.mask.flatten() & where
        return values.masked_fill(~there, 0.0).sum() / there.sum().clamp(min=1)


def check_sizes(student: Tensor, teacher: Posterior, lengths: Tensor, frames: Optional[Tensor]) -> None:
    """Refuse tensors whose B or T differ (:class:`ValueError`)."""
    sizes = [student.shape[:2], (teacher.size(0), teacher.size(1)), (len(lengths), student.size(1))]
    sizes += [] if frames is None else [frames.shape]
    if any(tuple(size) != tuple(sizes[0]) for size in sizes):
        names = ("student", "teacher", "lengths", "frames")
        # Frames are addressed by their index, which would be that of another frame if the sizes differed.
        found = ", ".join(f"{name} {tuple(size)}" for name, size in zip(names, sizes))
        raise ValueError(f"numbers of utterances and frames differ in size: {found}")


def check_vocabularies(student: Tensor, teacher: Posterior) -> None:
    """Refuse posteriors over different numbers of tokens (:class:`ValueError`)."""
    if student.size(2) != teacher.size(2):
        raise ValueError(f"student and teacher differ in size: {student.size(2)} and {teacher.size(2)} tokens")


class BlankSplit(NamedTuple):
    """A posterior, split into blank and non-blank mass."""

    log_blank: Tensor  #: (N,) log b
    log_nonblank: Tensor  #: (N,) log(1 − b), from the non-blank logits: exact where b rounds to 1
    token_norm: Tensor  #: (N,) logsumexp of the scaled non-blank logits
    is_nonblank: Tensor  #: (N,) bool: whether the likeliest label is not blank

    def select(self, rows: Tensor) -> BlankSplit:
        """The split of some of the frames."""
        return BlankSplit(*(x[rows] for x in self))


def split_blank(rows: Tensor, blank_id: int, temperature: float) -> BlankSplit:
    """Split (N, V) logits, or log-probabilities, at ``temperature``. ``rows`` are overwritten.

    They are changed in place, because on a CPU a new tensor of a megabyte costs more than the exponentials in it.
    """
    blank = rows[:, blank_id].clone()
    # As in argmax, the first of equal logits wins.
    is_nonblank = torch.zeros_like(blank, dtype=torch.bool)
    if blank_id + 1 < rows.size(1):
        is_nonblank |= rows[:, blank_id + 1 :].amax(-1) > blank
    if blank_id:
        is_nonblank |= rows[:, :blank_id].amax(-1) >= blank
    if temperature != 1:
        blank /= temperature
        rows /= temperature
    rows[:, blank_id] = -torch.inf
    top = rows.amax(-1)
    # If no token has any mass, the top is −∞, and −∞ − (−∞) would be NaN.
    norm = rows.sub_(finite(top)[:, None]).exp_().sum(-1).log_().add_(top)
    return BlankSplit(F.logsigmoid(blank - norm), F.logsigmoid(norm - blank), norm, is_nonblank)


def finite(x: Tensor) -> Tensor:
    """Replace −∞ by 0, so that it can be subtracted from −∞."""
    return x.masked_fill(x == -torch.inf, 0.0)


def cross(log_p: Tensor, log_p_inner: Tensor, log_q: Tensor) -> Tensor:
    """p · (log_p_inner − log_q), 0 where p is 0, even if log_q is −∞ there."""
    p = log_p.exp()
    zero = p == 0
    # Both masks are needed: where for the value, masked_fill against 0 · ∞ in the gradient.
    return torch.where(zero, 0.0, p * (log_p_inner.masked_fill(zero, 0.0) - log_q.masked_fill(zero, 0.0)))


def binary(p: BlankSplit, q: BlankSplit) -> Tensor:
    """(N,) BKL, the KL of blank against non-blank."""
    return cross(p.log_blank, p.log_blank, q.log_blank) + cross(p.log_nonblank, p.log_nonblank, q.log_nonblank)


@overload
def pick(student: Tensor, teacher: Tensor, counted: Counted) -> Tuple[Tensor, Tensor]: ...
@overload
def pick(student: Tensor, teacher: Posterior, counted: Counted) -> Tuple[Tensor, Posterior]: ...
def pick(student: Tensor, teacher: Posterior, counted: Counted) -> Tuple[Tensor, Posterior]:
    """The rows (N, V) of student and teacher on the frames that count."""
    return counted.take(student), counted.take(teacher.detach())
