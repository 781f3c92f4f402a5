"""How the losses are computed, by where their tensors lie: the one place where this is chosen.

``rows``: on a CPU. The frames that count are taken out first and worked on a few at a time, which needs the values of
masks (how many frames are there?) and is free where the values are at hand.
``masked``: anywhere, in plain torch. Every shape is known beforehand and no value is copied to the host, which
therefore never waits for the device; frames that don't count are computed and left out of the sums.
``fused``: on a CUDA device with Triton. As ``masked``, and one kernel in place of many for the losses that
:mod:`espnet_kd.losses.fused` knows; the others, and float64, are ``masked`` there.
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
    """One of ``BACKENDS``, for losses of these tensors, which lie on one device."""
    if _forced:
        name = _forced[-1]
    elif all(may_look(x) for x in tensors):
        name = "rows"
    elif all(has_values(x) and x.is_cuda for x in tensors) and _kernels_work(tensors[0].device):
        name = "fused"
    else:
        name = "masked"
    # The kernels compute in float32, and nothing that is trained has float64.
    return "masked" if name == "fused" and any(x.dtype == torch.float64 for x in tensors) else name


def may_look(x: Any) -> bool:
    """Whether the values of ``x`` may decide what is done next: for free on a CPU, a wait on any other device.

    Never where there are shapes alone, as while ``torch.compile`` traces. ``x`` is a tensor, or anything with a device.
    """
    if _forced:
        return _forced[-1] == "rows"
    return x.device.type == "cpu" and (not isinstance(x, Tensor) or has_values(x))


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """All losses inside by one backend: for tests and for measuring.

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
    """``torch.no_grad`` as a decorator that needs no torch yet: pages are checked without it (`asr_kd_page`)."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return inner  # type: ignore[return-value]


def has_values(x: Tensor) -> bool:
    """Whether ``x`` has values at all, which a subclass such as torch's FakeTensor may lack."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def offer_kernels(try_out: Callable[[torch.device], None]) -> None:
    """Make the backend ``fused`` available. ``try_out`` runs a kernel on a device, and raises where it cannot."""
    _try_kernels[:] = [try_out]
    _kernels_work.cache_clear()


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run on ``device``: tried once, and logged."""
    if not _try_kernels:
        return False
    try:
        _try_kernels[0](device)
    # Triton, its compiler, a C compiler, the driver or the device may each be missing or too old, with errors of
    # their own; whatever it is, the masked path computes the same.
    except Exception as e:  # noqa: BLE001
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        logging.warning("losses on %s: in plain torch, slower, because Triton cannot be used: %s", device, first)
        return False
    logging.info("losses on %s: by fused Triton kernels", device)
    return True
