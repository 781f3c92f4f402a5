"""Factorized KL on a CPU: only the frames that count, in small blocks, with value and gradient in closed form.

The gradient is the only new tensor of the size of the logits; the blocks fit into the processor's cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_kd.losses.common import BlankSplit, binary, compute_dtype, cross, finite, split_blank
from espnet_kd.topk import Posterior, TopK

#: Numbers in one block of rows, which fits into a processor's cache.
_BLOCK = 2**18


class _Frames(NamedTuple):
    """Numbers of the N frames that count, for the backward pass."""

    rows: Tensor  #: (N,) their places among all frames
    nonblank_mass: Tensor  #: (N,) 1 − b^T
    push: Tensor  #: (N,) b^S − b^T
    token_norm: Tensor  #: (N,) the student's logsumexp over the tokens
    norm: Tensor  #: (N,) the teacher's logsumexp over the whole vocabulary
    pull: Tensor  #: (N,) weight of the tokens' part in each frame, 0 where they are not read


class RowwiseFactorizedKL(torch.autograd.Function):
    """The loss with its gradient in closed form.

    For one frame, with z the student's scaled logits, n their logsumexp over the tokens and q̃ = exp(z − n):
    ∂BKL/∂z(blank) = b^S − b^T, ∂BKL/∂z(k) = −(b^S − b^T)·q̃(k), and ∂((1−b^T)·NKL)/∂z(k) = (1−b^T)·q̃(k) − p(k).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Posterior,
        counted: Tensor,
        blank_id: int,
        temperature: float,
        weights: Tuple[float, float, float],
    ) -> Tensor:
        """Compute the loss of logits (B, T, V) on the frames ``counted`` (B, T)."""
        ctx.save_for_backward(student)
        ctx.constants = blank_id, temperature, weights[0]
        rows = counted.flatten().nonzero()[:, 0].to(student.device)
        ctx.frames = None
        if not len(rows):
            return student.new_zeros((), dtype=compute_dtype(student))
        read = _Reader(student, len(rows))
        shape = len(rows), blank_id, temperature
        ctx.teacher = _Buckets(teacher, *shape) if isinstance(teacher, TopK) else _Dense(teacher, *shape)
        found, blanks = [], student.new_zeros((), dtype=torch.float64)
        sums = [blanks.clone(), blanks.clone()]  # over NB and over BL frames
        for block in rows.split(read.height):
            p = ctx.teacher.split(block)
            q = split_blank(read(block), blank_id, temperature)
            blanks += binary(p, q).double().sum()
            for i, half in enumerate((p.is_nonblank, ~p.is_nonblank)):
                if weights[1 + i] and half.any():
                    log_q = read(block[half]).div_(temperature).sub_(finite(q.token_norm[half])[:, None])
                    sums[i] += ctx.teacher.tokens(block[half], p.select(half), log_q).double().sum()
            push = torch.where(
                q.log_blank > q.log_nonblank,
                # The difference of the smaller probabilities; a difference of two near 1 would be rounding only.
                p.log_nonblank.exp() - q.log_nonblank.exp(),
                q.log_blank.exp() - p.log_blank.exp(),
            )
            norm = finite(p.token_norm) - finite(p.log_nonblank)
            found.append((block, p.log_nonblank.exp(), push, q.token_norm, norm, p.is_nonblank))
        block, mass, push, token_norm, norm, is_nonblank = (torch.cat(x) for x in zip(*found))
        counts = is_nonblank.sum().clamp(min=1).double(), (~is_nonblank).sum().clamp(min=1).double()
        of_nonblank, of_blank = (w / n for w, n in zip(weights[1:], counts))
        pull = torch.where(is_nonblank, of_nonblank, of_blank)
        ctx.frames = _Frames(block, mass, push, token_norm, norm, pull.to(compute_dtype(student)))
        # A part of weight 0 is left out, because 0 · ∞ would be NaN.
        loss = weights[0] * blanks / len(rows) if weights[0] else torch.zeros_like(blanks)
        loss = loss + sum(w * s / n for w, s, n in zip(weights[1:], sums, counts))
        return loss.to(compute_dtype(student))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        """The student's gradient (B, T, V)."""
        (student,) = ctx.saved_tensors
        blank_id, temperature, blank_weight = ctx.constants
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        flat_out = out.flatten(0, 1)
        if ctx.frames is None:
            return out.zero_(), None, None, None, None, None
        rest = torch.ones(len(flat_out), dtype=torch.bool, device=out.device)
        rest[ctx.frames.rows] = False
        flat_out[rest] = 0
        read = _Reader(student, len(ctx.frames.rows))
        scale = grad / temperature
        for block, mass, push, token_norm, norm, pull in zip(*(x.split(read.height) for x in ctx.frames)):
            push = push * (blank_weight / len(ctx.frames.rows))
            # q̃, or 0 where no token has any mass
            g = read(block).div_(temperature).sub_(finite(token_norm)[:, None]).exp_()
            g[:, blank_id] = 0
            tokens = (pull != 0).nonzero()[:, 0]
            p = ctx.teacher.probabilities(block[tokens], norm[tokens], g, tokens) if len(tokens) else None
            g *= (pull * mass - push)[:, None]
            if p is not None:
                g.index_add_(0, tokens, p.mul_(pull[tokens][:, None]).to(g.dtype), alpha=-1)
            g[:, blank_id] = push
            flat_out.index_copy_(0, block, g.mul_(scale).to(out.dtype))
        return out, None, None, None, None, None


