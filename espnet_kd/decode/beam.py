"""CTC prefix beam search without a lexicon or language model (flashlight-text, through torchaudio)."""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torchaudio.models.decoder import ctc_decoder

from espnet_kd import frames

#: Nats below the best that are kept however far: the beam alone prunes. Finite, so that -inf never passes.
_NO_THRESHOLD = 1e30


def ctc_nbest(
    log_probs: torch.Tensor,
    lengths: torch.Tensor,
    *,
    nbest: int,
    beam_size: int,
    beam_size_token: Optional[int] = None,
    blank_id: int = 0,
    drop: Sequence[int] = (),
) -> List[List[Tuple[List[int], float]]]:
    """Search the likeliest token sequences of each utterance, all alignments of a sequence summed.

    Exact where the beam holds every sequence and ``beam_size_token`` every token; otherwise a score is a lower bound.

    Args:
        log_probs: (B, T, V) log-probabilities (not logits: the scores are sums of them), on any device.
        lengths: (B,) frames that count; 0 is legal and gives one empty hypothesis of score 0.
        nbest: hypotheses wanted, at most ``beam_size``; fewer come where the beam ends in fewer sequences.
        beam_size: hypotheses kept after each frame; one that ends in a blank and one that doesn't are two.
        beam_size_token: likeliest labels of a frame that are tried, blank included; None: all (slow if V is large).
        blank_id: blank label.
        drop: labels never hypothesised (ESPnet's <sos/eos>, which is no text). Their probability is lost, not shared.

    Returns:
        For each utterance, best first, (token ids, log-probability in nats) of distinct token sequences.

    Raises:
        ValueError: shapes that don't fit, or numbers out of range.
        FloatingPointError: NaN inside the lengths.
    """
    if log_probs.dim() != 3 or lengths.shape != log_probs.shape[:1]:
        raise ValueError(f"want (B, T, V) and (B,), not {tuple(log_probs.shape)} and {tuple(lengths.shape)}")
    if not 1 <= nbest <= beam_size:
        raise ValueError(f"want 1 <= nbest <= beam_size, not {nbest} and {beam_size}")
    if beam_size_token is not None and beam_size_token < 1:
        raise ValueError(f"beam_size_token is {beam_size_token}; it must be 1 or more")
    batch, time, vocabulary = log_probs.shape
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= time:
        raise ValueError(f"lengths must be within 0…{time}: {lengths.tolist()}")
    inside = frames.valid(lengths.to(log_probs.device), time)
    if log_probs.isnan().any(dim=-1)[inside].any():
        raise FloatingPointError("NaN among the log-probabilities")
    # Dropped labels leave the matrix: a low score instead could still fill a beam that has room.
    kept = [v for v in range(vocabulary) if v == blank_id or v not in set(drop)]
    emissions = log_probs[..., kept].to("cpu", torch.float32).contiguous()
    decoder = ctc_decoder(
        lexicon=None,
        tokens=[str(v) for v in kept],
        nbest=beam_size,
        beam_size=beam_size,
        beam_size_token=min(beam_size_token or len(kept), len(kept)),
        beam_threshold=_NO_THRESHOLD,
        lm_weight=0.0,
        log_add=True,
        blank_token=str(blank_id),
        # The decoder starts and ends on "silence": any other token would be swallowed at the start of a text.
        sil_token=str(blank_id),
        sil_score=0.0,
    )
    result = []
    for found in decoder(emissions, lengths.cpu()):
        merged: Dict[Tuple[int, ...], float] = {}
        for hypothesis in found:
            ids = tuple(kept[i] for i in hypothesis.tokens.tolist())
            merged[ids] = float(np.logaddexp(merged.get(ids, -math.inf), hypothesis.score))
        ranked = sorted(merged.items(), key=lambda item: -item[1])
        result.append([(list(ids), score) for ids, score in ranked[:nbest] if score > -math.inf])
    return result
