"""A simulated accelerator: tensors that report another device, while their values are on the CPU.

Every operation for which the host would wait for a GPU is recorded, with the place in the code that called it. The
device is ``meta``, because that and the CPU are the only devices that torch always has.
"""

from __future__ import annotations

import os
import traceback
from typing import Any, Dict, List, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
DEVICE = torch.device("meta")
#: Operations whose result is a Python number or has a shape that depends on values.
ASKING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.repeat_interleave.Tensor, aten._unique2.default, aten.is_nonzero.default, aten.unique_consecutive.default,
}  # fmt: skip


class Wait(NamedTuple):
    """One wait: the operation, the package that called it, and the place in the code."""

    what: str
    owner: str  #: espnet_kd, espnet, ctc (torch's CTC, which needs the lengths on the host) or other
    where: str


class Far(torch.Tensor):
    """A tensor on the far device."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # FarDevice wraps the results

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Far:
        far = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        far.inner = inner
        return far

    def __repr__(self) -> str:
        return f"Far({self.inner!r})"

    def new(self, *content: Any) -> torch.Tensor:
        """Like torch's ``new`` with a list or with sizes; torch's own version bypasses FarDevice."""
        if isinstance(content[0], list):
            return torch.tensor(content[0], dtype=self.dtype).to(self.device)
        return self.new_empty(content)

    def tolist(self) -> Any:
        """torch's own version does not support subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FarDevice().__torch_dispatch__(func, types, args, kwargs)  # outside FarDevice nobody reads its waits


class FarDevice(TorchDispatchMode):
    """The mode in which far tensors work. ``waits`` is the list of waits since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: List[Wait] = []

    def __enter__(self) -> FarDevice:
        # Then torch.tensor creates its tensor on the CPU and copies it in a second operation, which FarDevice records.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        far = [x for x in given if isinstance(x, Far)]
        target = kwargs.get("device")
        goes_far = torch.device(target).type == DEVICE.type if target is not None else bool(far)
        if goes_far and target is not None:
            kwargs["device"] = "cpu"
        self._note(func, args, kwargs, far, goes_far)
        owners: Dict[int, Far] = {id(x.inner): x for x in far}
        unwrap = lambda x: x.inner if isinstance(x, Far) else x  # noqa: E731
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if func is aten.copy_.default:
            return args[0]
        if not goes_far:
            return out
        # After an in-place operation the result must be the same far tensor.
        wrap = lambda x: owners[id(x)] if id(x) in owners else Far(x)  # noqa: E731
        return tree_map(lambda x: wrap(x) if type(x) is torch.Tensor else x, out)

    def _note(self, func: Any, args: Any, kwargs: Dict[str, Any], far: List[Far], goes_far: bool) -> None:
        waits = far and func in ASKING
        if func is aten.index.Tensor or func is aten.index_put_.default and args[2].numel() > 1:
            waits = any(isinstance(i, Far) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None)
        if func is aten._ctc_loss.Tensor:
            for lengths in args[2:4]:
                if isinstance(lengths, Far):
                    self.waits.append(self._wait(func, "ctc"))
        if func is aten._to_copy.default and isinstance(args[0], Far) != goes_far:
            waits = not (goes_far and kwargs.get("non_blocking"))
        if func is aten.copy_.default and isinstance(args[0], Far) != isinstance(args[1], Far):
            waits = not (isinstance(args[0], Far) and (kwargs.get("non_blocking") or args[2:]))
        if waits:
            self.waits.append(self._wait(func))

    @staticmethod
    def _wait(func: Any, owner: str = "") -> Wait:
        for frame in reversed(traceback.extract_stack()):
            parts = frame.filename.split(os.sep)
            for package in ("espnet_kd", "espnet2", "espnet"):
                if package in parts and "tests" not in parts:
                    where = f"{os.sep.join(parts[-2:])}:{frame.lineno} {frame.name}"
                    return Wait(str(func), owner or package.rstrip("2"), where)
        return Wait(str(func), owner or "other", "")


def send(x: Any) -> Any:
    """A copy of ``x`` with its tensors on the far device."""
    return tree_map(lambda y: Far(y.detach().clone()) if isinstance(y, torch.Tensor) else y, x)


def move(model: torch.nn.Module) -> None:
    """Move the parameters and buffers of a model and its teacher to the far device."""
    model._apply(lambda x: Far(x.detach().clone()))
