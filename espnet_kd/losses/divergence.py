"""Frame-level distances between whole posteriors: the Kullback–Leibler divergence, its variants, and L2."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.backend import backend_of
from espnet_kd.losses.common import Counted, check_vocabularies, cross, full_precision, pick
from espnet_kd.topk import Posterior, TopK, in_buckets, kept_probabilities


def kl(
    student_logits: Tensor,
    teacher_logits: Posterior,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """KL(p‖q), summed over V and averaged over the frames that count.

    Args:
        student_logits: (B, T, V), or log-probabilities.
        teacher_logits: (B, T, V), or a :class:`espnet_kd.topk.TopK`; no gradient flows to it.
        lengths: (B,) frames.
        blank_id: index of blank; it changes nothing here, but every loss takes it.
        temperature: τ > 0 for both; not followed by a factor τ².
        frames: (B, T) bool narrowing the valid frames.

    Returns:
        scalar, in nats per frame; 0 with a gradient path when no frame counts.

    Source: the softmax-level baseline of every paper here.
    """
    check_vocabularies(student_logits, teacher_logits)
    of_teacher = teacher_logits.log_blank if isinstance(teacher_logits, TopK) else teacher_logits
    if backend_of(student_logits, of_teacher) == "fused":
        from espnet_kd.losses import fused

        return fused.kl(student_logits, teacher_logits, lengths, frames, blank_id, temperature)
    counted = Counted.of(student_logits, teacher_logits, lengths, frames)
    student, teacher = pick(student_logits, teacher_logits, counted)
    return counted.mean(_kl_rows(student, teacher, temperature), student_logits)


def softmax_l2(
    student_logits: Tensor,
    teacher_logits: Posterior,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """Σ_k (p(k) − q(k))², averaged over the frames that count. It is bounded by 2, and stable on peaky posteriors.

    Arguments and result as in :func:`espnet_kd.losses.kl`, but without unit.

    Source: TutorNet, arXiv 2008.00671, and Inter-KD, arXiv 2211.15075 (the papers), at τ = 1.
    """
    del blank_id
    check_vocabularies(student_logits, teacher_logits)
    counted = Counted.of(student_logits, teacher_logits, lengths, frames)
    student, teacher = pick(student_logits, teacher_logits, counted)
    q = (full_precision(student) / temperature).softmax(-1)
    if isinstance(teacher, TopK):
        # The tokens of the remainder count as p = 0, because the probability of each is not known.
        p, tokens = kept_probabilities(teacher, temperature)
        at_tokens = (p.square() - 2 * p * q.gather(1, tokens)).sum(-1)
        return counted.mean(q.square().sum(-1) + at_tokens, student_logits)
    p = (full_precision(teacher) / temperature).softmax(-1)
    return counted.mean((p - q).square().sum(-1), student_logits)


def delayed_kl(
    student_logits: Tensor,
    teacher_logits: Posterior,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
    max_delay: int = 4,
) -> Tensor:
    """KL of a streaming student with late outputs: per utterance the least mean_t KL(p_t‖q_{t+d}) over all delays d.

    The mean is over the frames t that count and have t + d inside the utterance. Utterances are then averaged, each
    weighted by its frames that count (whatever its delay), so that ``max_delay`` 0 is :func:`espnet_kd.losses.kl`.
    Gradient flows through the chosen delay only; if several delays are equally good, the shortest is chosen.

    Args:
        frames: (B, T) bool narrowing the valid frames t.
        max_delay: the largest delay d, in frames; delays that leave an utterance no frame are not considered for it.
        others: as in :func:`espnet_kd.losses.kl`.

    Raises:
        ValueError: ``max_delay`` is not a whole number of at least 0.

    Source: the idea is Delayed-KD's, arXiv 2505.22069; one delay per utterance is reconstruction.
    """
    del blank_id
    if not isinstance(max_delay, int) or max_delay < 0:
        raise ValueError(f"max_delay must be a whole number of frames, at least 0, not {max_delay!r}")
    check_vocabularies(student_logits, teacher_logits)
    everywhere = Counted.of(student_logits, teacher_logits, lengths, frames).mask
    lengths = lengths.to(everywhere.device, non_blocking=True)

    def after(delay: Tensor) -> Tuple[Counted, Tensor]:
        """The teacher's frames t that count and have t + delay inside, and their KL (N,)."""
        counted = Counted(everywhere & fr.valid(lengths - delay, everywhere.size(1)))
        student, teacher = counted.take(student_logits, delay), counted.take(teacher_logits.detach())
        return counted, _kl_rows(student, teacher, temperature)

    chosen, least = torch.zeros_like(lengths), torch.full_like(lengths, torch.inf, dtype=torch.float64)
    with torch.no_grad():  # choosing the delay first keeps the autograd graph of only one delay
        for d in range(max_delay + 1):
            delay = torch.full_like(lengths, d)
            counted, rows = after(delay)
            average = counted.spread(rows.double()).sum(1) / counted.mask.sum(1)  # NaN is never less
            chosen = torch.where(average < least, delay, chosen)
            least = torch.where(average < least, average, least)
    counted, rows = after(chosen)
    # The mean below weights an utterance by the frames that its delay leaves; these weights restore its own count.
    counts, left = everywhere.sum(1).double(), counted.mask.sum(1).double()
    weight = ((counts / counts.sum()) / (left / left.sum())).to(rows.dtype)
    return counted.mean(rows * counted.take(weight[:, None].expand_as(everywhere)), student_logits)


def consistency(
    first_logits: Tensor,
    second_logits: Tensor,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """½ (KL(sg p₂‖p₁) + KL(sg p₁‖p₂)): each of two views of the same utterances is a target for the other.

    Args:
        first_logits, second_logits: (B, T, V), or log-probabilities; gradient flows to both, each as a student.
        others: as in :func:`espnet_kd.losses.kl`.

    Source: CR-CTC, Yao et al., ICLR 2025 (the paper); the mean over frames is the convention here.
    """
    first = kl(first_logits, second_logits, lengths, blank_id=blank_id, temperature=temperature, frames=frames)
    second = kl(second_logits, first_logits, lengths, blank_id=blank_id, temperature=temperature, frames=frames)
    return 0.5 * (first + second)


def _kl_rows(student: Tensor, teacher: Posterior, temperature: float) -> Tensor:
    """(N,) KL of (N, V) rows; for cached targets over their buckets (:func:`espnet_kd.topk.in_buckets`)."""
    if isinstance(teacher, TopK):
        log_p, log_q = in_buckets(full_precision(student), teacher, temperature)
    else:
        log_p, log_q = ((full_precision(x) / temperature).log_softmax(-1) for x in (teacher, student))
    return cross(log_p, log_p, log_q).sum(-1)
