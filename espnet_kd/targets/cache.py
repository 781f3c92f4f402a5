"""Targets on disk: what a teacher said of each utterance, kept small and read lazily.

A cache is a directory::

    manifest.json        teacher, policy, frame shift, counts
    tokens.txt           the teacher's tokens
    shard.00000/         a few hundred utterances, whole or absent
      utterances         whose targets these are, and the sizes of the arks in bytes; then 'id frames rows checksum' a
                         line, sorted
      blank.ark .scp     (T,) log p(blank) of every frame; with more temperatures (T, 1 + n): log Σ p^(1/τ) beside it
      tokens.ark .scp    (N, 1 + k): the frame and k token ids, of the frames that have them; 16 bits a number
      log_probs.ark .scp (N, k) their log-probabilities; 16 bits a number, scaled by the utterance's range
      encoder.3.ark .scp (T, D) hidden states of a tap, in Kaldi's 8-bit compression

The arks are Kaldi's, so that other tools read them. Files that are missing, cut or of another cache are found when the
cache is opened. Every array is checked against its checksum when it is read: flipped bytes stop training instead of
teaching something else. The command that made a cache, given again, checks it all and makes what is damaged anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines
from espnet_kd.strict import check_type, parameters
from espnet_kd.targets.encode import FEATURE_RATE, EncoderOutputs
from espnet_kd.targets.teacher import Needs
from espnet_kd.topk import TopK

PathLike = Union[str, Path]
FORMAT = 2
MEND = "make it again with the same asr_kd_cache command"
MANIFEST, TOKENS, INDEX = "manifest.json", "tokens.txt", "utterances"
COUNTS = ("utterances", "frames", "rows", "bytes")
ROWS = ("tokens", "log_probs")  #: arks that have a row for each frame with tokens; of none where there is none
#: Least log-probability that is kept, in nats: with 16 bits a number its error stays below 0.0005.
_FLOOR = -60.0


@dataclass(frozen=True)
class Policy:
    """What is kept of each frame; a page decides."""

    top_k: int  #: tokens of a frame, blank apart
    tokens_on: str = "nonblank"  #: frames that have them: ``nonblank`` or ``all``
    temperatures: Tuple[float, ...] = ()  #: other than 1 at which the posterior is exact
    taps: Tuple[str, ...] = ()  #: hidden states

    def lacks(self, needed: Needs) -> List[str]:
        """What ``needed`` has beyond this one, in words."""
        found = []
        if needed.tokens_on == "all" and self.tokens_on != "all":
            found.append("tokens on all frames (it has those of non-blank frames)")
        found += [f"temperature {tau:g}" for tau in needed.temperatures if tau not in self.temperatures]
        found += [f"tap {tap}" for tap in needed.taps if tap not in self.taps]
        return found


@dataclass(frozen=True)
class Manifest:
    """What a cache says of itself."""

    teacher: str
    teacher_sha256: str  #: of the model file
    config_sha256: str  #: of its config.yaml
    tokens_sha256: str
    num_tokens: int
    frame_shift: float  #: seconds
    sampling_rate: float  #: Hz
    hidden_size: int
    policy: Policy
    data: str  #: hash of the utterances it was made from
    shards: int
    counts: Dict[str, int]  #: utterances, frames, rows, bytes; empty while it is being made
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """Short hash of what decides the targets; every shard bears it."""
        decisive = replace(self, teacher="", counts={})  # the teacher's path may be spelled in any way
        return hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """As in manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_manifest(cache: PathLike) -> Manifest:
    """Read a cache's manifest.

    Raises:
        UserError: no cache, a damaged one, or one of another format.
    """
    path = Path(cache) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {content.get('format')}, not {FORMAT}; make the cache anew: asr_kd_cache --force"
            )
        if content["shards"] < 1 or set(content["counts"]) not in (set(), set(COUNTS)):
            raise ValueError("wrong shards or counts")
        policy = content.pop("policy")
        for kind, found in ((Policy, policy), (Manifest, content)):
            for name, hint in parameters(kind).items():
                if name in found:
                    check_type(found[name], hint, f"{path} is damaged: {name}")
        policy = Policy(**{k: tuple(v) if isinstance(v, list) else v for k, v in policy.items()})
        return Manifest(policy=policy, **content)
    except FileNotFoundError as e:
        raise UserError(f"{cache} is no target cache: it has no {MANIFEST}; asr_kd_cache makes one") from e
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}); make the cache anew: asr_kd_cache --force"
        ) from e


