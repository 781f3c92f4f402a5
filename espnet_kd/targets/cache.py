"""Targets on disk: a teacher's outputs for each utterance, compressed and read lazily.

A cache is a directory::

    manifest.json        teacher, policy, frame shift, counts
    tokens.txt           the teacher's tokens
    shard.00000/         a few hundred utterances, whole or absent
      utterances         the hash of the cache and the sizes of the arks in bytes; then one line per utterance, sorted:
                         id frames rows checksum
      blank.ark .scp     the log-odds of blank in every frame; 16 bits a number, scaled by the utterance's range
      rows.ark .scp      the frames that have tokens, and how many; 16 bits a number
      tokens.ark .scp    the ids of these tokens; 8 to 16 bits each, 32 for vocabularies above 65,536
      log_probs.ark .scp their relative log-probabilities; 8 bits each
      encoder.3.ark .scp (T, D) hidden states of a tap, in Kaldi's 8-bit compression

The arks are Kaldi's, so that other tools read them; :mod:`espnet_kd.targets.nucleus` describes the numbers. Files
that are missing, cut or of another cache are found when the cache is opened. Every array is compared with its checksum
when it is read, so that flipped bytes stop a training instead of giving wrong targets. The command that made a cache,
given again, checks all of it and replaces damaged shards.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines
from espnet_kd.files import PathLike
from espnet_kd.strict import check_type, parameters
from espnet_kd.targets.teacher import Needs

FORMAT = 3
MEND = "make it again with the same asr_kd_cache command"
MANIFEST, TOKENS, INDEX = "manifest.json", "tokens.txt", "utterances"
COUNTS = ("utterances", "frames", "rows", "bytes")
ROWS = ("rows", "tokens", "log_probs")  #: arks with a row per frame with tokens; no entry if there are none
#: Upper bound of the counts and rates in a manifest.
_LARGE = 10**7


@dataclass(frozen=True)
class Policy:
    """The teacher's outputs that a cache keeps of each frame."""

    top_k: int  #: largest number of tokens per frame, without blank
    mass: float = 1.0  #: tokens are kept until, together with blank, they reach this probability
    tokens_on: str = "nonblank"  #: frames whose tokens are kept: ``nonblank`` or ``all``
    temperatures: Tuple[float, ...] = ()  #: temperatures other than 1 at which the posterior is exact
    taps: Tuple[str, ...] = ()  #: taps whose hidden states are kept

    def lacks(self, needed: Needs) -> List[str]:
        """Describe the outputs in ``needed`` that this policy does not keep."""
        found = []
        if needed.tokens_on == "all" and self.tokens_on != "all":
            found.append("tokens on all frames (it has those of non-blank frames)")
        found += [f"temperature {tau:g}" for tau in needed.temperatures if tau not in self.temperatures]
        found += [f"tap {tap}" for tap in needed.taps if tap not in self.taps]
        return found


@dataclass(frozen=True)
class Manifest:
    """The description of a cache in its manifest.json."""

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
        """Short hash of everything that determines the targets; every shard has it."""
        decisive = replace(self, teacher="", counts={})  # a teacher may have several paths
        return hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The content of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_manifest(cache: PathLike) -> Manifest:
    """Read a cache's manifest.

    Raises:
        UserError: there is no cache, it is damaged, or it has another format.
    """
    path = Path(cache) / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {content.get('format')}, not {FORMAT}; make the cache again: asr_kd_cache --force"
            )
        policy = content.pop("policy")
        for kind, found in ((Policy, policy), (Manifest, content)):
            for name, hint in parameters(kind).items():
                if name in found:
                    check_type(found[name], hint, f"{path} is damaged: {name}")
        kept: Dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in policy.items()}
        policy = Policy(**kept)
        manifest = Manifest(policy=policy, **content)
        _check_values(manifest)
        return manifest
    except FileNotFoundError as e:
        raise UserError(f"{cache} is no target cache: it has no {MANIFEST}; asr_kd_cache makes one") from e
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as e:
        raise UserError(
            f"{path} is damaged ({type(e).__name__}: {e}); make the cache again: asr_kd_cache --force"
        ) from e


