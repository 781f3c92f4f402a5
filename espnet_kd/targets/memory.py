"""Targets of utterances that a teacher has processed, kept in memory by utterance id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from espnet_kd.backend import may_look
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.late import LateCheck

_CHECK_AUDIO = LateCheck()


@dataclass(frozen=True)
class _Row:
    """One utterance of a batch of targets; the batch is kept as it was computed."""

    batch: EncoderOutputs
    prints: Tensor
    index: int


class Memory:
    """Targets of up to ``size`` bytes. Each utterance keeps the targets of the first batch that it was in."""

    def __init__(self, size: float):
        self.size = self._room = size
        self._rows: Dict[Tuple[str, ...], _Row] = {}

    def clear(self) -> None:
        """Remove all targets."""
        self._rows.clear()
        self._room = self.size

    def recall(self, utt_ids: Sequence[str], taps: Sequence[str], prints: Tensor) -> Optional[EncoderOutputs]:
        """The targets of a batch, padded with 0, or None if some are not in memory.

        Args:
            utt_ids: B utterance ids.
            taps: hidden states that are wanted.
            prints: (B, 2), see :func:`fingerprints`.

        Raises:
            ValueError: an utterance has other audio than the first time. This is raised only on a GPU, and by a later
                call, so that the host does not wait; on a CPU the utterance counts as unknown.
        """
        rows = [row for utt_id in utt_ids if (row := self._rows.get((utt_id, *taps))) is not None]
        if len(rows) < len(utt_ids):
            return None
        first = rows[0].batch
        whole = len(rows) == len(first.lengths) and all(
            row.batch is first and row.index == i for i, row in enumerate(rows)
        )
        before = rows[0].prints if whole else torch.stack([row.prints[row.index] for row in rows])
        changed = (before != prints).any()
        if may_look(changed):
            if changed:
                return None
        else:
            _CHECK_AUDIO(changed, lambda: _message(utt_ids, before, prints))
        if whole:
            return first
        one = lambda get: _pad([get(row.batch)[row.index] for row in rows])  # noqa: E731
        return EncoderOutputs(
            one(lambda batch: batch.logits),
            torch.stack([row.batch.lengths[row.index] for row in rows]),
            first.frame_shift,
            {tap: one(lambda batch, tap=tap: batch.hidden[tap]) for tap in first.hidden},
            None if first.decoder is None else one(lambda batch: batch.decoder),
        )

    def remember(self, utt_ids: Sequence[str], taps: Sequence[str], prints: Tensor, outputs: EncoderOutputs) -> None:
        """Keep the targets of a batch if there is room for them."""
        new = [(i, key) for i, utt_id in enumerate(utt_ids) if (key := (utt_id, *taps)) not in self._rows]
        size = sum(x.nbytes for x in (outputs.logits, outputs.decoder, *outputs.hidden.values()) if x is not None)
        if new and size <= self._room:
            self._room -= size
            self._rows.update((key, _Row(outputs, prints, i)) for i, key in new)


def fingerprints(speech: Tensor, lengths: Tensor) -> Tensor:
    """A fingerprint (B, 2) of each utterance's audio: the sum of its bits, and its length.

    ``speech`` is (B, samples, …), with 0 in the padding, which therefore adds nothing. Nothing is copied to the host.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[speech.element_size()]
    bits = speech.detach().contiguous().view(whole).flatten(1)
    return torch.stack([bits.sum(1, dtype=torch.int64), lengths.to(torch.int64)], dim=1)


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _message(utt_ids: Sequence[str], before: Tensor, prints: Tensor) -> str:
    changed = [utt_id for utt_id, same in zip(utt_ids, (before == prints).all(1).tolist()) if not same]
    return (
        f"{', '.join(changed[:5])}: the audio differs from the audio whose targets are kept in memory: utterances of "
        "training and validation share an id, or change between epochs; give --teacher_memory 0"
    )
