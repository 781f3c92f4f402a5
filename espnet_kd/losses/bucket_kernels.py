"""Triton kernels of factorized KL against cached targets: blank, the k kept tokens, and all others as one bucket.

They share table, means and arithmetic with :mod:`espnet_kd.losses.kernels`. The teacher's numbers per frame and per
kept token are computed beforehand.
"""

import triton
import triton.language as tl

from espnet_kd.losses.kernels import (
    MASS,
    NORM,
    TOKEN_NORM,
    _finite,
    _grow,
    _log_sum,
    _parts,
    _read,
    _store,
)


@triton.jit
def bucket_figures(
    student,
    log_blank,
    log_nonblank,
    nonblank,
    kept,
    log_kept,
    remainder,
    lengths,
    frames,
    table,
    num_frames,
    vocabulary,
    num_kept,
    rows,
    s_b,
    s_t,
    s_v,
    inverse_temperature,
    HAS_FRAMES: tl.constexpr,
    READ_NONBLANK: tl.constexpr,
    READ_BLANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Compute the table of one frame; NORM is the student's logsumexp over the tokens that were not kept."""
    vocabulary *= ALIGNED
    row = tl.program_id(0)
    b = (row // num_frames).to(tl.int64)
    t = (row % num_frames).to(tl.int64)
    counts = t < tl.load(lengths + b)
    if HAS_FRAMES:
        counts = counts & (tl.load(frames + row) != 0)
    student += (b * s_b + t * s_t) * ALIGNED
    kept += row.to(tl.int64) * num_kept
    log_kept += row.to(tl.int64) * num_kept
    blank_s = tl.load(student, mask=counts, other=0.0).to(tl.float32) * inverse_temperature
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        inside = (lanes < vocabulary) & counts
        s = _read(student, lanes, s_v, inside, 0) * inverse_temperature
        norm_s = _log_sum(s)
    else:
        max_s = -float("inf")
        sum_s = 0.0
        for start in range(0, vocabulary, BLOCK):
            columns = start + lanes
            inside = (columns < vocabulary) & counts
            s = _read(student, columns, s_v, inside, 0) * inverse_temperature
            max_s, sum_s = _grow(max_s, sum_s, s)
        norm_s = tl.log(sum_s) + _finite(max_s)

    log_blank_t = tl.load(log_blank + row, mask=counts, other=0.0)
    log_nonblank_t = tl.load(log_nonblank + row, mask=counts, other=-float("inf"))
    is_nonblank = tl.load(nonblank + row, mask=counts, other=0) != 0
    mass = tl.exp(log_nonblank_t)

    tokens = 0.0
    norm_others = 0.0
    if READ_NONBLANK or READ_BLANK:
        read = counts & tl.where(is_nonblank, READ_NONBLANK, READ_BLANK) & (mass != 0)
        limit = tl.where(read, num_kept, 0)
        # The student's mass on the tokens that were not kept is summed over them: 1 − the others would lose digits.
        if WHOLE:
            for place in range(0, limit):
                s = tl.where(lanes == tl.load(kept + place), -float("inf"), s)
            norm_others = _log_sum(s)
        else:
            max_s = -float("inf")
            sum_s = 0.0
            for start in range(0, vocabulary, BLOCK):
                columns = start + lanes
                inside = (columns < vocabulary) & read
                s = _read(student, columns, s_v, inside, 0) * inverse_temperature
                for place in range(0, limit):
                    s = tl.where(columns == tl.load(kept + place), -float("inf"), s)
                max_s, sum_s = _grow(max_s, sum_s, s)
            norm_others = tl.log(sum_s) + _finite(max_s)
        places = tl.arange(0, KEPT)
        there = (places < num_kept) & read
        column = tl.load(kept + places, mask=there, other=0)
        s_kept = tl.load(student + column * s_v, mask=there & (column != 0), other=-float("inf")).to(tl.float32)
        log_q = s_kept * inverse_temperature - _finite(norm_s)
        log_p = tl.load(log_kept + places, mask=there, other=-float("inf"))
        p = tl.exp(log_p)
        tokens = tl.sum(tl.where(p == 0, 0.0, p * (log_p - _finite(log_nonblank_t) - log_q)), 0)
        rest = tl.load(remainder + row, mask=read, other=0.0)
        log_ratio = tl.log(rest) - _finite(log_nonblank_t) - (norm_others - _finite(norm_s))
        tokens += tl.where(rest == 0, 0.0, rest * log_ratio)
        tokens = tl.where(read, tokens, 0.0)

    norm = _finite(norm_others)
    _store(table, rows, row, counts, is_nonblank, blank_s, norm_s, log_blank_t, log_nonblank_t, tokens, norm)


@triton.jit
def bucket_gradient(
    student,
    kept,
    log_kept,
    remainder,
    table,
    factors,
    grad,
    out,
    num_frames,
    vocabulary,
    num_kept,
    rows,
    blocks,
    s_b,
    s_t,
    s_v,
    inverse_temperature,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Like ``gradient`` in ``kernels``; the remainder is divided among its tokens in the student's proportions."""
    vocabulary *= ALIGNED
    program = tl.program_id(0)
    row = program // blocks
    columns = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    b = (row // num_frames).to(tl.int64)
    t = (row % num_frames).to(tl.int64)
    counts, push, pull = _parts(table, factors, rows, row)
    table += row
    within = columns < vocabulary
    s = _read(student + (b * s_b + t * s_t) * ALIGNED, columns, s_v, within & counts, 0) * inverse_temperature
    q = tl.exp(s - tl.load(table + TOKEN_NORM * rows))
    rest = tl.load(remainder + row)
    p = tl.where(rest == 0, 0.0, rest * tl.exp(s - tl.load(table + NORM * rows)))
    kept += row.to(tl.int64) * num_kept
    log_kept += row.to(tl.int64) * num_kept
    for place in range(0, tl.where(pull != 0.0, num_kept, 0)):
        p = tl.where(columns == tl.load(kept + place), tl.exp(tl.load(log_kept + place)), p)
    g = (pull * tl.load(table + MASS * rows) - push) * q - tl.where(pull == 0.0, 0.0, pull * p)
    g = tl.where(columns == 0, push, g) * (tl.load(grad).to(tl.float32) * inverse_temperature)
    g = tl.where(counts, g, 0.0)
    place = row.to(tl.int64) * vocabulary + columns
    tl.store(out + place, g.to(out.dtype.element_ty), mask=within)
