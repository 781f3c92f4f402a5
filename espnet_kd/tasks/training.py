"""One training from its options to its end: checks, the directory's record, ESPnet's trainer."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch

from espnet_kd.cli import UserError, refuse_empty
from espnet_kd.distill.checks import check_command
from espnet_kd.distill.checks.configuration import check_configuration, check_options
from espnet_kd.distill.checks.options import check_ranges
from espnet_kd.distill.page import list_pages, load_page
from espnet_kd.distill.plan import Plan, make_plan
from espnet_kd.distill.record import OUTPUT_OPTION, claim, claim_plain, make_record, write_record
from espnet_kd.distill.train_options import to_options
from espnet_kd.experiments.checkpoints import check_ended, mend
from espnet_kd.files import locked, replacing
from espnet_kd.tasks.asr_kd import ASRKDTask


def train_student(cmd: Sequence[str]) -> None:
    """Train as the options of ``asr_kd_train`` describe: a student by a method page, or any plain model.

    Raises:
        UserError: whatever the user can correct in the options, the data or the directory.
    """
    cmd = list(cmd)
    parser = ASRKDTask.get_parser()
    args = check_configuration(parser, cmd)
    refuse_empty(args, may_be=[a.dest for a in parser._actions if a.default == ""])
    if args.kd_config is None and not (args.collect_stats or args.print_config):
        given = [o for o in ("teacher", "target_cache", "nbest", "kd_stage", "kd_stages") if getattr(args, o)]
        if given:
            raise UserError(f"--{given[0]} needs a method: give --kd_config (known: {', '.join(list_pages())})")
    if not first_rank(args):
        logging.getLogger().setLevel(logging.ERROR)  # one process logs for all, as in ESPnet
    with contextlib.ExitStack() as stack:
        if args.output_dir and not args.collect_stats and not args.print_config:
            if first_rank(args):
                stack.enter_context(locked(Path(args.output_dir), OUTPUT_OPTION))
            check_command(args)
        _run(cmd, args)


def train(cmd: List[str]) -> None:
    """Run ESPnet's training."""
    try:
        ASRKDTask.main(cmd=cmd)
    except torch.multiprocessing.ProcessExitedException as e:
        if e.exit_code != 1:
            raise
        sys.exit(1)  # one process per GPU: that process has printed the error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Without this, a process of an externally launched job may abort when another one ends before it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _run(cmd: List[str], args: argparse.Namespace) -> None:
    if args.kd_config is None or args.print_config or args.collect_stats or not args.output_dir:
        # Statistics need no teacher, and without a page this is ESPnet's own training, made safe against kills by mend.
        trains = args.output_dir and not (args.print_config or args.collect_stats)
        if trains:
            claim_plain(args, ASRKDTask.get_parser())
        if trains and args.dry_run:
            _try_out(cmd, Path(args.output_dir))
            return
        if args.resume and args.output_dir and first_rank(args):
            mend(Path(args.output_dir))
        train(cmd)
        if trains and first_rank(args):
            check_ended(Path(args.output_dir), args.max_epoch, args.patience is not None)
        return
    if args.ngpu > 1 and not args.multiprocessing_distributed and args.dist_world_size is None:
        raise UserError("--ngpu above 1 needs --multiprocessing_distributed true (one process per GPU)")
    page = load_page(args.kd_config)
    for option in ("teacher", "target_cache"):
        if getattr(args, option) and page.teacher == "none":
            logging.warning("%s has no teacher: --%s is not used", page.method, option)
    if args.kd_stage is not None and args.kd_stage < 1:
        raise UserError(f"--kd_stage is {args.kd_stage}; it must be 1 or more")
    plan = make_plan(page, args.max_epoch, args.kd_stages)
    if args.kd_stage not in (None, *plan.numbers):
        logging.info("KD stage %d: nothing to do, this run has KD stages %s", args.kd_stage, plan.numbers)
        return
    check_options(ASRKDTask.get_parser(), plan.options, f"{page.path}: train")
    cmd = [*to_options(plan.options), *cmd, "--resume", "true"]
    args = check_configuration(ASRKDTask.get_parser(), cmd)
    check_ranges(args)  # with the page's options
    output_dir = Path(args.output_dir)
    record = make_record(args, ASRKDTask.get_parser(), plan)
    done = claim(output_dir, record, plan)
    if args.dry_run:
        _try_out(cmd, output_dir)
        return
    number = args.kd_stage or plan.numbers[-1]
    ended = number == plan.numbers[-1]
    if number <= done:
        logging.info("KD stage %d is finished in %s", number, output_dir)
    else:
        if first_rank(args):
            _prepare(output_dir, record, plan, done, number)
        train([*cmd, "--kd_stage", str(number)])
        if first_rank(args):
            check_ended(output_dir, plan.end_epoch(number), ended and args.patience is not None)
            write_record(output_dir, record, number, ended)
    if ended and first_rank(args):
        with replacing(output_dir / "experiment.json") as f:
            json.dump({"role": "student", "method": page.method, "kd_stages": plan.numbers, "seed": args.seed}, f)


def _prepare(output_dir: Path, record: Dict[str, Any], plan: Plan, done: int, number: int) -> None:
    """Make the directory ready for training up to the end of KD stage ``number``, and write the record."""
    reached = mend(output_dir)
    done = max((n for n in plan.numbers if n <= done and plan.end_epoch(n) <= reached), default=0)
    write_record(output_dir, record, done, False)
    names = ", ".join(f"{p.stage.number} ({p.stage.name})" for p in plan.phases if done < p.stage.number <= number)
    since = f", from epoch {reached + 1}" if reached else ""
    logging.info(
        "KD stage %s: to epoch %d of %d in %s%s", names, plan.end_epoch(number), plan.max_epoch, output_dir, since
    )


def _try_out(cmd: List[str], output_dir: Path) -> None:
    """Build all that a training needs, in a directory of its own: a dry run of ESPnet replaces config.yaml, too."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dry_run.", dir=output_dir) as scratch:
        train([*cmd, "--output_dir", scratch])


def first_rank(args: argparse.Namespace) -> bool:
    """Whether this process is the one of an externally launched job (torchrun, slurm) that writes."""
    from espnet2.train.distributed_utils import get_node_rank, get_rank

    if args.multiprocessing_distributed:  # one such process per machine, whose children are the ranks
        return not get_node_rank(args.dist_rank, args.dist_launcher)
    return not get_rank(args.dist_rank, args.dist_launcher)
