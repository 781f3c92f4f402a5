"""What a step needs beside its batch, read and laid out where ESPnet loads its data: in the data loader's workers.

A worker prepares batches while the training process computes, and its failures end the training. With a batch come what
a target cache holds of it, and as Python's numbers the lengths of its labels, which to ask a GPU for would be a wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Collection, Dict, List, Optional, Protocol, Sequence, Tuple

from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.topk import TopK

BROUGHT = "kd"  #: its name in a batch
#: A part of the training: begin and end as shares of it, and the taps that it reads; None where it reads no targets.
Part = Tuple[float, float, Optional[Tuple[str, ...]]]
Loaded = Tuple[List[str], Dict[str, Any]]


class Epochs(Protocol):
    """Where a training stands (:class:`espnet_kd.distill.schedule.Progress`)."""

    epoch: int  #: from 1
    max_epoch: int


@dataclass
class Loading:
    """ESPnet's ``collate_fn``, and beside what that gives an entry ``BROUGHT`` (see :class:`Brought`).

    Args:
        collate: ESPnet's own.
        parts: of the training; of validation the one that counts.
        progress: whose epoch it is, when the workers of an epoch are started; a step may read less than its epoch.
    """

    collate: Callable[[Collection[Any]], Loaded]
    teacher: Optional[CachedTeacher]
    parts: Sequence[Part]
    progress: Epochs

    def __call__(self, data: Collection[Any]) -> Loaded:
        """Utterance ids and the batch, of what the data set gives of each utterance."""
        utt_ids, batch = self.collate(data)
        brought: Dict[str, Any] = {}
        if "text_lengths" in batch:
            brought["text_lengths"] = batch["text_lengths"].tolist()
        taps = self._taps()
        if self.teacher is not None and taps is not None:
            try:
                brought["targets"] = to_plain(self.teacher.read(utt_ids, taps))
            except UserError as e:  # raised by the step: an exception of a worker comes with the worker's traceback
                brought["fault"] = str(e)
        return utt_ids, {**batch, BROUGHT: brought}

    def _taps(self) -> Optional[Tuple[str, ...]]:
        """What this epoch reads."""
        epoch, epochs = self.progress.epoch, max(self.progress.max_epoch, 1)
        begin, end = (epoch - 1) / epochs, epoch / epochs
        now = [taps for b, e, taps in self.parts if b < end and e > begin and taps is not None]
        return tuple(sorted({tap for taps in now for tap in taps})) if now else None


class Brought:
    """What came with a batch; nothing, where it was not loaded by :class:`Loading`."""

    def __init__(self, content: Optional[Dict[str, Any]] = None):
        self._content = content or {}

    def label_counts(self, batch_size: int) -> Optional[List[int]]:
        """The labels of each of ``batch_size`` utterances; None where they are not at hand."""
        counts = self._content.get("text_lengths")
        # Of a batch that torch's DataParallel has cut into parts they are the whole batch's.
        return counts if counts is not None and len(counts) == batch_size else None

    def targets(self, taps: Sequence[str]) -> Optional[EncoderOutputs]:
        """The cached targets; None where these were not read, or not with these taps.

        Raises:
            UserError: they could not be read.
        """
        if "fault" in self._content:
            raise UserError(self._content["fault"])
        plain = self._content.get("targets")
        return from_plain(plain) if plain is not None and set(taps) <= plain["hidden"].keys() else None


def to_plain(targets: EncoderOutputs) -> Dict[str, Any]:
    """Cached targets as a dictionary of tensors and numbers, which loader, pinning and ESPnet's ``to_device`` know."""
    x = targets.logits
    assert isinstance(x, TopK)
    return {
        "log_blank": x.log_blank, "tokens": x.tokens, "log_probs": x.log_probs, "num_tokens": x.num_tokens,
        "norms": dict(x.norms), "lengths": targets.lengths, "frame_shift": targets.frame_shift,
        "hidden": dict(targets.hidden),
    }  # fmt: skip


def from_plain(plain: Dict[str, Any]) -> EncoderOutputs:
    """The inverse of :func:`to_plain`."""
    names = ("log_blank", "tokens", "log_probs", "num_tokens", "norms")
    hidden: Dict[str, Tensor] = plain["hidden"]
    return EncoderOutputs(TopK(*(plain[n] for n in names)), plain["lengths"], plain["frame_shift"], hidden)
