"""What is looked at before training begins, in seconds: data, room on the disk, memory.

Whether student, teacher, targets and page fit each other is seen when the KD model is made (``checks.py``).
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Set, Tuple

import numpy as np
import psutil
import torch

from espnet_kd.cli import UserError
from espnet_kd.data.audio import is_pipe, read_audio_info
from espnet_kd.data.datadir import read_map, read_pairs
from espnet_kd.distill.requirements import check_requirements
from espnet_kd.experiments.audio_options import (
    check_channels,
    check_iterator,
    check_teacher_audio,
    sampling_rate,
    takes_audio,
)
from espnet_kd.experiments.models import find_experiment, read_config
from espnet_kd.inference.encode import input_width

if TYPE_CHECKING:
    from espnet2.asr.espnet_model import ESPnetASRModel

GIB = 2**30
#: Types of data whose files have a line per utterance, its id first.
LISTS = ("sound", "text", "kaldi_ark", "npy", "text_int", "csv_int", "text_float", "csv_float")
SIGNALS = (1.0, 2.0, 4.0)  # seconds, of the memory's test
SAMPLED = 100  # audio files of a wav.scp that are looked for


def check_files(args: argparse.Namespace) -> None:
    """Refuse data that training would stumble over: missing files, ids that only some of them have, missing audio or
    audio of another rate; and options that lack what they need.

    What is trained on are the utterances of the shape files; the data files may hold more.

    Raises:
        UserError: naming file and utterances.
    """
    for part in ("train", "valid"):
        data = getattr(args, f"{part}_data_path_and_name_and_type") or []
        shapes: List[str] = getattr(args, f"{part}_shape_file") or []
        if not data or any(Path(p).is_dir() for p, _, _ in data):  # with --multiple_iterator directories of parts
            continue
        if "speech" not in [name for _, name, _ in data]:
            option = f"--{part}_data_path_and_name_and_type"
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
    check_teachers(args)
    check_requirements(args)


def check_teachers(args: argparse.Namespace) -> None:
    """Refuse teachers that would get other audio than they know (:class:`UserError`); see ``audio_options``."""
    if not getattr(args, "kd_config", None):
        return
    check_iterator(args, [args.target_cache])
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
            "the statistics: make them anew (stages 2 to 4 of run.sh)"
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


def check_disk(args: argparse.Namespace, model: torch.nn.Module, kept: int = 0) -> None:
    """Refuse a disk without room for what a training of ``model`` writes (:class:`UserError`).

    Args:
        kept: students that are kept beside the checkpoints and models of ESPnet, one for each KD stage.
    """
    weights = sum(x.nbytes for x in model.state_dict().values())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # The checkpoint holds Adam's two moments beside the model; the one before stays, and both are there twice while
    # they are replaced. Models: the n best by each criterion, the newest, an average each.
    criteria = len(args.best_model_criterion)
    best = args.keep_nbest_models if isinstance(args.keep_nbest_models, list) else [args.keep_nbest_models]
    models = criteria * (max(best, default=1) + len(best)) + 1 + kept
    needed = 3 * (weights + 2 * trained) + models * weights
    out = Path(args.output_dir)
    files = [*out.glob("*.pth"), *out.glob("kd_stage*/*.pth")]
    there = sum(p.stat().st_size for p in files if not p.is_symlink())  # of this run: to be replaced
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if needed - there > free:
        raise UserError(
            f"{args.output_dir}: checkpoints and models take about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB "
            "are free; make room, or lower keep_nbest_models"
        )


def log_memory(args: argparse.Namespace, model: ESPnetASRModel, rate: float, beside: int = 0) -> None:
    """Say what training will take of the device's memory, and warn where there is less. An estimate.

    Parameters, their gradients and Adam's two moments are counted; what the encoder keeps of the largest batch for the
    backward pass is extrapolated from short test signals.

    Args:
        rate: sampling rate, Hz.
        beside: bytes of other models, the teacher's.
    """
    largest = _largest_batch(args)
    if input_width(model) or largest is None:
        return
    states = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters()) + beside
    count, seconds = largest[0], largest[1] / rate
    try:
        activations = count * float(np.polyval([*_kept_for_backward(model, rate), 0.0], seconds))
    except Exception as e:  # an encoder or frontend that does not take the test signals may well take the data
        model.train()
        logging.info("memory: no estimate for this model (%s: %s)", type(e).__name__, e)
        return
    if args.use_amp:
        activations /= 2  # mostly in half precision
    available = _available(args.ngpu)
    total = states + activations
    message = (
        f"memory, an estimate: {states / GIB:.2f} GiB for models, gradients and optimizer, {activations / GIB:.2f} GiB "
        f"for the largest batch ({count} × {seconds:.1f} s)"
    )
    if available is None or total <= available:
        logging.info("%s", message)
    else:
        less = "batch_bins" if args.batch_type in ("numel", "length") else "batch_size"
        logging.warning("%s, but %.2f GiB are free; lower %s if it ends", message, available / GIB, less)


def _largest_batch(args: argparse.Namespace) -> Optional[Tuple[int, int]]:
    """(utterances, samples of the longest) of the batch with the longest utterance, of one process; None: unknown."""
    files = args.train_shape_file
    if not files or args.multiple_iterator:
        return None
    try:
        longest = max((int(shape.split(",")[0]) for _, shape in read_pairs(files[0])), default=0)
    except ValueError as e:
        raise UserError(f"{files[0]}: {e}; make the statistics anew (stage 4 of run.sh)") from e
    if args.batch_type in ("numel", "length"):
        together = args.batch_bins / longest if longest else 0
    else:
        together = args.batch_size
    return max(1, round(together / (args.dist_world_size or 1))), longest


def _kept_for_backward(model: ESPnetASRModel, rate: float) -> Tuple[float, float]:
    """What encoder and CTC head keep of an utterance of s seconds for the backward pass: (a, b), a · s² + b · s bytes.

    Measured on short test signals in eval mode, hence without what dropout keeps; s² is attention's.
    """
    p = next(model.parameters())
    sizes = []
    model.eval()
    for seconds in SIGNALS:
        kept: Dict[int, torch.Tensor] = {}  # by address, one of each; held, so that no address is given twice

        def pack(x: torch.Tensor, kept: Dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x
            return x

        samples = int(seconds * rate)
        speech = torch.sin(torch.arange(samples, device=p.device, dtype=p.dtype))[None]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model.encode(speech, torch.tensor([samples], device=p.device))[0]
            model.ctc.ctc_lo(out[0] if isinstance(out, tuple) else out).log_softmax(-1)
        sizes.append(sum(x.untyped_storage().nbytes() for x in kept.values()))
    model.train()
    square, linear, _ = np.polyfit(SIGNALS, sizes, 2)  # the constant: parameters, position tables
    return max(0.0, float(square)), max(0.0, float(linear))


def _available(ngpu: int) -> Optional[int]:
    """Free bytes of the GPU or, without one, of the machine; None where there is no such GPU."""
    if ngpu > 0:
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return psutil.virtual_memory().available
