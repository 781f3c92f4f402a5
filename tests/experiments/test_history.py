"""Training statistics are read from checkpoints and logs, and from damaged ones as far as possible."""

import json
import math
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
from tiny_results import record, train

from espnet_kd.experiments.history import read_history, read_parts, read_stages, seconds


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


def test_a_cut_line_is_read_as_far_as_it_goes(tmp_path):
    line = "3epoch results: [train] loss=2.5, time=1 hour, 2 minutes and 3.5 seconds, [valid] loss=2, time=3 seconds"
    for end in range(len(line)):
        (tmp_path / "train.log").write_text(line[:end])
        for history in read_stages(tmp_path):
            stats = [x for phases in history.values() for phase in phases.values() for x in phase.values()]
            assert all(map(math.isfinite, stats))
    (tmp_path / "train.log").write_text(line)
    assert read_stages(tmp_path)[0][3]["train"]["loss"] == 2.5


def test_the_last_stage_is_not_given_the_log_of_another(tmp_path):
    for k in (1, 2):
        (tmp_path / f"train.kd_stage{k}.log").write_text(f"{4 + k}epoch results: [train] loss={k}.0\n")
        (tmp_path / f"kd_stage{k}").mkdir()
        (tmp_path / f"kd_stage{k}/kd_stage.json").write_text(json.dumps({"kd_stage": k}))
    (tmp_path / "kd_stage.json").write_text(json.dumps({"kd_stage": 3}))
    assert [max(h) for h in read_stages(tmp_path)] == [5, 6]


def test_the_parts_of_one_training(tmp_path):
    """A KD stage may begin within an epoch; the directory with the result of a KD stage is no training of its own."""
    assert read_parts(tmp_path) == []
    train(tmp_path, 5, ["loss"])
    assert read_parts(tmp_path) == []
    record(tmp_path, (1, 1), (1, 2), (3, 9))
    (tmp_path / "kd_stage1").mkdir()
    (tmp_path / "kd_stage1/config.yaml").write_text("{}")
    parts = read_parts(tmp_path)
    assert [(p.number, p.epochs, sorted(p.history)) for p in parts] == [
        (1, "1", [1]),
        (2, "1–2", [1, 2]),
        (3, "3–5", [3, 4, 5]),
    ]
    assert [sorted(h) for h in read_stages(tmp_path)] == [[1, 2, 3, 4, 5]]
    record(tmp_path, (1, 5), (6, 9))  # the second KD stage has not begun
    assert [p.number for p in read_parts(tmp_path)] == [1]


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}", '{"stages": 3}', '{"stages": [{}]}', '{"stages": [{"kd_stage": 1, "epochs": [1]}]}']
)
def test_a_record_that_says_nothing_of_parts(tmp_path, content):
    train(tmp_path, 2, ["loss"])
    (tmp_path / "kd_stage.json").write_text(content)
    assert read_parts(tmp_path) == []


def test_logs_of_all_kd_stages_are_of_one_training(tmp_path):
    """If an epoch is trained again after a kill, its last training counts."""
    record(tmp_path, (1, 1), (1, 2), (3, 4), finished=False)
    lines = {1: ["1epoch results: [train] loss=1.0"], 2: ["2epoch results: [train] loss=9.0"],
             3: ["2epoch results: [train] loss=2.0", "3epoch results: [train] loss=9.0",
                 "3epoch results: [train] loss=3.0"]}  # fmt: skip
    for k, content in lines.items():
        path = tmp_path / f"train.kd_stage{k}.log"
        path.write_text("".join(f"[host] {line}\n" for line in content))
        os.utime(path, (k, k))
    history = read_history(tmp_path)
    assert {epoch: phases["train"]["loss"] for epoch, phases in history.items()} == {1: 1.0, 2: 2.0, 3: 3.0}
