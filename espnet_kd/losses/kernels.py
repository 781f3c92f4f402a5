"""Triton kernels of factorized KL; called by :mod:`espnet_kd.losses.fused`, which describes what they compute.

A row is a frame. All arithmetic is float32. Only old features of Triton's language are used, so that any version
from 3.0 on compiles it; under ``TRITON_INTERPRET=1`` it runs on a CPU.
"""

import triton
import triton.language as tl

#: Rows of the table (7, N) float32, which has these figures of each frame.
BINARY: tl.constexpr = tl.constexpr(0)  # BKL
TOKENS: tl.constexpr = tl.constexpr(1)  # (1 − b^T)·NKL where it is read, else 0
KIND: tl.constexpr = tl.constexpr(2)  # 0 does not count, 1 non-blank, 2 blank
MASS: tl.constexpr = tl.constexpr(3)  # 1 − b^T
PUSH: tl.constexpr = tl.constexpr(4)  # b^S − b^T
TOKEN_NORM: tl.constexpr = tl.constexpr(5)  # the student's logsumexp over the tokens
NORM: tl.constexpr = tl.constexpr(6)  # the teacher's logsumexp over the vocabulary
FIGURES = 7


@triton.jit
def _finite(x):
    """Replace −∞ by 0, so that it can be subtracted from −∞."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _log_sigmoid(x):
    """−log(1 + exp(−x)), accurate for x of either sign."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    # W. Kahan's log1p: the quotient corrects the rounding error of 1 + y.
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x < 0, x, 0.0) - log1p


