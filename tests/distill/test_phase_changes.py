"""A KD stage with ``restart`` trains like a new optimizer and a new schedule, whatever their kinds."""

import copy
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

SHARES = {"at an epoch": (0.5, 0.5), "within an epoch": (0.4, 0.6), "within the last step of an epoch": (0.49, 0.51)}


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
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
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


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_a_resume_restarts_neither_again_nor_too_late(write_page_of, shares):
    """Whichever epoch it begins with. A training with more epochs has restarted, even if its plan would do so later."""
    page = write_page_of({"share": shares[0]}, {"share": shares[1], "restart": True})

    def train(max_epoch, first=1, saved=None):
        """Each step's learning rate from an epoch on, and the state before each epoch."""
        trained = build("adam", "warmup", torch.ones(4))
        progress, options = Progress(max_epoch=max_epoch, steps_per_epoch=STEPS), SimpleNamespace(patience=None)
        conf = SCHEDULERS["warmup"][1]
        changes = PhaseChanges(make_plan(page, max_epoch), progress, conf, trained[1:2], trained[2:], options)
        for x, state in zip(trained[1:], copy.deepcopy(saved or ())):
            x.load_state_dict(state)
        rates, states = [], []
        for progress.epoch in range(first, max_epoch + 1):
            states.append([copy.deepcopy(x.state_dict()) for x in trained[1:]])
            changes.at_epoch(progress.epoch)
            for progress.step in range(STEPS):
                changes.at_step()
                rates.append(trained[1].param_groups[0]["lr"])
                step(*trained, progress.step)
            progress.step = 0
        return rates, [*states, [x.state_dict() for x in trained[1:]]]

    whole, states = train(EPOCHS)
    assert sum(later < rate / 2 for rate, later in zip(whole, whole[1:])) == 1
    for epoch in range(2, EPOCHS + 1):
        assert train(EPOCHS, epoch, states[epoch - 1])[0] == whole[STEPS * (epoch - 1) :]
    longer, _ = train(7, EPOCHS + 1, states[-1])
    assert all(later > rate / 2 for rate, later in zip([whole[-1], *longer], longer))


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
