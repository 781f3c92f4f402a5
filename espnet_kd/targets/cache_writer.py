"""Writing a target cache shard by shard. Each shard is whole or absent, so that the same command resumes a run."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from espnet_kd import files
from espnet_kd.cli import UserError
from espnet_kd.files import locked, replacing
from espnet_kd.inference.encode import check_taps, half_on_gpu, recording
from espnet_kd.inference.recognise import AudioFile, Recogniser
from espnet_kd.losses.common import full_precision
from espnet_kd.targets.cache import (
    COUNTS,
    INDEX,
    MANIFEST,
    TOKENS,
    IndexEntry,
    Manifest,
    Policy,
    ark_names,
    checksum,
    load_arrays,
    read_arrays,
    read_index,
    read_manifest,
    shard_dir,
)
from espnet_kd.targets.nucleus import pack_targets
from espnet_kd.topk import compress

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

# Values of kaldiio's compression_method:
EIGHT_BITS, SIXTEEN_BITS = 2, 3  # scaled by the range of each column, of the whole matrix
SIXTEEN_BIT_INTEGERS, EIGHT_BIT_INTEGERS = 4, 6  # exact; only the first has a sign


class TargetRecogniser(Recogniser):
    """A teacher that gives each utterance its packed targets instead of a transcript."""

    def __init__(
        self, model: ESPnetASRModel, args: argparse.Namespace, config_dir: Union[str, Path] = ".", *, policy: Policy
    ):
        super().__init__(model, args, config_dir)
        check_taps(self.model, policy.taps, "teacher")
        if "decoder" in policy.taps:
            raise UserError("attention_kl reads the teacher's decoder, and a target cache has none; use --teacher")
        self.policy = policy

    def encode(self, speech: torch.Tensor, lengths: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Encode as in training: in bf16 on a GPU that has it; the CTC head stays in float32."""
        with half_on_gpu(self.device):
            out, frames = super().encode(speech, lengths)
        return full_precision(out[0] if isinstance(out, tuple) else out), frames

    @torch.inference_mode()
    def __call__(self, speech: Sequence[np.ndarray]) -> List[List[np.ndarray]]:
        """Targets of utterances, each (N_i,) float samples at ``rate`` Hz, as one batch (see `nucleus.pack_targets`).

        Raises:
            UserError: the model gives NaN.
        """
        with recording(self.own_model.encoder, self.policy.taps) as hidden, self._recording_output(hidden):
            logits, lengths = self.logits(speech)
        # Used for a tap without hidden states: if all utterances are too short, the encoder has no output.
        nothing = logits.new_zeros(*logits.shape[:2], self.model.encoder.output_size())
        packed = []
        # One utterance at a time, so that the log-probabilities of a whole batch never exist at once.
        for i, n in enumerate(lengths.tolist()):
            rows = logits[i, :n].float()
            if rows.log_softmax(-1).isnan().any():  # NaN also comes from an infinite logit
                raise self.diverged()
            states = [hidden.get(tap, nothing)[i, :n].float().cpu().numpy() for tap in self.policy.taps]
            short = compress(rows, self.policy.top_k, self.policy.temperatures)
            packed.append(pack_targets(short, states, self.policy))
        return packed

    @contextlib.contextmanager
    def _recording_output(self, hidden: Dict[str, torch.Tensor]) -> Iterator[None]:
        """Put the input of the CTC head, which is the encoder's output, into ``hidden``."""

        def keep(module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
            hidden["encoder"] = inputs[0]

        handle = self.own_model.ctc.ctc_lo.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def split(utterances: Sequence[AudioFile], shard_size: int) -> List[List[AudioFile]]:
    """Divide utterances, sorted by id, into shards of ``shard_size``; every job and machine gets the same shards."""
    ordered = sorted(utterances, key=lambda u: u.utt_id.encode())
    return [ordered[i : i + shard_size] for i in range(0, len(ordered), shard_size)]


@contextlib.contextmanager
def holding(cache: Path, job: int, jobs: int) -> Iterator[None]:
    """Lock a cache: exclusively for the run that finishes it, or shared with the other jobs of the same command.

    Raises:
        UserError: the cache is locked by another run, or by jobs with another number of parts, which would write the
            same shards; or the directory is no cache (:func:`check_place`).
    """
    if not (cache / MANIFEST).exists():
        check_place(cache)  # before a lock file is written into it
    with locked(cache, "--output", shared=jobs > 1), contextlib.ExitStack() as stack:
        if jobs > 1:
            # Lock before looking for others, so that of two jobs that start together at least one finds the other.
            stack.enter_context(locked(cache, "--output", part=f"of_{jobs}", shared=True))
            for path in cache.glob(".lock.of_*"):
                other = path.name.removeprefix(".lock.")
                if other != f"of_{jobs}":
                    _refuse_held(cache, other, jobs)
            stack.enter_context(locked(cache, "--output", part=str(job)))
        yield


def _refuse_held(cache: Path, other: str, jobs: int) -> None:
    """Refuse a job of ``jobs`` parts while jobs with another number, ``other``, are running (:class:`UserError`)."""
    try:
        with locked(cache, part=other):
            pass
    except UserError as e:
        raise UserError(
            f"{cache} is being made in {other.removeprefix('of_')} parts, and this is --job I/{jobs}: give all jobs "
            "the same number of parts, or wait until those are through"
        ) from e


def hash_data(utterances: Sequence[AudioFile]) -> str:
    """SHA-256 of ids, paths and lengths. Audio replaced by audio of the same length is not detected."""
    lines = sorted(f"{u.utt_id} {u.path} {u.samples}\n" for u in utterances)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_whole(shard: Path, manifest: Manifest, utterances: Sequence[AudioFile]) -> bool:
    """Whether a shard holds these utterances undamaged; every array is read."""
    if not shard.is_dir():
        return False
    try:
        entries = list(read_index(shard, manifest))
        if [e.utt_id for e in entries] != [u.utt_id for u in utterances]:
            return False
        for entry in entries:
            read_arrays(shard, manifest.policy, entry)
    except UserError:
        return False
    return True


def compression(name: str, x: np.ndarray, policy: Policy) -> Optional[int]:
    """The kaldiio compression of an ark's arrays; None for no compression."""
    if name in ("rows", "tokens"):  # whole numbers, which must stay exact
        if x.min() >= 0 and x.max() < 2**8:
            return EIGHT_BIT_INTEGERS
        return SIXTEEN_BIT_INTEGERS if x.min() >= -(2**15) and x.max() < 2**15 else None
    return {"blank": SIXTEEN_BITS, "log_probs": EIGHT_BIT_INTEGERS}.get(name, EIGHT_BITS)


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {place}: {e.strerror or e}; correct that and run the same command again") from e


def write_shard(
    shard: Path, manifest: Manifest, utterances: Sequence[AudioFile], targets: Dict[str, List[np.ndarray]]
) -> None:
    """Write a shard into a temporary directory, and rename it into place.

    Raises:
        UserError: it cannot be written (e.g. because the disk is full).
    """
    import kaldiio

    policy = manifest.policy
    # Not mkdtemp, because other users could not read its directory.
    work = shard.parent / f".{shard.name}.{uuid.uuid4().hex[:8]}"
    try:
        with _writing(shard):
            work.mkdir(parents=True)
            names = ark_names(policy)
            scps: Dict[str, List[str]] = {name: [] for name in names}
            offsets: Dict[str, List[int]] = {u.utt_id: [] for u in utterances}
            for i, name in enumerate(names):
                with open(work / f"{name}.ark", "wb") as f:
                    for u in utterances:
                        x = targets[u.utt_id][i]
                        if not x.size:
                            offsets[u.utt_id].append(-1)
                            continue
                        offset = f.tell() + len(f"{u.utt_id} ".encode())
                        kaldiio.save_ark(f, {u.utt_id: x}, compression_method=compression(name, x, policy))
                        offsets[u.utt_id].append(offset)
                        scps[name].append(f"{u.utt_id} {shard / name}.ark:{offset}\n")
                (work / f"{name}.scp").write_text("".join(scps[name]), encoding="utf-8")
            sizes = [str((work / f"{name}.ark").stat().st_size) for name in names]
            lines = [" ".join([manifest.identity, *sizes]) + "\n"]
            for u in utterances:
                blank, rows, *_ = targets[u.utt_id]
                entry = IndexEntry(
                    u.utt_id, len(blank), len(rows), 0, tuple(o if o >= 0 else None for o in offsets[u.utt_id])
                )
                # The arrays are read back, because compression is lossy; this also finds errors in writing.
                crc = checksum(load_arrays(work, policy, entry))
                lines.append(f"{u.utt_id} {entry.frames} {entry.rows} {crc}\n")
            with replacing(work / INDEX) as f:
                f.writelines(lines)
            if shard.exists():
                shutil.rmtree(shard)
            os.replace(work, shard)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(cache: Path, manifest: Manifest, token_list: Sequence[str]) -> None:
    """Write manifest and token list.

    Raises:
        UserError: the directory holds a cache of another teacher, policy or data, or other files; or
            it cannot be written.
    """
    if (cache / MANIFEST).exists():
        there = read_manifest(cache)
        for name, what in (
            ("teacher_sha256", "teacher"), ("config_sha256", "config.yaml of the teacher"),
            ("tokens_sha256", "token list"), ("policy", "policy"), ("data", "data"), ("shards", "number of shards"),
        ):  # fmt: skip
            if getattr(there, name) != getattr(manifest, name):
                shown = "teacher" if name == "teacher_sha256" else name
                raise UserError(
                    f"{cache} is a target cache with another {what} ({getattr(there, shown)}; now "
                    f"{getattr(manifest, shown)}); choose another --output, or --force to make it again"
                )
    else:
        check_place(cache)
    with _writing(cache), replacing(cache / TOKENS) as f:  # the manifest has the hash of this list
        f.writelines(f"{token}\n" for token in token_list)
    if not (cache / MANIFEST).exists():
        with _writing(cache), replacing(cache / MANIFEST) as f:
            f.write(manifest.to_json())


def _is_own(path: Path) -> bool:
    beginnings = ("shard.", ".shard.", f".{MANIFEST}.", f".{TOKENS}.", ".lock")
    return path.name in (MANIFEST, TOKENS) or path.name.startswith(beginnings)


def check_place(cache: Path) -> None:
    """Refuse a file, or a directory with other files than a cache's (:class:`UserError`)."""
    if cache.exists() and not cache.is_dir():
        raise UserError(f"--output {cache} is a file; give a directory")
    others = [path.name for path in cache.iterdir() if not _is_own(path)] if cache.exists() else []
    if others:
        raise UserError(
            f"--output {cache} holds {others[0]}, which is no part of a target cache; give another directory"
        )


def remove(cache: Path) -> None:
    """Remove a cache, if there is one, except the lock of this run (UserError as :func:`check_place`)."""
    check_place(cache)
    with _writing(cache):
        for path in cache.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not path.name.startswith(".lock"):
                path.unlink()


def count(cache: Path, manifest: Manifest) -> Dict[str, int]:
    """Count the utterances, frames, frames with tokens (``rows``) and bytes of the arks in all shards."""
    counts = dict.fromkeys(COUNTS, 0)
    for number in range(manifest.shards):
        shard = shard_dir(cache, number)
        for entry in read_index(shard, manifest):
            counts["utterances"] += 1
            counts["frames"] += entry.frames
            counts["rows"] += entry.rows
        counts["bytes"] += sum(path.stat().st_size for path in shard.glob("*.ark"))
    return counts


def remove_cache_leftovers(cache: Path) -> None:
    """Remove the temporary files of killed runs. No other run may be writing."""
    for path in cache.glob(".shard.*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in cache.glob(".lock.*"):  # locks of jobs
        path.unlink(missing_ok=True)
    for name in (MANIFEST, TOKENS):
        files.remove_leftovers(cache / name)


def finish(cache: Path, manifest: Manifest) -> Manifest:
    """Write the counts into the manifest, which marks the cache as finished."""
    done = replace(manifest, counts=count(cache, manifest))
    with _writing(cache), replacing(cache / MANIFEST) as f:
        f.write(done.to_json())
    return done


def write_shards(
    cache: Path,
    manifest: Manifest,
    shards: Sequence[Tuple[int, Sequence[AudioFile]]],
    run: Callable[[Sequence[AudioFile]], Dict[str, List[np.ndarray]]],
    done: Callable[[int], None],
) -> int:
    """Write the shards (number, utterances) that are missing or damaged; ``run`` computes the targets of utterances.

    Returns:
        The number of shards written.
    """
    written = 0
    for number, utterances in shards:
        shard = shard_dir(cache, number)
        if not is_whole(shard, manifest, utterances):
            write_shard(shard, manifest, utterances, run(utterances))
            written += 1
        done(len(utterances))
    return written
