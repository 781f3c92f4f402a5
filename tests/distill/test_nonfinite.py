"""Batches with a non-finite loss are named, skipped and counted; too many end the training."""

import math
import shutil

import numpy as np
import pytest
import soundfile
import tiny_asr
import torch
from espnet2.asr.espnet_model import ESPnetASRModel

from espnet_kd import late
from espnet_kd.backend import using
from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.nonfinite import NonFiniteLosses
from espnet_kd.distill.schedule import Progress
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.experiments.models import load_state
from espnet_kd.targets.online import OnlineTeacher


class Fragile(torch.nn.Module):
    """A replacement for an ESPnet model with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, speech, utt_id):
        loss = self.norm(speech).square().mean()
        return loss, {"loss": loss.detach(), "loss_att": None, "acc": math.nan}, torch.tensor(1)


@pytest.fixture
def watched():
    def make(limit=1):
        model, progress = Fragile(), Progress()
        NonFiniteLosses(limit, progress).watch(model)
        return model, progress

    return make


GOOD = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
BAD = GOOD.clone()
BAD[1, 1] = math.nan
NAMES = list("abcd")


def test_the_running_statistics_are_as_if_the_step_had_not_been(watched, caplog):
    model, _ = watched()
    model(speech=GOOD, utt_id=NAMES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert before["norm.num_batches_tracked"] == 1 and not caplog.text
    model(speech=BAD, utt_id=NAMES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "epoch 1, step 1: the loss is not finite (loss nan), the audio of b: the step is skipped (1" in caplog.text
    model(speech=GOOD, utt_id=NAMES)
    assert model.norm.num_batches_tracked == 2


def test_all_utterances_are_named_where_no_audio_is_at_fault(watched, caplog):
    model, _ = watched()
    model.norm.weight.data.fill_(1e30)
    model(speech=GOOD, utt_id=NAMES)
    assert "utterances a, b, c, d" in caplog.text


@pytest.fixture
def late_device(monkeypatch):
    """Simulate a GPU, whose values arrive later: they are read only once a test appends to the list that this gives.

    On ``synchronize`` they arrive too.
    """
    arrived = []

    class Event:
        def query(self):
            return bool(arrived)

        def synchronize(self):
            arrived.append(1)

    monkeypatch.setattr(late, "bring_over", lambda flag: (Event(), flag))
    with using("masked"):
        yield arrived


@pytest.mark.faults("losses that are no numbers")
def test_where_looking_is_a_wait_a_step_is_told_of_later(late_device, caplog):
    """The message has the epoch and step of the batch. The running statistics are restored at once, without waiting."""
    model, progress = Fragile(), Progress()
    losses = NonFiniteLosses(2, progress)
    losses.watch(model)
    model(speech=GOOD, utt_id=NAMES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(speech=BAD, utt_id=NAMES)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    progress.epoch, progress.step = 2, 4
    model.eval()
    model(speech=BAD, utt_id=NAMES)
    assert not caplog.text
    late_device.append(1)
    model.train()
    model(speech=GOOD, utt_id=NAMES)
    assert "epoch 1, step 1: the loss is not finite (loss nan), the audio of b: the step is skipped (1" in caplog.text
    assert "epoch 2, validation: the loss is not finite (loss nan), the audio of b: the batch is left" in caplog.text
    late_device.clear()
    for _ in range(2):
        model(speech=BAD, utt_id=NAMES)
    with pytest.raises(UserError, match="epoch 2, step 5.*more than --max_nonfinite 2 such batches in one epoch"):
        losses.finish()


@pytest.mark.faults("losses that are no numbers")
def test_the_limit_is_of_an_epoch_and_of_validation_too(watched):
    model, progress = watched(limit=2)
    model(speech=BAD, utt_id=NAMES)
    model.eval()
    model(speech=BAD, utt_id=NAMES)
    progress.epoch = 2
    model(speech=BAD, utt_id=NAMES)
    model.train()
    model(speech=BAD, utt_id=NAMES)
    with pytest.raises(UserError, match="epoch 2, step 1.*more than --max_nonfinite 2 such batches in one epoch"):
        model(speech=BAD, utt_id=NAMES)


@pytest.fixture
def with_nan(corpus, tmp_path):
    """The tiny corpus with a NaN sample in one training utterance, as in a damaged float WAV file."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus.dir, copy)
    waves = [line.split() for line in (copy / "train" / "wav.scp").read_text().splitlines()]
    samples, rate = soundfile.read(waves[4][1], dtype="float32")
    samples[1000] = np.nan
    soundfile.write(copy / "nan.wav", samples, rate, subtype="FLOAT")
    waves[4][1] = str(copy / "nan.wav")
    (copy / "train" / "wav.scp").write_text("".join(f"{u} {p}\n" for u, p in waves))
    options = corpus.options(tmp_path / "out", "--use_tensorboard", "false", max_epoch=2)
    scp = str(corpus.dir / "train" / "wav.scp")
    return tmp_path / "out", [o.replace(scp, str(copy / "train" / "wav.scp")) for o in options]


