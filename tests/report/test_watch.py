"""A line for each run: what it trains, how far it is, how long it will take."""

import json
import os
import time

import pytest
import yaml
from tiny_results import describe, train

from espnet_kd.bin import asr_kd_report
from espnet_kd.cli import UserError
from espnet_kd.report import watch


def begin(run, max_epoch=10, **record):
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"max_epoch": max_epoch}))
    if record:
        (run / "kd_stage.json").write_text(json.dumps(record))


def age(run, seconds):
    for path in run.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def exp(tmp_path):
    """A finished teacher, a plain student that runs, a distilled one in its second KD stage, which has just begun."""
    exp = tmp_path / "exp"
    begin(exp / "teacher", 2)
    train(exp / "teacher", 2, ["loss"])
    describe(exp / "teacher", "teacher")
    begin(exp / "plain")
    train(exp / "plain", 4, ["loss"])  # 64.5 s an epoch
    age(exp / "plain", 20)
    student = exp / "student"
    begin(student / "kd_stage1", 3, method="kl", kd_stage=1, epochs=3, finished=True)
    train(student / "kd_stage1", 3, ["loss"])
    begin(student / "kd_stage2", 3, method="kl", kd_stage=2, epochs=3, finished=False)
    (exp / "stats/logdir").mkdir(parents=True)
    return exp


def once(exp, capsys):
    asr_kd_report.main(["--watch", str(exp), "--once"])
    return capsys.readouterr().out.splitlines()


def test_lines(exp, capsys):
    lines = once(exp, capsys)
    assert lines[0].startswith("plain: training, epoch 4 of 10, validation loss 0.183, 6 min 0")  # 6 · 64.5 s − 20 s
    assert lines[1:] == [
        "student: kl, KD stage 1, epoch 3 of 3, validation loss 0.498, finished",
        "student: kl, KD stage 2, epoch 0 of 3, first epoch",
        "teacher: teacher, epoch 2 of 2, validation loss 1.353, finished",
    ]
    assert once(exp / "plain", capsys)[0].startswith("plain: training, epoch 4 of 10")


def test_a_run_that_writes_nothing_is_called_silent(exp, capsys):
    age(exp / "plain", 600)
    assert "nothing written for 10 min 00 s: has it stopped?" in once(exp, capsys)[0]


def test_half_written_files_are_as_if_not_there(exp, capsys):
    for name in ("checkpoint.pth", "config.yaml"):
        (exp / "plain" / name).write_text("{")
    (exp / "student/kd_stage1/kd_stage.json").write_text("[")
    lines = once(exp, capsys)
    assert lines[0].startswith("plain: training, epoch 4 of ?")  # from the log


def test_it_refreshes_until_interrupted(exp, capsys, monkeypatch):
    rounds = []

    def sleep(seconds):
        rounds.append(seconds)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    asr_kd_report.main(["--watch", str(exp)])
    assert len(rounds) == 3 and capsys.readouterr().out.count("plain: ") == 3


def test_nothing_to_watch(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        asr_kd_report.main(["--watch", str(tmp_path), "--once"])
    with pytest.raises(UserError, match="not a directory"):
        asr_kd_report.main(["--watch", str(tmp_path / "x")])
