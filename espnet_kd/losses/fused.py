"""KL, binary and factorized KL by one Triton kernel forward and one backward, for CUDA devices.

The forward pass reads both logits once and keeps 7 numbers per frame. The backward pass reads the student's logits
again, and the teacher's on frames whose tokens have a weight, and writes the gradient. Of cached targets only the kept
numbers are read. No other tensor has the size of the logits, no shape depends on a value, and nothing is copied to the
host. Value and gradient are those of :class:`espnet_kd.losses.rows.RowwiseFactorizedKL`, in float32.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, ContextManager, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_kd.losses import bucket_kernels, kernels
from espnet_kd.losses.common import check_sizes
from espnet_kd.topk import Posterior, TopK

#: Longest row that one program holds in registers; a longer row is read twice, in blocks of this length.
_WHOLE = 8192
#: Least length of the smaller part, if a row is held in two parts.
_SMALL = 256
#: Numbers of a row that one program of the backward pass writes, and frames that the means add up at a time.
_BACKWARD, _MEANS = 1024, 4096


class _Options(NamedTuple):
    blank_id: int
    temperature: float
    weights: Tuple[float, float, float]
    together: bool  #: the tokens' parts are averaged over all frames, not separately over NB and BL


def factorized_kl(
    student: Tensor,
    teacher: Posterior,
    lengths: Tensor,
    frames: Optional[Tensor],
    blank_id: int,
    temperature: float,
    weights: Tuple[float, float, float],
) -> Tensor:
    """w_B · mean(BKL) + w_N · mean_NB((1−b^T)·NKL) + w_F · mean_BL((1−b^T)·NKL); logits (B, T, V), not float64."""
    return _apply(student, teacher, lengths, frames, _Options(blank_id, temperature, weights, False))


def kl(
    student: Tensor, teacher: Posterior, lengths: Tensor, frames: Optional[Tensor], blank_id: int, temperature: float
) -> Tensor:
    """KL, as BKL + (1−b^T)·NKL, averaged over all frames."""
    return _apply(student, teacher, lengths, frames, _Options(blank_id, temperature, (1.0, 1.0, 1.0), True))


def try_out(device: torch.device) -> None:
    """Run the kernels once on a few numbers, and raise any error."""
    lengths = torch.ones(1, dtype=torch.long, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        student = torch.zeros(1, 1, 4, device=device, requires_grad=True)
        kl(student, torch.zeros(1, 1, 4, device=device), lengths, None, 0, 1.0).backward()


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs of a kernel."""
    kernel[(programs,)](*args, **options)


def _apply(
    student: Tensor, teacher: Posterior, lengths: Tensor, frames: Optional[Tensor], options: _Options
) -> Tensor:
    check_sizes(student, teacher, lengths, frames)
    lengths = lengths.to(student.device, non_blocking=True).contiguous()
    if frames is not None:
        frames = frames.to(student.device, non_blocking=True).contiguous().view(torch.uint8)
    if not student.numel():
        return student.sum().float()
    if isinstance(teacher, TopK):
        return _FusedBucketKL.apply(student, lengths, frames, options, *_bucket_tensors(teacher, options))
    return _FusedKL.apply(student, teacher.detach(), lengths, frames, options)


