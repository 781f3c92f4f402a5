"""Cached targets and label lengths, loaded in the workers of ESPnet's data loader together with each batch.

A worker prepares batches while the training process computes; an error in it ends the training. The label lengths come
as Python numbers, because reading them from a GPU would make the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Collection, Dict, List, Optional, Protocol, Sequence, Tuple

from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.topk import TopK

BROUGHT = "kd"  #: key of this module's entry in a batch
#: A part of the training: begin and end as shares of the whole, and the taps that it needs (None: no targets).
ReadPart = Tuple[float, float, Optional[Tuple[str, ...]]]
Loaded = Tuple[List[str], Dict[str, Any]]


class Epochs(Protocol):
    """The current position of a training (:class:`espnet_kd.distill.schedule.Progress`)."""

    epoch: int  #: from 1
    max_epoch: int


@dataclass
class Loading:
    """ESPnet's ``collate_fn``, whose batches get a further entry ``BROUGHT`` (see :class:`Brought`).

    Args:
        collate: ESPnet's ``collate_fn``.
        parts: all parts of the training; for validation the last one.
        progress: has the epoch when the workers are started; they load all targets that a step of the epoch may need.
    """

    collate: Callable[[Collection[Any]], Loaded]
    teacher: Optional[CachedTeacher]
    parts: Sequence[ReadPart]
    progress: Epochs

    def __call__(self, data: Collection[Any]) -> Loaded:
        """Return utterance ids and batch, made of the data set's entries."""
        utt_ids, batch = self.collate(data)
        brought: Dict[str, Any] = {}
        if "text_lengths" in batch:
            brought["text_lengths"] = batch["text_lengths"].tolist()
        taps = self._taps()
        if self.teacher is not None and taps is not None:
            try:
                brought["targets"] = to_plain(self.teacher.read(utt_ids, taps))
            except UserError as e:  # the step raises it, because a worker's exception would show a traceback
                brought["fault"] = str(e)
        return utt_ids, {**batch, BROUGHT: brought}

    def _taps(self) -> Optional[Tuple[str, ...]]:
        """The taps that this epoch needs."""
        epoch, epochs = self.progress.epoch, max(self.progress.max_epoch, 1)
        begin, end = (epoch - 1) / epochs, epoch / epochs
        now = [taps for b, e, taps in self.parts if b < end and e > begin and taps is not None]
        return tuple(sorted({tap for taps in now for tap in taps})) if now else None


class Brought:
    """The entry that :class:`Loading` adds to a batch; empty for a batch that was loaded without it."""

    def __init__(self, content: Optional[Dict[str, Any]] = None):
        self._content = content or {}

    def label_counts(self, batch_size: int) -> Optional[List[int]]:
        """The number of labels of each of ``batch_size`` utterances; None if they were not loaded."""
        counts = self._content.get("text_lengths")
        # If torch's DataParallel has cut a batch into parts, these are still the counts of the whole batch.
        return counts if counts is not None and len(counts) == batch_size else None

    def targets(self, taps: Sequence[str]) -> Optional[EncoderOutputs]:
        """The cached targets; None if they were not loaded, or not with these taps.

        Raises:
            UserError: they could not be read.
        """
        if "fault" in self._content:
            raise UserError(self._content["fault"])
        plain = self._content.get("targets")
        return from_plain(plain) if plain is not None and set(taps) <= plain["hidden"].keys() else None


def to_plain(targets: EncoderOutputs) -> Dict[str, Any]:
    """Cached targets as a dictionary of tensors and numbers, which data loader and ``to_device`` can handle."""
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
