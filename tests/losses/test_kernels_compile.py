"""The kernels compile for GPUs that this machine lacks. The compiler can reject code that the interpreter accepts."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from espnet_kd import losses
from espnet_kd.backend import using
from espnet_kd.topk import compress

triton = pytest.importorskip("triton", reason="needs Triton")
fused = pytest.importorskip("espnet_kd.losses.fused", reason="needs Triton")
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.uint8: "*u8",
    torch.float64: "*fp64",
}  # fmt: skip


def launches(name, width, dtype, kept, framed, monkeypatch):
    """(kernel, arguments, options) of each launch of a loss and its gradient, on tensors without values."""
    found = []
    monkeypatch.setattr(fused, "launch", lambda kernel, programs, *args, **more: found.append((kernel, args, more)))
    monkeypatch.setattr(fused, "_on", lambda x: contextlib.nullcontext())
    with FakeTensorMode(), using("fused"):
        student, teacher = torch.zeros(2, 5, width, dtype=dtype, requires_grad=True), torch.zeros(2, 5, width)
        target = compress(teacher, kept) if kept else teacher
        frames = torch.ones(2, 5, dtype=torch.bool) if framed else None
        getattr(losses, name)(student, target, torch.full((2,), 5), frames=frames).backward()
    return found


def compiled(kernel, args, options, capability):
    """Compile a launch and return the size of its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {int: "i32", float: "fp32"}
    options = dict(options)
    warps = options.pop("num_warps", 4)
    names = kernel.arg_names
    signature = {n: POINTERS[x.dtype] if isinstance(x, torch.Tensor) else kinds[type(x)] for n, x in zip(names, args)}
    signature.update(dict.fromkeys(options, "constexpr"))
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in options.items()})
    return len(triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps}).asm["cubin"])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kept", [None, 96])
@pytest.mark.parametrize("width, dtype, framed", [
    (30, torch.float32, False), (5000, torch.bfloat16, True), (9001, torch.float16, False),
])  # fmt: skip
def test_for_a_gpu_that_is_not_there(width, dtype, framed, kept, capability, monkeypatch):
    """The widths give rows that are whole, in two parts and in blocks."""
    kept = kept and min(kept, width - 1)
    for name in ("kl", "blank_kl", "factorized_kl"):
        found = launches(name, width, dtype, kept, framed, monkeypatch)
        assert len(found) == 3
        for launch in found:
            assert compiled(*launch, capability) > 1000


def test_a_kernel_that_no_compiler_takes_is_noticed(monkeypatch):
    import triton.language as tl

    @triton.jit
    def broken(x, BLOCK: tl.constexpr):
        tl.store(x, tl.arange(0, BLOCK))  # an error: stores a block to a single address

    with pytest.raises(Exception, match="shape|block|pointer|Value argument"):
        compiled(broken, (torch.zeros(3),), {"BLOCK": 8}, 90)
