"""A teacher whose outputs are read from its target cache (see ``cache.py``); the model does not run."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines
from espnet_kd.frames import valid
from espnet_kd.inference.encode import FEATURE_RATE, EncoderOutputs
from espnet_kd.targets.cache import (
    MEND,
    TOKENS,
    IndexEntry,
    PathLike,
    ark_names,
    hash_tokens,
    read_arrays,
    read_index,
    read_manifest,
    shard_dir,
)
from espnet_kd.targets.nucleus import unpack_targets
from espnet_kd.targets.teacher import Needs
from espnet_kd.topk import TopK


class CachedTeacher:
    """Targets from a cache, in place of a teacher that runs (see :class:`espnet_kd.targets.teacher.Teacher`).

    The index is kept in memory, about 80 bytes per utterance; arrays are read when a batch needs them.

    Raises:
        UserError: there is no cache, or it is unfinished or damaged.
    """

    def __init__(self, cache: PathLike):
        self.path = Path(cache)
        self.manifest = read_manifest(cache)
        self.policy = self.manifest.policy
        if not self.manifest.counts:
            raise UserError(f"the target cache {cache} is not finished; run the same asr_kd_cache command again")
        self.name = f"{self.manifest.teacher} (cached in {cache})"
        there = (self.path / TOKENS).is_file()
        self.token_list = [line for _, line in iter_lines(self.path / TOKENS)] if there else []
        if hash_tokens(self.token_list) != self.manifest.tokens_sha256:
            raise UserError(f"{self.path / TOKENS} is not the list that this cache was made with; {MEND}")
        self.sampling_rate, self.frame_shift = self.manifest.sampling_rate, self.manifest.frame_shift
        self.device = torch.device("cpu")
        # Packed shard by shard, because as Python objects the index would need several times as much memory.
        ids: List[np.ndarray] = []
        numbers = array("q")
        for number in range(self.manifest.shards):
            entries = list(read_index(shard_dir(cache, number), self.manifest))
            ids.append(np.array([e.utt_id.encode() for e in entries], dtype=np.bytes_))
            for e in entries:
                numbers.extend((number, e.frames, e.rows, e.crc, *(-1 if o is None else o for o in e.offsets)))
        found = sum(map(len, ids))
        if found != self.manifest.counts["utterances"]:
            raise UserError(
                f"{cache} has {found} utterances and its manifest counts {self.manifest.counts['utterances']}; {MEND}"
            )
        self._ids = np.concatenate(ids)  # sorted, because asr_kd_cache cuts a sorted list into shards
        self._numbers = np.frombuffer(numbers, dtype=np.int64).reshape(found, -1)

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return self.manifest.hidden_size

    def __contains__(self, utt_id: object) -> bool:
        return isinstance(utt_id, str) and self._find(utt_id) is not None

    def check(self, needed: Needs) -> None:
        """Refuse a method that needs outputs which the cache does not have (:class:`UserError`)."""
        if missing := self.policy.lacks(needed):
            raise UserError(
                f"the target cache {self.path} has no {', no '.join(missing)}; make one for this method: asr_kd_cache "
                "--kd_config"
            )

    def state_dict(self) -> Dict[str, Tensor]:
        """Refused (:class:`UserError`): a cache has no parameters."""
        raise UserError(
            f"this method is initialised with the teacher's parameters, and {self.path} has only its outputs; leave "
            "--target_cache out, and give --teacher EXP"
        )

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device."""
        self.device = fn(torch.zeros((), device=self.device)).device

    def probe(self, speech: Tensor, speech_lengths: Tensor) -> EncoderOutputs:
        """Number of frames, computed from the frame shift; logits are 0."""
        rate = FEATURE_RATE if speech.dim() == 3 else self.sampling_rate  # (B, T, D): features
        frames = (speech_lengths / rate / self.frame_shift).long()
        empty = speech.new_zeros(len(frames), int(frames.max()), 1)
        return EncoderOutputs(empty, frames, self.frame_shift)

    def targets(
        self,
        utt_ids: Sequence[str],
        speech: Tensor,
        speech_lengths: Tensor,
        taps: Sequence[str] = (),
        text: Optional[Tensor] = None,
        text_lengths: Optional[Tensor] = None,
    ) -> EncoderOutputs:
        """The targets of a batch, found by ``utt_ids``; the audio is not used.

        Raises:
            UserError: an utterance is missing or damaged.
        """
        found = self.read(utt_ids, taps)
        if self.device.type == "cpu":
            return found
        logits = found.logits.map(lambda x: x.to(self.device))
        hidden = {tap: h.to(self.device) for tap, h in found.hidden.items()}
        return EncoderOutputs(logits, found.lengths.to(self.device), found.frame_shift, hidden)

    def read(self, utt_ids: Sequence[str], taps: Sequence[str] = ()) -> EncoderOutputs:
        """The targets of a batch on the CPU (:class:`UserError`: an utterance is missing or damaged)."""
        each = [self._read(utt_id) for utt_id in utt_ids]
        lengths = torch.tensor([len(arrays[0]) for arrays in each])
        logits = pad_frames(self._unpack(utt_ids, each), lengths)
        hidden = {}
        for tap in set(taps):
            place = len(ark_names(self.policy)) - len(self.policy.taps) + self.policy.taps.index(tap)
            states = [torch.from_numpy(arrays[place]) for arrays in each]
            # An utterance without frames has no array, and therefore no width.
            states = [h if len(h) else h.new_zeros(0, self.hidden_size) for h in states]
            hidden[tap] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return EncoderOutputs(logits, lengths, self.frame_shift, hidden)

    def _find(self, utt_id: str) -> Optional[int]:
        key = utt_id.encode()
        if len(key) > self._ids.itemsize:
            return None  # not in the list; searchsorted would copy all ids to the longer type
        i = int(np.searchsorted(self._ids, key))
        return i if i < len(self._ids) and self._ids[i] == key else None

    def _read(self, utt_id: str) -> List[np.ndarray]:
        """The arrays of an utterance."""
        shard, entry = self._entry(utt_id)
        return read_arrays(shard, self.policy, entry)

    def _entry(self, utt_id: str) -> Tuple[Path, IndexEntry]:
        """The shard and the index entry of an utterance."""
        i = self._find(utt_id)
        if i is None:
            raise UserError(f"utterance '{utt_id}' is not in the target cache {self.path}; make it for this data")
        number, frames, rows, crc, *offsets = (int(n) for n in self._numbers[i])
        entry = IndexEntry(utt_id, frames, rows, crc, tuple(None if o < 0 else o for o in offsets))
        return shard_dir(self.path, number), entry

    def _unpack(self, utt_ids: Sequence[str], each: Sequence[List[np.ndarray]]) -> TopK:
        """The frames of all utterances, one after another."""
        try:
            return unpack_targets(each, self.policy, self.manifest.num_tokens)
        except ValueError as e:
            if len(each) > 1:
                for utt_id, arrays in zip(utt_ids, each):  # find the damaged utterance
                    self._unpack([utt_id], [arrays])
            raise UserError(
                f"{self._entry(utt_ids[0])[0]}: the targets of '{utt_ids[0]}' are damaged ({e}); {MEND}"
            ) from e


def pad_frames(x: TopK, lengths: Tensor) -> TopK:
    """Arrange frames of utterances, given one after another, as a batch (B, T, k); in padding p(blank) is 1.

    k is a multiple of 16, or all tokens, because on a GPU a kernel is compiled for each different size.
    """
    k = x.tokens.size(-1)
    wide = max(min(-(-k // 16) * 16, x.num_tokens - 1), k)
    inside = valid(lengths, int(lengths.max()))

    def spread(values: Tensor, fill: float) -> Tensor:
        out = values.new_full((*inside.shape, *([wide] if values.dim() > 1 else [])), fill)
        if values.dim() > 1:
            out[..., :k][inside] = values
        else:
            out[inside] = values
        return out

    norms = {tau: spread(norm, 0.0) for tau, norm in x.norms.items()}
    return TopK(spread(x.log_blank, 0.0), spread(x.tokens, 0), spread(x.log_probs, -torch.inf), x.num_tokens, norms)