@triton.jit
def _cross(log_p, log_q):
    """p · (log p − log q), 0 where p is 0."""
    p = tl.exp(log_p)
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit
def _read(row, columns, stride, inside, blank: tl.constexpr):
    """Logits of the tokens in float32; −∞ in the blank's column and where not ``inside``."""
    x = tl.load(row + columns * stride, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(columns == blank, -float("inf"), x)

@triton.jit
def _log_sum(x):
    """logsumexp of a block; −∞ if all its numbers are."""
    top = _finite(tl.max(x, 0))
    return tl.log(tl.sum(tl.exp(x - top), 0)) + top


@triton.jit
def _grow(largest, total, x):
    """Add a block to a logsumexp, which is log(total) + largest."""
    new = tl.maximum(largest, tl.max(x, 0))
    total = total * tl.exp(largest - _finite(new)) + tl.sum(tl.exp(x - _finite(new)), 0)
    return new, total


@triton.jit
def _store(table, rows, row, counts, is_nonblank, blank_s, norm_s, log_blank_t, log_nonblank_t, tokens, norm):
    """Write the table of one frame.

    The figures that are not given are computed from blank's logit, the norm of the student's tokens, and the teacher's
    log p(blank) and log(1 − p(blank)).
    """
    log_blank_s = _log_sigmoid(blank_s - norm_s)
    log_nonblank_s = _log_sigmoid(norm_s - blank_s)
    mass = tl.exp(log_nonblank_t)
    binary = _cross(log_blank_t, log_blank_s) + _cross(log_nonblank_t, log_nonblank_s)
    # The difference of the smaller probabilities, because a difference of two near 1 would be rounding only.
    push = tl.where(
        log_blank_s > log_nonblank_s,
        mass - tl.exp(log_nonblank_s),
        tl.exp(log_blank_s) - tl.exp(log_blank_t),
    )
    kind = tl.where(counts, tl.where(is_nonblank, 1.0, 2.0), 0.0)
    table += row
    tl.store(table + BINARY * rows, tl.where(counts, binary, 0.0))
    tl.store(table + TOKENS * rows, tokens)
    tl.store(table + KIND * rows, kind)
    tl.store(table + MASS * rows, mass)
    tl.store(table + PUSH * rows, push)
    tl.store(table + TOKEN_NORM * rows, _finite(norm_s))
    tl.store(table + NORM * rows, norm)


@triton.jit
def _parts(table, factors, rows, row):
    """Whether a frame counts, and the factors push and pull of its gradient."""
    kind = tl.load(table + KIND * rows + row).to(tl.int32)
    push = tl.load(table + PUSH * rows + row) * tl.load(factors)
    pull = tl.where(kind == 1, tl.load(factors + 1), tl.load(factors + 2))
    return kind > 0, push, tl.where(kind > 0, pull, 0.0)


@triton.jit
def figures(
    student,
    teacher,
    lengths,
    frames,
    table,
    num_frames,
    vocabulary,
    rows,
    s_b,
    s_t,
    s_v,
    t_b,
    t_t,
    t_v,
    inverse_temperature,
    BLANK: tl.constexpr,
    HAS_FRAMES: tl.constexpr,
    READ_NONBLANK: tl.constexpr,
    READ_BLANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Compute the table of one frame. If WHOLE, both rows are read once, into registers for BLOCK and REST numbers.

    Larger rows are read in blocks, and a second time if the tokens' part is needed.
    """
    vocabulary *= ALIGNED
    row = tl.program_id(0)
    b = (row // num_frames).to(tl.int64)
    t = (row % num_frames).to(tl.int64)
    counts = t < tl.load(lengths + b)
    if HAS_FRAMES:
        counts = counts & (tl.load(frames + row) != 0)
    student += (b * s_b + t * s_t) * ALIGNED
    teacher += (b * t_b + t * t_t) * ALIGNED
    blank_s = tl.load(student + BLANK * s_v, mask=counts, other=0.0).to(tl.float32) * inverse_temperature
    raw_blank = tl.load(teacher + BLANK * t_v, mask=counts, other=0.0).to(tl.float32)
    blank_t = raw_blank * inverse_temperature
    lanes = tl.arange(0, BLOCK)

    if WHOLE:
        inside = (lanes < vocabulary) & counts
        s = _read(student, lanes, s_v, inside, BLANK) * inverse_temperature
        raw = _read(teacher, lanes, t_v, inside, BLANK)
        before = tl.max(tl.where(lanes < BLANK, raw, -float("inf")), 0) if BLANK > 0 else -float("inf")
        after = tl.max(tl.where(lanes > BLANK, raw, -float("inf")), 0)
        max_s = tl.max(s, 0)
        if REST > 0:
            columns = BLOCK + tl.arange(0, REST)
            inside = (columns < vocabulary) & counts
            rest_s = _read(student, columns, s_v, inside, BLANK) * inverse_temperature
            rest_raw = _read(teacher, columns, t_v, inside, BLANK)
            if BLANK > 0:
                before = tl.maximum(before, tl.max(tl.where(columns < BLANK, rest_raw, -float("inf")), 0))
            after = tl.maximum(after, tl.max(tl.where(columns > BLANK, rest_raw, -float("inf")), 0))
            max_s = tl.maximum(max_s, tl.max(rest_s, 0))
        w = raw * inverse_temperature
        top_s = _finite(max_s)
        top_t = _finite(tl.maximum(before, after) * inverse_temperature)
        sum_s = tl.sum(tl.exp(s - top_s), 0)
        sum_t = tl.sum(tl.exp(w - top_t), 0)
        if REST > 0:
            rest_w = rest_raw * inverse_temperature
            sum_s += tl.sum(tl.exp(rest_s - top_s), 0)
            sum_t += tl.sum(tl.exp(rest_w - top_t), 0)
        norm_s = tl.log(sum_s) + top_s
        norm_t = tl.log(sum_t) + top_t
    else:
        before = -float("inf")
        after = -float("inf")
        max_s = -float("inf")
        max_t = -float("inf")
        sum_s = 0.0
        sum_t = 0.0
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            inside = (columns < vocabulary) & counts
            s = _read(student, columns, s_v, inside, BLANK) * inverse_temperature
            raw = _read(teacher, columns, t_v, inside, BLANK)
            before = tl.maximum(before, tl.max(tl.where(columns < BLANK, raw, -float("inf")), 0))
            after = tl.maximum(after, tl.max(tl.where(columns > BLANK, raw, -float("inf")), 0))
            w = raw * inverse_temperature
            max_s, sum_s = _grow(max_s, sum_s, s)
            max_t, sum_t = _grow(max_t, sum_t, w)
        norm_s = tl.log(sum_s) + _finite(max_s)
        norm_t = tl.log(sum_t) + _finite(max_t)

    # As in argmax, the first of equal logits wins.
    is_nonblank = after > raw_blank
    if BLANK > 0:
        is_nonblank = is_nonblank | (before >= raw_blank)
    log_blank_t = _log_sigmoid(blank_t - norm_t)
    log_nonblank_t = _log_sigmoid(norm_t - blank_t)
    mass = tl.exp(log_nonblank_t)

    tokens = mass * 0.0
    if READ_NONBLANK or READ_BLANK:
        read = counts & tl.where(is_nonblank, READ_NONBLANK, READ_BLANK) & (mass != 0)
        if read:
            if WHOLE:
                tokens = tl.sum(_cross(w - _finite(norm_t), s - _finite(norm_s)), 0)
                if REST > 0:
                    tokens += tl.sum(_cross(rest_w - _finite(norm_t), rest_s - _finite(norm_s)), 0)
            else:
                for start in range(0, vocabulary, BLOCK):
                    columns = start + lanes
                    inside = columns < vocabulary
                    s = _read(student, columns, s_v, inside, BLANK) * inverse_temperature
                    w = _read(teacher, columns, t_v, inside, BLANK) * inverse_temperature
                    tokens += tl.sum(_cross(w - _finite(norm_t), s - _finite(norm_s)), 0)
        tokens = tl.where(read, mass * tokens, 0.0)

    norm = _finite(norm_t) - _finite(log_nonblank_t)
    _store(table, rows, row, counts, is_nonblank, blank_s, norm_s, log_blank_t, log_nonblank_t, tokens, norm)


@triton.jit
def means(
    table,
    loss,
    factors,
    rows,
    blank_weight,
    nonblank_weight,
    blank_tokens_weight,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the loss, and the factors (3,) of the parts of a frame's gradient: weight / number of frames.

    Only one program runs, so that the sums are the same in every run. TOGETHER: the tokens' parts are averaged over all
    frames.
    """
    lanes = tl.arange(0, BLOCK)
    binary = tl.zeros([BLOCK], tl.float64)
    on_nonblank = tl.zeros([BLOCK], tl.float64)
    on_blank = tl.zeros([BLOCK], tl.float64)
    nonblanks = tl.zeros([BLOCK], tl.float64)
    blanks = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + lanes
        there = row < rows
        kind = tl.load(table + KIND * rows + row, mask=there, other=0.0)
        tokens = tl.load(table + TOKENS * rows + row, mask=there, other=0.0)
        binary += tl.load(table + BINARY * rows + row, mask=there, other=0.0)
        on_nonblank += tl.where(kind == 1.0, tokens, 0.0)
        on_blank += tl.where(kind == 2.0, tokens, 0.0)
        nonblanks += tl.where(kind == 1.0, 1.0, 0.0)
        blanks += tl.where(kind == 2.0, 1.0, 0.0)
    num_nonblank = tl.sum(nonblanks, 0)
    num_blank = tl.sum(blanks, 0)
    num = tl.maximum(num_nonblank + num_blank, 1.0)
    if TOGETHER:
        num_nonblank = num
        num_blank = num
    by_binary = blank_weight / num
    by_nonblank = nonblank_weight / tl.maximum(num_nonblank, 1.0)
    by_blank = blank_tokens_weight / tl.maximum(num_blank, 1.0)
    # A part with weight 0 must not count, even if it is infinite.
    total = tl.where(by_binary == 0, 0.0, by_binary * tl.sum(binary, 0))
    total += tl.where(by_nonblank == 0, 0.0, by_nonblank * tl.sum(on_nonblank, 0))
    total += tl.where(by_blank == 0, 0.0, by_blank * tl.sum(on_blank, 0))
    tl.store(loss, total.to(tl.float32))
    tl.store(factors, by_binary.to(tl.float32))
    tl.store(factors + 1, by_nonblank.to(tl.float32))
    tl.store(factors + 2, by_blank.to(tl.float32))


@triton.jit
def gradient(
    student,
    teacher,
    table,
    factors,
    grad,
    out,
    num_frames,
    vocabulary,
    rows,
    blocks,
    s_b,
    s_t,
    s_v,
    t_b,
    t_t,
    t_v,
    inverse_temperature,
    BLANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one block of a row of the gradient: (pull·(1−b^T) − push)·q̃(k) − pull·p(k), for blank push; all · grad/τ.

    The teacher's row is read only if pull is not 0.
    """
    vocabulary *= ALIGNED
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    b = (row // num_frames).to(tl.int64)
    t = (row % num_frames).to(tl.int64)
    counts, push, pull = _parts(table, factors, rows, row)
    table += row
    within = columns < vocabulary
    s = _read(student + (b * s_b + t * s_t) * ALIGNED, columns, s_v, within & counts, BLANK)
    q = tl.exp(s * inverse_temperature - tl.load(table + TOKEN_NORM * rows))
    g = (pull * tl.load(table + MASS * rows) - push) * q
    if pull != 0.0:
        w = _read(teacher + (b * t_b + t * t_t) * ALIGNED, columns, t_v, within, BLANK)
        g -= pull * tl.exp(w * inverse_temperature - tl.load(table + NORM * rows))
    g = tl.where(columns == BLANK, push, g) * (tl.load(grad).to(tl.float32) * inverse_temperature)
    g = tl.where(counts, g, 0.0)
    place = row.to(tl.int64) * vocabulary + columns
    tl.store(out + place, g.to(out.dtype.element_ty), mask=within)
