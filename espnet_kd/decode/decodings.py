"""Decodings of experiments: their directories, their inputs, and the decoding itself."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import logging
import math
import os
import time
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Union

from espnet_kd import cli
from espnet_kd.data.datadir import read_map
from espnet_kd.experiments.record import Record
from espnet_kd.files import PathLike, check_writable, read_json, replacing, sha256_of

#: The models that `espnet_kd.experiments.models.find_experiment` chooses from.
MODELS = ("model.pth", "*.ave.pth", "*.ave_*best.pth", "*.best.pth", "latest.pth", "student.pth")
#: Suffixes of files that are accepted as an experiment: a model beside its config.yaml, or a zip that ESPnet packed.
FILES = (".pth", ".zip")
#: Files that `asr_kd_score` writes beside the hypotheses.
SCORES = ("score.json", "score.txt", "per_utt.tsv")
#: What follows the name of a test set without transcripts, whose reference is the output of the teacher.
REFERENCE_IS_TEACHER = " (reference: teacher)"
#: The numeric options of a search.
SEARCH = ("beam_size", "nbest", "beam_size_token", "ngram_weight", "ctc_weight")
BEAM_SIZE_TOKEN_HELP = "likeliest tokens of a frame that a beam search tries"


def decode_experiments(args: argparse.Namespace) -> None:
    """Decode every data dir with every experiment, as the options of ``asr_kd_inference`` describe.

    Raises:
        UserError: whatever the user can correct in the options, the experiments or the data.
    """
    if not 0 <= args.ctc_weight <= 1:
        raise cli.UserError(f"--ctc_weight is {args.ctc_weight}; it must be between 0 and 1")
    if not math.isfinite(args.ngram_weight):
        raise cli.UserError(f"--ngram_weight is {args.ngram_weight}; it must be a number")
    if args.ngram_file and args.beam_size == 1:
        raise cli.UserError("--ngram_file has no effect on greedy decoding; give --beam_size, e.g. 10")
    if args.ctc_weight < 1:
        args.nj = 1  # ESPnet's search uses one thread only, but recipes pass --nj in any case
    places = list_decodings(args.expdir, args.data_dir, args.output_dir)
    search = {name: getattr(args, name) for name in SEARCH}
    ngram = {"ngram_sha256": _hash_ngram(args.ngram_file) if args.ngram_file else None}
    # the decodings that are left to do: {experiment: [(data dir, output dir, inputs)]}
    todo: Dict[str, List[Tuple[Path, Path, Dict]]] = {}
    for expdir, data_dir, output_dir in places:
        inputs = {**describe_inputs(Path(expdir), data_dir), "search": {**search, **ngram}}
        record = record_of(output_dir)
        if not args.force and record.is_of(inputs) and not audio_has_changed(record.path, [data_dir]):
            logging.info("%s is decoded already with this model, data and search (--force decodes again)", output_dir)
        else:
            todo.setdefault(expdir, []).append((data_dir, output_dir, inputs))
    if not todo:
        return
    for decodings in todo.values():
        for _, output_dir, _ in decodings:
            check_writable(output_dir)

    start = time.perf_counter()
    # Imported here, so that --help, mistakes in the command line and finished decodings do not wait for the import.
    from espnet_kd.experiments.models import find_experiment
    from espnet_kd.inference.recognise import choose_device, read_utterances

    device = choose_device(args)
    found = {expdir: find_experiment(expdir) for expdir in todo}  # find all before the first is decoded
    for number, (expdir, decodings) in enumerate(todo.items(), 1):
        config, model_file = found[expdir]
        if len(todo) > 1:
            logging.info("experiment %d of %d: %s", number, len(todo), expdir)
        recogniser = _load(config, model_file, args, device)
        _warm_up(recogniser)
        load_seconds = time.perf_counter() - start
        for data_dir, output_dir, inputs in decodings:
            utterances = read_utterances(data_dir, recogniser.rate)
            facts = {
                "model": str(model_file),
                "data_dir": str(data_dir),
                **search,
                "ngram_file": args.ngram_file,
                "load_seconds": round(load_seconds, 3),
                "inputs": inputs,
            }
            _decode(recogniser, utterances, output_dir, facts, args)
        start = time.perf_counter()


def check_search_options(args: argparse.Namespace) -> None:
    """Refuse search options that are out of range, before anything is loaded.

    Raises:
        UserError: naming the option and its range.
    """
    cli.check_positive(args, "nj", "nbest", "beam_size", "beam_size_token")
    if args.beam_size < args.nbest:
        raise cli.UserError(f"--beam_size is {args.beam_size}; for --nbest {args.nbest} it must be at least as large")


def list_decodings(
    expdirs: Sequence[str], data_dirs: Sequence[str], output_dir: Optional[str] = None
) -> List[Tuple[str, Path, Path]]:
    """Every (experiment, data dir, its output directory), once also if it is given twice.

    Raises:
        UserError: ``output_dir`` is given for several decodings, or two would be written to one directory.
    """
    if output_dir and (len(expdirs) > 1 or len(data_dirs) > 1):
        raise cli.UserError("--output_dir goes with one --expdir and one --data_dir; leave it out for several")
    places: List[Tuple[str, Path, Path]] = []
    taken: Dict[str, str] = {}
    for expdir in expdirs:
        for data_dir in data_dirs:
            place = Path(output_dir) if output_dir else decode_dir(expdir, data_dir)
            pair = f"{os.path.normpath(expdir)} on {os.path.normpath(data_dir)}"
            if pair in taken.values():
                continue
            other = taken.setdefault(os.path.abspath(place), pair)
            if other != pair:
                raise cli.UserError(f"{other} and {pair} would both be in {place}; give --output_dir, one at a time")
            places.append((expdir, Path(data_dir), place))
    return places


def decode_dir(expdir: Union[str, Path], data_dir: Union[str, Path]) -> Path:
    """``EXP/decode_<name of the data dir>`` of EXP, EXP/FILE.pth, EXP/FILE.zip or EXP/export."""
    path = Path(expdir)
    if path.suffix in FILES:
        path = path.parent
    if path.name == "export":
        path = path.parent
    return path / f"decode_{os.path.basename(os.path.abspath(data_dir))}"


def _load(config: Path, model_file: Path, args: argparse.Namespace, device: str):
    """Load an experiment, and return a recogniser that maps a batch of samples to the N-best of each utterance."""
    from espnet_kd.experiments.models import load_model
    from espnet_kd.inference.recognise import Recogniser

    options = {name: getattr(args, name) for name in ("beam_size", "nbest", "ngram_file", "ngram_weight")}
    if args.ctc_weight < 1:
        from espnet_kd.decode.stock import StockRecogniser

        return StockRecogniser(config, model_file, device, ctc_weight=args.ctc_weight, **options)
    model, train_args = load_model(config, model_file, device)
    if args.beam_size == 1:
        return Recogniser(model, train_args, config.parent)
    from espnet_kd.decode.beam_recognise import BeamRecogniser  # greedy decoding does not need its libraries

    options["beam_size_token"] = args.beam_size_token
    return BeamRecogniser(model, train_args, config.parent, search_jobs=args.search_jobs, **options)


def _decode(recogniser, utterances: List, output_dir: Path, facts: Dict, args: argparse.Namespace) -> None:
    """Decode one data dir; ``facts`` and the measurements go to decode.json."""
    import torch

    from espnet_kd.inference.recognise import recognise

    hypotheses, timing = recognise(recogniser, utterances, args.batch_seconds, args.nj)
    record = record_of(output_dir)
    record.begin()
    for name in SCORES:  # the error rates of an earlier decoding must not be reported as those of this one
        (output_dir / name).unlink(missing_ok=True)
    write_recog_dirs(output_dir, hypotheses, args.nbest)
    rtf = timing.decode_seconds / timing.audio_seconds if timing.audio_seconds else None
    facts = {
        "params": recogniser.num_parameters,
        "utterances": len(utterances),
        "audio_seconds": round(timing.audio_seconds, 3),
        "decode_seconds": round(timing.decode_seconds, 4),
        "rtf": rtf,
        "read_seconds": round(timing.read_seconds, 4),
        "threads": args.nj * torch.get_num_threads(),
        "search_processes": args.search_jobs if args.beam_size > 1 and args.ctc_weight == 1 else 0,
        "device": torch.cuda.get_device_name() if args.ngpu else "cpu",
        "batch_seconds": args.batch_seconds,
        **_versions(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "audio_sha256": hash_audio(with_times(u.path for u in utterances)),
        **facts,
    }
    record.finish(facts.pop("inputs"), **facts)
    logging.info("%d utterances → %s, real-time factor %s", len(utterances), output_dir, rtf and f"{rtf:.5f}")


def describe_inputs(experiment: Path, data_dir: Path) -> Dict:
    """The inputs of a decoding of EXP or EXP/FILE.pth: hashes of the candidate models, and of wav.scp.

    Contents are hashed, not times, so that an export that is written again counts as the same model.

    Raises:
        UserError: the data dir has no wav.scp.
    """
    try:
        wav_scp = hashlib.sha256((data_dir / "wav.scp").read_bytes()).hexdigest()
    except OSError as e:
        raise cli.UserError(f"cannot read {data_dir}/wav.scp: {e.strerror}; is --data_dir a data dir?") from e
    if experiment.suffix in FILES:
        directory, files = experiment.parent, [experiment]
    else:
        directory, files = experiment, sorted({f for pattern in MODELS for f in experiment.glob(pattern)})
    hashes: Dict[Path, str] = {}
    models = {}
    for file in (directory / "config.yaml", *files):
        if file.is_file():
            target = file.resolve()  # most names in an ESPnet experiment are links to a few files
            if target not in hashes:
                hashes[target] = sha256_of(target)
            models[file.name] = hashes[target]
    return {"models": models, "wav_scp_sha256": wav_scp}


def audio_has_changed(record: Path, data_dirs: Iterable[PathLike], most: Optional[int] = None) -> bool:
    """Whether the audio of data dirs has another content than when it was decoded, as ``record`` describes.

    A corpus that is made or formatted again keeps the names in wav.scp. Contents are compared only if a file was
    written after the decoding. Audio that was removed counts as unchanged, and so does that of a decoding of an earlier
    version, which has no hash.
    """
    known, decoded = (read_json(record) or {}).get("audio_sha256"), record.stat().st_mtime_ns
    try:
        files = audio_of(data_dirs, most)
        return bool(known) and any(time > decoded for _, time in files) and hash_audio(files) != known
    except OSError:
        return False


def audio_of(data_dirs: Iterable[PathLike], most: Optional[int] = None) -> Tuple[Tuple[str, int], ...]:
    """The audio files of data dirs, :func:`with_times`; if there are more than ``most``, every second, third …"""
    files = [file for data_dir in data_dirs for file in read_map(Path(data_dir) / "wav.scp").values()]
    return with_times(files[:: math.ceil(len(files) / most)] if most and files else files)


def with_times(files: Iterable[str]) -> Tuple[Tuple[str, int], ...]:
    """Each file with the time of its last change, which, unlike that of its content, is new in a copy."""
    return tuple((file, os.stat(file).st_ctime_ns) for file in files)


@functools.lru_cache(maxsize=1)
def hash_audio(files: Tuple[Tuple[str, int], ...]) -> str:
    """The hash of the contents of files, which are given with the times of their last changes."""
    digest = hashlib.sha256()
    for file, _ in files:
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()


def _hash_ngram(path: str) -> str:
    try:
        return sha256_of(path)
    except OSError as e:
        raise cli.UserError(f"cannot read --ngram_file {path}: {e.strerror}") from e


def record_of(output_dir: Path) -> Record:
    """The record of a decoding: its inputs and measurements."""
    return Record(output_dir / "decode.json", key="inputs")


def write_recog_dirs(output_dir: Path, hypotheses: Dict[str, List], nbest: int) -> None:
    """Write text, token, token_int and score of ``{utt_id: N-best}``, as ESPnet does but with plain scores.

    An utterance with fewer than n hypotheses is not in ``<n>best_recog``. Files of an earlier search with more than
    ``nbest`` hypotheses are removed.
    """
    columns = {
        "text": lambda h: h.text,
        "token": lambda h: " ".join(h.tokens),
        "token_int": lambda h: " ".join(map(str, h.token_ids)),
        "score": lambda h: f"{h.score:.6f}",
    }
    for n in range(nbest):
        for name, show in columns.items():
            with replacing(output_dir / f"{n + 1}best_recog" / name) as f:
                f.writelines(f"{utt_id} {show(found[n])}\n" for utt_id, found in hypotheses.items() if n < len(found))
    n = nbest + 1
    while (left := output_dir / f"{n}best_recog").is_dir():
        for name in columns:
            (left / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a directory with other files is kept
            left.rmdir()
        n += 1


def _warm_up(recogniser) -> None:
    """Decode half a second of silence, so that one-time costs stay out of the real-time factor."""
    import numpy as np

    recogniser([np.zeros((recogniser.rate or 16000) // 2, dtype=np.float32)])


def _versions() -> Dict[str, str]:
    import espnet2
    import torch

    return {"torch": torch.__version__, "espnet": espnet2.__version__}
