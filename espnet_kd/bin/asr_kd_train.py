"""Train a student by a method page: all its KD stages, or one of them.

Example:
    python -m espnet_kd.bin.asr_kd_train --config conf/train_student.yaml \\
        --teacher exp/teacher --kd_config progressive_fkl --output_dir exp/student_fkl \\
        <everything else that espnet2.bin.asr_train takes>

Earlier KD stages lie in OUTPUT_DIR/kd_stage<k>, the last in OUTPUT_DIR itself. The same command continues a run that
was stopped; finished KD stages are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch

from espnet_kd.cli import UserError, run
from espnet_kd.distill.checkpoints import CHECKPOINT, RECORD, finished_checkpoint, mend
from espnet_kd.distill.configuration import check_configuration, check_options
from espnet_kd.distill.page import KDStage, Page, list_pages, load_page
from espnet_kd.distill.preflight import check_files
from espnet_kd.distill.schedule import Ramp, Weight
from espnet_kd.files import locked, replacing
from espnet_kd.strict import to_yaml
from espnet_kd.targets.cache import read_manifest
from espnet_kd.targets.experiment import find_experiment, load_state, student_only

STUDENT = "student.pth"
#: What a user changes to train elsewhere.
OUTPUT_OPTION = "--output_dir (of run.sh: --tag or --expdir)"


def get_parser() -> argparse.ArgumentParser:
    """The parser of ``espnet2.bin.asr_train`` with this task's options (ESPnet's tools look for this function)."""
    from espnet_kd.tasks.asr_kd import ASRKDTask

    parser = ASRKDTask.get_parser()
    parser.usage = "%(prog)s --config YAML --teacher EXP --kd_config PAGE --output_dir DIR [option ...]"
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Train (see the module's docstring)."""
    cmd = list(sys.argv[1:] if cmd is None else cmd)
    args = check_configuration(get_parser(), cmd)
    if args.kd_config is None and not (args.collect_stats or args.print_config):
        given = [o for o in ("teacher", "target_cache", "nbest", "kd_stage", "kd_stages") if getattr(args, o)]
        if given:
            raise UserError(f"--{given[0]} needs a method: give --kd_config (known: {', '.join(list_pages())})")
    if not first_rank(args):
        logging.getLogger().setLevel(logging.ERROR)  # one process speaks for all, as ESPnet has it
    with contextlib.ExitStack() as stack:
        if args.output_dir and not args.collect_stats and not args.print_config:
            if first_rank(args):
                stack.enter_context(locked(Path(args.output_dir), OUTPUT_OPTION))
            if args.ngpu > torch.cuda.device_count() and args.dist_launcher is None:
                raise UserError(
                    f"--ngpu {args.ngpu}: torch finds {torch.cuda.device_count()} usable GPUs on this machine; give "
                    "--ngpu 0, or see what nvidia-smi says"
                )
            if args.max_epoch < 1:
                raise UserError(f"--max_epoch is {args.max_epoch}; it must be 1 or more")
            check_files(args)
            for given in args.init_param:
                load_state(given.split(":")[0])  # ESPnet would load it with all that it holds
        _run(cmd, args)


def train(cmd: List[str]) -> None:
    """ESPnet's training."""
    from espnet_kd.tasks.asr_kd import ASRKDTask

    try:
        ASRKDTask.main(cmd=cmd)
    except torch.multiprocessing.ProcessExitedException as e:
        if e.exit_code != 1:
            raise
        sys.exit(1)  # one process per GPU: that one has told why


def _run(cmd: List[str], args: argparse.Namespace) -> None:
    if args.kd_config is None or args.print_config or args.collect_stats or args.dry_run or not args.output_dir:
        # Statistics need no teacher, and without a page this is ESPnet's own training, made safe against kills.
        if args.resume and args.output_dir and first_rank(args):
            mend(Path(args.output_dir))
        train(cmd)
        if args.output_dir and not args.collect_stats and not args.dry_run and first_rank(args):
            finished_checkpoint(Path(args.output_dir), args.max_epoch, args.patience is not None)
        return
    if args.ngpu > 1 and not args.multiprocessing_distributed and args.dist_world_size is None:
        raise UserError("--ngpu above 1 needs --multiprocessing_distributed true (one process per GPU)")
    page = load_page(args.kd_config)
    if args.teacher and page.teacher == "none":
        logging.warning("%s has no teacher: --teacher is not used", page.method)
    if args.target_cache and page.teacher == "none":
        logging.warning("%s has no teacher: --target_cache is not used", page.method)
    chosen = choose_stages(page, args.kd_stages)
    if args.kd_stage is not None and args.kd_stage < 1:
        raise UserError(f"--kd_stage is {args.kd_stage}; it must be 1 or more")
    epochs = page.epochs(args.max_epoch, chosen)
    if args.kd_stage is not None and args.kd_stage not in epochs:
        logging.info("KD stage %d: nothing to do, this run has KD stages %s", args.kd_stage, chosen)
    output_dir = Path(args.output_dir)
    dirs = {k: output_dir if k == chosen[-1] else output_dir / f"kd_stage{k}" for k in chosen}
    stages = [(page.stages[k - 1], epochs[k], dirs[k], dirs.get(before)) for before, k in zip([None, *chosen], chosen)]
    todo = []
    for stage, *rest in stages:  # a mistake in the third shows before the first has trained
        check_options(get_parser(), stage.train, f"{page.path}: stages[{stage.number - 1}].train")
        check_configuration(get_parser(), stage_options(cmd, args, stage, *rest))
        if args.kd_stage in (None, stage.number):
            todo.append((stage, *rest))
    for stage, *rest in todo:
        _train_stage(cmd, args, page, stage, *rest)
    if args.kd_stage in (None, chosen[-1]) and first_rank(args):
        with replacing(output_dir / "experiment.json") as f:
            json.dump({"role": "student", "method": page.method, "kd_stages": chosen, "seed": args.seed}, f)


