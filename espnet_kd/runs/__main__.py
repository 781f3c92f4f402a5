"""The work of run_all.sh, which makes the environment and hands its command line on; its --help describes the options.

    python -m espnet_kd.runs --root DIR --activate COMMAND [--only_check] -- [option of run_all.sh …]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import List, Mapping, Optional, Sequence

from espnet_kd import cli
from espnet_kd.lazy import importing_lazily
from espnet_kd.runs import plan
from espnet_kd.runs.console import Console
from espnet_kd.runs.options import Job, WrongOption, pairs, parse
from espnet_kd.runs.pool import Pool, Stopped
from espnet_kd.runs.steps import State, Step


def get_parser() -> argparse.ArgumentParser:
    """The options that run_all.sh passes besides its own command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the project's directory")
    parser.add_argument("--activate", default="", help="the command that a new shell needs before others")
    parser.add_argument("--only_check", action="store_true", help="look for mistakes in the options, and end")
    parser.add_argument("words", nargs="*", help="the command line of run_all.sh")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the job.

    Raises:
        UserError: a mistake in a method page; a step has failed.
        SystemExit: with 2 for wrong options; with the exit code of a step that has ended the job; with 128 + its number
            after a signal.
    """
    args = get_parser().parse_args(argv)
    try:
        job = parse(args.root, args.words)
        if args.only_check:
            return
        if job.is_dry_run:
            return print_commands(job)
        check_job_gpus(job)
        run = run_comparison if job.methods else run_one
        run(job)
    except WrongOption as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Stopped as e:
        print("error: stopped; the same command continues where it stopped", file=sys.stderr)
        sys.exit(128 + e.number)
    verdict = job.exp / "report/verdict.txt"
    if verdict.exists():
        print("\n" + verdict.read_text(encoding="utf-8"), end="")
    print(f"\nThe commands of README.md run in a shell after:  {args.activate}")


def print_commands(job: Job) -> None:
    """A dry run: print the commands that each step would run."""
    load_given_method(job)
    for first, last in ((1, 4), (5, 5), (6, 6), (7, 13)):
        code = subprocess.run([job.command[0], *plan.stages(first, last), *job.options]).returncode
        if code:
            sys.exit(code)


def check_job_gpus(job: Job) -> None:
    """Refuse more GPUs than this machine has, before hours of data preparation; GPUs of a cluster are not checked."""
    cmd = job.recipe / "cmd.sh"
    here = cmd.is_file() and re.search(r"^[^#\n]*cuda_cmd=.*run_local", cmd.read_text(encoding="utf-8"), re.MULTILINE)
    if here and job.settings["ngpu"] != "0":
        # The check runs in its own process, because it imports torch.
        check = f"from espnet_kd import cli; cli.run(lambda _: cli.check_gpus({int(job.settings['ngpu'])}))"
        code = subprocess.run([sys.executable, "-c", check]).returncode
        if code:
            sys.exit(code)


def page_module() -> ModuleType:
    """The module that reads method pages. Reading the options of objectives does not need torch and numpy."""
    with importing_lazily(("espnet_kd",), dict.fromkeys(("torch", "numpy"), ())):
        from espnet_kd.distill import page
    return page


def load_methods(job: Job, pages: Sequence[str]) -> List[plan.Method]:
    """Read method pages, and import the objectives that they name, as their training does in the recipe's directory.

    Raises:
        UserError: a mistake in one of them.
    """
    sys.path.insert(0, str(job.recipe))
    load_page = page_module().load_page
    loaded = []
    for name in pages:
        page = load_page(str(job.recipe / name) if name.endswith((".yaml", ".yml")) else name)
        loaded.append(plan.Method(name, page.teacher != "none", page.needs_text, page.nbest))
    sys.path.remove(str(job.recipe))
    return loaded


def load_given_method(job: Job) -> None:
    """Read the page of --method where it is given: a mistake in it is found before any work (:class:`UserError`)."""
    if any(pair[0] == "--method" for pair in pairs(job.options)):
        load_methods(job, [job.settings["method"]])


def run_one(job: Job) -> None:
    """Run one method: data, teacher and plain student, distilled student, results. The first failure ends the job."""
    load_given_method(job)
    steps, console = plan.one_method(job), Console()
    with open_pool(job, console) as pool:
        console.log(f"{len(steps)} steps in {job.recipe}; logs in {job.logs}")
        run_or_exit(job, pool, steps)


def run_comparison(job: Job) -> None:
    """Run several methods and seeds. If a step fails, the other steps run on, and the last line names it.

    Raises:
        UserError: a step has failed.
    """
    console = Console()
    pages, left_out = plan.choose_methods(job, page_module().list_pages())
    for name in left_out:
        console.log(f"{name} is left out: the recipe has no conf/train_student_{name}.yaml")
    methods = load_methods(job, pages)
    with open_pool(job, console) as pool:
        names, seeds = " ".join(Path(page).name for page in pages), " ".join(job.seeds)
        console.log(f"methods: {names}; seeds: {seeds}; logs in {job.logs}")
        run_or_exit(job, pool, [plan.DATA])
        if not all(method.needs_text for method in methods):
            plan.copy_without_text(job)
        steps = plan.comparison(job, methods)
        console.log(f"{len(steps)} runs, {job.jobs} side by side")
        states = pool.run(steps)
        failed = failures(steps, states)
        last = plan.decoding(decodable(job, steps, states))
        if last and pool.run([last])[last.name] is State.FAILED:
            failed.append(last.name)
    if failed:
        raise cli.UserError(f"failed: {'; '.join(failed)}; logs in {job.logs}")


def open_pool(job: Job, console: Console) -> Pool:
    """The pool in which the steps of the job run."""
    job.logs.mkdir(parents=True, exist_ok=True)
    return Pool(job.command, job.logs, job.jobs, console)


def run_or_exit(job: Job, pool: Pool, steps: Sequence[Step]) -> None:
    """Run steps that must all succeed; at the first failure, exit with that step's exit code."""
    for name, state in pool.run(steps, stop_at_failure=True).items():
        if state is State.FAILED:
            log = job.logs / next(step.log_name for step in steps if step.name == name)
            print(f"error: failed: {name}; the whole log is {log}", file=sys.stderr)
            sys.exit(pool.exit_codes[name])


def failures(steps: Sequence[Step], states: Mapping[str, State]) -> List[str]:
    """Names of failed steps for the last line; if the teacher has failed, one entry stands for all that need it."""
    without_teacher = states["teacher"] is State.FAILED
    # A lost step is a failure too: it was not started, because it would use outdated files of an earlier run.
    bad = (State.FAILED,) if without_teacher else (State.FAILED, State.LOST)
    names = [step.name for step in steps if states[step.name] in bad]
    return [*names, "all methods that need the teacher"] if without_teacher else names


def decodable(job: Job, steps: Sequence[Step], states: Mapping[str, State]) -> List[str]:
    """The experiments of successful steps, which can be decoded."""
    done = [step.experiment for step in steps if step.experiment and states[step.name] is State.DONE]
    return [experiment for experiment in done if (job.recipe / experiment / "config.yaml").exists()]


if __name__ == "__main__":
    cli.run(main)
