"""Resuming after a kill, also if it came while a checkpoint was written."""

import datetime
import json
import shutil

import pytest
import torch
from tiny_phases import MID, RESTART, Killed, assert_same, train, write_page

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.experiments.checkpoints import keep_previous, mend, read_checkpoint


def checkpoint(path, epoch):
    """Write a checkpoint and an epoch's model as ESPnet's trainer does."""
    model = {"weight": torch.full((50,), float(epoch))}
    stats = {e: {"train": {"loss": 1.0, "time": datetime.timedelta(seconds=e)}} for e in range(1, epoch + 1)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    states = {"model": model, "reporter": {"epoch": epoch, "stats": stats}, "optimizers": [optimizer]}
    torch.save({**states, "schedulers": [None], "scaler": None}, path / "checkpoint.pth")
    torch.save(model, path / f"{epoch}epoch.pth")
    return model


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.fixture
def two(tmp_path):
    """A run after its second epoch."""
    checkpoint(tmp_path, 1)
    keep_previous(tmp_path)
    checkpoint(tmp_path, 2)
    return tmp_path


def test_nothing_to_mend(tmp_path, two):
    assert mend(tmp_path / "absent") == 0
    before = {p: p.stat().st_mtime_ns for p in two.iterdir()}
    assert mend(two) == 2
    assert {p: p.stat().st_mtime_ns for p in two.iterdir()} == before


def test_keep_previous(tmp_path):
    keep_previous(tmp_path)
    assert list(tmp_path.iterdir()) == []
    checkpoint(tmp_path, 1)
    keep_previous(tmp_path)
    assert (tmp_path / "checkpoint.prev.pth").read_bytes() == (tmp_path / "checkpoint.pth").read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.faults("half-written and foreign checkpoints")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_checkpoint_gives_way_to_the_previous_one(two, share, caplog):
    truncate(two / "checkpoint.pth", share)
    assert mend(two) == 1
    assert "checkpoint.pth is damaged" in caplog.text
    assert f"going back to {two / 'checkpoint.prev.pth'}, epoch 1" in caplog.text
    assert read_checkpoint(two / "checkpoint.pth")["reporter"]["epoch"] == 1
    # The second epoch will be trained again; the model of the first stays.
    assert not (two / "2epoch.pth").exists() and (two / "1epoch.pth").exists()
    assert mend(two) == 1


@pytest.mark.faults("half-written and foreign checkpoints")
def test_a_kill_in_the_first_epochs_writing(tmp_path):
    checkpoint(tmp_path, 1)
    truncate(tmp_path / "checkpoint.pth")
    assert mend(tmp_path) == 0
    assert not (tmp_path / "checkpoint.pth").exists()


@pytest.mark.faults("half-written and foreign checkpoints")
def test_both_damaged(two):
    truncate(two / "checkpoint.pth")
    truncate(two / "checkpoint.prev.pth")
    assert mend(two) == 0
    assert not (two / "checkpoint.pth").exists()


@pytest.mark.faults("half-written and foreign checkpoints")
@pytest.mark.parametrize("harm", ["missing", "half", "another's"])
def test_an_epochs_model_is_written_again(two, harm, caplog):
    file = two / "2epoch.pth"
    if harm == "missing":
        file.unlink()
    elif harm == "half":
        truncate(file)
    else:
        torch.save({"weight": torch.zeros(50)}, file)
    assert mend(two) == 2
    assert f"writing {file} again" in caplog.text
    assert torch.equal(torch.load(file)["weight"], torch.full((50,), 2.0))


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.faults("half-written and foreign checkpoints")
def test_a_checkpoint_with_code_is_not_run(tmp_path, monkeypatch):
    """It is not treated as damaged either, because then the user would lose the whole training."""
    checkpoint(tmp_path, 1)
    states = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    torch.save({**states, "x": Malicious(tmp_path / "ran")}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="checkpoint.pth holds more than tensors .io.open.*ESPNET_KD_TRUST_PICKLE=1"):
        mend(tmp_path)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("ESPNET_KD_TRUST_PICKLE", "1")
    assert mend(tmp_path) == 1 and (tmp_path / "ran").exists()


@pytest.mark.faults("half-written and foreign checkpoints")
def test_a_damaged_name_is_no_code(two):
    """If one byte of a class name has changed, the file is damaged, as its checksum shows, and holds no code."""
    content = bytearray((two / "checkpoint.pth").read_bytes())
    content[content.index(b"timedelta")] ^= 1
    (two / "checkpoint.pth").write_bytes(content)
    assert mend(two) == 1


@pytest.mark.faults("half-written and foreign checkpoints")
@pytest.mark.parametrize("method", [None, "kl"])
def test_espnet_is_not_let_at_a_checkpoint_with_code(corpus, teacher_dir, tmp_path, method):
    """ESPnet's own resume would run the code."""
    out = tmp_path / "out"
    out.mkdir()
    more = ["--use_tensorboard", "false", "--resume", "true"]
    if method:
        with pytest.raises(Killed):  # leaves a record, but no trained step
            train(corpus, out, method, "--teacher", teacher_dir, *more, kill_at=("step", 1, 0))
    torch.save({"model": {}, "reporter": {"epoch": 1}, "x": Malicious(tmp_path / "ran")}, out / "checkpoint.pth")
    with pytest.raises(UserError, match="could run code"):
        if method:
            train(corpus, out, method, "--teacher", teacher_dir, *more)
        else:
            asr_kd_train.main(corpus.options(out, *more))
    assert not (tmp_path / "ran").exists()


@pytest.mark.faults("half-written and foreign checkpoints")
def test_nor_at_initial_parameters_with_code(corpus, tmp_path):
    torch.save({"x": Malicious(tmp_path / "ran")}, tmp_path / "init.pth")
    options = corpus.options(tmp_path / "out", "--init_param", f"{tmp_path}/init.pth:encoder:encoder")
    with pytest.raises(UserError, match="init.pth holds more than tensors .*could run code"):
        asr_kd_train.main(options)
    assert not (tmp_path / "ran").exists()


@pytest.mark.faults("half-written and foreign checkpoints")
def test_something_else_is_no_checkpoint(tmp_path):
    torch.save({"model": {}}, tmp_path / "checkpoint.pth")
    assert read_checkpoint(tmp_path / "checkpoint.pth") is None
    assert read_checkpoint(tmp_path / "absent.pth") is None


@pytest.fixture(scope="module")
def unbroken(corpus, teacher_dir, tmp_path_factory):
    """The page and directory of a training without a kill."""
    directory = tmp_path_factory.mktemp("runs")
    page = write_page(directory, **MID)
    train(corpus, directory / "whole", page, "--teacher", teacher_dir)
    return page, directory / "whole"


@pytest.fixture(scope="module")
def killed(corpus, teacher_dir, unbroken):
    """The directory of the same training, killed in its third epoch."""
    page, whole = unbroken
    out = whole.with_name("killed")
    with pytest.raises(Killed):
        train(corpus, out, page, "--teacher", teacher_dir, kill_at=("step", 3, 1))
    return out


@pytest.mark.faults("a training that ends in the middle of an epoch")
@pytest.mark.parametrize("damage", ["none", "checkpoint", "model"])
def test_training_resumes_to_the_same_student(corpus, teacher_dir, unbroken, killed, tmp_path, caplog, damage):
    """After a kill, the same command gives the student of an unbroken training."""
    page, whole = unbroken
    out = tmp_path / "student"
    shutil.copytree(killed, out, symlinks=True)
    assert read_checkpoint(out / "checkpoint.pth")["reporter"]["epoch"] == 2
    assert not (out / "student.pth").exists() and (out / "kd_stage1/student.pth").exists()
    if damage == "checkpoint":  # as if the kill had come while it was written
        truncate(out / "checkpoint.pth")
    if damage == "model":
        (out / "2epoch.pth").unlink()
    with caplog.at_level("INFO"):
        train(corpus, out, page, "--teacher", teacher_dir)
    assert "from epoch 3" in caplog.text
    assert ("going back to" in caplog.text) == (damage == "checkpoint")
    assert ("2epoch.pth again" in caplog.text) == (damage == "model")
    assert_same(whole, out)


@pytest.mark.faults("a training killed in each KD stage and at each boundary")
@pytest.mark.parametrize("option", [("--shuffle_within_batch", "true"), ("--accum_grad", 2)])
def test_a_resume_is_exact(corpus, teacher_dir, tmp_path, option):
    """Other batches in each epoch: a teacher's outputs depend a little on their padding, and may be kept in memory.
    Steps that ``accum_grad`` does not divide: ESPnet keeps the gradients of the last ones for the next epoch.
    """
    page, one, other = write_page(tmp_path, **MID), tmp_path / "one", tmp_path / "other"
    more = ("--teacher", teacher_dir, *option)
    train(corpus, one, page, *more)
    with pytest.raises(Killed):
        train(corpus, other, page, *more, kill_at=("step", 3, 0))
    train(corpus, other, page, *more)
    assert_same(one, other)


@pytest.mark.faults("half-written and foreign checkpoints")
def test_nothing_readable_is_left_of_the_kd_stages_before(corpus, teacher_dir, tmp_path):
    """Their record alone is not enough: they are trained again."""
    page, one, other = write_page(tmp_path, **RESTART), tmp_path / "one", tmp_path / "other"
    train(corpus, one, page, "--teacher", teacher_dir)
    train(corpus, other, page, "--teacher", teacher_dir, "--kd_stage", 1)
    truncate(other / "checkpoint.pth")
    with pytest.raises(Killed):
        train(corpus, other, page, "--teacher", teacher_dir, kill_at=("step", 1, 1))
    assert json.loads((other / "kd_stage.json").read_text())["finished_kd_stage"] == 0
    train(corpus, other, page, "--teacher", teacher_dir)
    assert_same(one, other)
