"""Frame masks, frame selections, and the alignment of a teacher's frames with a student's. Torch and NumPy only.

Conventions: ``lengths`` (B,) counts frames; masks are (B, T) bool, True where a frame counts; blank is token 0
unless stated otherwise; frame shifts are in seconds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Mapping, Optional, Sequence, Tuple, overload

import numpy as np
import torch
from torch import Tensor

from espnet_kd.backend import may_look, without_gradient
from espnet_kd.late import LateCheck
from espnet_kd.topk import Posterior, TopK

#: Rules of :func:`select` and the options each takes. ``n``, ``theta`` and ``ratio`` have no default.
SELECTIONS: Mapping[str, Tuple[str, ...]] = {
    "all": (),
    "elimination": ("log_prior", "prior_scale"),
    "symmetric": ("n",),
    "trim": (),
    "threshold": ("theta",),
    "random": ("ratio", "generator"),
}
_REQUIRED = ("n", "theta", "ratio")


def valid(lengths: Tensor, num_frames: int) -> Tensor:
    """Mask (B, T) of the frames inside each utterance."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def best(logits: Posterior) -> Tensor:
    """The likeliest token (…) of logits (…, V), without gradient. On a CPU numpy computes it in a ninth of the time."""
    if isinstance(logits, Tensor) and may_look(logits) and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(-1)))
    return logits.argmax(-1)


def nonblank(teacher_logits: Posterior, frames: Tensor, blank_id: int = 0) -> Tensor:
    """The non-blank frames (NB): those of ``frames`` on which the teacher's argmax at temperature 1 is not blank.

    Args:
        teacher_logits: (B, T, V) logits or log-probabilities.
        frames: (B, T) bool, usually ``valid(...)``.
    """
    return frames & (best(teacher_logits) != blank_id)


def check_rule(rule: str, options: Mapping[str, Any]) -> None:
    """Check a rule of :func:`select` and its options, without any tensor of a batch.

    Raises:
        ValueError: the rule is unknown, or an option is unknown, missing or bad; the message names rule and option.
    """
    if not isinstance(rule, str) or rule not in SELECTIONS:
        raise ValueError(f"unknown frame selection {rule!r}; there are {', '.join(SELECTIONS)}")
    known = SELECTIONS[rule]
    for name in options:
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no options"
            raise ValueError(f"frame selection {rule}: unknown option {name!r}; it {takes}")
    for name in known:
        if name in _REQUIRED and name not in options:
            raise ValueError(f"frame selection {rule}: {name} must be given")
    for name, value in options.items():
        good, what = _OPTIONS[name]
        if not good(value):
            raise ValueError(f"frame selection {rule}: {name} must be {what}, not {value!r}")
    if "prior_scale" in options and options.get("log_prior") is None:
        raise ValueError(f"frame selection {rule}: prior_scale scales a log_prior, which is not given")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


#: Option of ``select`` → function that checks a value, and description of the accepted values.
_OPTIONS = {
    "n": (
        lambda v: isinstance(v, Integral) and _is_number(v) and int(v) >= 0,
        "a whole number of frames, at least 0",
    ),
    "theta": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "ratio": (lambda v: _is_number(v) and 0 <= v < math.inf, "a finite number, at least 0"),
    "prior_scale": (lambda v: _is_number(v) and 0 <= v < math.inf, "a finite number, at least 0"),
    # A token with prior 0 would win every frame. A prior on a GPU is not checked, because the host would wait.
    "log_prior": (
        lambda v: v is None or (isinstance(v, Tensor) and v.dim() == 1 and (not may_look(v) or _is_finite(v))),
        "a tensor (V,) of finite log-probabilities, or None",
    ),
    "generator": (lambda v: v is None or isinstance(v, torch.Generator), "a torch.Generator or None"),
}


