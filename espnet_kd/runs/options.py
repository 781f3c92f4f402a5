"""The command line of run_all.sh: its own options are taken out, the others go to every call of run.sh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import DefaultDict, Iterator, Sequence, Tuple

from espnet_kd.cli import UserError

OWN = ("methods", "seeds", "jobs", "recipe")
#: Options of run.sh: those that only run_all.sh sets, those that --methods excludes, and those that need no value.
OF_RUN_SH = ("--stage", "--stop_stage", "--show_options", "--experiments")
SAME_FOR_ALL = ("--method", "--kd_stages", "--seed", "--tag", "--pseudo", "--untranscribed")
FLAGS = ("--dry_run", "--show_options")


class WrongOption(UserError):
    """A mistake in the command line: exit code 2, while other errors have 1."""


@dataclass(frozen=True)
class Job:
    """A job, as the command line describes it."""

    root: Path  #: directory of the project
    recipe: Path  #: directory of run.sh
    options: Tuple[str, ...]  #: options for every call of run.sh
    settings: DefaultDict[str, str]  #: {option of run.sh: the value that run.sh uses}
    methods: str  #: value of --methods; empty: only the method of run.sh
    seeds: Tuple[str, ...]
    jobs: int  #: number of steps that may run at the same time

    @property
    def command(self) -> Tuple[str, ...]:
        """The beginning of every call of run.sh."""
        return (str(self.recipe / "run.sh"), *self.options)

    @property
    def exp(self) -> Path:
        """The absolute path of the directory of experiments."""
        return (self.recipe / self.settings["expdir"]).resolve()

    @property
    def logs(self) -> Path:
        """The directory with a log of each step."""
        return self.exp / "run_all"

    @property
    def is_dry_run(self) -> bool:
        """Whether commands are printed only."""
        return self.settings["dry_run"] == "true"


def parse(root: Path, words: Sequence[str]) -> Job:
    """Read the command line.

    Raises:
        WrongOption: an option, which the message names, is wrong.
        SystemExit: run.sh refuses an option, and has written why.
    """
    own = dict.fromkeys(OWN, "")
    options: Tuple[str, ...] = ()
    for pair in pairs(words):
        name = pair[0].removeprefix("--")
        if pair[0].startswith("--") and name in own:
            if len(pair) < 2 or not pair[1].strip():
                raise WrongOption(f"option {pair[0]} needs a value")
            own[name] = pair[1]
        else:
            options += pair
    recipe = root / "egs2" / (own["recipe"] or "mini") / "asr_kd1"
    if not os.access(recipe / "run.sh", os.X_OK):
        known = " ".join(sorted(path.parents[1].name for path in root.glob("egs2/*/asr_kd1/run.sh")))
        raise WrongOption(f"--recipe {own['recipe']}: there is no recipe of that name; known: {known}")
    if not own["methods"] and (own["seeds"] or own["jobs"]):
        raise WrongOption("--seeds and --jobs go with --methods")
    names = [pair[0] for pair in pairs(options)]
    for name in names:
        if name in OF_RUN_SH:
            raise WrongOption(f"{name} is for run.sh of a recipe")
    settings = read_run_settings(recipe / "run.sh", options)
    # By default two trainings run at the same time if there are two cores, but only one on a GPU.
    jobs = own["jobs"] or ("2" if (os.cpu_count() or 1) >= 2 and settings["ngpu"] == "0" else "1")
    job = Job(root, recipe, options, settings, own["methods"], tuple(own["seeds"].split() or ["0"]), as_jobs(jobs))
    if job.methods:
        check_comparison(job, names)
    return job


def pairs(words: Sequence[str]) -> Iterator[Tuple[str, ...]]:
    """Yield options with their values; a word that is not an option is yielded like one, and run.sh refuses it."""
    i = 0
    while i < len(words):
        alone = words[i] in FLAGS and (i + 1 == len(words) or words[i + 1].startswith("--"))
        yield tuple(words[i : i + (1 if alone else 2)])
        i += 1 if alone else 2


def as_jobs(text: str) -> int:
    """The value of --jobs."""
    if not re.fullmatch("[1-9][0-9]*", text):
        raise WrongOption(f"--jobs must be a number above 0, not {text!r}")
    return int(text)


def check_comparison(job: Job, names: Sequence[str]) -> None:
    """Refuse options that cannot be given with --methods (:class:`WrongOption`).

    Args:
        names: names of the given options of run.sh.
    """
    if job.is_dry_run:
        raise WrongOption("--dry_run is for one method: give it without --methods, or to run.sh")
    for seed in job.seeds:
        if not re.fullmatch("0|[1-9][0-9]*", seed):
            raise WrongOption(f"--seeds must be whole numbers, not {seed!r}")
        if job.seeds.count(seed) > 1:
            raise WrongOption(f"--seeds names {seed} twice")
    for name in names:
        if name in SAME_FOR_ALL:
            raise WrongOption(f"{name} cannot be given with --methods: its runs differ in nothing but method and seed")


def read_run_settings(run: Path, options: Sequence[str]) -> DefaultDict[str, str]:
    """The values that a recipe's run.sh uses: {option: value}; the value is empty if run.sh does not print the option.

    Raises:
        SystemExit: with the exit code of run.sh, which has written what is wrong.
    """
    done = subprocess.run([str(run), "--show_options", "true", *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    pairs = (line.partition("=") for line in done.stdout.splitlines() if "=" in line)
    return defaultdict(str, {name: value for name, _, value in pairs})
