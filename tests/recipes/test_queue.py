"""What run_all.sh is made of: the queue of runs with its line of progress, and the environment that is made."""

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from recipe import ROOT

RUN = """#!/usr/bin/env bash
# NAME SECONDS CODE [EPOCHS DIR]
echo "$1 begins" | tee -a calls
for ((i = 1; i <= ${4:-0}; i++)); do echo "${i}epoch results: loss=1" >>"$5/train.log"; done
sleep "$2"
echo "$1 ends" >>calls
exit "$3"
"""
HEAD = f"""set -euo pipefail
run=./run.sh options=() logs=$PWD/logs
. {ROOT}/egs2/TEMPLATE/queue.sh
trap end_runs EXIT
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "run.sh").write_text(RUN)
    (tmp_path / "run.sh").chmod(0o755)
    return tmp_path


def bash(place: Path, script: str, **options) -> subprocess.CompletedProcess:
    command = ["bash", "-c", HEAD + script]
    return subprocess.run(
        command, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=300, **options
    )


def test_each_starts_when_what_it_needs_has_ended_well(place):
    script = """
enqueue a '' '' 0 a 1 0
enqueue bad '' '' 0 bad 0.1 3
enqueue 'needs, bad' bad '' 0 never 0 0
enqueue anyway 'bad?' '' 0 anyway 0.1 0
enqueue both $'a\\nanyway\\n' '' 0 both 0.1 0
enqueue further 'needs, bad' '' 0 never 0 0
run_queue 2
echo "${state[both]} ${state[bad]} ${state["needs, bad"]} ${state[further]} ${#pids[@]}"
"""
    done = bash(place, script, stderr=subprocess.PIPE)
    assert done.stdout.split() == ["done", "failed", "lost", "lost", "0"], done.stderr
    calls = (place / "calls").read_text().splitlines()
    assert set(calls[:2]) == {"a begins", "bad begins"} and calls[-2:] == ["both begins", "both ends"]
    assert calls.index("bad ends") < calls.index("anyway begins") and not [c for c in calls if "never" in c]
    assert (place / "logs/both.log").read_text() == "both begins\n"
    lines = [line.split(" ", 1)[1] for line in done.stderr.splitlines() if line[:2].isdigit()]
    assert lines[0] == f"1 of 6: bad FAILED; the end of {place.resolve() / 'logs/bad.log'}:"
    ended = [line.rsplit(",", 1)[0].split(" of 6: ") for line in lines[1:]]
    assert [number for number, _ in ended] == ["2", "3", "4"] and ended[-1][1] == "both"
    assert {name for _, name in ended[:2]} == {"a", "anyway"}


def test_the_first_failure_may_end_everything(place):
    script = "stop_at_failure=true\nenqueue long '' '' 0 long 98 0\nenqueue bad '' '' 0 bad 0.1 3\nrun_queue 2\n"
    done = bash(place, script, stderr=subprocess.PIPE)  # and does not wait for the other one
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == f"error: failed: bad; the whole log is {place.resolve() / 'logs/bad.log'}"


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_so_many_side_by_side(place, limit):
    script = "".join(f"enqueue {name} '' '' 0 {name} 1 0\n" for name in "abc") + f"run_queue {limit}\n"
    bash(place, script, stderr=subprocess.DEVNULL)
    begun, most = 0, 0
    for line in (place / "calls").read_text().splitlines():
        begun += 1 if line.endswith("begins") else -1
        most = max(most, begun)
    assert most == limit


def in_terminal(place: Path, script: str) -> str:
    """What a script writes to its standard error, which is a terminal."""
    ours, theirs = pty.openpty()
    bash(place, script, stderr=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            more = os.read(ours, 4096)
        except OSError:  # the other end is closed
            return written.decode()
        written += more


def test_a_terminal_has_one_line_of_progress_with_the_time_left(place):
    (place / "exp").mkdir()
    (place / "exp/train.log").write_text("1epoch results: loss=1\n")  # of an earlier call
    script = "enqueue teacher '' exp 5 teacher 6 0 2 exp\nenqueue kl teacher '' 5 kl 0 0\nrun_queue 2\n"
    said = in_terminal(place, script)
    progress = [line for line in said.split("\r\x1b[K") if "running" in line]
    assert progress and all("\n" not in line and len(line) < 200 for line in progress)
    # Three of ten epochs are done, two of them now, in 2 to 6 seconds or more: seven are left.
    assert progress[0].startswith("0 of 2 done, about ") and " of training left; running: teacher" in progress[0]


def test_a_step_that_fails_shows_the_end_of_its_log(place):
    done = bash(place, "step data data 0 7 || echo \"code $?\"\nstep again again 0 0", stderr=subprocess.PIPE)
    assert done.stdout == "code 7\n"
    assert "data FAILED; the end of" in done.stderr and "\ndata begins\n" in done.stderr
    assert " again, " in done.stderr.splitlines()[-1] and "again begins" not in done.stderr


def test_a_step_shows_that_it_goes_on(place):
    said = in_terminal(place, "step data data 6 0")
    assert re.search(r"\r\x1b\[Krunning: data, [2-9] s\r", said), said


PYTHON = """#!/usr/bin/env bash
case "$*" in
*sys.prefix*) echo "{prefix}" ;;
"-m pip "*) echo "$*" >"{prefix}/pip"; echo "Collecting much"; exit "$(cat "{prefix}/code")" ;;
esac
"""


@pytest.mark.parametrize("code", [0, 1])
def test_what_pip_says_goes_into_a_log(tmp_path, code):
    (tmp_path / "setup.py").touch()
    (tmp_path / "code").write_text(str(code))
    python = tmp_path / "python"
    python.write_text(PYTHON.format(prefix=tmp_path))
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    env.pop("ESPNET_KD_INSTALLED", None)
    script = f"set -euo pipefail; ROOT={tmp_path} EXTRAS='mini test'; . {ROOT}/egs2/TEMPLATE/setup_env.sh; echo ready"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    log = tmp_path / "espnet_kd_install.log"
    assert log.read_text() == "Collecting much\n" and str(log) in done.stderr
    assert f" -q -e {tmp_path}[mini,test]" in (tmp_path / "pip").read_text()
    if code:
        assert done.returncode == 1 and "error: pip cannot install" in done.stderr and "ready" not in done.stdout
        assert not list(tmp_path.glob(".espnet_kd.*"))
    else:
        assert done.stdout == "ready\n" and "installed" in done.stderr and "Collecting" not in done.stderr
        assert len(list(tmp_path.glob(".espnet_kd.*"))) == 2  # it is not installed again


@pytest.mark.parametrize(
    "own, used, activate",
    [
        ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, "making {root}/.venv", ". {root}/.venv/bin/activate"),
        (
            {"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base", "ESPNET_KD_INTO_BASE": "1"},
            "using the active environment /conda", "conda activate /conda",
        ),
        (
            {"CONDA_PREFIX": "/conda/envs/asr", "CONDA_DEFAULT_ENV": "asr"},
            "using the active environment /conda/envs/asr", "conda activate /conda/envs/asr",
        ),
        ({}, "making {root}/.venv", ". {root}/.venv/bin/activate"),
        ({"VIRTUAL_ENV": "/venv"}, "using the active environment /venv", ". /venv/bin/activate"),
    ],
)  # fmt: skip
def test_which_environment_is_used(tmp_path, own, used, activate):
    """Conda's base only where that is asked for; what a new shell has to run is known."""
    (tmp_path / "setup.py").touch()
    (tmp_path / "code").write_text("0")
    venv = f"{tmp_path}/.venv"
    make = f"*venv*) mkdir -p {venv}/bin; echo VIRTUAL_ENV={venv} >{venv}/bin/activate ;;\nesac"
    python = PYTHON.replace("esac", make).replace("{prefix}", str(tmp_path))
    for name in ("python3.12", "python"):
        (tmp_path / name).write_text(python)
        (tmp_path / name).chmod(0o755)
    without = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "ESPNET_KD_INSTALLED")
    env = {k: v for k, v in os.environ.items() if k not in without} | own
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = f"set -euo pipefail; ROOT={tmp_path} EXTRAS=mini; . {ROOT}/egs2/TEMPLATE/setup_env.sh; echo $ACTIVATE"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and used.format(root=tmp_path) in done.stderr, done.stderr
    assert done.stdout == activate.format(root=tmp_path) + "\n"
    base = own.get("CONDA_DEFAULT_ENV") == "base" and "ESPNET_KD_INTO_BASE" not in own
    assert ("ESPNET_KD_INTO_BASE=1" in done.stderr) == base


@pytest.mark.parametrize("conda, used", [("base", True), ("asr", False), (None, True)])
def test_a_recipe_uses_the_projects_environment_beside_condas_base(tmp_path, conda, used):
    recipe = tmp_path / "egs2/mini/asr_kd1"
    recipe.mkdir(parents=True)
    (recipe / "path.sh").write_text((ROOT / "egs2/TEMPLATE/asr_kd1/path.sh").read_text())
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("echo activated\n")
    env = {"PATH": os.environ["PATH"], **({"CONDA_PREFIX": "/c", "CONDA_DEFAULT_ENV": conda} if conda else {})}
    done = subprocess.run(["bash", "-c", ". ./path.sh"], cwd=recipe, env=env, capture_output=True, text=True)
    assert done.stdout == ("activated\n" if used else "")
