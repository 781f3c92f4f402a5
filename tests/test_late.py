"""Values on a GPU that are looked at when they have come over."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_kd.late import LateCheck


class Event:
    """Stands for CUDA's: whether a copy is done."""

    def __init__(self, done):
        self.done = done

    def query(self):
        return self.done


def test_on_a_cpu_it_is_at_once():
    check = LateCheck()
    check(torch.tensor(False), lambda: "fine")
    with pytest.raises(ValueError, match="^wrong$"):
        check(torch.tensor(True), lambda: "wrong")


def test_what_has_not_come_over_is_not_looked_at():
    check, event = LateCheck(), Event(False)
    check._pending.append((Event(True), torch.tensor(False), lambda: "fine"))
    check._pending.append((event, torch.tensor(True), lambda: "wrong"))
    check(torch.tensor(False), lambda: "fine")
    event.done = True
    with pytest.raises(ValueError, match="^wrong$"):
        check(torch.tensor(False), lambda: "fine")
    check.look()  # said once


def test_shapes_alone_are_passed_over():
    with FakeTensorMode():
        LateCheck()(torch.tensor(True), lambda: "wrong")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False")
def test_on_a_gpu_it_is_late_and_without_a_wait():
    check, wrong = LateCheck(), torch.tensor(True, device="cuda")
    check(torch.zeros_like(wrong), lambda: "fine")  # the first pinned memory may be a wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        check(wrong, lambda: "wrong")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="^wrong$"):
        check.look()
