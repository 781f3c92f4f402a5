"""Every fenced ``sh`` command of every README is run, or is checked to be accepted as it stands.

The line before a fence is its mark: ``<!-- long -->`` (runs for minutes or more) or ``<!-- data -->`` (needs a corpus,
an experiment or a cluster). bash reads marked fences in a sandbox where stand-ins replace the commands and record each
call: its directory and its words, after expansion of all variables, arrays and loops. Each call is then checked: stages
by ``run.sh --dry_run``, the printed commands and every Python command by their parsers. Unmarked fences are run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

import pytest

from espnet_kd.bin import asr_kd_page, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.page import list_pages, load_page

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(
    r"^## (?P<heading>[^\n]+)|(?:^<!-- (?P<mark>\w+) -->\n)?^```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
#: Commands of others, and why they are not run; for the last three, the command that they start is checked.
THIRD_PARTY = {
    "pip": "installs from the network",
    "espnet/run.sh": "asr.sh of an ESPnet checkout; its --asr_args are checked",
    "srun": "slurm",
    "torchrun": "PyTorch's launcher",
}
#: Where the fences below a heading start, by the beginning of "README#heading"; a recipe's fences start in the recipe.
HOMES = {
    "README.md": ".", "tests/": ".", "conf/": "egs2/an4/asr_kd1",
    "egs2/TEMPLATE/README.md#Inside an ESPnet checkout": "espnet/egs2/an4/asr1",
    "egs2/": "egs2/an4/asr_kd1",
}  # fmt: skip

#: The stand-in prints the recorded page when run.sh asks for a method page, and records every other call.
STUB = """#!/usr/bin/env bash
if [ "${2:-}" = espnet_kd.bin.asr_kd_page ]; then cat "${PAGES}/$(basename "$3" .yaml)"; exit; fi
printf '%s\\0' "$(($# + 3))" "${FENCE:-0}" "${PWD}" "$0" "$@" >>"${CALLS}"
"""


@dataclass
class Fence:
    """One fence: its README, its line, its mark, its commands, and the directory where they begin."""

    readme: str
    line: int
    mark: str
    text: str
    home: str


@dataclass
class Call:
    """One command as bash would start it, from a directory below the project."""

    place: str
    words: List[str]


def read_fences() -> List[Fence]:
    listed = subprocess.run(["git", "ls-files", "*README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for readme in listed.stdout.split():
        heading, text = "", (ROOT / readme).read_text(encoding="utf-8")
        recipe = readme.endswith("/asr_kd1/README.md")
        for match in FENCE.finditer(text):
            heading = match["heading"] or heading
            if not match["heading"]:
                home = next(home for start, home in HOMES.items() if f"{readme}#{heading}".startswith(start))
                home = str(Path(readme).parent) if recipe else home
                line = text.count("\n", 0, match.start("text"))
                found.append(Fence(readme, line, match["mark"] or "", match["text"], home))
    return found


FENCES = read_fences()


class Sandbox:
    """Two copies of the recipes, one to run and one with stand-ins, and the calls that the READMEs' commands make."""

    def __init__(self, directory: Path):
        self.real, self.stubs, self.bin = (directory / name for name in ("real", "stubs", "bin"))
        produced = shutil.ignore_patterns("data", "dump*", "exp*", "downloads")
        for tree in (self.real, self.stubs):
            shutil.copytree(ROOT / "egs2", tree / "egs2", symlinks=True, ignore=produced)
            shutil.copytree(ROOT / "tests/benchmarks", tree / "tests/benchmarks")
            shutil.copytree(ROOT / "conf", tree / "conf")
            (tree / "tests/gpu").mkdir()
            for name in ("run_all.sh", "tests/run.sh", "tests/gpu/run.sh"):
                shutil.copy(ROOT / name, tree / name)
            # Files that the READMEs expect the reader to have: a student's YAML, a checkout of ESPnet.
            shutil.copy(ROOT / "egs2/mini/asr_kd1/conf/train_student.yaml", tree)
            (tree / "espnet/egs2/an4/asr1/conf").mkdir(parents=True)
            (tree / "espnet/egs2/an4/asr1/run.sh").touch()
        self.bin.mkdir()
        scripts = [p for p in self.stubs.rglob("*.sh") if p.name in ("run.sh", "run_all.sh")]
        for path in [*scripts, *(self.bin / name for name in ("python", "python3", "pip", "srun", "torchrun"))]:
            path.write_text(STUB)
            path.chmod(0o755)
        (directory / "pages").mkdir()
        for name in [*list_pages(), *map(str, (ROOT / "tests/benchmarks").glob("*.yaml"))]:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                asr_kd_page.main([name])
            (directory / "pages" / Path(name).stem).write_text(said.getvalue())
        self.calls = directory / "calls"
        self.env = {
            **os.environ,
            "VIRTUAL_ENV": sys.prefix, "ESPNET_KD_INSTALLED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "PAGES": str(directory / "pages"), "CALLS": str(self.calls), "TMPDIR": str(directory),
        }  # fmt: skip

    def bash(self, script: str, place: str, stubs: bool) -> subprocess.CompletedProcess:
        first = self.bin if stubs else Path(sys.prefix) / "bin"
        env = {**self.env, "PATH": f"{first}:{os.environ['PATH']}"}
        tree = self.stubs if stubs else self.real
        # CDPATH lets cd take paths from the project's top, which some READMEs use in other directories.
        return subprocess.run(
            ["bash", "-eu", "-c", f"export CDPATH=.:{tree}\n{script}"], cwd=tree / place, env=env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip

    def recorded(self) -> Iterator[Tuple[int, Call]]:
        """Yield the calls that the stand-ins have recorded since the last time, with the numbers of their fences."""
        words = self.calls.read_text().split("\0") if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        while len(words) > 1:
            count, number, place, *rest = words[: int(words[0]) + 1]
            words = words[int(count) + 1 :]
            tree = self.stubs if place.startswith(str(self.stubs)) else self.real
            yield int(number), Call(str(Path(place).relative_to(tree)), [re.sub(r"^.*/bin/", "", rest[0]), *rest[1:]])

    def calls_of(self, readme: str) -> Dict[int, List[Call]]:
        """The calls that bash makes for each fence of a README, when it reads the fences in order as one script."""
        fences = [f for f in FENCES if f.readme == readme]
        script = []
        for fence in fences:
            script.append(f"cd {shlex.quote(str(self.stubs / fence.home))}; export FENCE={fence.line}")
            # `<its options>` becomes `…`, because bash would take it for redirections.
            script.append(re.sub(r"<[a-z ]+>", "…", fence.text))
        done = self.bash("\n".join(script), ".", stubs=True)
        assert done.returncode == 0, f"{readme}: bash does not get through: {done.stdout}"
        calls: Dict[int, List[Call]] = {f.line: [] for f in fences}
        for number, call in self.recorded():
            calls[number].append(call)
        return calls

    # ---- checks of calls ----

    def check(self, call: Call) -> None:
        name, *words = call.words
        words = [word for word in words if word != "…"]
        if name in THIRD_PARTY:
            if "-m" in words:
                self.check_python(words[words.index("-m") :], call.place)
        elif name == "./run.sh" and call.place.startswith("espnet/"):
            options = dict(zip(words[::2], words[1::2]))
            assert options.get("--python", "python3 -m espnet_kd") == "python3 -m espnet_kd"
            self.parse(asr_kd_train, options.get("--asr_args", "").split(), call.place)
        elif name in ("python", "python3"):
            self.check_python(words, call.place)
        elif name == "./run.sh":
            self.check_stages(words, call.place)
        elif name == "./run_all.sh":
            self.check_run_all(words, call.place)
        else:
            assert name in ("./tests/run.sh", "./tests/gpu/run.sh") and call.place == ".", f"unknown: {name} {words}"
            self.check_help(name.removeprefix("./"))  # further words are pytest's

    def check_help(self, script: str) -> str:
        done = self.bash(f"./{script} --help", ".", stubs=False)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stdout
        return done.stdout

    def check_run_all(self, words: Sequence[str], place: str) -> None:
        known, stages = self.check_help("run_all.sh"), []
        own = {"--recipe": "mini"}
        for option, value in zip(words[::2], words[1::2]):
            if option in ("--recipe", "--methods", "--seeds", "--jobs"):
                assert option in known
                own[option] = value
            else:
                stages += [option, value]
        assert place == "." and len(words) % 2 == 0
        for method in own.get("--methods", "all").replace("all", "").split():
            load_page(method)
        assert all(seed.isdigit() for seed in own.get("--seeds", "0").split())
        self.check_stages(stages, f"egs2/{own['--recipe']}/asr_kd1")

    def check_stages(self, words: Sequence[str], place: str) -> None:
        """Run the real script as a dry run, and check every command that it prints."""
        script = shlex.join(["./run.sh", *words, *([] if "--dry_run" in words else ["--dry_run"])])
        done = self.bash(f"export PATH={self.bin}:$PATH; {script}", place, stubs=False)
        said = [shlex.split(line) for line in done.stdout.splitlines() if line[:1] not in ("", "#")]
        assert done.returncode == 0 and said, f"{script}: {done.stdout}"
        self.calls.unlink(missing_ok=True)
        for printed in said:
            if "local/data.sh" in printed:
                line = f"export PATH={self.bin}:$PATH; {shlex.join(printed)}"
                assert self.bash(line, place, stubs=False).returncode == 0
                ((_, call),) = self.recorded()
                self.check_python(call.words[1:], place)
            elif "-m" in printed:
                at = len(printed) - 1 - printed[::-1].index("-m")  # a launcher's -m comes before the command's
                self.check_python(printed[at:], place)
            else:
                assert (self.real / place / printed[0]).exists(), printed

    def check_python(self, words: Sequence[str], place: str) -> None:
        if words[0] == "-m":
            self.parse(importlib.import_module(words[1]), words[2:], place)
            return
        main = runpy.run_path(str(self.real / place / words[0]))["main"]
        if list(inspect.signature(main).parameters) != ["argv"]:
            inspect.signature(main).bind(*words[1:])
            return
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
            main(["--help"])
        known = set(re.findall(r"--\w+", said.getvalue()))
        assert {word for word in words[1:] if word.startswith("--")} <= known

    def parse(self, module, words: Sequence[str], place: str) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
            patch.chdir(self.real / place)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    args = module.get_parser().parse_args(list(words))
            except SystemExit as e:
                assert e.code == 0 and "--help" in words, f"{module.__name__} {shlex.join(words)}: {said.getvalue()}"
                return
        pages = getattr(args, "kd_config", None) or []
        for page in [pages] if isinstance(pages, str) else pages:
            load_page(str(self.real / place / page) if page.endswith(".yaml") else page)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("readmes"))


