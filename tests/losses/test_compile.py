"""The kernels compile for a GPU on a machine without one, because Triton includes its compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
ROOT = Path(__file__).resolve().parents[2]
#: Student and teacher (B, T, V) of one loss call each.
CASES = {
    "float32": "torch.zeros(3, 7, 5000), torch.zeros(3, 7, 5000)",
    "half": "torch.zeros(3, 7, 500).bfloat16(), torch.zeros(3, 7, 500).half()",
    "one frame of two tokens": "torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)",
    "odd strides": "torch.zeros(30, 3, 7).permute(1, 2, 0), torch.zeros(3, 7, 60)[..., ::2]",
    "a row in blocks": "torch.zeros(3, 7, 9001), torch.zeros(3, 7, 9001)",
    "cached": "torch.zeros(3, 7, 500), compress(torch.zeros(3, 7, 500), 12, (2.0,))",
    "cached, one token": "torch.zeros(1, 1, 2), compress(torch.zeros(1, 1, 2), 1, (2.0,))",
    "cached, a row in blocks": "torch.zeros(3, 7, 9001), compress(torch.zeros(3, 7, 9001), 96, (2.0,))",
}
#: Compiles each kernel instead of launching it, with the specialisations of Triton's launcher: for numbers equal to 1,
#: and for addresses and numbers divisible by 16.
PROGRAM = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from espnet_kd import losses
from espnet_kd.backend import using
from espnet_kd.losses import fused

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
         torch.uint8: "*u8"}


def compile_it(kernel, programs, *args, num_warps=4, **options):
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = args[place] if place < len(args) else options[name]
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif place >= len(args) or number and value == 1:
            signature[name], constants[(place,)] = "constexpr", value
            continue
        else:
            signature[name] = "i32" if number else "fp32"
        if not number or value % 16 == 0:
            if signature[name] != "fp32":
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options={"num_warps": num_warps})
    print(len(made.asm["cubin"]))


fused.launch = compile_it
lengths = torch.full((STUDENT.size(0),), STUDENT.size(1))
frames = torch.ones(STUDENT.shape[:2], dtype=torch.bool)
with using("fused"):
    losses.factorized_kl(STUDENT.requires_grad_(), TEACHER, lengths, frames=frames, blank_id=BLANK).backward()
    losses.kl(STUDENT, TEACHER, lengths, temperature=2.0)
"""


@pytest.mark.trains
@pytest.mark.parametrize("key, capability", [("float32", 80), *((key, 90) for key in CASES)])
def test_kernels_compile(key, capability, chosen, tmp_path):
    """A separate process and compiler cache make sure that the kernels are really compiled."""
    if torch.version.cuda is None:
        pytest.skip("this torch is not made for CUDA")
    head = "import torch\nfrom espnet_kd.topk import compress\n"
    program = f"{head}CAPABILITY, BLANK = {capability}, 0\nSTUDENT, TEACHER = {CASES[key]}\n{PROGRAM}"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len([int(n) for n in run.stdout.split() if int(n) > 1000]) == 5
