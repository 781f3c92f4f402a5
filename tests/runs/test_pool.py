"""The pool that runs the steps of a job: order, failures, signals and the progress line."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from espnet_kd.runs.console import Console
from espnet_kd.runs.pool import Pool, Stopped
from espnet_kd.runs.steps import State, Step

RUN = """#!/usr/bin/env bash
# NAME SECONDS CODE [EPOCHS DIR]
cd "$(dirname "$0")"
echo "$1 begins" | tee -a calls
for ((i = 1; i <= ${4:-0}; i++)); do echo "${i}epoch results: loss=1" >>"$5/train.log"; done
sleep "$2"
echo "$1 ends" >>calls
exit "$3"
"""


OTHERS = set()  #: child processes that exist before a test, such as Python's resource tracker


def children():
    """The processes that the pool has started, and their children."""
    return [p for p in psutil.Process().children(recursive=True) if p.pid not in OTHERS]


@pytest.fixture
def place(tmp_path):
    OTHERS.clear()
    OTHERS.update(p.pid for p in psutil.Process().children(recursive=True))
    (tmp_path / "logs").mkdir()
    (tmp_path / "run.sh").write_text(RUN)
    (tmp_path / "run.sh").chmod(0o755)
    return tmp_path


def step(name, seconds=0.0, code=0, **more):
    return Step(name, (name, str(seconds), str(code)), **more)


def run(place, steps, jobs=2, **options):
    with Pool([str(place / "run.sh")], place / "logs", jobs, Console()) as pool:
        return pool.run(steps, **options), pool


def calls(place):
    return (place / "calls").read_text().splitlines()


def test_each_starts_when_what_it_needs_has_ended_well(place, capsys):
    steps = [
        step("a", 4),
        step("bad", 0.1, 3),
        step("needs, bad", needs=("bad",)),
        step("anyway", 0.1, after=("bad",)),
        step("both", 0.1, needs=("a", "anyway")),
        step("further", needs=("needs, bad",)),
        step("even so", after=("further",)),
    ]
    states, pool = run(place, steps)
    ended = {"a": State.DONE, "bad": State.FAILED, "needs, bad": State.LOST, "anyway": State.DONE}
    assert states == {**ended, "both": State.DONE, "further": State.LOST, "even so": State.DONE}
    assert pool.exit_codes["bad"] == 3 and not children()
    said = calls(place)
    assert set(said[:2]) == {"a begins", "bad begins"} and said[-2:] == ["both begins", "both ends"]
    assert said.index("bad ends") < said.index("anyway begins")
    assert not [c for c in said if c.startswith(("needs", "further"))]
    assert (place / "logs/both.log").read_text() == "both begins\n"
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines() if line[:2].isdigit()]
    assert lines[0] == f"1 of 7: bad FAILED; the end of {place / 'logs/bad.log'}:"
    ended = [line.rsplit(",", 1)[0].split(" of 7: ") for line in lines[1:]]
    assert [number for number, _ in ended] == ["2", "3", "4", "5"] and ended[-1][1] == "both"
    assert {name for _, name in ended[:3]} == {"a", "anyway", "even so"}


def test_those_start_first_that_come_first(place):
    run(place, [step(name, 0.1) for name in "cabd"], jobs=1)
    assert [c.split()[0] for c in calls(place)[::2]] == list("cabd")


def test_the_first_failure_may_end_everything(place):
    steps = [step("long", 98), step("bad", 0.1, 3), step("next", needs=("bad",))]
    states, pool = run(place, steps, stop_at_failure=True)
    assert states == {"long": State.RUNNING, "bad": State.FAILED, "next": State.WAITING}
    assert pool.exit_codes == {"bad": 3} and not children()


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_so_many_side_by_side(place, limit):
    run(place, [step(name, 1.0) for name in "abcd"], jobs=limit)
    begun, most = 0, 0
    for line in calls(place):
        begun += 1 if line.endswith("begins") else -1
        most = max(most, begun)
    assert most == limit


def in_terminal(place, steps):
    """The output of a pool on a standard error that is a terminal."""
    ours, theirs = pty.openpty()
    read = f"from pathlib import PosixPath; from espnet_kd.runs.steps import Step; steps = {steps!r}"
    job = f"with Pool(['{place}/run.sh'], PosixPath('{place}/logs'), 2, Console()) as pool: pool.run(steps)"
    script = f"{read}\nfrom espnet_kd.runs.pool import *\n{job}"
    subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, stderr=theirs, timeout=300, check=True)
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
    (place / "exp/train.log").write_text("1epoch results: loss=1\n")  # an epoch of an earlier call
    teacher = Step("teacher", ("teacher", "6", "0", "2", "exp"), directory=place / "exp", epochs=5)
    said = in_terminal(place, [teacher, step("kl", needs=("teacher",), epochs=5)])
    progress = [line for line in said.split("\r\x1b[K") if "running" in line]
    assert progress and all("\n" not in line and len(line) < 200 for line in progress)
    # Three of ten epochs are done. The two of this call, in 2 to 6 seconds or more, give the time of the other seven.
    assert progress[0].startswith("0 of 2 done, about ") and " of training left; running: teacher" in progress[0]
    assert said.count("\n") == 2  # one line for each finished step


def test_a_single_step_shows_that_it_goes_on(place):
    said = in_terminal(place, [step("data", 5)])
    assert re.search(r"\r\x1b\[Krunning: data, [2-9] s\r", said), said


def test_a_step_that_fails_shows_the_end_of_its_log(place, capsys):
    (place / "run.sh").write_text("#!/usr/bin/env bash\nseq 9; printf 'a bar\\rof progress\\n'; exit 7\n")
    states, pool = run(place, [Step("data, all", ("x",))])
    log = place / "logs/data_all.log"
    assert states == {"data, all": State.FAILED} and pool.exit_codes == {"data, all": 7}
    head, *end = capsys.readouterr().err.splitlines()
    assert head.endswith(f" data, all FAILED; the end of {log}:") and end == ["7", "8", "9", "a bar", "of progress"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_whole_tree(place, number, monkeypatch, request):
    """This includes a process that ignores SIGTERM and the children of a step."""
    monkeypatch.setattr("espnet_kd.runs.pool.GRACE", 1.0)
    # The default handler is needed, because a shell may have started these tests in the background with SIGINT ignored.
    before = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, before))
    tree = "trap '' TERM; sleep 98 & sleep 98 & : >ready; wait"
    (place / "run.sh").write_text(f"#!/usr/bin/env bash\ncd \"$(dirname \"$0\")\"\n{tree}\n")
    seen = []

    class Watching(Console):
        def is_due(self):
            if (place / "ready").exists() and not seen:
                seen.extend(children())
                os.kill(os.getpid(), number)
            return False

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Stopped) as stopped, Pool([str(place / "run.sh")], place / "logs", 1, Watching()) as pool:
        pool.run([step("long"), step("next")])
    assert stopped.value.number == number and len(seen) == 3
    assert not psutil.wait_procs(seen, timeout=10)[1]  # psutil can wait for grandchildren too
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_an_ignored_signal_stays_ignored(place):
    """nohup relies on this."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Pool([str(place / "run.sh")], place / "logs", 1, Console()) as pool:
            os.kill(os.getpid(), signal.SIGHUP)
            assert pool.run([step("a")]) == {"a": State.DONE}
    finally:
        signal.signal(signal.SIGHUP, before)