@pytest.mark.faults("losses that are no numbers")
def test_a_plain_training_with_one_broken_file(with_nan, caplog):
    out, options = with_nan
    asr_kd_train.main(options)
    assert caplog.text.count("the audio of train4: the step is skipped (1 of at most 20 in an epoch)") == 2
    assert "The grad norm is nan. Skipping updating the model." in caplog.text
    assert all(torch.isfinite(x).all() for x in load_state(out / "2epoch.pth").values())
    stats = read_checkpoint(out / "checkpoint.pth")["reporter"]["stats"]
    assert all(math.isfinite(stats[e][part]["loss_ctc"]) for e in (1, 2) for part in ("train", "valid"))
    with pytest.raises(UserError, match="more than --max_nonfinite 0 such batches"):
        asr_kd_train.main([*options, "--max_nonfinite", "0", "--output_dir", str(out.with_name("strict"))])


@pytest.mark.faults("losses that are no numbers")
def test_a_teacher_that_says_nonsense_of_one_utterance(corpus, teacher_dir, tmp_path, monkeypatch, caplog):
    targets = OnlineTeacher.targets

    def poisoned(self, utt_ids, *args, **kwargs):
        said = targets(self, utt_ids, *args, **kwargs)
        if "train2" in utt_ids:
            said.logits[utt_ids.index("train2"), 0] = math.inf
        return said

    monkeypatch.setattr(OnlineTeacher, "targets", poisoned)
    more = ["--teacher", str(teacher_dir), "--kd_config", "kl", "--teacher_memory", "0", "--use_tensorboard", "false"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *more, max_epoch=1))
    line = next(m for m in caplog.messages if "the loss is not finite" in m)
    assert "loss_kl" in line and "loss_ctc" not in line and "train2" in line and "(1 of" in line
    assert all(torch.isfinite(x).all() for x in load_state(tmp_path / "out" / "student.pth").values())


def test_a_training_that_moves_nothing_does_not_count_as_finished(corpus, tmp_path, monkeypatch):
    """ESPnet would end it after the epoch without an error, and a second call would continue after that epoch."""
    forward = ESPnetASRModel.forward

    def broken(self, *args, **kwargs):
        loss, stats, weight = forward(self, *args, **kwargs)
        return loss * math.nan, stats, weight

    monkeypatch.setattr(ESPnetASRModel, "forward", broken)
    options = corpus.options(tmp_path / "out", "--use_tensorboard", "false")
    for _ in range(2):
        with pytest.raises(UserError, match="out: no step of epoch 1 had finite gradients.*optim_conf: lr"):
            asr_kd_train.main([*options, "--resume", "true"])


def test_a_model_like_espnets_is_watched(corpus, tmp_path):
    from espnet_kd.tasks.asr_kd import ASRKDTask

    args = ASRKDTask.get_parser().parse_args(corpus.options(tmp_path / "out"))
    norms = [m for m in ASRKDTask.build_model(args).modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(norms) == tiny_asr.config()["encoder_conf"]["num_blocks"]
