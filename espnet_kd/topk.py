"""Compressed teacher posteriors, as the target cache stores them. Torch only.

For each frame they have the blank, up to k of the likeliest other tokens, and the remaining mass of all other tokens.
Frame selections and losses accept them in place of logits (B, T, V), without expanding them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Sequence, Tuple, Union

import torch
from torch import Tensor

from espnet_kd.backend import may_look

#: A remainder below this share of the non-blank mass is a rounding error.
_ROUNDING = 1e-6


class NotKept(ValueError):
    """An objective needs something that the target cache does not have."""


@dataclass(frozen=True)
class TopK:
    """Log-probabilities at temperature 1; blank is token 0.

    The leading dimensions are (B, T), or (N,) for selected frames. ``x[mask]`` and other indices select frames.
    """

    log_blank: Tensor  #: (B, T)
    tokens: Tensor  #: (B, T, k) int64; the first is the likeliest, the others are in any order
    log_probs: Tensor  #: (B, T, k); −∞, with token 0, where none was kept
    num_tokens: int  #: V
    #: Temperature τ other than 1 → (B, T) log Σ_k p(k)^(1/τ), which makes the posterior at τ exact.
    norms: Dict[float, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.log_blank.device

    def size(self, dim: int) -> int:
        """The size that the logits (B, T, V) would have."""
        return self.num_tokens if dim in (-1, self.log_blank.dim()) else self.log_blank.size(dim)

    def detach(self) -> TopK:
        """Itself: no gradient flows to a cache."""
        return self

    def map(self, fn: Callable[[Tensor], Tensor]) -> TopK:
        """Apply ``fn`` to every tensor."""
        norms = {tau: fn(x) for tau, x in self.norms.items()}
        return replace(
            self, log_blank=fn(self.log_blank), tokens=fn(self.tokens), log_probs=fn(self.log_probs), norms=norms
        )

    def __getitem__(self, index: Any) -> TopK:
        return self.map(lambda x: x[index])

    def argmax(self, dim: int = -1) -> Tensor:
        """The likeliest token (B, T); blank if it is as likely as another."""
        return self.tokens[..., 0].masked_fill(self.log_probs[..., 0] <= self.log_blank, 0)

    def log_blank_at(self, temperature: float) -> Tensor:
        """(B, T) log p(blank) at ``temperature``.

        Raises:
            NotKept: nothing was kept for this temperature.
        """
        return self._scaled(self.log_blank, temperature)

    def log_tokens_at(self, temperature: float) -> Tensor:
        """(B, T, k) log-probabilities at ``temperature`` (NotKept as :meth:`log_blank_at`)."""
        return self._scaled(self.log_probs, temperature)

    def _scaled(self, x: Tensor, temperature: float) -> Tensor:
        if temperature == 1:
            return x
        if temperature not in self.norms:
            raise NotKept(f"the cached targets are not for temperature {temperature:g}; make the cache for this page")
        norm = self.norms[temperature]
        return x / temperature - (norm[..., None] if x.dim() > norm.dim() else norm)

    def log_nonblank_at(self, temperature: float) -> Tensor:
        """(B, T) log(1 − p(blank)) at ``temperature``; exact where p(blank) rounds to 1."""
        # Rounding may leave it a little above 0.
        log_blank = self.log_blank_at(temperature).clamp(max=0.0)
        return log_blank.expm1().neg().log()

    def remainder_at(self, temperature: float) -> Tensor:
        """The probability (B, T) of all tokens that were not kept; 0 where it is a rounding error.

        On a GPU, frames without any kept token give NaN, because looking for them would make the host wait.

        Raises:
            NotKept: some of the frames have no kept token.
        """
        log_nonblank = self.log_nonblank_at(temperature)
        missing = (self.log_probs[..., 0] == -torch.inf) & (log_nonblank > -torch.inf)
        if not may_look(missing):
            log_nonblank = log_nonblank.masked_fill(missing, torch.nan)
        elif missing.any():
            raise NotKept("the cached targets keep no tokens on some of these frames; make the cache for this page")
        finite = log_nonblank.masked_fill(log_nonblank == -torch.inf, 0.0)
        share = 1 - (self.log_tokens_at(temperature) - finite[..., None]).double().exp().sum(-1)
        share = share.masked_fill(share < _ROUNDING, 0.0)
        if self.tokens.size(-1) >= self.num_tokens - 1:  # all tokens are kept if the last place is used
            share = share.masked_fill(self.log_probs[..., -1] > -torch.inf, 0.0)
        return log_nonblank.exp() * share.to(log_nonblank.dtype)


#: Posteriors of frames: logits (…, V), or compressed ones from a target cache.
Posterior = Union[Tensor, TopK]


def kept_probabilities(teacher: TopK, temperature: float) -> Tuple[Tensor, Tensor]:
    """Probabilities of blank and the kept tokens of N frames (N, 1 + k), and the ids of these tokens (N, 1 + k).

    Raises:
        NotKept: temperature or tokens were not kept.
    """
    lost = teacher.remainder_at(temperature).isnan()
    log_p = torch.cat([teacher.log_blank_at(temperature)[:, None], teacher.log_tokens_at(temperature)], 1)
    tokens = torch.cat([torch.zeros_like(teacher.tokens[:, :1]), teacher.tokens], 1)
    return log_p.exp().masked_fill(lost[:, None], torch.nan), tokens


def in_buckets(student: Tensor, teacher: TopK, temperature: float) -> Tuple[Tensor, Tensor]:
    """Posteriors of N frames over the buckets blank, each kept token, and remainder, for the divergences.

    Args:
        student: (N, V) logits in float32 or better.
        teacher: targets of N frames.

    Returns:
        log p and log q, (N, k + 2) each; gradient flows to ``student``.

    Raises:
        NotKept: temperature or tokens were not kept.
    """
    rest = teacher.remainder_at(temperature)
    log_p = torch.cat([teacher.log_blank_at(temperature)[:, None], teacher.log_tokens_at(temperature)], 1)
    kept = torch.cat([torch.zeros_like(teacher.tokens[:, :1]), teacher.tokens], 1)
    log_q = (student / temperature).log_softmax(-1)
    log_rest = log_sum(log_q.scatter(1, kept, -torch.inf))
    return (
        torch.cat([log_p, rest.log()[:, None]], 1).to(log_q.dtype),
        torch.cat([log_q.gather(1, kept), log_rest[:, None]], 1),
    )


def log_sum(x: Tensor) -> Tensor:
    """(N,) logsumexp of (N, K); −∞ with a gradient of 0, not of NaN, where all are −∞."""
    empty = (x == -torch.inf).all(-1)
    return x.masked_fill(empty[:, None], 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)


def compress(logits: Tensor, k: int, temperatures: Sequence[float] = ()) -> TopK:
    """The :class:`TopK` of logits (…, V) in float32 or better, with tokens kept on every frame."""
    log_probs = logits.log_softmax(-1)
    tokens = logits[..., 1:]
    # Computed from the other tokens' mass, because log_softmax loses all digits where p(blank) rounds to 1.
    log_blank = -torch.nn.functional.softplus(tokens.logsumexp(-1) - logits[..., 0])
    best = log_probs[..., 1:].topk(min(k, tokens.size(-1)), -1)
    # In float64 and with the exact blank, because log p(blank) at τ is often a difference of two tiny numbers.
    exact = torch.cat([log_blank[..., None], log_probs[..., 1:]], -1).double() if temperatures else log_probs
    norms = {tau: (exact / tau).logsumexp(-1).to(log_probs.dtype) for tau in temperatures if tau != 1}
    return TopK(log_blank, best.indices + 1, best.values, logits.size(-1), norms)
