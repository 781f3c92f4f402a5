"""The report of fabricated experiments, whole and with parts missing."""

import json
import math
from datetime import timedelta

import numpy as np
import pytest
import torch

from espnet_kd.bin import asr_kd_report
from espnet_kd.cli import UserError
from espnet_kd.report.history import read_history, read_stages, seconds

ISSUE_KEYS = {
    "role", "method", "kd_stages", "params", "epochs", "seed", "testset", "cer", "wer", "wer_low", "wer_high", "rtf",
    "train_seconds",
}  # fmt: skip


def train(run_dir, epochs, names, log_only=False):
    """Leave what an ESPnet run of so many epochs leaves: 61.5 s of training and 3 s of validation in each."""
    from espnet2.train.reporter import Reporter

    run_dir.mkdir(parents=True, exist_ok=True)
    reporter, log = Reporter(), []
    for epoch in range(1, epochs + 1):
        reporter.set_epoch(epoch)
        for phase, duration in (("train", 61.5), ("valid", 3.0)):
            with reporter.observe(phase) as sub:
                sub.register({n: torch.tensor(10.0 * math.exp(-epoch) + i) for i, n in enumerate(names)})
                sub.next()
            reporter.stats[epoch][phase]["time"] = timedelta(seconds=duration)
        log.append(f"[host] 2025-01-01 (trainer:1) INFO: {reporter.log_message()}\n")
    (run_dir / "train.log").write_text("".join(log))
    if not log_only:
        torch.save({"model": {"w": torch.zeros(9)}, "reporter": reporter.state_dict()}, run_dir / "checkpoint.pth")


def describe(expdir, role, method=None, kd_stages=None, seed=0):
    expdir.mkdir(parents=True, exist_ok=True)
    facts = {"role": role, "method": method, "kd_stages": kd_stages, "seed": seed}
    (expdir / "experiment.json").write_text(json.dumps(facts))


def score(expdir, wer, testset="test", decode=True):
    out = expdir / f"decode_{testset}"
    out.mkdir(parents=True, exist_ok=True)
    rates = {k: {"err": e, "low": e - 1, "high": e + 1} for k, e in (("cer", wer / 2), ("wer", wer))}
    (out / "score.json").write_text(json.dumps({"testset": testset, **rates, "utterances": 7}))
    if decode:
        (out / "decode.json").write_text(json.dumps({"params": 1234567, "rtf": 0.01}))


@pytest.fixture
def exp(tmp_path):
    exp = tmp_path / "exp"
    for seed in (0, 1):
        plain, student = exp / f"plain{seed}", exp / f"fkl{seed}"
        describe(plain, "plain", seed=seed)
        train(plain, 5, ["loss", "loss_ctc"])
        score(plain, 20.0 + seed)
        describe(student, "student", "progressive_fkl", [1, 2, 3], seed)
        train(student / "kd_stage1", 1, ["loss", "loss_kd"])
        train(student / "kd_stage2", 1, ["loss", "loss_kd"])
        train(student, 3, ["loss", "loss_ctc", "loss_kd"])
        score(student, 18.0 + seed)
    return exp


def report(exp, *options):
    asr_kd_report.main(["--expdir", str(exp), *map(str, options)])
    return json.loads((exp / "results.json").read_text()), (exp / "RESULTS.md").read_text()