def test_epochs_are_counted_in_every_log_of_a_training(tmp_path):
    (tmp_path / "train.log").write_text("1epoch results: x\n2epoch results: x\n")
    (tmp_path / "train.kd_stage2.log").write_text("3epoch started\n3epoch results: x\n")
    one = Step("kl", (), directory=tmp_path, epochs=9)
    assert [one.finished_epochs(state) for state in (State.RUNNING, State.DONE)] == [3, 9]
    assert Step("kl", (), directory=tmp_path, epochs=2).finished_epochs(State.RUNNING) == 2
    assert Step("kl", (), directory=tmp_path / "gone", epochs=2).finished_epochs(State.WAITING) == 0
    assert Step("data", ()).finished_epochs(State.RUNNING) == 0


def test_time_is_given_in_seconds_or_minutes():
    from espnet_kd.runs.console import time_in_words

    assert [time_in_words(s) for s in (0.9, 99.9, 100, 149, 150)] == ["0 s", "99 s", "2 min", "2 min", "3 min"]
    assert time_in_words(3600) == "60 min"


def test_progress_is_shown_every_minute_where_there_is_no_terminal(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console, due = Console(), []
    for now[0] in (1001.0, 1059.0, 1060.0, 1061.0, 1120.0):
        due.append(console.is_due())
    assert due == [False, False, True, False, True]
    console.show("0 of 2 done")
    assert re.fullmatch(r"\d\d:\d\d:\d\d 0 of 2 done\n", capsys.readouterr().err)