def first_rank(args: argparse.Namespace) -> bool:
    """Whether this process is the one of an externally launched job (torchrun, slurm) that writes."""
    from espnet2.train.distributed_utils import get_node_rank, get_rank

    if args.multiprocessing_distributed:  # one such process per machine, whose children are the ranks
        return not get_node_rank(args.dist_rank, args.dist_launcher)
    return not get_rank(args.dist_rank, args.dist_launcher)


#: Options of ESPnet that decide what is trained, on what.
DECISIVE = (
    *("frontend", "frontend_conf", "specaug", "specaug_conf", "normalize", "encoder", "encoder_conf", "decoder"),
    *("decoder_conf", "ctc_conf", "model_conf", "preprocessor_conf", "token_type", "bpemodel", "optim", "optim_conf"),
    *("scheduler", "scheduler_conf", "batch_type", "batch_bins", "batch_size", "accum_grad", "grad_clip"),
    *("train_data_path_and_name_and_type", "valid_data_path_and_name_and_type", "freeze_param", "init_param"),
)


def fingerprint(args: argparse.Namespace) -> str:
    """Short hash of the student's configuration, its tokens and the list of its training data."""
    digest = hashlib.sha256(repr([(k, getattr(args, k, None)) for k in DECISIVE]).encode())
    for path in (args.token_list, *(p for p, _, _ in args.train_data_path_and_name_and_type or [])):
        if path is not None and Path(path).is_file():
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


def choose_stages(page: Page, wanted: Optional[Sequence[int]]) -> List[int]:
    """The KD stages to train, in order (:class:`UserError` where the page has no such)."""
    chosen = sorted(set(wanted or range(1, len(page.stages) + 1)))
    if chosen[0] < 1 or chosen[-1] > len(page.stages):
        raise UserError(f"--kd_stages {chosen}: {page.path} has KD stages 1 to {len(page.stages)}")
    return chosen


def stage_options(
    cmd: List[str], args: argparse.Namespace, stage: KDStage, epochs: int, output_dir: Path, before: Optional[Path]
) -> List[str]:
    """The command line of one KD stage as an ESPnet run."""
    own = [
        *to_options(stage.train),
        *cmd,
        *("--output_dir", str(output_dir), "--max_epoch", str(epochs), "--kd_stage", str(stage.number)),
        *("--resume", "true"),
        *(["--init_param", str(before / STUDENT)] if before is not None else []),
    ]
    # The student's learning-rate schedule at the KD stage's length [ours]: a short one would never leave the warm-up.
    warmup = (args.scheduler_conf or {}).get("warmup_steps")
    if warmup and "scheduler_conf" not in stage.train:
        own += ["--scheduler_conf", f"warmup_steps={max(1, round(warmup * epochs / args.max_epoch))}"]
    # Every KD stage of an externally launched job forms a process group of its own, hence its own file.
    if args.dist_init_method.startswith("file://"):
        own += ["--dist_init_method", f"{args.dist_init_method}.kd_stage{stage.number}"]
    return own