@without_gradient
def select(teacher_logits: Posterior, lengths: Tensor, rule: str, *, blank_id: int = 0, **options: Any) -> Tensor:
    """Choose the frames on which a student is distilled, by the teacher's blanks.

    Args:
        teacher_logits: (B, T, V) logits or log-probabilities, or a :class:`espnet_kd.topk.TopK`; all rules use
            temperature 1.
        lengths: (B,) frames.
        rule: one of

            - ``all``: every valid frame;
            - ``elimination``: NB, the valid frames whose argmax is not blank; with ``log_prior`` (V,) by the argmax of
              log p − ``prior_scale`` · log_prior (default 0.5);
            - ``symmetric``: NB and the ``n`` frames to the left and to the right of each;
            - ``trim``: from the first to the last NB frame;
            - ``threshold``: NB, and blank frames with p(blank) ≤ 1 − ``theta``;
            - ``random``: NB, and per utterance round(``ratio`` · |NB|) blank frames (half to even; all of them where
              there are fewer), drawn again in each call, from ``generator`` (on any device) where given.
        blank_id: index of blank.
        options: those of the rule, see :data:`SELECTIONS`.

    Returns:
        (B, T) bool, True only inside ``lengths``; an utterance without NB frame keeps none under ``elimination``,
        ``symmetric``, ``trim`` and ``random``.

    Raises:
        ValueError: as :func:`check_rule`; or ``log_prior`` does not have V entries.

    Source: Hilmes, Rossenbach, Schlüter, Interspeech 2025, arXiv 2506.01503 (the paper).
    """
    check_rule(rule, options)
    inside = valid(lengths, teacher_logits.size(1))
    if rule == "all":
        return inside
    if rule == "elimination":
        return nonblank(_less_prior(teacher_logits, **options), inside, blank_id)
    speech = nonblank(teacher_logits, inside, blank_id)
    if rule == "symmetric":
        return inside & _dilate(speech, options["n"])
    if rule == "trim":
        return (speech.cumsum(1) > 0) & (speech.flip(1).cumsum(1).flip(1) > 0)
    if rule == "threshold":
        return speech | (inside & (_log_blank(teacher_logits, blank_id).exp() <= 1 - options["theta"]))
    return speech | _draw(inside & ~speech, speech.sum(1), **options)


