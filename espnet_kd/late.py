"""Checking values of GPU tensors without making the host wait for them."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, NoReturn, Protocol, Tuple

import torch
from torch import Tensor

from espnet_kd.backend import has_values, may_look


class Copied(Protocol):
    """An event that marks the end of a copy from the GPU."""

    def query(self) -> bool:
        """Whether the copy is finished."""

    def synchronize(self) -> None:
        """Wait until the copy is finished."""


class _Pending:
    """Flags on a GPU, each with a function to call if it is True, that are being copied to the host."""

    def __init__(self) -> None:
        self._pending: Deque[Tuple[Copied, Tensor, Callable[[], None]]] = deque()

    def add(self, flag: Tensor, act: Callable[[], None]) -> None:
        """Check the earlier flags that have been copied; then check ``flag``, a scalar, or begin to copy it.

        An exception of ``act`` is raised here; it may come from the ``act`` of an earlier call.
        """
        self.look()
        if not has_values(flag):  # only shapes, during tracing
            return
        if may_look(flag):
            if flag:
                act()
        else:
            self._pending.append((*bring_over(flag), act))

    def look(self) -> None:
        """Check the flags that have been copied."""
        while self._pending and self._pending[0][0].query():
            _, here, act = self._pending.popleft()
            if here:
                act()

    def finish(self) -> None:
        """Wait for all flags, and check them."""
        while self._pending:
            self._pending[0][0].synchronize()
            self.look()


class Later(_Pending):
    """Call a function if a flag is True: on a CPU at once, on a GPU when the flag has been copied to the host."""

    def __call__(self, flag: Tensor, act: Callable[[], None]) -> None:
        """Check ``flag``, a scalar, now or later, and call ``act`` if it is True."""
        self.add(flag, act)


class LateCheck(_Pending):
    """``check(wrong, message)`` raises ValueError with the message if the tensor ``wrong`` is True, now or later."""

    def __call__(self, wrong: Tensor, message: Callable[[], str]) -> None:
        """Check ``wrong``, a scalar; the message is made only if it is needed."""
        self.add(wrong, lambda: self._refuse(message))

    def _refuse(self, message: Callable[[], str]) -> NoReturn:
        self._pending.clear()  # the other flags most likely have the same cause
        raise ValueError(message())


def bring_over(flag: Tensor) -> Tuple[Copied, Tensor]:
    """Begin to copy a scalar from a GPU; its value may be read when the event is finished."""
    # Without pinned memory the host would wait for the copy.
    here = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))
    return copied, here
