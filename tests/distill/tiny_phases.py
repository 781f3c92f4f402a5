"""A training of three KD stages on the tiny corpus that can be killed at any moment, and a comparison of two."""

import json
from pathlib import Path

import pytest
import tiny_kd
import torch
import yaml

from espnet_kd.bin import asr_kd_train
from espnet_kd.distill.page import METHODS_DIR
from espnet_kd.distill.phases import PhaseChanges
from espnet_kd.distill.schedule import EpochHooks
from espnet_kd.experiments import checkpoints
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.tasks import asr_kd, training

#: Three steps per epoch, so twelve in all.
EPOCHS = 4
#: KD stages end with the first step of epoch 2 and of epoch 3.
MID = dict(shares=(0.3, 0.25, 0.45))
#: KD stage 2 restarts with epoch 2, and ends with the second step of epoch 3.
RESTART = dict(shares=(0.25, 0.38, 0.37), restart=2)
#: KD stage 2 restarts with the second step of epoch 2, and ends with the second step of epoch 3.
MID_RESTART = dict(shares=(0.3, 0.33, 0.37), restart=2)


class Killed(BaseException):
    """A BaseException, because no code may catch it, as with ``kill -9``."""


def write_page(directory: Path, shares, restart=None, **more) -> Path:
    """Write the main method's page with other shares and, if ``restart`` is given, ``restart`` in that KD stage."""
    page = yaml.safe_load((METHODS_DIR / "progressive_fkl.yaml").read_text(encoding="utf-8"))
    for number, (stage, share) in enumerate(zip(page["stages"], shares), 1):
        stage["share"] = share
        if number == restart:
            stage["restart"] = True
    return tiny_kd.write_yaml(directory / f"progressive_fkl{restart or ''}.yaml", {**page, **more})


def train(corpus, out, page, *more, kill_at=None, text=True, **changes):
    """Train with a page and a warm-up of the learning rate; the models of all epochs are kept.

    ``kill_at``: one of the moments of :class:`Moments`, at which the training is killed.
    """
    own = ["--kd_config", str(page), "--use_tensorboard", "false", "--keep_nbest_models", "9"]
    own += ["--scheduler", "warmuplr", "--scheduler_conf", "warmup_steps=8"]
    changes = {"max_epoch": EPOCHS, **changes}
    with pytest.MonkeyPatch.context() as patch:
        if kill_at is not None:
            Moments(kill_at).watch(patch)
        asr_kd_train.main(corpus.options(out, *own, *map(str, more), text=text, **changes))


class Moments:
    """Kills a training at one moment, which is a tuple.

    ("step", epoch, step): before this step.
    (when, file, epoch): ``before``, ``while`` or ``after`` a file (``checkpoint``, ``model``) of this epoch is written.
    (when, "hand-over", epoch), (when, "record", KD stage): ``before`` or ``after`` it.
    (when, "restart", part): ``before`` or ``after`` the optimizer is restarted at the end of this part; -1: at the
    beginning of the training.
    """

    def __init__(self, at):
        self.at = at

    def pass_by(self, *moment):
        if moment == self.at:
            raise Killed

    def around(self, function, *name):
        """Return ``function`` with one moment before and one after it."""

        def wrapped(*args, **kwargs):
            moment = [n(*args) if callable(n) else n for n in name]
            self.pass_by("before", *moment)
            result = function(*args, **kwargs)
            self.pass_by("after", *moment)
            return result

        return wrapped

    def watch(self, patch):
        """Patch the code so that it passes every moment."""
        count, save, at = EpochHooks._count, torch.save, self.at

        def stepping(hooks, batches):
            for step, batch in enumerate(count(hooks, batches)):
                self.pass_by("step", hooks.progress.epoch, step)
                yield batch

        def saving(states, place, *args, **kwargs):
            if not isinstance(place, Path):  # a file that is renamed when complete
                return save(states, place, *args, **kwargs)
            if place.name == checkpoints.CHECKPOINT:
                moment = ("checkpoint", states["reporter"]["epoch"])
            elif place.name.endswith("epoch.pth"):
                moment = ("model", int(place.name[: -len("epoch.pth")]))
            else:
                return save(states, place, *args, **kwargs)
            self.pass_by("before", *moment)
            save(states, place, *args, **kwargs)
            if at == ("while", *moment):
                content = place.read_bytes()
                place.write_bytes(content[: len(content) // 2])
                raise Killed
            self.pass_by("after", *moment)

        patch.setattr(EpochHooks, "_count", stepping)
        patch.setattr(torch, "save", saving)
        patch.setattr(asr_kd, "hand_over", self.around(asr_kd.hand_over, "hand-over", lambda o, p, epoch, **_: epoch))
        # Its first record is that of the KD stages that were finished before.
        write = self.around(training.write_record, "record", lambda out, record, done, ended: done)
        patch.setattr(training, "write_record", write)
        restart = self.around(PhaseChanges._restart, "restart", lambda changes, share: changes.part)
        patch.setattr(PhaseChanges, "_restart", restart)


def assert_same(one, other, ends=("kd_stage1", "kd_stage2", ".")):
    """Assert that two trainings agree bit for bit: models of all epochs, optimizer, losses, each stage's student."""
    first, second = (read_checkpoint(x / "checkpoint.pth") for x in (one, other))
    for part in ("model", "optimizers", "schedulers"):
        assert equal(first[part], second[part]), part
    assert losses(first) == losses(second)
    models = [f"{epoch}epoch.pth" for epoch in first["reporter"]["stats"]] + ["valid.loss_ctc.ave.pth"]
    for name in (*models, *(f"{end}/student.pth" for end in ends)):
        assert equal(torch.load(one / name), torch.load(other / name)), name
    records = [json.loads((x / "kd_stage.json").read_text()) for x in (one, other)]
    assert records[0] == records[1] and records[0]["finished"]
    assert not list(other.rglob("*.part")) and (other / "experiment.json").is_file()
    assert sorted(p.name for p in other.glob("kd_stage*")) == sorted(p.name for p in one.glob("kd_stage*"))


def equal(one, other):
    """Whether two nested states of tensors and other values are the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def losses(states):
    """Every loss of every epoch, and the learning rate."""
    return {
        (epoch, phase, key): str(value)
        for epoch, phases in states["reporter"]["stats"].items()
        for phase, values in phases.items()
        for key, value in values.items()
        if key.startswith(("loss", "optim0_lr"))
    }