class _FusedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        lengths: Tensor,
        frames: Optional[Tensor],
        options: _Options,
    ) -> Tensor:
        rows = student.size(0) * student.size(1)
        table = student.new_empty(kernels.FIGURES, rows, dtype=torch.float32)
        aligned = _aligned(student, teacher)
        with _on(student):
            launch(
                kernels.figures,
                rows,
                *(student, teacher, lengths, table if frames is None else frames, table),
                *(student.size(1), student.size(2) // aligned, rows),
                *_strides(student, aligned),
                *_strides(teacher, aligned),
                1.0 / options.temperature,
                BLANK=options.blank_id,
                HAS_FRAMES=frames is not None,
                **_reads(options),
                ALIGNED=aligned,
                **_blocks(student.size(2)),
            )
            loss, factors = _means(table, options)
        ctx.save_for_backward(student, teacher, table, factors)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        student, teacher, table, factors = ctx.saved_tensors
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        vocabulary = student.size(2)
        block = min(_BACKWARD, _power_of_2(vocabulary))
        blocks = -(-vocabulary // block)
        rows, aligned = table.size(1), _aligned(student, teacher)
        with _on(student):
            launch(
                kernels.gradient,
                rows * blocks,
                *(student, teacher, table, factors, grad, out),
                *(student.size(1), vocabulary // aligned, rows, blocks),
                *_strides(student, aligned),
                *_strides(teacher, aligned),
                1.0 / ctx.options.temperature,
                BLANK=ctx.options.blank_id,
                ALIGNED=aligned,
                BLOCK=block,
                num_warps=_warps(block, 8),
            )
        return out, None, None, None, None


class _FusedBucketKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, lengths: Tensor, frames: Optional[Tensor], options: _Options, *teacher: Tensor
    ) -> Tensor:
        rows = student.size(0) * student.size(1)
        table = student.new_empty(kernels.FIGURES, rows, dtype=torch.float32)
        aligned = _aligned(student)
        num_kept = teacher[-2].size(-1)
        with _on(student):
            launch(
                bucket_kernels.bucket_figures,
                rows,
                *(student, *teacher, lengths, table if frames is None else frames, table),
                *(student.size(1), student.size(2) // aligned, num_kept, rows),
                *_strides(student, aligned),
                1.0 / options.temperature,
                HAS_FRAMES=frames is not None,
                **_reads(options),
                ALIGNED=aligned,
                KEPT=_power_of_2(num_kept),
                **_block(student.size(2)),
            )
            loss, factors = _means(table, options)
        ctx.save_for_backward(student, *teacher[3:], table, factors)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        student, kept, log_kept, remainder, table, factors = ctx.saved_tensors
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
        vocabulary = student.size(2)
        block = min(_BACKWARD, _power_of_2(vocabulary))
        blocks = -(-vocabulary // block)
        rows, aligned = table.size(1), _aligned(student)
        with _on(student):
            launch(
                bucket_kernels.bucket_gradient,
                rows * blocks,
                *(student, kept, log_kept, remainder, table, factors, grad, out),
                *(student.size(1), vocabulary // aligned, kept.size(-1), rows, blocks),
                *_strides(student, aligned),
                1.0 / ctx.options.temperature,
                ALIGNED=aligned,
                BLOCK=block,
                num_warps=_warps(block, 8),
            )
        return (out, *[None] * 9)


def _bucket_tensors(teacher: TopK, options: _Options) -> Tuple[Tensor, ...]:
    """log p(blank), log(1 − p(blank)), is non-blank, kept tokens, their log-probabilities, remainder (contiguous)."""
    log_blank, log_nonblank = teacher.log_blank_at(options.temperature), teacher.log_nonblank_at(options.temperature)
    nonblank = (teacher.argmax() != 0).to(torch.uint8)
    log_kept, remainder = teacher.log_tokens_at(options.temperature), teacher.remainder_at(options.temperature)
    log_blank, log_nonblank, log_kept, remainder = (
        x.float().contiguous() for x in (log_blank, log_nonblank, log_kept, remainder)
    )
    return log_blank, log_nonblank, nonblank.contiguous(), teacher.tokens.contiguous(), log_kept, remainder


def _reads(options: _Options) -> Dict[str, bool]:
    """The kinds of frames whose tokens a kernel must read."""
    return {"READ_NONBLANK": options.weights[1] != 0, "READ_BLANK": options.weights[2] != 0}


def _means(table: Tensor, options: _Options) -> Tuple[Tensor, Tensor]:
    """The loss of a table, and the factors of the parts of its gradient."""
    loss = table.new_empty(())
    factors = table.new_empty(3)
    weights = (float(w) for w in options.weights)
    launch(
        kernels.means, 1, table, loss, factors, table.size(1), *weights, TOGETHER=options.together, BLOCK=_MEANS,
        num_warps=16,
    )  # fmt: skip
    return loss, factors


def _on(x: Tensor) -> ContextManager[Any]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _power_of_2(n: int) -> int:
    """The least power of 2 that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def _warps(block: int, each: int) -> int:
    """Number of warps (32 threads) for a block, with ``each`` numbers per thread."""
    return min(max(_power_of_2(block // (32 * each)), 1), 16)


def _block(vocabulary: int) -> Dict[str, Any]:
    """How the forward pass reads a row: whole, or in blocks."""
    block = min(_power_of_2(vocabulary), _WHOLE)
    return {"WHOLE": block >= vocabulary, "BLOCK": block, "num_warps": _warps(block, 16)}


def _blocks(vocabulary: int) -> Dict[str, Any]:
    """Like :func:`_block`, but a whole row is held as two powers of 2 if that leaves fewer places unused."""
    one = _block(vocabulary)
    half = one["BLOCK"] // 2
    rest = max(_power_of_2(vocabulary - half), _SMALL)
    if not one["WHOLE"] or rest >= half:
        return {**one, "REST": 0}
    return {**one, "BLOCK": half, "REST": rest, "num_warps": _warps(half, 16)}


def _aligned(*logits: Tensor) -> int:
    """Largest power of 2, up to 8, that divides all sizes and strides: one instruction can load this many numbers.

    The kernels take sizes and strides in this unit, so that the compiler can rely on it.
    """
    if any(x.stride(2) != 1 for x in logits):
        return 1
    return math.gcd(8, logits[0].size(2), *(x.stride(dim) for x in logits for dim in (0, 1)))


def _strides(x: Tensor, aligned: int) -> Tuple[int, int, int]:
    return x.stride(0) // aligned, x.stride(1) // aligned, x.stride(2)
