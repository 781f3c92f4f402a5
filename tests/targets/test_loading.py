"""ESPnet's data-loader workers read and collate cached targets, which changes nothing else in a training."""

import gc
import multiprocessing
import os
import shutil

import pytest
import torch
from espnet2.torch_utils.device_funcs import to_device
from tiny_cache import command

from espnet_kd.bin import asr_kd_cache, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Progress
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.inference.encode import EncoderOutputs
from espnet_kd.targets.cache import shard_dir
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.loading import BROUGHT, Brought, Loading, from_plain, to_plain
from espnet_kd.topk import compress

PARTS = [(0.0, 0.2, None), (0.2, 0.5, ("encoder",)), (0.5, 1.0, ())]


def collate(data):
    return list(data), {"speech": torch.zeros(2, 5), "text_lengths": torch.tensor([3, 0])}


def targets(hidden=("encoder",), temperatures=(2.0,)):
    x = compress(torch.randn(2, 4, 9), 3, temperatures)
    return EncoderOutputs(x, torch.tensor([4, 2]), 0.04, {tap: torch.randn(2, 4, 5) for tap in hidden})


class Cached:
    """A replacement for a cached teacher."""

    def __init__(self, error=None):
        self.error, self.asked = error, []

    def read(self, utt_ids, taps=()):
        self.asked.append((list(utt_ids), taps))
        if self.error:
            raise UserError(self.error)
        return targets(taps)


@pytest.mark.parametrize("epoch, epochs, taps", [
    (1, 10, None), (2, 10, None), (3, 10, ("encoder",)), (5, 10, ("encoder",)), (6, 10, ()), (10, 10, ()),
    (1, 2, ("encoder",)), (2, 2, ()), (1, 1, ("encoder",)),
])  # fmt: skip
def test_an_epoch_brings_what_its_parts_read(epoch, epochs, taps):
    teacher = Cached()
    ids, batch = Loading(collate, teacher, PARTS, Progress(epoch, epochs))(["a", "b"])
    assert ids == ["a", "b"] and set(batch) == {"speech", "text_lengths", BROUGHT}
    assert teacher.asked == ([] if taps is None else [(["a", "b"], taps)])
    brought = Brought(to_device(batch)[BROUGHT])
    assert brought.label_counts(2) == [3, 0] and brought.label_counts(1) is None
    assert (brought.targets(taps or ()) is None) == (taps is None)
    assert brought.targets(("encoder.1",)) is None  # such a tap is read in the step


def test_nothing_came_along():
    assert Brought().label_counts(2) is None and Brought(None).targets(()) is None
    assert Loading(collate, None, PARTS, Progress(3, 10))(["a"])[1][BROUGHT] == {"text_lengths": [3, 0]}


def test_what_is_wrong_is_told_by_the_step():
    _, batch = Loading(collate, Cached("'a' is damaged"), PARTS, Progress(3, 10))(["a"])
    with pytest.raises(UserError, match="^'a' is damaged$"):
        Brought(batch[BROUGHT]).targets(())


def test_targets_come_over_as_they_are():
    """Targets are unchanged after the conversion to plain values, ESPnet's ``to_device`` and the conversion back."""
    one = targets()
    other = from_plain(to_device(to_plain(one), "cpu"))
    assert (other.frame_shift, other.logits.num_tokens) == (0.04, 9) and other.logits.norms.keys() == {2.0}
    for x, y in ((one.logits.tokens, other.logits.tokens), (one.logits.norms[2.0], other.logits.norms[2.0]),
                 (one.lengths, other.lengths), (one.hidden["encoder"], other.hidden["encoder"])):  # fmt: skip
        assert torch.equal(x, y)


@pytest.fixture
def cache(corpus, teacher_dir, tmp_path):
    asr_kd_cache.main(command(teacher_dir, corpus, tmp_path / "targets"))
    return tmp_path / "targets"


def train(corpus, out, cache, thirds, workers):
    torch.manual_seed(0)
    options = ["--target_cache", str(cache), "--kd_config", str(thirds), "--num_workers", str(workers)]
    asr_kd_train.main(corpus.options(out, *options, batch_size=2))
    return read_checkpoint(out / "checkpoint.pth")


def test_training_reads_nothing_and_learns_the_same(corpus, cache, thirds, tmp_path, monkeypatch):
    """The student is the same whether workers, the loader without workers, or the training step read the targets."""
    home, read, places = os.getpid(), CachedTeacher.read, tmp_path / "places"
    places.touch()

    def noted(self, *args):
        with open(places, "a") as f:
            f.write(f"{os.getpid() != home}\n")
        return read(self, *args)

    monkeypatch.setattr(CachedTeacher, "read", noted)
    found = {}
    for name, workers, asked in (("workers", 2, {"True"}), ("here", 0, {"False"}), ("step", 0, {"False"})):
        if name == "step":
            monkeypatch.setattr(Brought, "targets", lambda self, taps: None)
        places.write_text("")
        found[name] = train(corpus, tmp_path / name, cache, thirds, workers)
        seen = places.read_text().split()
        assert seen[:9] == ["False"] * 9  # the check before training that the teacher recognises anything
        assert set(seen[9:]) == asked
    for name in ("here", "step"):
        for key, value in found["workers"]["model"].items():
            assert torch.equal(value, found[name]["model"][key]), (name, key)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_ends_the_training_in_one_line(corpus, cache, thirds, tmp_path, workers):
    """Damage is found when it is read. The error shows no traceback of a worker, and no worker is left running."""
    for number in range(len(list(cache.glob("shard.*")))):
        ark = shard_dir(cache, number) / "log_probs.ark"
        content = bytearray(ark.read_bytes())
        content[-3] ^= 0x55
        ark.write_bytes(content)
    with pytest.raises(UserError, match="shard.*are damaged|cannot be read") as e:
        train(corpus, tmp_path / "exp", cache, thirds, workers)
    assert "Traceback" not in str(e.value) and "\n" not in str(e.value)
    del e  # its traceback refers to the loader and would keep it alive
    gc.collect()
    assert multiprocessing.active_children() == []


def test_a_shard_that_goes_away_meanwhile(corpus, cache, thirds, tmp_path):
    teacher = CachedTeacher(cache)
    shutil.rmtree(shard_dir(cache, 0))
    _, batch = Loading(collate, teacher, [(0.0, 1.0, ())], Progress())(["train0"])
    with pytest.raises(UserError, match="train0.*No such file"):
        Brought(batch[BROUGHT]).targets(())