def test_rows_table_and_picture(exp, tmp_path):
    score(tmp_path / "elsewhere" / "big", 9.0)
    rows, page = report(exp, "--teacher", tmp_path / "elsewhere" / "big")
    assert [(r["role"], r["experiment"]) for r in rows] == [
        ("teacher", "big"), ("plain", "plain0"), ("plain", "plain1"), ("student", "fkl0"), ("student", "fkl1"),
    ]  # fmt: skip
    assert all(row.keys() >= ISSUE_KEYS for row in rows)
    teacher, student = rows[0], rows[3]
    assert (teacher["epochs"], teacher["train_seconds"], teacher["wer"]) == (None, None, 9.0)
    assert (student["method"], student["kd_stages"], student["seed"]) == ("progressive_fkl", [1, 2, 3], 0)
    assert (student["epochs"], student["params"], student["rtf"]) == (5, 1234567, 0.01)
    assert student["train_seconds"] == pytest.approx(5 * 64.5)  # all three KD stages
    assert (student["wer"], student["wer_low"], student["wer_high"], student["cer"]) == (18.0, 17.0, 19.0, 9.0)
    line = "|fkl0|student|progressive_fkl|1+2+3|0|test|1,234,567|9.00 [8.00, 10.00]|18.00 [17.00, 19.00]|0.0100|5|"
    assert line + "5 min 22 s|" in page
    assert "|progressive_fkl, KD stages 1+2+3|test|2|9.25 (9.00–9.50)|18.50 (18.00–19.00)|" in page
    assert "## Environments" in page and "torch version" in page and "](curves.png)" in page
    assert "## Missing" not in page
    assert (exp / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_parts_are_named_and_the_rest_shown(exp):
    describe(exp / "unfinished", "student", "kl")
    (exp / "fkl0" / "decode_test" / "decode.json").unlink()
    (exp / "fkl1" / "decode_test" / "score.json").write_text("{broken")
    (exp / "plain0" / "checkpoint.pth").unlink()
    (exp / "plain0" / "train.log").unlink()
    (exp / "plain1" / "experiment.json").unlink()
    (exp / "asr_stats").mkdir()
    rows, page = report(exp)
    found = {r["experiment"]: r for r in rows}
    assert set(found) == {"unfinished", "fkl0", "fkl1", "plain0", "plain1"}
    assert found["unfinished"]["wer"] is None and found["fkl1"]["wer"] is None
    assert (found["fkl0"]["params"], found["fkl0"]["wer"]) == (None, 18.0)
    assert (found["plain0"]["train_seconds"], found["plain0"]["wer"]) == (None, 20.0)
    assert (found["plain1"]["role"], found["plain1"]["epochs"]) == (None, 5)
    missing = page.split("## Missing")[1]
    for words in ("unfinished: not scored", "fkl0/decode_test: no decode.json", "decode_test/score.json cannot be read",
                  "plain0: no training statistics", "plain1: no experiment.json"):  # fmt: skip
        assert words in missing


def test_no_statistics_at_all_leave_no_picture(tmp_path):
    score(tmp_path / "a", 5.0)
    describe(tmp_path / "a", "teacher")
    (tmp_path / "curves.png").write_text("of another time")
    _, page = report(tmp_path)
    assert "curves.png" not in page and not (tmp_path / "curves.png").exists()


def test_several_test_sets_are_several_rows(tmp_path):
    describe(tmp_path / "a", "plain")
    score(tmp_path / "a", 5.0, "clean")
    score(tmp_path / "a", 9.0, "other")
    rows, _ = report(tmp_path)
    assert [(r["testset"], r["wer"]) for r in rows] == [("clean", 5.0), ("other", 9.0)]


def test_log_stands_in_for_a_missing_or_damaged_checkpoint(tmp_path):
    train(tmp_path, 3, ["loss", "loss_ctc"])
    whole = read_history(tmp_path)
    assert seconds(whole) == pytest.approx(3 * 64.5)
    data = (tmp_path / "checkpoint.pth").read_bytes()
    for damage in (lambda p: p.write_bytes(data[: len(data) // 2]), lambda p: p.unlink()):
        damage(tmp_path / "checkpoint.pth")
        parsed = read_history(tmp_path)
        assert seconds(parsed) == pytest.approx(3 * 64.5)
        assert parsed[2]["valid"]["loss_ctc"] == pytest.approx(whole[2]["valid"]["loss_ctc"], abs=1e-3)


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"reporter": {"stats": {1: {"train": {"loss": Evil()}}}, "epoch": 1}}, tmp_path / "checkpoint.pth")
    Evil.ran = False
    assert read_history(tmp_path) is None
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Evil.ran = True


def test_numpy_numbers_in_a_checkpoint_are_read(tmp_path):
    stats = {1: {"train": {"loss": np.float64(2.5), "time": timedelta(seconds=4), "total_count": 3}}}
    torch.save({"reporter": {"stats": stats, "epoch": 1}}, tmp_path / "checkpoint.pth")
    assert read_history(tmp_path)[1]["train"] == {"loss": 2.5, "time": 4.0, "total_count": 3.0}


def test_stages_come_in_order(tmp_path):
    train(tmp_path, 3, ["loss"], log_only=True)
    train(tmp_path / "kd_stage2", 2, ["loss"], log_only=True)
    train(tmp_path / "kd_stage1", 1, ["loss"], log_only=True)
    assert [len(h) for h in read_stages(tmp_path)] == [1, 2, 3]


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no experiment in"):
        report(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--teacher .*nowhere"):
        report(tmp_path, "--teacher", tmp_path / "nowhere")
