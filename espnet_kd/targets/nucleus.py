"""Compressed frame posteriors: the likeliest tokens that carry most of the mass, in 8 bits each, and one remainder.

What is kept is exact up to rounding. For an utterance with T frames, N of which have tokens, M tokens in all::

    blank      (T, 1 + n)  log p/(1−p) of blank, at temperature 1 and at n others; within ±60, off by at most 0.001
    rows       (N, 2)      the frame number, and the number of its tokens, negative if blank is the likeliest of all
    tokens     (L, 1)      the ids, frame by frame: the likeliest token, then the others in the order of their ids;
                           32768 is subtracted if V ≤ 65536. If V ≤ 1024, L ≥ M bytes instead: the number of ids
                           skipped since the previous one (for the first two of a frame, since blank); a byte 255
                           means that a further byte is added
    log_probs  (M + 2N, 1) codes 0…255 of the tokens' probabilities, of each row's remainder, and of each row's span

A row's span is 12/255 nats times its code. Code c of a token, or of the remainder (all other tokens together), stands
for span · (c/254)² nats below the likeliest of the row; 255 stands for probability 0. The relative error of a
probability x nats below the likeliest is thus at most √(span · x)/254: with the largest span 1.4 % for a token a third
as likely, and 5 % for the least likely token that is kept. Only ratios are written; the probabilities that are read sum
to 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, List, Protocol, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_kd.topk import TopK

#: A token with p(token | not blank) below exp(−SPAN) is never kept, unless it is the likeliest.
SPAN = 12.0
NONE, LEVELS = 255, 254
LIMIT = 60.0  #: largest absolute log-odds, in nats
OFFSET = 2**15  #: subtracted from ids, because Kaldi's 16-bit integers have a sign
IN_BYTES, IN_16_BITS = 2**10, 2**16  #: largest vocabularies whose ids are written in this way


class Kept(Protocol):
    """The outputs of a frame that are kept (see ``cache.Policy``)."""

    @property
    def mass(self) -> float:
        """The probability that blank and the kept tokens reach together."""

    @property
    def tokens_on(self) -> str:
        """The frames whose tokens are kept: ``all`` or ``nonblank``."""

    @property
    def temperatures(self) -> Tuple[float, ...]:
        """Temperatures other than 1 at which the posterior is kept."""


def pack_targets(x: TopK, hidden: Sequence[np.ndarray], policy: Kept) -> List[np.ndarray]:
    """The float32 arrays to write for one utterance: its :class:`TopK` of T frames and its hidden states (T, D)."""
    x = x.map(lambda y: y.cpu())
    nonblank = x.argmax() != 0
    there = torch.ones_like(nonblank) if policy.tokens_on == "all" else nonblank
    some = x[there]
    kept = in_nucleus(some, policy.mass)
    some, kept = _by_id(some, kept)
    inner = _inner(some)
    counts = kept.sum(1)
    inner = inner.masked_fill(~kept, -torch.inf).double()
    rest = (1 - inner.exp().sum(1)).clamp(min=0).log()
    coded, spans = quantise(torch.cat([inner, rest[:, None]], 1))
    codes = torch.cat([coded[:, :-1][kept], coded[:, -1], spans])
    odds = (x.log_blank - x.log_nonblank_at(1.0)).clamp(-LIMIT, LIMIT)
    columns = [odds]
    for tau in policy.temperatures:
        # Use the rounded values of the kept tokens, so that they and the exact mass of all others sum to 1 when read.
        scaled = F.logsigmoid(odds.double()) / tau
        total = (x.norms[tau].double().exp() - (x.log_blank.double() / tau).exp()).clamp(min=0)
        was = (some.log_probs.double() / tau).exp().masked_fill(~kept, 0.0).sum(1)
        mass = F.logsigmoid(-odds[there])[:, None]
        will_be = ((_normalised(codes, counts) + mass).double() / tau).exp().sum(1)
        total[there] = (total[there] - was).clamp(min=0) + will_be
        columns.append((scaled - total.log()).clamp(-LIMIT, LIMIT).float())
    rows = torch.stack([there.nonzero()[:, 0], torch.where(nonblank[there], counts, -counts)], 1)
    ids = write_ids(some.tokens[kept], counts, x.num_tokens)
    written = [torch.stack(columns, 1), rows, ids[:, None], codes[:, None]]
    return [*(y.float().numpy() for y in written), *hidden]


def unpack_targets(each: Sequence[Sequence[np.ndarray]], policy: Kept, num_tokens: int) -> TopK:
    """The inverse of :func:`pack_targets` for several utterances.

    Returns:
        A :class:`TopK` of all their frames, one after another, with as many tokens as the longest row has. All
        utterances are unpacked in one call, because a call for each would take longer than the work.

    Raises:
        ValueError: the arrays do not fit together.
    """
    columns, rows, tokens, codes = ([torch.from_numpy(arrays[i]) for arrays in each] for i in range(4))
    _check_sizes(columns, rows, codes, policy)
    first = np.cumsum([0, *map(len, columns)]).tolist()
    # Round, because whole numbers written in 16 bits are read with an error of a few thousandths.
    frames = torch.cat([x[:, 0] + start for x, start in zip(rows, first)]).round().long()
    counts = torch.cat([x[:, 1] for x in rows]).round().long()
    parts = [x[:, 0].split([len(x) - 2 * len(r), len(r), len(r)]) for x, r in zip(codes, rows)]
    all_codes = torch.cat([part for place in range(3) for part in (p[place] for p in parts)]).round().long()
    log_blank, odds, norms = _read_blank(torch.cat(columns), policy)
    nonblank, counts = counts > 0, counts.abs()
    all_tokens = read_ids(torch.cat(tokens)[:, 0].round().long(), counts, num_tokens)
    _check(len(odds), frames, counts, all_tokens, all_codes, num_tokens)
    width = max(int(counts.max()), 1) if len(counts) else 1
    by_frame = torch.zeros(len(odds), width, dtype=torch.int64)
    log_probs = torch.full(by_frame.shape, -torch.inf)
    if len(frames):
        by_frame[frames] = _spread(all_tokens, counts, 0)
        kept = (_normalised(all_codes, counts) + F.logsigmoid(-odds[frames])[:, None]).float()
        # Rounding must not change whether blank is the likeliest.
        limit = log_blank[frames]
        above = torch.nextafter(limit, torch.ones_like(limit))
        kept[:, 0] = torch.where(nonblank, torch.maximum(kept[:, 0], above), torch.minimum(kept[:, 0], limit))
        log_probs[frames] = kept
    return TopK(log_blank, by_frame, log_probs, num_tokens, norms)


def _read_blank(columns: Tensor, policy: Kept) -> Tuple[Tensor, Tensor, Dict[float, Tensor]]:
    """(T,) log p(blank) and its log-odds, and the norms at other temperatures."""
    log_blank = F.logsigmoid(columns[:, 0])
    norms = {tau: log_blank / tau - F.logsigmoid(columns[:, 1 + i]) for i, tau in enumerate(policy.temperatures)}
    return log_blank, columns[:, 0], norms


def in_nucleus(x: TopK, mass: float) -> Tensor:
    """Mask (N, k) of the tokens that N frames keep: the likeliest until they and blank reach ``mass``, at least one."""
    p = x.log_probs.double().exp()
    before = x.log_blank.double().exp()[:, None] + p.cumsum(1) - p
    kept = (before < mass) & (_inner(x) >= -SPAN) & (p > 0)
    kept[:, :1] = True
    return kept


def write_ids(tokens: Tensor, counts: Tensor, num_tokens: int) -> Tensor:
    """Encode the ids (M,) of rows with ``counts`` ids each as (L,) numbers; ids must rise from a row's second on."""
    if num_tokens > IN_BYTES:
        return tokens - (OFFSET if num_tokens <= IN_16_BITS else 0)
    before = torch.cat([tokens.new_zeros(1), tokens])[:-1].masked_fill(_places(counts) < 2, 0)
    passed = tokens - before - 1
    ends = (passed // NONE + 1).cumsum(0)
    out = tokens.new_full((int(ends[-1]) if len(ends) else 0,), NONE)
    out[ends - 1] = passed % NONE
    return out


def read_ids(written: Tensor, counts: Tensor, num_tokens: int) -> Tensor:
    """The inverse of :func:`write_ids` (ValueError: ``written`` is not its result)."""
    if num_tokens > IN_BYTES:
        return written + (OFFSET if num_tokens <= IN_16_BITS else 0)
    ends = (written != NONE).nonzero()[:, 0]
    if len(ends) != int(counts.sum()) or (len(written) and written[-1] == NONE):
        raise ValueError("tokens.ark holds no such array")
    total = written.cumsum(0)[ends] + torch.arange(1, len(ends) + 1)
    steps = torch.diff(total, prepend=total.new_zeros(1))
    place = _places(counts)
    firsts = (torch.arange(len(ends)) - place).clamp(max=max(len(ends) - 1, 0))
    return torch.where(place == 0, steps, total - total[firsts])


def _places(counts: Tensor) -> Tensor:
    """(M,) the place of each token in its row, from 0."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)


def _by_id(x: TopK, kept: Tensor) -> Tuple[TopK, Tensor]:
    """Sort each row: its likeliest token, then the other kept tokens in the order of their ids, then the rest."""
    key = x.tokens.masked_fill(~kept, x.num_tokens)
    key[:, :1] = 0
    order = key.argsort(dim=1, stable=True)
    return replace(x, tokens=x.tokens.gather(1, order), log_probs=x.log_probs.gather(1, order)), kept.gather(1, order)


def quantise(log_p: Tensor) -> Tuple[Tensor, Tensor]:
    """Codes (N, k) of rows of log-probabilities, and the codes of their spans (N,); int64."""
    below = log_p.amax(1, keepdim=True) - log_p
    there = below <= SPAN  # False for −∞, and for a remainder that is almost 0
    spans = (below.masked_fill(~there, 0.0).amax(1) / SPAN * NONE).ceil().long()
    codes = (below * NONE / SPAN / spans.clamp(min=1)[:, None]).clamp(0, 1).sqrt().mul(LEVELS).round().long()
    return codes.masked_fill(~there, NONE), spans


def dequantise(codes: Tensor, spans: Tensor) -> Tensor:
    """(N, k) log-probabilities in float64, whose probabilities sum to 1; −∞ for the code ``NONE``."""
    below = spans.double()[:, None] * SPAN / NONE * (codes.double() / LEVELS).square()
    return (-below).masked_fill(codes == NONE, -torch.inf).log_softmax(1)


def _inner(x: TopK) -> Tensor:
    """(N, k) log p(token | not blank); −∞ for frames with p(blank) = 1."""
    return (x.log_probs - x.log_nonblank_at(1.0)[:, None]).nan_to_num(-torch.inf, neginf=-torch.inf)


def _normalised(codes: Tensor, counts: Tensor) -> Tensor:
    """(N, k) log p(token | not blank) from N rows' codes; they sum to 1 with the remainder, and are −∞ for no token."""
    tokens, rest, spans = codes.split([len(codes) - 2 * len(counts), len(counts), len(counts)])
    return dequantise(torch.cat([_spread(tokens, counts, NONE), rest[:, None]], 1), spans)[:, :-1]


def _spread(values: Tensor, counts: Tensor, fill: int) -> Tensor:
    """Arrange M values as (N, most), with ``counts`` values in each row."""
    most = int(counts.max()) if len(counts) else 0
    out = values.new_full((len(counts), most), fill)
    out[torch.arange(most) < counts[:, None]] = values
    return out


def _check_sizes(columns: Sequence[Tensor], rows: Sequence[Tensor], codes: Sequence[Tensor], policy: Kept) -> None:
    """Refuse arrays whose shapes :func:`pack_targets` does not make (ValueError)."""
    for name, wrong in (
        ("blank", any(x.size(1) != 1 + len(policy.temperatures) for x in columns)),
        ("rows", any(bool(((r[:, 0] < -0.5) | (r[:, 0] > len(x) - 0.5)).any()) for r, x in zip(rows, columns))),
        ("log_probs", any(len(x) < 2 * len(r) for x, r in zip(codes, rows))),
    ):
        if wrong:
            raise ValueError(f"{name}.ark holds no such array")


def _check(num_frames: int, frames: Tensor, counts: Tensor, tokens: Tensor, codes: Tensor, num_tokens: int) -> None:
    """Refuse numbers that :func:`pack_targets` does not write (ValueError)."""
    for name, wrong in (
        ("rows", (frames < 0) | (frames >= num_frames) | (counts < 1)),
        ("tokens", (tokens < 1) | (tokens >= num_tokens)),
        ("log_probs", (codes < 0) | (codes > NONE)),
    ):
        if wrong.any() or len(tokens) != int(counts.sum()) or len(codes) != len(tokens) + 2 * len(counts):
            raise ValueError(f"{name}.ark holds no such array")
