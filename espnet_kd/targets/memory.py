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
    """One utterance of a batch of targets, which is kept as it was computed."""

    batch: EncoderOutputs
    prints: Tensor
    index: int


class Memory:
    """Targets of up to ``size`` bytes. An utterance that comes with another batch keeps those of its first one."""

    def __init__(self, size: float):
        self.size = self._room = size
        self._rows: Dict[Tuple[str, ...], _Row] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._room = self.size

    def recall(self, utt_ids: Sequence[str], taps: Sequence[str], prints: Tensor) -> Optional[EncoderOutputs]:
        """The targets of a batch, padded with 0, or None where they are not all known.

        Args:
            utt_ids: B names.
            taps: hidden states that are wanted.
            prints: (B, 2), see :func:`fingerprints`.

        Raises:
            ValueError: an utterance has other audio than the first time. Only on a GPU, where looking at once would be
                a wait, and by a later call; on a CPU the utterance counts as unknown.
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
        """Keep the targets of a batch, where there is room for them."""
        new = [(i, key) for i, utt_id in enumerate(utt_ids) if (key := (utt_id, *taps)) not in self._rows]
        size = sum(x.nbytes for x in (outputs.logits, outputs.decoder, *outputs.hidden.values()) if x is not None)
        if new and size <= self._room:
            self._room -= size
            self._rows.update((key, _Row(outputs, prints, i)) for i, key in new)


def fingerprints(speech: Tensor, lengths: Tensor) -> Tensor:
    """(B, 2) of what must be the same for targets to be: a sum of each utterance's bits, and its length.

    ``speech`` is (B, samples, …), and 0 behind the lengths: padding adds nothing. Nothing is copied to the host.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[speech.element_size()]
    bits = speech.detach().contiguous().view(whole).flatten(1)
    return torch.stack([bits.sum(1, dtype=torch.int64), lengths.to(torch.int64)], dim=1)


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _message(utt_ids: Sequence[str], before: Tensor, prints: Tensor) -> str:
    changed = [utt_id for utt_id, same in zip(utt_ids, (before == prints).all(1).tolist()) if not same]
    return (
        f"{', '.join(changed[:5])}: not the audio of which the teacher's targets are kept: utterances of training "
        "and validation share an id, or come in chunks, or change from epoch to epoch; give --teacher_memory 0"
    )
