"""Writing a target cache: shard by shard, each whole or absent, so that the same command continues a broken run."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, Tuple, Union

import numpy as np
import torch

from espnet_kd import files
from espnet_kd.cli import UserError
from espnet_kd.decode.recognise import Recogniser, Utterance
from espnet_kd.files import replacing
from espnet_kd.targets.cache import (
    INDEX,
    MANIFEST,
    TOKENS,
    Entry,
    Manifest,
    Policy,
    ark_names,
    checksum,
    load_arrays,
    pack,
    read_arrays,
    read_index,
    read_manifest,
    shard_dir,
)
from espnet_kd.targets.encode import check_taps, recording
from espnet_kd.topk import compress

EIGHT_BITS = 2  # kaldiio's compression_method: a byte a number, scaled by columns


class TargetRecogniser(Recogniser):
    """A teacher that gives each utterance its packed targets instead of a transcript."""

    def __init__(
        self, model: torch.nn.Module, args: argparse.Namespace, config_dir: Union[str, Path] = ".", *, policy: Policy
    ):
        super().__init__(model, args, config_dir)
        check_taps(self.model, policy.taps, "teacher")
        if "decoder" in policy.taps:
            raise UserError("attention_kl reads the teacher's decoder, which a target cache has not; use --teacher")
        self.policy = policy
        self._where = config_dir

    @torch.inference_mode()
    def __call__(self, speech: Sequence[np.ndarray]) -> List[List[np.ndarray]]:
        """Targets of utterances, each (N_i,) float samples at ``rate`` Hz, as one batch (see `cache.pack`).

        Raises:
            UserError: the model gives NaN.
        """
        with recording(self.own_model.encoder, self.policy.taps) as hidden, self._recording_output(hidden):
            logits, lengths = self.logits(speech)
        # Where all are too short the encoder has said nothing.
        nothing = logits.new_zeros(*logits.shape[:2], self.model.encoder.output_size())
        packed = []
        # Utterance by utterance: the log-probabilities of a batch need not exist at once.
        for i, n in enumerate(lengths.tolist()):
            rows = logits[i, :n].float()
            if rows.isnan().any():
                raise UserError(f"the model of {self._where} gives NaN; it has diverged, or its file is damaged")
            states = [hidden.get(tap, nothing)[i, :n].float().cpu().numpy() for tap in self.policy.taps]
            packed.append(pack(compress(rows, self.policy.top_k, self.policy.temperatures), states, self.policy))
        return packed

    @contextlib.contextmanager
    def _recording_output(self, hidden: Dict[str, torch.Tensor]) -> Iterator[None]:
        """Put what the CTC head hears, last of all the encoder's output, into ``hidden``."""

        def keep(module: torch.nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
            hidden["encoder"] = inputs[0]

        handle = self.own_model.ctc.ctc_lo.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def split(utterances: Sequence[Utterance], shard_size: int) -> List[List[Utterance]]:
    """Shards of ``shard_size`` utterances, by name: the same whatever job or machine writes them."""
    ordered = sorted(utterances, key=lambda u: u.utt_id.encode())
    return [ordered[i : i + shard_size] for i in range(0, len(ordered), shard_size)]


def is_whole(shard: Path, policy: Policy, utterances: Sequence[Utterance]) -> bool:
    """Whether a shard holds these utterances, undamaged: every array is read."""
    if not shard.is_dir():
        return False
    try:
        entries = list(read_index(shard, policy))
        if [e.utt_id for e in entries] != [u.utt_id for u in utterances]:
            return False
        for entry in entries:
            read_arrays(shard, policy, entry)
    except UserError:
        return False
    return True


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {place}: {e.strerror}; mend that and run the same command again") from e


def write_shard(
    shard: Path, policy: Policy, utterances: Sequence[Utterance], targets: Dict[str, List[np.ndarray]]
) -> None:
    """Write a shard beside its place and rename it into place.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    import kaldiio

    # Not mkdtemp, whose directories nobody else may read.
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
                        method = EIGHT_BITS if name in policy.taps else None
                        kaldiio.save_ark(f, {u.utt_id: x}, compression_method=method)
                        offsets[u.utt_id].append(offset)
                        scps[name].append(f"{u.utt_id} {shard / name}.ark:{offset}\n")
                (work / f"{name}.scp").write_text("".join(scps[name]), encoding="utf-8")
            lines = []
            for u in utterances:
                blank, tokens, *_ = targets[u.utt_id]
                entry = Entry(
                    u.utt_id, len(blank), len(tokens), 0, tuple(o if o >= 0 else None for o in offsets[u.utt_id])
                )
                # Of what is read back: compression is lossy, and what was written wrong shows here.
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
        UserError: the directory holds a cache of another teacher, policy or data, or something else than a cache; or
            it cannot be written.
    """
    if (cache / MANIFEST).exists():
        there = read_manifest(cache)
        for name, what in (
            ("teacher_sha256", "teacher"), ("tokens_sha256", "token list"), ("policy", "policy"), ("data", "data"),
            ("shards", "number of shards"),
        ):  # fmt: skip
            if getattr(there, name) != getattr(manifest, name):
                shown = "teacher" if name == "teacher_sha256" else name
                raise UserError(
                    f"{cache} is a target cache with another {what} ({getattr(there, shown)}; now "
                    f"{getattr(manifest, shown)}); choose another --output, or --force to make it anew"
                )
        return
    check_place(cache)
    with _writing(cache), replacing(cache / TOKENS) as f:
        f.writelines(f"{token}\n" for token in token_list)
    with _writing(cache), replacing(cache / MANIFEST) as f:
        f.write(manifest.to_json())


def _is_own(path: Path) -> bool:
    beginnings = ("shard.", ".shard.", f".{MANIFEST}.", f".{TOKENS}.")
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
    """Remove a cache, if there is one (UserError as :func:`check_place`)."""
    check_place(cache)
    if cache.exists():
        shutil.rmtree(cache)


def count(cache: Path, manifest: Manifest) -> Dict[str, int]:
    """Utterances, frames, frames with tokens (``rows``) and bytes of the arks, of all shards."""
    counts = {"utterances": 0, "frames": 0, "rows": 0, "bytes": 0}
    for number in range(manifest.shards):
        shard = shard_dir(cache, number)
        for entry in read_index(shard, manifest.policy):
            counts["utterances"] += 1
            counts["frames"] += entry.frames
            counts["rows"] += entry.rows
        counts["bytes"] += sum(path.stat().st_size for path in shard.glob("*.ark"))
    return counts


def remove_leftovers(cache: Path) -> None:
    """Remove what killed runs left; nobody may be writing now."""
    for path in cache.glob(".shard.*"):
        shutil.rmtree(path, ignore_errors=True)
    for name in (MANIFEST, TOKENS):
        files.remove_leftovers(cache / name)


def finish(cache: Path, manifest: Manifest) -> Manifest:
    """Write the counts into the manifest: from now on it may be trained from."""
    done = replace(manifest, counts=count(cache, manifest))
    with _writing(cache), replacing(cache / MANIFEST) as f:
        f.write(done.to_json())
    return done


def write_shards(
    cache: Path,
    policy: Policy,
    shards: Sequence[Tuple[int, Sequence[Utterance]]],
    run: Callable[[Sequence[Utterance]], Dict[str, List[np.ndarray]]],
    done: Callable[[int], None],
) -> int:
    """Write the shards (number, utterances) that are missing or damaged; ``run`` gives targets of utterances.

    Returns:
        How many were written.
    """
    written = 0
    for number, utterances in shards:
        shard = shard_dir(cache, number)
        if not is_whole(shard, policy, utterances):
            write_shard(shard, policy, utterances, run(utterances))
            written += 1
        done(len(utterances))
    return written
