"""A KD stage with ``restart`` trains like a new optimizer and a new schedule, whatever their kinds."""

from types import SimpleNamespace

import pytest
import torch
from espnet2.schedulers.noam_lr import NoamLR
from espnet2.schedulers.warmup_lr import WarmupLR
from torch.optim import lr_scheduler

from espnet_kd.distill.phases import PhaseChanges
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress

EPOCHS, STEPS = 4, 5
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=0.3),  # has a state at once
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
}
SCHEDULERS = {
    "none": (None, {}),
    "warmup": (WarmupLR, {"warmup_steps": 8}),
    "noam": (NoamLR, {"model_size": 4, "warmup_steps": 8}),
    "exponential": (lr_scheduler.ExponentialLR, {"gamma": 0.8}),
    "one cycle": (lr_scheduler.OneCycleLR, {"max_lr": 0.1, "total_steps": EPOCHS * STEPS + 1, "cycle_momentum": False}),
}


def build(optimizer, scheduler, weights, **changed):
    parameter = torch.nn.Parameter(weights.clone())
    made = OPTIMIZERS[optimizer]([parameter])
    kind, conf = SCHEDULERS[scheduler]
    return parameter, made, None if kind is None else kind(made, **{**conf, **changed})


def step(parameter, optimizer, scheduler, number):
    optimizer.zero_grad()
    (parameter * torch.arange(1.0, 5.0) - number % 3).square().sum().backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.4, 0.6)], ids=["at an epoch", "within an epoch"])
@pytest.mark.filterwarnings("ignore:.*NoamLR is deprecated")
def test_it_trains_like_a_new_one(write_page_of, optimizer, scheduler, shares):
    plan = make_plan(write_page_of({"share": shares[0]}, {"share": shares[1], "restart": True}), EPOCHS)
    progress = Progress(max_epoch=EPOCHS, steps_per_epoch=STEPS)
    trained = build(optimizer, scheduler, torch.ones(4))
    options = SimpleNamespace(patience=None)
    changes = PhaseChanges(plan, progress, SCHEDULERS[scheduler][1], trained[1:2], trained[2:], options)
    warm = {"warmup_steps": round(8 * shares[1])} if "warmup_steps" in SCHEDULERS[scheduler][1] else {}
    begin, other = round(shares[0] * EPOCHS * STEPS), None
    for number in range(EPOCHS * STEPS):
        epoch, progress.step = divmod(number, STEPS)
        progress.epoch = epoch + 1
        if progress.step == 0:
            changes.at_epoch(progress.epoch)
        changes.at_step()
        if number == begin:
            other = build(optimizer, scheduler, trained[0].detach(), **warm)
        if other is not None:
            step(*other, number)
        step(*trained, number)
        if other is not None:
            assert torch.equal(trained[0], other[0])
            assert trained[1].param_groups[0]["lr"] == other[1].param_groups[0]["lr"]
    if other[2] is not None:
        assert trained[2].state_dict() == other[2].state_dict()


@pytest.mark.parametrize("patience", [None, 3])
def test_patience_begins_after_the_last_boundary(write_page_of, patience):
    plan = make_plan(write_page_of({"share": 0.3}, {"share": 0.3}, {"share": 0.4}), 10)
    options = SimpleNamespace(patience=patience)
    changes = PhaseChanges(plan, Progress(max_epoch=10), {}, [], [], options)
    found = []
    for epoch in range(1, 11):
        changes.at_epoch(epoch)
        found.append(options.patience)
    assert found == [None] * 6 + [patience] * 4


@pytest.fixture
def write_page_of(write_page):
    from espnet_kd.distill.page import load_page

    return lambda *stages: load_page(str(write_page({"stages": list(stages)})))