def _full(logits: Tensor) -> Tensor:
    """Convert to float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_blank(logits: Posterior, blank_id: int) -> Tensor:
    """(B, T) log p(blank)."""
    if isinstance(logits, TopK):
        return logits.log_blank
    logits = _full(logits)
    return logits[..., blank_id] - logits.logsumexp(-1)


def _less_prior(logits: Posterior, log_prior: Optional[Tensor] = None, prior_scale: float = 0.5) -> Posterior:
    if log_prior is None:
        return logits
    if len(log_prior) != logits.size(-1):
        raise ValueError(
            f"frame selection elimination: log_prior has {len(log_prior)} entries, the teacher {logits.size(-1)} tokens"
        )
    log_prior = prior_scale * _full(log_prior.to(logits.device, non_blocking=True))
    if isinstance(logits, TopK):
        # Only kept tokens are compared: another token would win only if the priors of all kept tokens were far higher.
        tokens = logits.log_probs - log_prior[logits.tokens]
        best, place = tokens.max(-1)
        tokens_best = logits.tokens.gather(-1, place[..., None])
        return replace(logits, log_blank=logits.log_blank - log_prior[0], log_probs=best[..., None], tokens=tokens_best)
    # The argmax needs no normalisation of the posterior.
    return _full(logits) - log_prior


def _dilate(mask: Tensor, n: int) -> Tensor:
    """``mask`` (B, T) extended by ``n`` frames to both sides, each row separately."""
    num = mask.size(1)
    n = min(n, num)
    before = torch.nn.functional.pad(mask.cumsum(1), (1, 0))  # (B, T + 1): how many are set in [0, t)
    t = torch.arange(num, device=mask.device)
    return before[:, (t + n + 1).clamp(max=num)] > before[:, (t - n).clamp(min=0)]


def _draw(
    candidates: Tensor, speech_frames: Tensor, ratio: float, generator: Optional[torch.Generator] = None
) -> Tensor:
    """Draw round(ratio · speech_frames) of the ``candidates`` (B, T) in each row, or all of them."""
    device = candidates.device
    where = device if generator is None else generator.device
    scores = torch.rand(candidates.shape, generator=generator, device=where).to(device, non_blocking=True)
    rank = scores.masked_fill(~candidates, torch.inf).argsort(1).argsort(1)
    # float64, so that the product rounds as Python's would.
    quota = (speech_frames.double() * ratio).round()
    return candidates & (rank < quota[:, None])


#: Seconds by which the lengths of two models may differ, because convolutions lose frames at an utterance's ends.
ENDS = 0.08
#: The pending length checks of all calls of :func:`align`.
_CHECK_LENGTHS = LateCheck()


def nearest_multiple(shift: float, other: float) -> float:
    """Ratio ``shift / other``, rounded to a half or whole number if it is within 1 % of one."""
    ratio = shift / other
    halves = round(ratio * 2) / 2
    return halves if halves and abs(ratio / halves - 1) < 0.01 else ratio


def align(
    logits: Posterior,
    hidden: dict[str, Tensor],
    lengths: Tensor,
    frame_shift: float,
    student_frames: int,
    student_lengths: Tensor,
    student_shift: float,
    *,
    blank_id: int = 0,
    pool: str = "least_blank",
    utt_ids: Sequence[str] = (),
) -> Tuple[Posterior, dict[str, Tensor], Tensor]:
    """Align a teacher's outputs with a student's frames.

    Student frame i covers the teacher frames [i·r, (i+1)·r), r = student_shift / frame_shift. The
    posterior is that of the covered frame with the lowest p(blank) (``least_blank``; a mean would blur CTC's spikes) or
    their ``mean``; hidden states are averaged. For r < 1 both are taken from the teacher frame in which the middle of
    the student frame lies.

    Args:
        logits: (B, T', V) teacher logits or log-probabilities, or a :class:`espnet_kd.topk.TopK`.
        hidden: tap name → (B, T', D).
        lengths: (B,) teacher frames.
        student_frames: T, the student's padded length.
        student_lengths: (B,) student frames.
        utt_ids: names for the message.

    Returns:
        logits (B, T, V), hidden {name: (B, T, D)}, lengths (B,): the frames that both have.

    Raises:
        ValueError: lengths differ by more than two frames of the slower rate and by more than 80 ms, which models may
            lose at the ends of an utterance; the message has both lengths. On a GPU a later call raises it, so that the
            host does not wait.
    """
    ratio = nearest_multiple(student_shift, frame_shift)
    # In units of teacher frames, so that the numbers are whole if the rates are equal.
    difference = (student_lengths * ratio - lengths).abs().max()
    _CHECK_LENGTHS(
        difference > max(2 * max(ratio, 1.0), ENDS / frame_shift) + 1e-6,
        lambda: (
            f"the lengths of teacher and student differ by more than two frames: teacher {lengths.tolist()} frames of "
            f"{frame_shift * 1000:g} ms, student {student_lengths.tolist()} frames of {student_shift * 1000:g} ms"
            + (f", in the batch of {', '.join(utt_ids)}" if utt_ids else "")
        ),
    )
    if ratio == 1:
        both = torch.minimum(student_lengths, lengths)
        return fit(logits, student_frames), {k: fit(h, student_frames) for k, h in hidden.items()}, both

    if not logits.size(1):  # no utterance has a frame: one of padding, because indices need something to point at
        logits, hidden = fit(logits, 1), {k: fit(h, 1) for k, h in hidden.items()}
    # In float64, in which the product with 2.4 is off by less than the 1e-9 below; in float32 it would pass a frame.
    start = torch.arange(student_frames, device=logits.device, dtype=torch.float64)
    if ratio < 1:
        covered = ((start + 0.5) * ratio + 1e-9).long()[:, None]  # (T, 1)
        inside = torch.ones_like(covered, dtype=torch.bool)
    else:
        first = torch.ceil(start * ratio - 1e-9).long()
        last = torch.ceil((start + 1) * ratio - 1e-9).long()  # exclusive
        covered = first[:, None] + torch.arange(math.ceil(ratio), device=logits.device)  # (T, K)
        inside = covered < last[:, None]
    inside = inside & (covered < lengths[:, None, None])  # (B, T, K)
    # A student frame counts only if it covers a teacher frame; with r = 1.5 the last may begin after the teacher's end.
    both = torch.minimum(student_lengths, inside.any(-1).sum(-1).to(student_lengths.dtype))
    covered = covered.clamp(max=logits.size(1) - 1)
    batch = torch.arange(logits.size(0), device=logits.device)[:, None]

    weights = inside / inside.sum(-1, keepdim=True).clamp(min=1)  # (B, T, K)
    hidden = {
        k: (h[:, covered].masked_fill(~inside[..., None], 0.0) * weights[..., None].to(h.dtype)).sum(2)
        for k, h in hidden.items()
    }
    if pool == "mean":
        if isinstance(logits, TopK):
            raise ValueError("pool: mean needs whole posteriors, and a target cache has the likeliest tokens alone")
        log_probs = logits.log_softmax(-1)[:, covered]  # (B, T, K, V)
        log_weights = weights.to(log_probs.dtype).log()[..., None]
        return torch.logsumexp((log_probs + log_weights).masked_fill(~inside[..., None], -torch.inf), 2), hidden, both
    best = _log_blank(logits, blank_id)[:, covered].masked_fill(~inside, torch.inf).argmin(-1)  # (B, T)
    chosen = covered.expand(logits.size(0), -1, -1).gather(2, best[..., None])[..., 0]  # (B, T)
    return logits[batch, chosen], hidden, both


@overload
def fit(x: Tensor, num_frames: int) -> Tensor: ...
@overload
def fit(x: Posterior, num_frames: int) -> Posterior: ...
def fit(x: Posterior, num_frames: int) -> Posterior:
    """Cut or zero-pad (B, T', …) to T frames; padding must lie outside the lengths, where it is never read."""
    if isinstance(x, TopK):
        return x.map(lambda y: fit(y, num_frames))
    if x.size(1) >= num_frames:
        return x[:, :num_frames]
    return torch.cat([x, x.new_zeros(x.size(0), num_frames - x.size(1), *x.shape[2:])], dim=1)
