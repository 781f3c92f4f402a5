"""Greedy CTC search: the best label of every frame, repeats merged, blanks dropped."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch

from espnet_kd import frames


def ctc_collapse(token_ids: torch.Tensor, blank_id: int = 0) -> List[int]:
    """Merge repeats, then drop blanks.

    Args:
        token_ids: (T,) integer label of every frame; T may be 0.
        blank_id: blank label.

    Raises:
        ValueError: ``token_ids`` is not one-dimensional.
    """
    if token_ids.dim() != 1:
        raise ValueError(f"token_ids must be (T,), not {tuple(token_ids.shape)}")
    merged = torch.unique_consecutive(token_ids)
    return merged[merged != blank_id].tolist()


def ctc_greedy(
    logits: torch.Tensor, lengths: torch.Tensor, blank_id: int = 0, drop: Sequence[int] = ()
) -> List[Tuple[List[int], float]]:
    """Greedy search over a batch.

    Args:
        logits: (B, T, V) logits or log-probabilities, on any device.
        lengths: (B,) frames that count; 0 is legal and gives an empty hypothesis.
        blank_id: blank label.
        drop: labels taken out after collapsing (ESPnet's <sos/eos>, which is not text).

    Returns:
        For each utterance (token ids, log-probability of the best path in nats).
    """
    best, ids = logits.float().max(dim=-1)
    frame_score = best - logits.float().logsumexp(dim=-1)
    inside = frames.valid(lengths.to(logits.device), logits.size(1))
    scores = frame_score.masked_fill(~inside, 0.0).sum(dim=1).tolist()
    ids, banned = ids.cpu(), set(drop)
    return [
        ([t for t in ctc_collapse(row[:n], blank_id) if t not in banned], score)
        for row, n, score in zip(ids, lengths.tolist(), scores)
    ]
