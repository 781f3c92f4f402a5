"""Looking at a value on a GPU without waiting for it."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, NoReturn, Protocol, Tuple

import torch
from torch import Tensor

from espnet_kd.backend import has_values, may_look


class Copied(Protocol):
    """An event that follows a copy."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Wait until it is done."""


class Later:
    """Acts where a flag is True: on a CPU at once, on a GPU as soon as the flag has come over by itself."""

    def __init__(self) -> None:
        self._pending: Deque[Tuple[Copied, Tensor, Callable[[], None]]] = deque()

    def __call__(self, flag: Tensor, act: Callable[[], None]) -> None:
        """Look at all earlier flags that have come over, and at ``flag``, a scalar, or have it come over.

        What ``act`` raises is raised here, for an earlier flag that of the earlier call.
        """
        self.look()
        if not has_values(flag):  # shapes alone, while something is traced
            return
        if may_look(flag):
            if flag:
                act()
        else:
            self._pending.append((*bring_over(flag), act))

    def look(self) -> None:
        """Look at those that have come over."""
        while self._pending and self._pending[0][0].query():
            _, here, act = self._pending.popleft()
            if here:
                act()

    def clear(self) -> None:
        """Forget all flags that have not come over."""
        self._pending.clear()

    def finish(self) -> None:
        """Wait for all of them, and look."""
        while self._pending:
            self._pending[0][0].synchronize()
            self.look()


class LateCheck:
    """``check(wrong, message)`` raises ValueError for the first tensor ``wrong`` that is True."""

    def __init__(self) -> None:
        self._later = Later()

    def __call__(self, wrong: Tensor, message: Callable[[], str]) -> None:
        """See :class:`Later`; the message is made when it is needed."""
        self._later(wrong, lambda: self._refuse(message))

    def _refuse(self, message: Callable[[], str]) -> NoReturn:
        self._later.clear()  # the other flags are most likely of the same fault
        raise ValueError(message())


def bring_over(flag: Tensor) -> Tuple[Copied, Tensor]:
    """Begin to copy a scalar from a GPU; it may be looked at when the event is done."""
    # From memory that is not pinned the copy would be a wait.
    here = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(flag.device))
    return copied, here
