"""Looking at a value on a GPU without waiting for it."""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Tuple

import torch
from torch import Tensor

from espnet_kd.backend import has_values


class LateCheck:
    """Refuses what a tensor says is wrong: on a CPU at once, on a GPU as soon as the value has come over by itself."""

    def __init__(self) -> None:
        self._pending: Deque[Tuple[torch.cuda.Event, Tensor, Callable[[], str]]] = deque()

    def __call__(self, wrong: Tensor, message: Callable[[], str]) -> None:
        """Look at all earlier values that have come over, and at ``wrong``, a scalar, or have it come over.

        Raises:
            ValueError: with its message, of the first that is True.
        """
        self.look()
        if not has_values(wrong):  # shapes alone, while something is traced
            return
        if not wrong.is_cuda:
            if wrong:
                raise ValueError(message())
            return
        # From memory that is not pinned the copy would be a wait.
        here = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(wrong, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(wrong.device))
        self._pending.append((copied, here, message))

    def look(self) -> None:
        """Look at those that have come over (ValueError as above)."""
        while self._pending and self._pending[0][0].query():
            _, here, message = self._pending.popleft()
            if here:
                self._pending.clear()  # of the same kind, most likely
                raise ValueError(message())
