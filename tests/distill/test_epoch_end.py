"""An epoch in which nothing was learnt is refused, and is not counted when the training is resumed."""

import json

import pytest
from tiny_phases import MID, assert_same, train, write_page

from espnet_kd.cli import UserError
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.targets.online import OnlineTeacher


@pytest.fixture
def broken(monkeypatch):
    """The teacher's outputs are NaN from epoch ``since[0]`` on, which a test can change."""
    from espnet_kd.tasks.asr_kd import ASRKDTask

    since, targets = [1], OnlineTeacher.targets

    def poisoned(self, utt_ids, *args, **kwargs):
        result = targets(self, utt_ids, *args, **kwargs)
        if len(utt_ids) and ASRKDTask.progress.epoch >= since[0]:  # not in the trial before training
            result.logits.fill_(float("nan"))
        return result

    monkeypatch.setattr(OnlineTeacher, "targets", poisoned)
    return since


@pytest.mark.faults("losses that are no numbers")
@pytest.mark.parametrize("patience", [[], ["--patience", "3"]])
def test_an_epoch_without_an_update(corpus, teacher_dir, tmp_path, broken, patience):
    """The training does not count as finished, not even on a second call. A corrected command starts again."""
    out, page = tmp_path / "student", "kl"
    for _ in range(2):
        with pytest.raises(
            UserError, match="student: no step of epoch 1 had finite gradients.* lower the learning rate"
        ):
            train(corpus, out, page, "--teacher", teacher_dir, *patience, "--teacher_memory", 0, max_epoch=2)
        assert not json.loads((out / "kd_stage.json").read_text())["finished"]
        assert not (out / "student.pth").exists() and not (out / "1epoch.pth").exists()
    broken[0] = 99
    more = ["--teacher_memory", 0, "--optim_conf", "lr=0.001"]
    train(corpus, out, page, "--teacher", teacher_dir, *patience, *more, max_epoch=2)
    assert json.loads((out / "kd_stage.json").read_text())["finished"]


@pytest.mark.faults("losses that are no numbers")
def test_a_later_epoch_without_an_update(corpus, teacher_dir, tmp_path, broken):
    """The epochs before stay, and a later training continues after them."""
    out, page = tmp_path / "student", write_page(tmp_path, **MID)
    broken[0] = 3
    for _ in range(2):
        with pytest.raises(
            UserError, match="no step of epoch 3 had finite gradients.*into another directory: lower the"
        ):
            train(corpus, out, page, "--teacher", teacher_dir, "--teacher_memory", 0)
        assert read_checkpoint(out / "checkpoint.pth")["reporter"]["epoch"] == 2
        assert not (out / "kd_stage2").exists() and not (out / "3epoch.pth").exists()
    broken[0] = 99
    train(corpus, out, page, "--teacher", teacher_dir, "--teacher_memory", 0)
    train(corpus, tmp_path / "whole", page, "--teacher", teacher_dir, "--teacher_memory", 0)
    assert_same(tmp_path / "whole", out)


def test_fewer_batches_than_accum_grad(corpus, teacher_dir, tmp_path):
    with pytest.raises(UserError, match="epoch 1 .*fewer batches than accum_grad"):
        train(corpus, tmp_path / "out", "kl", "--teacher", teacher_dir, "--accum_grad", 9, max_epoch=1)