@pytest.fixture(scope="module")
def calls() -> Dict[str, Dict[int, List[Call]]]:
    """The calls of each README, filled in by the test of its first marked fence."""
    return {}


@pytest.mark.parametrize("fence", FENCES, ids=lambda f: f"{f.readme}:{f.line}")
def test_command(fence: Fence, sandbox: Sandbox, calls: Dict) -> None:
    if not fence.mark:
        done = sandbox.bash(fence.text, fence.home, stubs=False)
        assert done.returncode == 0, done.stdout
        return
    assert fence.mark in ("long", "data"), f"unknown mark {fence.mark}"
    if fence.readme not in calls:
        calls[fence.readme] = sandbox.calls_of(fence.readme)
    found = calls[fence.readme][fence.line]
    settings = all(re.match(r"\w+=", line) for line in fence.text.splitlines())  # assignments for a cmd.sh call nothing
    assert found or settings, "nothing is called"
    for call in found:
        sandbox.check(call)


@pytest.mark.parametrize(
    "call",
    [
        Call("egs2/mini/asr_kd1", ["./run.sh", "--stge", "3"]),
        Call("egs2/mini/asr_kd1", ["./run.sh", "--method", "no_such_page"]),
        Call("egs2/mini/asr_kd1", ["./run.sh", "--train_args", "--no_such_option 3"]),
        Call("egs2/mini/asr_kd1", ["./run.sh", "--local_data_opts", "--no_such_option 3"]),
        Call(".", ["./run_all.sh", "--methods", "no_such_page"]),
        Call("egs2/mini/asr_kd1", ["./run_all.sh"]),
        Call(".", ["python", "-m", "espnet_kd.bin.asr_kd_export", "--expdirr", "exp"]),
        Call(".", ["python", "tests/benchmarks/data_scale.py", "--no_such_option", "3"]),
        Call("espnet/egs2/an4/asr1", ["./run.sh", "--asr_args", "--teacher exp/x --kd_konfig kl"]),
        Call(".", ["srun", "python3", "-m", "espnet_kd.bin.asr_kd_train", "--kd_stage", "one"]),
        Call(".", ["rm", "-r", "exp"]),
    ],
    ids=lambda call: " ".join(call.words[:3]),
)
def test_wrong_commands_are_found(call: Call, sandbox: Sandbox) -> None:
    with pytest.raises((AssertionError, UserError)):
        sandbox.check(call)