def _check_values(manifest: Manifest) -> None:
    """Refuse values that no cache has (ValueError), because array sizes and file names are derived from them."""
    policy = manifest.policy
    positive = {f"temperature {tau}": tau for tau in policy.temperatures}
    positive.update(frame_shift=manifest.frame_shift, sampling_rate=manifest.sampling_rate)
    wrong = [f"{name} {value}" for name, value in positive.items() if not 0 < value < _LARGE]
    if not 0 < policy.mass <= 1:
        wrong.append(f"mass {policy.mass}")
    for name, value, most in (
        ("num_tokens", manifest.num_tokens, _LARGE),
        ("top_k", policy.top_k, manifest.num_tokens - 1),
        ("hidden_size", manifest.hidden_size, _LARGE),
        ("shards", manifest.shards, _LARGE),
    ):
        if not 1 <= value <= most:
            wrong.append(f"{name} {value}")
    if policy.tokens_on not in ("nonblank", "all"):
        wrong.append(f"tokens_on {policy.tokens_on!r}")
    wrong += [f"tap {tap!r}" for tap in policy.taps if not re.fullmatch(r"encoder(\.\d+)?", tap)]
    if set(manifest.counts) not in (set(), set(COUNTS)) or any(n < 0 for n in manifest.counts.values()):
        wrong.append(f"counts {manifest.counts}")
    if wrong:
        raise ValueError(f"wrong values: {', '.join(wrong)}")


def shard_dir(cache: PathLike, number: int) -> Path:
    """Directory of a shard."""
    return Path(cache) / f"shard.{number:05d}"


def checksum(arrays: Sequence[np.ndarray]) -> int:
    """CRC-32 of arrays' shapes and values."""
    crc = 0
    for x in arrays:
        crc = zlib.crc32(repr(x.shape).encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(x).data, crc)
    return crc


class IndexEntry(NamedTuple):
    """One line of a shard's index, with the offsets in its arks (None where the utterance has no such array)."""

    utt_id: str
    frames: int
    rows: int
    crc: int
    offsets: Tuple[Optional[int], ...]


def ark_names(policy: Policy) -> Tuple[str, ...]:
    """The arks of a shard."""
    return ("blank", *ROWS, *policy.taps)


def read_index(shard: Path, manifest: Manifest) -> Iterator[IndexEntry]:
    """Yield the utterances of a shard. Sizes and offsets are checked; the contents of the arks are not.

    Raises:
        UserError: a file is missing, cut or damaged, or belongs to another cache; the message has the remedy.
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
        for number, line in lines:  # noqa: B007 (the message below has it)
            utt_id, frames, rows, crc = line.rsplit(" ", 3)
            offsets = tuple(table.get(utt_id) for table in tables)
            # An utterance without tokens is not in the arks of ``ROWS``, because Kaldi has no empty matrix.
            missing = [n for n, o in zip(names, offsets) if o is None and (n not in ROWS or int(rows))]
            if missing and int(frames):
                raise UserError(f"{shard / missing[0]}.scp lacks utterance '{utt_id}'; {MEND}")
            yield IndexEntry(utt_id, int(frames), int(rows), int(crc), offsets)
    except ValueError as e:
        raise UserError(f"{shard / INDEX}:{number} is damaged; {MEND}") from e
    except OSError as e:
        raise UserError(f"{e.filename or shard}: {e.strerror}; {MEND}") from e


def _read_scp(shard: Path, name: str, size: int) -> Iterator[Tuple[str, int]]:
    """Utterances and offsets of ``name.scp``. The ark is looked for beside it, so that a cache can be moved.

    ``size`` is the ark's size in bytes when it was written.
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


def read_arrays(shard: Path, policy: Policy, entry: IndexEntry) -> List[np.ndarray]:
    """The arrays of one utterance, in the order of :func:`ark_names`, checked.

    Raises:
        UserError: a file is missing, cut, or different from what was written.
    """
    arrays = load_arrays(shard, policy, entry)
    if checksum(arrays) != entry.crc:
        raise UserError(f"{shard}: the targets of '{entry.utt_id}' are damaged (checksum); {MEND}")
    return arrays


def load_arrays(shard: Path, policy: Policy, entry: IndexEntry) -> List[np.ndarray]:
    """The arrays of one utterance, in the order of :func:`ark_names` (UserError: a file is missing or cut)."""
    import kaldiio

    where = f"{shard}: the targets of '{entry.utt_id}'"
    arrays: List[np.ndarray] = []
    for name, offset in zip(ark_names(policy), entry.offsets):
        if offset is None:
            widths = {"blank": 1 + len(policy.temperatures), "rows": 2, "tokens": 1, "log_probs": 1}
            arrays.append(np.zeros((0, widths.get(name, 0)), np.float32))
            continue
        try:
            with open(shard / f"{name}.ark", "rb") as f:
                f.seek(offset)
                # Only this header is accepted, because for others kaldiio would parse text, or unpickle.
                if f.read(2) != b"\0B":
                    raise ValueError("no binary array")
                f.seek(offset)
                arrays.append(np.array(kaldiio.matio.read_kaldi(f), dtype=np.float32))
        except Exception as e:  # kaldiio may raise any exception for a damaged ark
            why = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__} in {name}.ark"
            raise UserError(f"{where} cannot be read ({why}); {MEND}") from e
    return arrays


def hash_tokens(token_list: Sequence[str]) -> str:
    """SHA-256 of a token list."""
    return hashlib.sha256("\n".join(token_list).encode()).hexdigest()
