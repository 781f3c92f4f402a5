"""CTC prefix beam search without a lexicon, with or without an n-gram model of tokens (flashlight-text, KenLM)."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from flashlight.lib.text.decoder import CriterionType, LexiconFreeDecoder, LexiconFreeDecoderOptions, ZeroLM

from espnet_kd import frames
from espnet_kd.cli import UserError
from espnet_kd.inference.greedy import ctc_collapse
from espnet_kd.targets.nbest import Hypotheses

#: Distance to the best hypothesis (nats) above which others are pruned: only the beam prunes; -inf is still excluded.
_NO_THRESHOLD = 1e30
SPACE = "<space>"
#: Tokens that never occur in a text.
NO_TEXT = ("<blank>", "<unk>", "<sos/eos>", "<mask>", "")
#: Smallest share of the tokens that an n-gram model must contain.
LEAST_KNOWN = 0.5


class BeamSearch:
    """Finds the likeliest token sequences of each utterance; a sequence has the sum over all its alignments.

    The search is exact if the beam holds every sequence and ``beam_size_token`` every token; otherwise scores are lower
    bounds.
    With an n-gram model a score is log P(tokens | audio) in nats + ``ngram_weight`` · log10 P_ngram(<s> tokens </s>),
    the units of ESPnet's own n-gram scorer. Several threads may use one object,
    but the search holds Python's lock, so that they take turns (`espnet_kd.decode.beside` uses processes).
    """

    def __init__(
        self,
        tokens: Sequence[str],
        *,
        nbest: int,
        beam_size: int,
        beam_size_token: Optional[int] = None,
        blank_id: int = 0,
        drop: Sequence[int] = (),
        ngram_file: Union[str, Path, None] = None,
        ngram_weight: float = 0.9,
    ):
        """Build the search once for many utterances.

        Args:
            tokens: names of the V labels; only the n-gram model uses them.
            nbest: hypotheses wanted, at most ``beam_size``; fewer if the beam ends with fewer sequences.
            beam_size: hypotheses kept after each frame; a sequence with and without a final blank counts twice.
            beam_size_token: likeliest labels of a frame that are tried, blank included; None: all (slow if V is large).
            blank_id: blank label.
            drop: labels never hypothesised (ESPnet's <sos/eos>, which is not text). Their probability is lost.
            ngram_file: ARPA or KenLM's binary format, over ``tokens``.
            ngram_weight: factor of its log10 probabilities.

        Raises:
            ValueError: numbers out of range.
            UserError: the n-gram model cannot be read, or lacks most of the tokens.
        """
        if not 1 <= nbest <= beam_size:
            raise ValueError(f"want 1 <= nbest <= beam_size, not {nbest} and {beam_size}")
        if beam_size_token is not None and beam_size_token < 1:
            raise ValueError(f"beam_size_token is {beam_size_token}; it must be 1 or more")
        # Dropped labels are removed from the matrix: with a low score they could still fill free places of a beam.
        self._kept = [v for v in range(len(tokens)) if v == blank_id or v not in set(drop)]
        self._blank = self._kept.index(blank_id)
        self.vocabulary, self._nbest = len(tokens), nbest
        # Keep a reference here, because the decoder has none of its own.
        self._lm = load_ngram(ngram_file, [tokens[v] for v in self._kept], self._blank) if ngram_file else ZeroLM()
        options = LexiconFreeDecoderOptions(
            beam_size=beam_size,
            beam_size_token=min(beam_size_token or len(self._kept), len(self._kept)),
            beam_threshold=_NO_THRESHOLD,
            lm_weight=ngram_weight if ngram_file else 0.0,
            sil_score=0.0,
            log_add=True,
            criterion_type=CriterionType.CTC,
        )
        # Blank is passed as "silence", on which the decoder starts and ends: another token would be lost at the start.
        self._decoder = LexiconFreeDecoder(options, self._lm, self._blank, self._blank, [])
        self._lock = threading.Lock()

    def __call__(self, log_probs: torch.Tensor, lengths: torch.Tensor) -> List[Hypotheses]:
        """Search a batch.

        Args:
            log_probs: (B, T, V) log-probabilities (not logits: the scores are sums of them), on any device.
            lengths: (B,) frames that count; 0 is legal and gives one empty hypothesis.

        Returns:
            For each utterance the distinct token sequences as (score, token ids), best first.

        Raises:
            ValueError: shapes that don't fit.
            FloatingPointError: NaN inside the lengths.
        """
        check_batch(log_probs, lengths, self.vocabulary)
        emissions = log_probs[..., self._kept].to("cpu", torch.float32).contiguous()
        return [self._search(rows[:n]) for rows, n in zip(emissions, lengths.tolist())]

    def _search(self, emissions: torch.Tensor) -> Hypotheses:
        """Search one utterance (T, V), contiguous."""
        with self._lock:
            found = self._decoder.decode(emissions.data_ptr(), *emissions.shape)
            alignments = [(h.tokens, h.score) for h in found]
        merged: Dict[Tuple[int, ...], float] = {}
        for labels, score in alignments:
            ids = tuple(self._kept[i] for i in ctc_collapse(torch.tensor(labels), self._blank))
            merged[ids] = float(np.logaddexp(merged.get(ids, -math.inf), score))
        ranked = sorted(merged.items(), key=lambda item: -item[1])
        return [(score, list(ids)) for ids, score in ranked[: self._nbest] if score > -math.inf]


def load_ngram(ngram_file: Union[str, Path], tokens: Sequence[str], unknown: int):
    """Load a KenLM model whose words are ``tokens``; ``unknown`` is the index of one that it cannot have (blank).

    Raises:
        UserError: KenLM is missing, the file cannot be read, or the model has other words.
    """
    from flashlight.lib.text.dictionary import Dictionary

    try:
        from flashlight.lib.text.decoder.kenlm import KenLM
    except ImportError as e:
        raise UserError(
            f"--ngram_file needs KenLM, which this flashlight-text lacks ({e}); pip install a wheel of flashlight-text"
        ) from e
    try:
        lm = KenLM(str(ngram_file), Dictionary(list(tokens)))
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
        raise UserError(f"cannot read the n-gram model {ngram_file}: {reason[0]}; give ARPA or KenLM's format") from e
    scores = [lm.score(lm.start(False), i)[1] for i in range(len(tokens))]
    strange = [t for t, score in zip(tokens, scores) if score == scores[unknown] and t not in NO_TEXT]
    known = sum(t not in NO_TEXT for t in tokens) - len(strange)
    # A model of words also has a few of the tokens, such as "a" and "i". It is detected because it lacks most tokens,
    # or the space token, which is never a word.
    if known < LEAST_KNOWN * (known + len(strange)) or SPACE in strange:
        raise UserError(
            f"the n-gram model {ngram_file} has {known} of the model's {known + len(strange)} tokens (not "
            f"{', '.join(strange[:4])}, …); is it a model of words? Train it on text split into tokens"
        )
    return lm


def check_batch(log_probs: torch.Tensor, lengths: torch.Tensor, vocabulary: int) -> None:
    """Refuse (B, T, V) log-probabilities and (B,) lengths that cannot be searched.

    Raises:
        ValueError: shapes that don't fit each other or ``vocabulary``.
        FloatingPointError: NaN inside the lengths.
    """
    if log_probs.dim() != 3 or lengths.shape != log_probs.shape[:1] or log_probs.size(2) != vocabulary:
        raise ValueError(f"want (B, T, {vocabulary}) and (B,), not {tuple(log_probs.shape)} and {tuple(lengths.shape)}")
    batch, time, _ = log_probs.shape
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= time:
        raise ValueError(f"lengths must be within 0…{time}: {lengths.tolist()}")
    inside = frames.valid(lengths.to(log_probs.device), time)
    if log_probs.isnan().any(dim=-1)[inside].any():
        raise FloatingPointError("NaN among the log-probabilities")