class _Dense:
    """A teacher's logits (B, T, V)."""

    def __init__(self, teacher: Tensor, most: int, blank_id: int, temperature: float):
        self.read = _Reader(teacher, most)
        self.blank_id, self.temperature = blank_id, temperature

    def split(self, rows: Tensor) -> BlankSplit:
        """Split the posteriors of some rows into blank and non-blank."""
        return split_blank(self.read(rows), self.blank_id, self.temperature)

    def tokens(self, rows: Tensor, split: BlankSplit, log_q: Tensor) -> Tensor:
        """(N,) (1−b^T)·NKL against log q̃ (N, V), which is overwritten."""
        log_p = self.read(rows).div_(self.temperature).sub_(finite(split.token_norm)[:, None])
        p = log_p.exp()
        # 0 in both, because 0 · ∞ would send every frame to the slow path below.
        p[:, self.blank_id] = log_p[:, self.blank_id] = 0
        sums = p.mul(log_q.sub_(log_p)).sum(-1)
        odd = ~sums.isfinite()
        if odd.any():  # 0 · ∞ in the sum, or an infinite KL
            lost = p[odd] == 0
            sums[odd] = p[odd].mul(log_q[odd].masked_fill(lost, 0.0)).sum(-1)
        return -sums * split.log_nonblank.exp()

    def probabilities(self, rows: Tensor, norm: Tensor, q: Tensor, where: Tensor) -> Tensor:
        """(N, V) p(k), which the caller may overwrite; the blank's column has no meaning."""
        return self.read(rows).div_(self.temperature).sub_(norm[:, None]).exp_()


class _Buckets:
    """A teacher's cached targets. Tokens that were not kept form one bucket, divided in the student's proportions."""

    def __init__(self, teacher: TopK, most: int, blank_id: int, temperature: float):
        if blank_id != 0:
            raise ValueError("cached targets have blank as token 0")
        self.teacher, self.temperature = teacher.map(lambda x: x.flatten(0, 1)), temperature

    def split(self, rows: Tensor) -> BlankSplit:
        """Split the posteriors of some rows into blank and non-blank."""
        x = self.teacher[rows]
        log_blank, log_nonblank = x.log_blank_at(self.temperature), x.log_nonblank_at(self.temperature)
        return BlankSplit(log_blank, log_nonblank, log_nonblank, x.argmax() != 0)

    def tokens(self, rows: Tensor, split: BlankSplit, log_q: Tensor) -> Tensor:
        """(N,) (1−b^T)·NKL over the kept tokens and the remainder, against log q̃ (N, V), which is overwritten."""
        x = self.teacher[rows]
        mass = finite(split.log_nonblank)[:, None]
        log_q[:, 0] = -torch.inf
        kept = log_q.gather(1, x.tokens)
        others = log_q.scatter_(1, x.tokens, -torch.inf).logsumexp(-1, keepdim=True)
        log_p = torch.cat([x.log_tokens_at(self.temperature), x.remainder_at(self.temperature).log()[:, None]], 1)
        return cross(log_p, log_p - mass, torch.cat([kept, others], 1)).sum(-1)

    def probabilities(self, rows: Tensor, norm: Tensor, q: Tensor, where: Tensor) -> Tensor:
        """(N, V) p(k); the remainder is divided in proportion to the student's q̃ (rows ``where``)."""
        x = self.teacher[rows]
        p = q[where].scatter_(1, x.tokens, 0.0)
        share = x.remainder_at(self.temperature)[:, None] / p.sum(-1, keepdim=True)
        kept = x.log_tokens_at(self.temperature).exp().to(p.dtype)
        return p.mul_(share.nan_to_num(0.0, 0.0)).scatter_(1, x.tokens, kept)


class _Reader:
    """Reads rows of (B, T, V) block by block into one buffer; each call overwrites the result of the call before."""

    def __init__(self, x: Tensor, most: int):
        self.flat = x.flatten(0, 1)
        self.height = max(1, min(most, _BLOCK // x.size(2)))
        self.buffer = self.flat.new_empty(self.height, x.size(2), dtype=compute_dtype(x))

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, V) in float32 or better, which the caller may overwrite."""
        buffer = self.buffer[: len(rows)]
        if buffer.dtype != self.flat.dtype:
            return buffer.copy_(self.flat[rows])
        return torch.index_select(self.flat, 0, rows, out=buffer)