def shard_dir(cache: PathLike, number: int) -> Path:
    """Directory of a shard."""
    return Path(cache) / f"shard.{number:05d}"


def checksum(arrays: Sequence[np.ndarray]) -> int:
    """CRC-32 of arrays' shapes and values."""
    crc = 0
    for x in arrays:
        crc = zlib.crc32(repr(x.shape).encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(x), crc)
    return crc


class Entry(NamedTuple):
    """One line of a shard's index, with the offsets in its arks (None where the utterance has no such array)."""

    utt_id: str
    frames: int
    rows: int
    crc: int
    offsets: Tuple[Optional[int], ...]


def ark_names(policy: Policy) -> Tuple[str, ...]:
    """The arks of a shard."""
    return ("blank", *ROWS, *policy.taps)


def read_index(shard: Path, manifest: Manifest) -> Iterator[Entry]:
    """Yield the utterances of a shard; sizes and offsets are checked, what the arks hold is not.

    Raises:
        UserError: a file is missing, cut or damaged, or of another cache; the message says how to mend it.
    """
    names = ark_names(manifest.policy)
    missing = [name for name in (INDEX, *(f"{n}.scp" for n in names)) if not (shard / name).is_file()]
    if missing:
        raise UserError(f"{shard / missing[0]} is missing; {MEND}")
    number = 1
    try:
        lines = iter_lines(shard / INDEX)
        identity, *sizes = next(lines, (1, ""))[1].split(" ")
        if identity != manifest.identity:
            raise UserError(f"{shard} is damaged, or holds the targets of another cache; {MEND}")
        tables = [dict(_read_scp(shard, name, int(size))) for name, size in zip(names, sizes, strict=True)]
        for number, line in lines:  # noqa: B007 (told below)
            utt_id, frames, rows, crc = line.rsplit(" ", 3)
            offsets = tuple(table.get(utt_id) for table in tables)
            # An utterance without a token has no row, and Kaldi knows no empty matrix.
            missing = [n for n, o in zip(names, offsets) if o is None and (n not in ROWS or int(rows))]
            if missing and int(frames):
                raise UserError(f"{shard / missing[0]}.scp lacks utterance '{utt_id}'; {MEND}")
            yield Entry(utt_id, int(frames), int(rows), int(crc), offsets)
    except ValueError as e:
        raise UserError(f"{shard / INDEX}:{number} is damaged; {MEND}") from e
    except OSError as e:
        raise UserError(f"{e.filename or shard}: {e.strerror}; {MEND}") from e


def _read_scp(shard: Path, name: str, size: int) -> Iterator[Tuple[str, int]]:
    """Utterances and offsets of ``name.scp``. The ark lies beside, wherever the cache was moved to.

    ``size`` is what the ark had in bytes when it was written.
    """
    found = (shard / f"{name}.ark").stat().st_size
    if found != size:
        raise UserError(f"{shard / name}.ark has {found} bytes, not {size}; {MEND}")
    for number, line in iter_lines(shard / f"{name}.scp"):
        utt_id, _, place = line.partition(" ")
        path, _, offset = place.rpartition(":")
        if "|" in place or Path(path).name != f"{name}.ark" or not offset.isdigit() or int(offset) >= size:
            where, expected = f"{shard / name}.scp:{number}", f"'utterance …/{name}.ark:offset' with offset < {size}"
            raise UserError(f"{where}: expected {expected}, found '{line}'; {MEND}")
        yield utt_id, int(offset)


