"""One line for each run: what it trains, its epoch and the remaining time."""

import json
import os
import subprocess
import sys
import time

import pytest
import yaml
from tiny_results import describe, record, train

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
    """A finished teacher, a plain student in training, and a distilled student whose second KD stage has just begun."""
    exp = tmp_path / "exp"
    begin(exp / "teacher", 2)
    train(exp / "teacher", 2, ["loss"])
    describe(exp / "teacher", "teacher")
    begin(exp / "plain")
    train(exp / "plain", 4, ["loss"])  # 64.5 s per epoch
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


def test_one_training_of_several_kd_stages(tmp_path, capsys):
    """One line shows the current KD stage. The directories with the students of KD stages do not count as runs."""
    student = tmp_path / "exp/student"
    begin(student, 25)
    (student / "kd_stage1").mkdir()
    (student / "kd_stage1/config.yaml").write_text("max_epoch: 25")
    found = {}
    for done in (0, 1, 2, 5, 25):
        record(student, (1, 2), (2, 5), (6, 25), finished=done == 25)
        if done:
            train(student, done, ["loss"])
        (line,) = once(tmp_path / "exp", capsys)
        found[done] = line.split(", validation")[0]
    assert found == {
        0: "student: progressive_fkl, KD stage 1, epoch 0 of 25, first epoch",
        1: "student: progressive_fkl, KD stage 1, epoch 1 of 25",
        2: "student: progressive_fkl, KD stage 2, epoch 2 of 25",
        5: "student: progressive_fkl, KD stage 3, epoch 5 of 25",
        25: "student: progressive_fkl, KD stage 3, epoch 25 of 25",
    }
    assert line.endswith("finished")


def test_a_finished_training_that_goes_on_is_not_finished(tmp_path, capsys):
    """A higher max_epoch extends it; experiment.json is still there."""
    student = tmp_path / "exp/student"
    describe(student, "student", "progressive_fkl")
    for epochs, finished in ((4, True), (9, False)):
        begin(student, epochs)
        record(student, (1, 1), (2, epochs), finished=finished)
        train(student, 4, ["loss"])
        (line,) = once(tmp_path / "exp", capsys)
        assert f"epoch 4 of {epochs}, " in line and line.endswith("finished") == finished


def test_a_plain_training_that_goes_on_is_not_finished(tmp_path, capsys):
    plain = tmp_path / "exp/plain"
    describe(plain, "plain")
    for epochs, patience, finished in ((4, None, True), (9, None, False), (9, 3, True)):
        plain.mkdir(exist_ok=True)
        (plain / "config.yaml").write_text(yaml.safe_dump({"max_epoch": epochs, "patience": patience}))
        train(plain, 4, ["loss"])
        (line,) = once(tmp_path / "exp", capsys)
        assert f"epoch 4 of {epochs}, " in line and line.endswith("finished") == finished


def test_a_run_that_writes_nothing_is_called_silent(exp, capsys):
    age(exp / "plain", 600)
    assert "nothing written for 10 min 00 s: has it stopped?" in once(exp, capsys)[0]


def test_half_written_files_are_as_if_not_there(exp, capsys):
    for name in ("checkpoint.pth", "config.yaml"):
        (exp / "plain" / name).write_text("{")
    (exp / "student/kd_stage1/kd_stage.json").write_text("[")
    lines = once(exp, capsys)
    assert lines[0].startswith("plain: training, epoch 4 of ?")  # the epoch is read from the log


@pytest.mark.parametrize("model", ["valid.loss.ave.pth", "valid.acc.ave_10best.pth", "model.pth"])
def test_a_finished_experiment_without_checkpoint_and_log_is_finished(tmp_path, capsys, model):
    """Such an experiment was downloaded, or its checkpoint was removed to save disk space."""
    begin(tmp_path / "teacher", 30)
    assert once(tmp_path, capsys) == ["teacher: training, epoch 0 of 30, first epoch"]
    (tmp_path / "teacher" / model).touch()
    assert once(tmp_path, capsys) == ["teacher: training, finished"]
    (tmp_path / "teacher/checkpoint.pth").touch()  # with a checkpoint it counts as in training again
    assert "finished" not in once(tmp_path, capsys)[0]


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


def test_a_run_with_a_log_is_watched_without_torch(tmp_path):
    begin(tmp_path / "exp" / "run", 4)
    lines = [f"{n}epoch results: [train] loss=2.0, time=3 seconds, [valid] loss={5 - n}.0" for n in (1, 2)]
    (tmp_path / "exp" / "run" / "train.log").write_text("\n".join(lines) + "\n")
    (tmp_path / "exp" / "run" / "checkpoint.pth").write_bytes(b"as torch writes it")
    script = (
        "import sys; from espnet_kd.bin import asr_kd_report; "
        f"asr_kd_report.main(['--watch', '--once', {str(tmp_path / 'exp')!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert "epoch 2 of 4, validation loss 3.000" in done.stdout and done.stdout.endswith("False\n"), done
