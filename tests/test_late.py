"""Checks of values on a GPU that wait until the values have been copied to the CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_kd import late
from espnet_kd.backend import using
from espnet_kd.late import LateCheck, Later


class Event:
    """Stand-in for a CUDA event, which shows whether a copy is done."""

    def __init__(self, done=False):
        self.done = done

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


@pytest.fixture
def events(monkeypatch):
    """Replace copies from the device by stand-ins; give the event of each copy, in order."""
    events = []

    def bring_over(flag):
        events.append(Event())
        return events[-1], flag

    monkeypatch.setattr(late, "bring_over", bring_over)
    with using("masked"):
        yield events


def test_on_a_cpu_it_is_at_once():
    check = LateCheck()
    check(torch.tensor(False), lambda: "fine")
    with pytest.raises(ValueError, match="^wrong$"):
        check(torch.tensor(True), lambda: "wrong")


def test_what_has_not_come_over_is_not_looked_at(events):
    check = LateCheck()
    check(torch.tensor(False), lambda: "fine")
    check(torch.tensor(True), lambda: "wrong")
    events[0].done = True
    check(torch.tensor(False), lambda: "fine")
    events[1].done = True
    with pytest.raises(ValueError, match="^wrong$"):
        check(torch.tensor(False), lambda: "fine")
    check.look()  # the error is raised only once


def test_all_are_looked_at_in_the_end_and_in_order(events):
    later, acted = Later(), []
    for number, flag in enumerate([True, False, True, True]):
        later(torch.tensor(flag), lambda number=number: acted.append(number))
    assert acted == []
    later.finish()
    assert acted == [0, 2, 3] and all(event.done for event in events)
    later.finish()
    assert acted == [0, 2, 3]


def test_shapes_alone_are_passed_over():
    with FakeTensorMode():
        LateCheck()(torch.tensor(True), lambda: "wrong")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
def test_on_a_gpu_it_is_late_and_without_a_wait():
    check, wrong = LateCheck(), torch.tensor(True, device="cuda")
    check(torch.zeros_like(wrong), lambda: "fine")  # the first allocation of pinned memory may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        check(wrong, lambda: "wrong")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="^wrong$"):
        check.look()