def read_arrays(shard: Path, policy: Policy, entry: Entry) -> List[np.ndarray]:
    """The arrays of one utterance, in the order of :func:`ark_names`, checked.

    Raises:
        UserError: a file is missing, cut, or other than it was written.
    """
    arrays = load_arrays(shard, policy, entry)
    if checksum(arrays) != entry.crc:
        raise UserError(f"{shard}: the targets of '{entry.utt_id}' are damaged (checksum); {MEND}")
    return arrays


def load_arrays(shard: Path, policy: Policy, entry: Entry) -> List[np.ndarray]:
    """The arrays of one utterance, in the order of :func:`ark_names` (UserError: a file is missing or cut)."""
    import kaldiio

    where = f"{shard}: the targets of '{entry.utt_id}'"
    arrays: List[np.ndarray] = []
    for name, offset in zip(ark_names(policy), entry.offsets):
        if offset is None:
            widths = {"blank": 1 + len(policy.temperatures), "tokens": 1 + policy.top_k, "log_probs": policy.top_k}
            arrays.append(np.zeros((0, widths.get(name, 0)), np.float32))
            continue
        try:
            with open(shard / f"{name}.ark", "rb") as f:
                f.seek(offset)
                # Of what kaldiio reads only this: other headers have it parse text, or unpickle.
                if f.read(2) != b"\0B":
                    raise ValueError("no binary array")
                f.seek(offset)
                arrays.append(np.array(kaldiio.matio.read_kaldi(f), dtype=np.float32))
        except Exception as e:  # a damaged ark: whatever kaldiio stumbles over
            why = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__} in {name}.ark"
            raise UserError(f"{where} cannot be read ({why}); {MEND}") from e
    return arrays


def pack(x: TopK, hidden: Sequence[np.ndarray], policy: Policy) -> List[np.ndarray]:
    """What is written of one utterance: its :class:`TopK` of T frames and hidden states (T, D), as float32 arrays."""
    blank = [x.log_blank, *(x.norms[tau] for tau in policy.temperatures)]
    nonblank = x.argmax() != 0
    kept = torch.ones_like(nonblank) if policy.tokens_on == "all" else nonblank
    tokens = torch.cat([kept.nonzero(), x.tokens[kept]], 1).float()
    log_probs = x.log_probs[kept].float().clamp(min=_FLOOR)
    columns = torch.stack(blank, 1).float().cpu().numpy()
    return [columns[:, 0] if len(blank) == 1 else columns, tokens.cpu().numpy(), log_probs.cpu().numpy(), *hidden]


def unpack(arrays: Sequence[np.ndarray], policy: Policy, num_tokens: int) -> Tuple[TopK, List[Tensor]]:
    """The inverse of :func:`pack`: a :class:`TopK` of T frames and the hidden states."""
    blank, rows, values, *hidden = map(torch.from_numpy, arrays)
    columns = blank[:, None] if blank.dim() == 1 else blank
    tokens = torch.zeros(len(columns), policy.top_k, dtype=torch.int64)
    log_probs = torch.full(tokens.shape, -torch.inf)
    if len(rows):
        # Rounded: 16 bits come back a few thousandths off the whole number.
        rows = rows.round().long()
        tokens[rows[:, 0]], log_probs[rows[:, 0]] = rows[:, 1:], values
    norms = {tau: columns[:, 1 + i] for i, tau in enumerate(policy.temperatures)}
    return TopK(columns[:, 0], tokens, log_probs, num_tokens, norms), hidden