def _train_stage(
    cmd: List[str],
    args: argparse.Namespace,
    page: Page,
    stage: KDStage,
    epochs: int,
    output_dir: Path,
    before: Optional[Path],
) -> None:
    """One KD stage: an ordinary ESPnet run that starts from the student of the one before."""
    label = f"KD stage {stage.number} ({stage.name})"
    record = {
        "method": page.method,
        "kd_stage": stage.number,
        "epochs": epochs,
        "objectives": [{"objective": o.name, "weight": str(o.weight), **o.conf} for o in stage.objectives],
        "ctc": {"weight": as_record(stage.ctc_weight), "per": stage.ctc_per},
        "seed": args.seed,
        # A cache says by itself whose it is; with it, --teacher is only compared, and may be spelled in any way.
        "teacher": args.teacher if page.teacher == "required" and not args.target_cache else [],
        "student": fingerprint(args),
        "pool": page.pool,
        "init_from": page.init_from,
        "train": stage.train,
    }
    if page.teacher == "required" and args.target_cache:
        manifest = read_manifest(args.target_cache)
        whose = {"teacher": manifest.teacher_sha256, "config": manifest.config_sha256}
        record["target_cache"] = {**whose, **asdict(manifest.policy)}
    if page.teacher_weights:
        record["teacher_weights"] = page.teacher_weights
    if stage.attention_weight != float(stage.ctc_weight != 0.0):
        record["attention"] = as_record(stage.attention_weight)
    if stage.nbest and args.nbest and Path(args.nbest).is_file():
        record["nbest"] = hashlib.sha256(Path(args.nbest).read_bytes()).hexdigest()[:12]
    if _finished(output_dir, record, label):
        logging.info("%s is finished in %s", label, output_dir)
        return
    if before is not None and not (before / STUDENT).is_file():
        raise UserError(f"{label} starts from {before / STUDENT}, which is missing: train the KD stage before it first")
    own = stage_options(cmd, args, stage, epochs, output_dir, before)
    if first_rank(args):
        output_dir.mkdir(parents=True, exist_ok=True)
        with replacing(output_dir / RECORD) as f:
            json.dump({**record, "finished": False}, f, indent=2)
        done = mend(output_dir)
        logging.info("%s: %d epochs into %s%s", label, epochs, output_dir, f", from epoch {done + 1}" if done else "")
    early = get_parser().parse_args(own).patience is not None
    train(own)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        if first_rank(args):
            _finish(output_dir, page, record, early)
        torch.distributed.barrier()
        if not args.dist_init_method.startswith("file://"):
            # The next KD stage meets in a file: torchrun's store outlives a group, and would give it old addresses.
            name = [uuid.uuid4().hex]
            torch.distributed.broadcast_object_list(name, src=0)
            args.dist_init_method = f"file://{output_dir.resolve()}/.dist_init_{name[0]}"
        torch.distributed.destroy_process_group()
    elif first_rank(args):
        _finish(output_dir, page, record, early)
    else:
        await_finish(output_dir)


def await_finish(output_dir: Path, seconds: float = 600.0) -> None:
    """Wait, on another machine, until the first one has written what the next KD stage starts from.

    Raises:
        UserError: it did not within ``seconds``.
    """
    for _ in range(math.ceil(seconds / 0.5)):
        with contextlib.suppress(OSError, ValueError):
            if json.loads((output_dir / RECORD).read_text(encoding="utf-8"))["finished"]:
                return
        time.sleep(0.5)
    raise UserError(f"the first machine did not finish {output_dir} in {seconds:.0f} s; do both see this directory?")


def as_record(weight: Weight) -> Union[float, Dict[str, Any]]:
    """A weight as JSON has it."""
    return asdict(weight) if isinstance(weight, Ramp) else weight


def _finished(output_dir: Path, record: Dict[str, Any], label: str) -> bool:
    """Whether this KD stage is done; refuse a directory that holds a run with other settings."""
    try:
        found = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as e:
        raise UserError(f"{output_dir / RECORD} is damaged ({e}); remove {output_dir} to train {label} anew") from e
    finished = found.pop("finished", False)
    record = json.loads(json.dumps(record))  # as it comes back: tuples are lists
    differing = [k for k in {**record, **found} if found.get(k) != record.get(k)]
    # A directory in which nothing was trained yet may take a mended command.
    if differing and (output_dir / CHECKPOINT).exists():
        what = "; ".join(f"{k}: {found.get(k)} there, {record.get(k)} now" for k in differing)
        raise UserError(f"{output_dir} holds {label} with other settings ({what}); choose another {OUTPUT_OPTION}")
    return finished and (output_dir / STUDENT).is_file()


def _finish(output_dir: Path, page: Page, record: Dict[str, Any], early: bool) -> None:
    """Write the student-only file that the next KD stage starts from, then the record."""
    states = finished_checkpoint(output_dir, record["epochs"], early)
    state = load_state(find_experiment(output_dir)[1]) if page.init_from == "best" else states["model"]
    with replacing(output_dir / STUDENT, "wb") as f:
        torch.save(student_only(state), f)
    with replacing(output_dir / RECORD) as f:
        json.dump({**record, "finished": True}, f, indent=2)


def to_options(train: Mapping[str, Any]) -> List[str]:
    """A page's ``train:`` block as command line options, so that ESPnet's parser checks them."""
    options: List[str] = []
    for key, value in train.items():
        if isinstance(value, Mapping):
            for inner, v in value.items():
                options += [f"--{key}", f"{inner}={to_yaml(v)}"]
        elif isinstance(value, list):
            options += [f"--{key}", *(",".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)]
        else:
            options += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return options


if __name__ == "__main__":
    run(main)
