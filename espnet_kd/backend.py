"""The choice of how losses are computed, which depends on the device of their tensors.

``rows``: on a CPU. The frames that count are selected first and processed in small blocks. This needs the values of
masks, which cost nothing to read on a CPU.
``masked``: on any device, in plain torch. Every shape is known beforehand and no value is copied to the host, which
therefore never waits for the device. Frames that don't count are computed, and left out of the sums.
``fused``: on a CUDA device with Triton. Like ``masked``, but with one kernel in place of many for the losses in
:mod:`espnet_kd.losses.fused`; the other losses, and float64, use ``masked``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any, Callable, Iterator, List, TypeVar

import torch
from torch import Tensor

BACKENDS = ("rows", "masked", "fused")
Function = TypeVar("Function", bound=Callable[..., Any])
_forced: List[str] = []
_try_kernels: List[Callable[[torch.device], None]] = []


def backend_of(*tensors: Tensor) -> str:
    """The one of ``BACKENDS`` that computes losses of these tensors, which are on one device."""
    if _forced:
        name = _forced[-1]
    elif all(may_look(x) for x in tensors):
        name = "rows"
    elif all(has_values(x) and x.is_cuda for x in tensors) and _kernels_work(tensors[0].device):
        name = "fused"
    else:
        name = "masked"
    # The kernels compute in float32 only; no training uses float64.
    return "masked" if name == "fused" and any(x.dtype == torch.float64 for x in tensors) else name


def may_look(x: Any) -> bool:
    """Whether the program may branch on the values of ``x``: True on a CPU; on other devices the host would wait.

    False if there are only shapes, as while ``torch.compile`` traces. ``x`` is a tensor, or anything with a device.
    """
    if _forced:
        return _forced[-1] == "rows"
    return x.device.type == "cpu" and (not isinstance(x, Tensor) or has_values(x))


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Compute all losses inside the block with one backend, for tests and measurements.

    Raises:
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}; there are {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def without_gradient(function: Function) -> Function:
    """``torch.no_grad`` as a decorator that does not import torch, because `asr_kd_page` checks pages without it."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return inner  # type: ignore[return-value]


def has_values(x: Tensor) -> bool:
    """Whether ``x`` has values; a subclass such as torch's FakeTensor has only a shape."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def offer_kernels(try_out: Callable[[torch.device], None]) -> None:
    """Make the backend ``fused`` available. ``try_out`` runs a kernel on a device, and raises where it cannot."""
    _try_kernels[:] = [try_out]
    _kernels_work.cache_clear()


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run on ``device``; tried once, and logged."""
    if not _try_kernels:
        return False
    try:
        _try_kernels[0](device)
    # Triton, its compiler, a C compiler, the driver or the device may each be missing or too old, with errors of
    # their own; in each case, the masked backend computes the same.
    except Exception as e:  # noqa: BLE001
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        logging.warning("losses on %s: in plain torch, slower, because Triton cannot be used: %s", device, first)
        return False
    logging.info("losses on %s: by fused Triton kernels", device)
    return True