class CachedTeacher:
    """Targets from a cache, in place of a teacher that runs (see :class:`espnet_kd.targets.teacher.Teacher`).

    The index is in memory, some 80 bytes an utterance; arrays are read when a batch asks for them.

    Raises:
        UserError: no cache, an unfinished or a damaged one.
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
        # Packed shard by shard: as Python's objects the index would be several times as large on the way.
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
                f"{cache} has {found} utterances and its manifest says {self.manifest.counts['utterances']}; {MEND}"
            )
        self._ids = np.concatenate(ids)  # sorted, as asr_kd_cache cuts a sorted list into shards
        self._numbers = np.frombuffer(numbers, dtype=np.int64).reshape(found, -1)

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return self.manifest.hidden_size

    def __contains__(self, utt_id: str) -> bool:
        return self._find(utt_id) is not None

    def check(self, needed: Needs) -> None:
        """Refuse a method that needs more than was kept (:class:`UserError`)."""
        if missing := self.policy.lacks(needed):
            raise UserError(
                f"the target cache {self.path} has no {', no '.join(missing)}; make one for this method: asr_kd_cache "
                "--kd_config"
            )

    def state_dict(self) -> Dict[str, Tensor]:
        """Refused (:class:`UserError`): a cache has no parameters."""
        raise UserError(f"this method begins with the teacher's parameters, and {self.path} has its outputs alone")

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device."""
        self.device = fn(torch.zeros((), device=self.device)).device

    def probe(self, speech: Tensor, speech_lengths: Tensor) -> EncoderOutputs:
        """Frames alone, by the frame shift."""
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
        """What the teacher said of a batch, found by ``utt_ids``; the audio is not looked at.

        Raises:
            UserError: an utterance is missing or damaged.
        """
        found = [self._read(utt_id) for utt_id in utt_ids]
        lengths = torch.tensor([len(x.log_blank) for x, _ in found])
        most = int(lengths.max())
        padded = [x[None].map(lambda y: _pad(y, most)) for x, _ in found]
        first = padded[0]
        logits = TopK(
            torch.cat([x.log_blank for x in padded]),
            torch.cat([x.tokens for x in padded]),
            torch.cat([x.log_probs for x in padded]),
            first.num_tokens,
            {tau: torch.cat([x.norms[tau] for x in padded]) for tau in first.norms},
        ).map(lambda y: y.to(self.device))
        hidden = {}
        for tap in set(taps):
            each = [h[self.policy.taps.index(tap)] for _, h in found]
            # Of an utterance without frames there is no array, hence no width.
            each = [h if len(h) else h.new_zeros(0, self.hidden_size) for h in each]
            hidden[tap] = torch.nn.utils.rnn.pad_sequence(each, batch_first=True).to(self.device)
        return EncoderOutputs(logits, lengths.to(self.device), self.frame_shift, hidden)

    def _find(self, utt_id: str) -> Optional[int]:
        key = utt_id.encode()
        if len(key) > self._ids.itemsize:
            return None  # searchsorted would copy all ids to the longer type
        i = int(np.searchsorted(self._ids, key))
        return i if i < len(self._ids) and self._ids[i] == key else None

    def _read(self, utt_id: str) -> Tuple[TopK, List[Tensor]]:
        i = self._find(utt_id)
        if i is None:
            raise UserError(f"utterance '{utt_id}' is not in the target cache {self.path}; make it for this data")
        number, frames, rows, crc, *offsets = (int(n) for n in self._numbers[i])
        entry = Entry(utt_id, frames, rows, crc, tuple(None if o < 0 else o for o in offsets))
        arrays = read_arrays(shard_dir(self.path, number), self.policy, entry)
        return unpack(arrays, self.policy, self.manifest.num_tokens)


def hash_tokens(token_list: Sequence[str]) -> str:
    """SHA-256 of a token list."""
    return hashlib.sha256("\n".join(token_list).encode()).hexdigest()


def hash_file(path: PathLike) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pad(x: Tensor, frames: int) -> Tensor:
    """(1, T, …) with zeros up to (1, ``frames``, …); what lies beyond the length is never read."""
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, frames - x.size(1)))
