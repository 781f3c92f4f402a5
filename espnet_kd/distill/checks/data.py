"""The data of a training: files, utterances, audio."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import List, Set

from espnet_kd.cli import UserError
from espnet_kd.data.audio import is_pipe, read_audio_info
from espnet_kd.data.datadir import read_map, read_pairs
from espnet_kd.experiments.audio_options import (
    check_channels,
    check_teacher_audio,
    sampling_rate,
    takes_audio,
)
from espnet_kd.experiments.models import find_experiment, read_config

#: Types of data whose files have a line per utterance, its id first.
LISTS = ("sound", "text", "kaldi_ark", "npy", "text_int", "csv_int", "text_float", "csv_float")
SAMPLED = 100  # audio files of a wav.scp that are looked for


def check_files(args: argparse.Namespace) -> None:
    """Refuse data with missing files, ids that only some of the files have, missing audio or audio of another rate.

    What is trained on are the utterances of the shape files; the data files may hold more.

    Raises:
        UserError: naming file and utterances.
    """
    if args.multiple_iterator:
        # KD stages and ramps follow the steps of an epoch, which would begin again with each part of the data.
        raise UserError(
            "--multiple_iterator true (of asr.sh: --num_splits_asr above 1) reads the training data in parts, which is "
            "not supported here; give undivided files"
        )
    for part in ("train", "valid"):
        option = f"--{part}_data_path_and_name_and_type"
        data = getattr(args, option[2:]) or []
        shapes: List[str] = getattr(args, f"{part}_shape_file") or []
        if not data:
            continue
        folder = next((path for path, _, _ in data if Path(path).is_dir()), None)
        if folder is not None:
            raise UserError(f"{option}: {folder} is a directory; give a file, such as {folder}/wav.scp,speech,sound")
        if "speech" not in [name for _, name, _ in data]:
            raise UserError(f"{option} names no speech: give it {Path(data[0][0]).parent}/wav.scp,speech,sound as well")
        if not shapes and args.iterator_type == "sequence":
            raise UserError(f"no --{part}_shape_file: make statistics first (stage 4 of run.sh)")
        ids = [_ids(path) for path in shapes]
        for path, mine in zip(shapes, ids):
            if not mine:
                raise UserError(f"{path} is empty: there is nothing to {'train on' if part == 'train' else 'validate'}")
            _refuse_lack(path, mine, shapes[0], ids[0])
            _refuse_lack(shapes[0], ids[0], path, mine)
        for path, _, kind in data:
            if kind in LISTS and ids:
                _refuse_lack(path, _ids(path), shapes[0], ids[0])
            if kind == "sound":
                _look_at_audio(path, args)


def check_teachers(args: argparse.Namespace) -> None:
    """Refuse teachers that would get other audio than they know (:class:`UserError`); see ``audio_options``."""
    if not getattr(args, "kd_config", None):
        return
    for path in [] if args.target_cache else args.teacher:
        config, _ = find_experiment(path)
        check_teacher_audio(args, argparse.Namespace(**read_config(config)), path)


def _ids(path: str) -> Set[str]:
    return set(read_map(path))


def _refuse_lack(path: str, mine: Set[str], other: str, needed: Set[str]) -> None:
    lacking = sorted(needed - mine)
    if lacking:
        raise UserError(
            f"{path} lacks {len(lacking)} utterances of {other} ({', '.join(lacking[:5])} …); the data changed after "
            "the statistics: make them again (stages 2 to 4 of run.sh)"
        )


def _look_at_audio(path: str, args: argparse.Namespace) -> None:
    """Refuse audio that is missing, of another rate than the student's frontend, or of several channels for KD."""
    pairs = list(read_pairs(path))
    wanted = sampling_rate(args) if takes_audio(args) else None
    for utt_id, audio in pairs[:: max(1, len(pairs) // SAMPLED)]:
        if is_pipe(audio):
            continue
        try:
            _, rate, channels = read_audio_info(audio)
        except UserError as e:
            raise UserError(f"{path}, utterance {utt_id}: {e}") from e
        if wanted is not None and rate != wanted:
            raise UserError(
                f"{path}: utterance {utt_id} has {rate} Hz, and the student's frontend is made for {wanted:g} Hz; "
                "resample the data (stage 2 of run.sh), or set frontend_conf: fs"
            )
        if getattr(args, "kd_config", None):
            check_channels(channels, args, f"{path}: utterance {utt_id}")
