"""The recurrence on a GPU (Triton): gates, scan and gradients in one pass over the memory each way.

B batch, T time, D state width. A program walks `length` tokens of `BD` channels in tiles of W * U tokens. In a tile
row w holds U consecutive tokens in registers: it solves them from zero, one scan over the W rows gives each row the
state that enters it, and the row solves its tokens again from there. Only `projected` and `states` are read, so
that bf16 costs 6 bytes an element forward and 10.25 backward (minGRU), 8 and 14.25 (minLSTM).

Where B * D is too small to fill the chip T is cut into segments: a first kernel reduces each segment to what it does
to a state, and the second one folds the segments before its own, always in the same order: two runs agree to the bit.

What a stretch of tokens does to the state that enters it is held as (A, Z, H): h -> A * h + H, with A the product of
its a, and Z = 1 - |A| summed up by itself. Near A = 1 the state moves by H - Z * h, since float32 has no digits for
such an A, and keeps its rounding errors in a second float (near A = -1 so does -h); elsewhere it is A * h + H, since A
may be far below the last digit of Z. That keeps float32 exact for gates that remember everything and for gates that
forget everything.

Tiles are constants that the compiled code speaks for (benchmarks/machine_code.py), not timings of a device.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError('the "triton" backend needs triton: pip install triton') from error

from .backends import COMPILED, Kernels
from .cells import PRIMITIVES
from .scan_blocks import ScanInputs

INTERPRETED = triton.knobs.runtime.interpret  # by Triton's interpreter, which takes CPU tensors
# W rows, U tokens a row, BD channels, warps: the largest that keep a thread within MAX_REGISTERS. The second ones are
# for masks and for a ragged width, which take registers of their own.
FORWARD_TILES = (4, 16, 32, 2), (4, 8, 32, 2)
BACKWARD_TILES = (4, 8, 32, 2), (4, 4, 32, 4)
MAX_REGISTERS = 128  # of a thread, so that PROGRAMS_PER_PROCESSOR programs fit at once
PROGRAMS_PER_PROCESSOR = 8
MIN_TILES = 4  # in a segment: with fewer, reducing costs more than it frees


class Plan(NamedTuple):
    """How T is laid over programs: `segments` of `length` tokens (the last may be shorter), walked in tiles of W * U
    tokens by BD channels."""

    W: int
    U: int
    BD: int
    warps: int
    segments: int
    length: int


def plan(B: int, T: int, D: int, tile: tuple[int, int, int, int], processors: int) -> Plan:
    """Cut T into segments of at least MIN_TILES tiles, as many as make no more programs than run at once.

    Where the cuts are decides how a state is rounded: for results that do not depend on the batch, pass B = 1.
    """
    W, U, BD, warps = tile
    BD = min(BD, triton.next_power_of_2(D))
    W = min(W, max(2, triton.next_power_of_2(triton.cdiv(T, U))))
    programs = max(B, 1) * triton.cdiv(D, BD)
    segments = max(1, min(PROGRAMS_PER_PROCESSOR * processors // programs, T // (MIN_TILES * W * U)))
    length = triton.cdiv(T, segments * W * U) * W * U
    return Plan(W, U, BD, warps, triton.cdiv(T, length), length)


# Gates.

# CELL, a constant of the kernels: minGRU 0, or the sum of those that apply. LINEAR: the candidate is the projection
# itself. SIGNED: a = tanh of a block of its own. GIVEN: the recurrence alone, of `solve`.
LSTM, LINEAR, SIGNED, GIVEN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp2(x, NVIDIA: tl.constexpr):
    if NVIDIA:  # without the instructions that a denormal result would take
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _reciprocal(x, NVIDIA: tl.constexpr):
    if NVIDIA:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _exp_of_minus(x, NVIDIA: tl.constexpr):
    """exp(-x), at most 2 ** 120: a sum of such is finite, and its reciprocal is not zero."""
    return _exp2(tl.minimum(x * -LOG2_E, 120.0, propagate_nan=tl.PropagateNan.ALL), NVIDIA)


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=None if mask is None else 0.0).to(tl.float32)


@triton.jit
def _size(a, CELL: tl.constexpr):
    """|a|"""
    return tl.abs(a) if SIGNED & CELL else a


@triton.jit
def _gates(projected, mask, D: tl.constexpr, CELL: tl.constexpr, NVIDIA: tl.constexpr):
    """(a, z, i, d0, d1) of h = a * h + i * c; z = 1 - |a| by itself, as 1 - a would lose its digits, and i = z unless
    SIGNED or GIVEN. d0, d1: derivatives, for `_pull_back`."""
    x = _load(projected, mask)
    if GIVEN & CELL:  # the smaller share
        return tl.where(x < 0, 1.0 + x, x), tl.where(x < 0, -x, 1.0 - x), 1.0, x, x
    elif SIGNED & CELL:
        size = tl.abs(x)
        e = _exp2(size * (-2.0 * LOG2_E), NVIDIA)
        r = _reciprocal(1.0 + e, NVIDIA)
        square = x * x
        # tanh(x) / x below 1/4, to 1e-8: there 1 - e has lost its digits.
        ratio = -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0)))
        a = tl.where(size < 0.25, x + x * square * ratio, tl.where(x < 0, -r, r) * (1.0 - e))
        z = 2.0 * e * r
        y = _exp_of_minus(_load(projected + D, mask), NVIDIA)
        i = _reciprocal(1.0 + y, NVIDIA)
        return a, z, i, z * (1.0 + tl.abs(a)), y * i * i
    elif LSTM & CELL:
        y = _load(projected + D, mask)
        # Far below zero f / (f + i) depends on the difference alone, which the bound would swallow.
        shift = tl.maximum(-40.0 - tl.maximum(x, y), 0.0)
        x = _exp_of_minus(x + shift, NVIDIA)
        y = _exp_of_minus(y + shift, NVIDIA)
        r = _reciprocal(2.0 + x + y, NVIDIA)
        a = (1.0 + y) * r
        z = (1.0 + x) * r
        return a, z, z, -a * (x * r), z * (y * r)
    else:
        x = _exp_of_minus(x, NVIDIA)
        z = _reciprocal(1.0 + x, NVIDIA)
        a = x * z
        return a, z, z, a * z, a


@triton.jit
def _candidate(projected, i, mask, CELL: tl.constexpr, NVIDIA: tl.constexpr):
    """(c, i * dc/dx) of c = g(x), or of x itself."""
    x = _load(projected, mask)
    if LINEAR & CELL:
        return x, i
    s = _reciprocal(1.0 + _exp2(x * -LOG2_E, NVIDIA), NVIDIA)
    return tl.where(x >= 0, x + 0.5, s), tl.where(x >= 0, i, i * s - (i * s) * s)


@triton.jit
def _pull_back(h, a, z, i, c, d0, d1, CELL: tl.constexpr):
    """The derivatives of the state after a token by the projections of its gates, and that state; h: before it."""
    if SIGNED & CELL:
        return d0 * h, d1 * c, a * h + i * c
    else:
        change = c - h
        return d0 * change, d1 * change, z * change + h


# Tokens of a tile, which begins with token `t` of a sequence, whose rows of the masks and states begin at `start`, and
# has `left` tokens; `row` (W,) are the first ones of its rows. d (BD,): the channels.


@triton.jit
def _at(tensor, t, row, d, stride: tl.constexpr):
    """Pointers (W, BD) into a tensor (T, D)."""
    return tensor + (row[:, None] * stride + d[None, :]) + t.to(tl.int64) * stride


@triton.jit
def _flag(mask, t, row, left, other: tl.constexpr):
    """(W, 1), of a mask (B, T); `other` where there is no token."""
    return (tl.load(mask + t + row, mask=row < left, other=other) != 0)[:, None]


@triton.jit
def _token(projected, padding_mask, t, row, left, inside, D: tl.constexpr, CELL: tl.constexpr, RAGGED: tl.constexpr,
           NVIDIA: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """What `_gates` and `_candidate` say; padding, and what is beyond the tile, keeps the state."""
    BLOCKS: tl.constexpr = 3 if (LSTM | SIGNED) & CELL else 2
    TIME: tl.constexpr = RAGGED or padding_mask is not None
    mask = None if D % BD == 0 else inside
    if TIME:
        skip = (row >= left)[:, None] if padding_mask is None else _flag(padding_mask, t, row, left, 1)
        mask = inside & ~skip
    a, z, i, d0, d1 = _gates(projected, mask, D, CELL, NVIDIA)
    if TIME:
        a, z, i = tl.where(skip, 1.0, a), tl.where(skip, 0.0, z), tl.where(skip, 0.0, i)
        d0, d1 = tl.where(skip, 0.0, d0), tl.where(skip, 0.0, d1)
    c, d2 = _candidate(projected + (BLOCKS - 1) * D, i, mask, CELL, NVIDIA)
    return a, z, i, c, d0, d1, d2


@triton.jit
def _terms(projected, states, d_states, reset_mask, padding_mask, h0, r, start, t, row, left, d,
           D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr, RAGGED: tl.constexpr,
           NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """(A, Z) of the rows of a tile, and a and b of its tokens, U tensors (W, BD) each: of h = a * h + b from the left
    or, given d_states, of e = a * (e + b) from the right. Given states also a where they are reset, and derivatives of
    the state after a token by its projections; else empty."""
    MASKED: tl.constexpr = RAGGED or D % BD != 0
    inside = (d < D)[None, :]
    projected = _at(projected, t, row, d, stride)
    if d_states is not None:
        d_states = _at(d_states, t, row, d, d_stride)
    if states is not None:
        begins = (t + row == 0)[:, None]
        before = inside & ~begins & (row <= left)[:, None]
        h = tl.where(begins, h0[None, :], _load(_at(states, t - 1, row, d, D), before))
    A, Z = tl.full([W, BD], 1.0, tl.float32), tl.zeros([W, BD], tl.float32)
    a_, b_, to_r_, d0_, d1_, d2_ = (), (), (), (), (), ()
    for u in tl.static_range(U):
        a, z, i, c, d0, d1, d2 = _token(
            projected + u * stride, padding_mask, start + t, row + u, left, inside, D, CELL, RAGGED, NVIDIA, BD
        )
        b = i * c
        if reset_mask is not None:
            reset = _flag(reset_mask, start + t, row + u, left, 0)
            b = tl.where(reset, a * r[None, :] + b, b)
        if states is not None:
            if reset_mask is not None:
                h = tl.where(reset, r[None, :], h)
                to_r_ = to_r_ + (tl.where(reset, a, 0.0),)
            d0, d1, h = _pull_back(h, a, z, i, c, d0, d1, CELL)
            d0_, d1_, d2_ = d0_ + (d0,), d1_ + (d1,), d2_ + (d2,)
        if reset_mask is not None:
            a, z = tl.where(reset, 0.0, a), tl.where(reset, 1.0, z)
        if d_states is not None:
            b = _load(d_states + u * d_stride, ((row + u < left)[:, None] & inside) if MASKED else None)
        A, Z = A * a, Z + z * _size(A, CELL)
        a_, b_ = a_ + (a,), b_ + (b,)
    return A, Z, a_, b_, to_r_, d0_, d1_, d2_


# What stretches of tokens do to a state.


@triton.jit
def _then(A1, H1, A1_before, H1_before, A2, H2, A2_before, H2_before):
    """The first stretch, then the second. `before`: the same, of all that comes before the last row."""
    return A1 * A2, A2 * H1 + H2, A1 * A2_before, A2_before * H1 + H2_before


@triton.jit
def _add(A1, Z1, H1, A2, Z2, H2):
    return A1 + A2, Z1 + Z2, H1 + H2


@triton.jit
def _stretches(A, Z, a_, b_, REVERSE: tl.constexpr, CELL: tl.constexpr, U: tl.constexpr):
    """(A, H) (W, BD) of all that comes before each row of a tile, and (A, Z, H) (BD,) of the tile, from `_terms`."""
    one, zero = tl.full(A.shape, 1.0, tl.float32), tl.zeros(A.shape, tl.float32)
    H = zero
    for u in tl.static_range(U - 1 if REVERSE else 0, -1 if REVERSE else U, -1 if REVERSE else 1):
        H = a_[u] * (H + b_[u]) if REVERSE else a_[u] * H + b_[u]
    A_rows, H_rows, A_before, H_before = tl.associative_scan((A, H, one, zero), 0, _then)
    last = (tl.arange(0, A.shape[0]) == A.shape[0] - 1)[:, None]
    of_rows = tl.where(last, A_rows, 0.0), Z * _size(A_before, CELL), tl.where(last, H_rows, 0.0)
    A, Z, H = tl.reduce(of_rows, 0, _add)
    return A_before, H_before, A, Z, H


@triton.jit
def _advance(h, low, A, Z, H, CELL: tl.constexpr):
    """The state (h + low) after (A, Z, H). Near |A| = 1 `low` keeps what the sum rounds away (Dekker's two-sum)."""
    if SIGNED & CELL:
        h, low = tl.where(A < 0, -h, h), tl.where(A < 0, -low, low)
    change = (H - Z * h) + low
    total = h + change
    near = Z < 0.5
    return tl.where(near, total, _size(A, CELL) * h + H), tl.where(near, change - (total - h), 0.0)


@triton.jit
def _enter(state, summaries, b, segments, first, count, step: tl.constexpr, d, D: tl.constexpr, CELL: tl.constexpr):
    """What a segment starts from, (h, low) (BD,): of `state` (B, D) after `count` segments, from `first` by `step`."""
    h = _load(state + b * D + d, d < D)
    low = h * 0.0
    for k in range(0, count):
        summary = summaries + (b * segments + first + k * step) * 3 * D + d
        A, Z, H = _load(summary, d < D), _load(summary + D, d < D), _load(summary + 2 * D, d < D)
        h, low = _advance(h, low, A, Z, H, CELL)
    return h, low


@triton.jit
def _place(T, length, first_segment, last_segment, D: tl.constexpr, BD: tl.constexpr):
    """Of this program: batch row (int64), segment, its first token and number of tokens, and channels."""
    columns: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    d = program % columns * BD + tl.arange(0, BD)
    segments = last_segment - first_segment + 1
    segment = first_segment + program // columns % segments
    b = (program // columns // segments).to(tl.int64)
    start = segment * length
    return b, segment, start, tl.minimum(length, T - start), d


@triton.jit(do_not_specialize=["T", "length", "segments"])
def reduce_kernel(projected, reset_state, reset_mask, padding_mask, d_states, summaries,
                  T, length, segments, batch_stride, d_batch_stride,
                  D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                  NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """summaries (B, segments, 3, D): (A, Z, H) of h for every segment but the last or, given d_states, of e for every
    one but the first. Walks from where the state leaves a segment, and no further than |A| > 0: what lies beyond an A
    that has underflowed does not reach that end."""
    REVERSE: tl.constexpr = d_states is not None
    b, segment, first, count, d = _place(T, length, 1 if REVERSE else 0, segments - (1 if REVERSE else 2), D, BD)
    r = _load(reset_state + d, d < D)
    projected += b * batch_stride
    row = tl.arange(0, W) * U
    if REVERSE:
        row = (W - 1) * U - row  # the scan runs from row 0, the latest
        d_states += b * d_batch_stride
    A, Z, H = tl.full([BD], 1.0, tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    tiles = tl.cdiv(count, W * U)
    done = 0
    while (done < tiles) & (tl.max(_size(A, CELL), axis=0) > 0):
        at = (done if REVERSE else tiles - 1 - done) * (W * U)
        A_rows, Z_rows, a_, b_, _, _, _, _ = _terms(
            projected, None, d_states, reset_mask, padding_mask, None, r, b * T, first + at, row, count - at, d,
            D, stride, d_stride, CELL, REVERSE, NVIDIA, W, U, BD,
        )  # fmt: skip
        _, _, A_tile, Z_tile, H_tile = _stretches(A_rows, Z_rows, a_, b_, REVERSE, CELL, U)
        A, Z, H = A_tile * A, Z_tile + _size(A_tile, CELL) * Z, A * H_tile + H
        done += 1
    summaries += (b * segments + segment) * 3 * D + d
    tl.store(summaries, A, mask=d < D)
    tl.store(summaries + D, Z, mask=d < D)
    tl.store(summaries + 2 * D, H, mask=d < D)


# Forward.


@triton.jit
def _forward_tile(projected, states, reset_mask, padding_mask, r, h, low, start, t, left, d,
                  D: tl.constexpr, stride: tl.constexpr, CELL: tl.constexpr, RAGGED: tl.constexpr,
                  NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Store the states of a tile entered with (h, low) (BD,); return what leaves it."""
    MASKED: tl.constexpr = RAGGED or D % BD != 0
    row = tl.arange(0, W) * U
    A_rows, Z_rows, a_, b_, _, _, _, _ = _terms(
        projected, None, None, reset_mask, padding_mask, None, r, start, t, row, left, d,
        D, stride, 0, CELL, RAGGED, NVIDIA, W, U, BD,
    )  # fmt: skip
    A_before, H_before, A, Z, H = _stretches(A_rows, Z_rows, a_, b_, False, CELL, U)
    state = A_before * h[None, :] + H_before
    states = _at(states, t, row, d, D)
    for u in tl.static_range(U):
        state = a_[u] * state + b_[u]
        tl.store(states + u * D, state, mask=((row + u < left)[:, None] & (d < D)[None, :]) if MASKED else None)
    return _advance(h, low, A, Z, H, CELL)


@triton.jit(do_not_specialize=["T", "length", "segments"])
def forward_kernel(projected, initial_state, reset_state, reset_mask, padding_mask, summaries, states, final_state,
                   T, length, segments, batch_stride, D: tl.constexpr, stride: tl.constexpr, CELL: tl.constexpr,
                   NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    b, segment, first, count, d = _place(T, length, 0, segments - 1, D, BD)
    r = _load(reset_state + d, d < D)
    h, low = _enter(initial_state, summaries, b, segments, 0, segment, 1, d, D, CELL)
    projected += b * batch_stride
    states += b * T * D
    full = count // (W * U) * (W * U)
    for at in range(0, full, W * U):
        h, low = _forward_tile(
            projected, states, reset_mask, padding_mask, r, h, low, b * T, first + at, W * U, d,
            D, stride, CELL, False, NVIDIA, W, U, BD,
        )  # fmt: skip
    if full != count:
        h, low = _forward_tile(
            projected, states, reset_mask, padding_mask, r, h, low, b * T, first + full, count - full, d,
            D, stride, CELL, True, NVIDIA, W, U, BD,
        )  # fmt: skip
    if segment == segments - 1:
        tl.store(final_state + b * D + d, h, mask=d < D)


# Backward: with d[t] = dL/dh[t] in total, e[t] = a[t] * (d_states[t] + e[t+1]) flows on to h[t-1].


@triton.jit
def _backward_tile(projected, states, d_states, d_projected, reset_mask, padding_mask, h0, r, e, low, d_r, start, t,
                   left, d, D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                   RAGGED: tl.constexpr, NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr,
                   BD: tl.constexpr):  # fmt: skip
    """Store the gradients of a tile entered from the right with (e, low) (BD,); return what leaves it to the left.
    d_r (W, BD): the reset state's gradient so far."""
    BLOCKS: tl.constexpr = 3 if (LSTM | SIGNED) & CELL else 2
    MASKED: tl.constexpr = RAGGED or D % BD != 0
    row = (W - 1 - tl.arange(0, W)) * U  # the scan runs from row 0, the latest
    A_rows, Z_rows, a_, d_states_, to_r_, d0_, d1_, d2_ = _terms(
        projected, states, d_states, reset_mask, padding_mask, h0, r, start, t, row, left, d,
        D, stride, d_stride, CELL, RAGGED, NVIDIA, W, U, BD,
    )  # fmt: skip
    A_before, E_before, A, Z, E = _stretches(A_rows, Z_rows, a_, d_states_, True, CELL, U)
    flow = A_before * e[None, :] + E_before
    d_projected = _at(d_projected, t, row, d, BLOCKS * D)
    for u in tl.static_range(U - 1, -1, -1):
        d_state = d_states_[u] + flow
        flow = a_[u] * d_state
        if reset_mask is not None:
            d_r += to_r_[u] * d_state
        pointers = d_projected + u * BLOCKS * D
        there = ((row + u < left)[:, None] & (d < D)[None, :]) if MASKED else None
        tl.store(pointers, d_state * d0_[u], mask=there)
        if BLOCKS == 3:
            tl.store(pointers + D, d_state * d1_[u], mask=there)
        tl.store(pointers + (BLOCKS - 1) * D, d_state * d2_[u], mask=there)
    e, low = _advance(e, low, A, Z, E, CELL)
    return e, low, d_r


@triton.jit(do_not_specialize=["T", "length", "segments"])
def backward_kernel(projected, initial_state, reset_state, reset_mask, padding_mask, states, d_states, d_final_state,
                    summaries, d_projected, d_initial_state, d_reset_state,
                    T, length, segments, batch_stride, d_batch_stride,
                    D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                    NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """d_reset_state: (B, segments, D), to be summed."""
    b, segment, first, count, d = _place(T, length, 0, segments - 1, D, BD)
    r = _load(reset_state + d, d < D)
    h0 = _load(initial_state + b * D + d, d < D)
    e, low = _enter(d_final_state, summaries, b, segments, segments - 1, segments - 1 - segment, -1, d, D, CELL)
    d_r = tl.zeros([W, BD], tl.float32)
    projected += b * batch_stride
    d_projected += b * T * (3 if (LSTM | SIGNED) & CELL else 2) * D
    states += b * T * D
    d_states += b * d_batch_stride
    at = count // (W * U) * (W * U)  # of the segment's tokens: where the tile at hand begins
    if at != count:
        e, low, d_r = _backward_tile(
            projected, states, d_states, d_projected, reset_mask, padding_mask, h0, r, e, low, d_r, b * T, first + at,
            count - at, d, D, stride, d_stride, CELL, True, NVIDIA, W, U, BD,
        )  # fmt: skip
    for _ in range(0, count // (W * U)):
        at -= W * U
        e, low, d_r = _backward_tile(
            projected, states, d_states, d_projected, reset_mask, padding_mask, h0, r, e, low, d_r, b * T, first + at,
            W * U, d, D, stride, d_stride, CELL, False, NVIDIA, W, U, BD,
        )  # fmt: skip
    if segment == 0:
        tl.store(d_initial_state + b * D + d, e, mask=d < D)
    if reset_mask is not None:
        tl.store(d_reset_state + (b * segments + segment) * D + d, tl.sum(d_r, axis=0), mask=d < D)


# Launch.


CELLS = {"mingru": 0, "minlstm": LSTM.value, "mingru_signed": SIGNED.value | LINEAR.value}
CELLS |= {f"{name}:candidate=linear": CELLS[name] | LINEAR.value for name in ("mingru", "minlstm")}
FUSED = frozenset(CELLS)
CELLS["linear"] = GIVEN.value | LINEAR.value  # what `solve` is given


def forward(inputs: ScanInputs, batch_invariant=False):
    """As `scan_blocks.forward`, for a cell of FUSED; "linear" has what `solve` is given."""
    layout = _layout(FORWARD_TILES, inputs, batch_invariant)
    states = inputs.projected.new_empty(*inputs.projected.shape[:2], inputs.initial_state.shape[1])
    final_state = torch.empty_like(inputs.initial_state, memory_format=torch.contiguous_format)
    _run(forward_kernel, layout, inputs, states=states, final_state=final_state)
    return states, final_state.new_empty(*states.shape[:2], 0), final_state


def backward(inputs: ScanInputs, states, rest, d_states, d_rest, d_final_state, batch_invariant=False):
    """As `scan_blocks.backward`, for a cell of FUSED."""
    layout = _layout(BACKWARD_TILES, inputs, batch_invariant)
    d_projected = torch.empty_like(inputs.projected, memory_format=torch.contiguous_format)
    d_initial_state = torch.empty_like(inputs.initial_state, memory_format=torch.contiguous_format)
    d_reset_state = d_initial_state.new_zeros(len(d_initial_state), layout.segments, d_initial_state.shape[1])
    _run(
        backward_kernel, layout, inputs, d_states,
        states=states.contiguous(), d_final_state=d_final_state.contiguous(), d_projected=d_projected,
        d_initial_state=d_initial_state, d_reset_state=d_reset_state,
    )  # fmt: skip
    return d_projected, torch.zeros_like(inputs.parameters), d_initial_state, d_reset_state.sum((0, 1))


def solve(share: Tensor, inflow: Tensor, carry: Tensor, reverse: bool = False, batch_invariant=False):
    """`scan_torch.solve` in float32, with the rounding of h kept in a second float."""
    given = torch.cat([share.transpose(0, 1), inflow.transpose(0, 1)], -1)
    start = carry.to(torch.float32)
    inputs = ScanInputs(
        given.flip(1) if reverse else given, share, start, start.new_zeros(start.shape[1]), None, None,
        PRIMITIVES["linear"], "triton",
    )  # fmt: skip
    states, _, final_state = forward(inputs, batch_invariant=batch_invariant)
    return (states.flip(1) if reverse else states).transpose(0, 1), final_state


def _layout(tiles, inputs: ScanInputs, batch_invariant: bool) -> Plan:
    (B, T, _), D = inputs.projected.shape, inputs.initial_state.shape[1]
    # A mask may be there for the sake of another row.
    plain = inputs.reset_mask is None and inputs.padding_mask is None and not batch_invariant
    tile = choose_tile(tiles, D, plain)
    return plan(1 if batch_invariant else B, T, D, tile, processors(inputs.projected.device))


def choose_tile(tiles, D: int, plain: bool) -> tuple[int, int, int, int]:
    return tiles[0] if plain and D % tiles[0][2] == 0 else tiles[1]


def _run(kernel, layout: Plan, inputs: ScanInputs, d_states: Tensor | None = None, **tensors) -> None:
    """Reduce the segments, where there are several, and run the kernel on all of them."""
    projected, (B, D) = _readable(inputs.projected), inputs.initial_state.shape
    masks = [None if x is None else x.contiguous().view(torch.uint8) for x in (inputs.reset_mask, inputs.padding_mask)]
    nvidia = projected.is_cuda and torch.version.hip is None
    shared = dict(
        projected=projected, reset_state=inputs.reset_state, reset_mask=masks[0], padding_mask=masks[1],
        summaries=inputs.initial_state.new_empty(B, layout.segments, 3, D), T=projected.shape[1], length=layout.length,
        segments=layout.segments, batch_stride=projected.stride(0), D=D, stride=projected.stride(1),
        CELL=CELLS[inputs.cell.spec], NVIDIA=nvidia, W=layout.W, U=layout.U, BD=layout.BD,
    ) | compile_options(layout.warps, nvidia)  # fmt: skip
    upstream: dict[str, object] = dict(d_states=None, d_batch_stride=0, d_stride=0)
    if d_states is not None:
        d_states = _readable(d_states)
        upstream = dict(d_states=d_states, d_batch_stride=d_states.stride(0), d_stride=d_states.stride(1))
        tensors |= upstream
    programs = B * triton.cdiv(D, layout.BD)  # of a segment
    if not programs:  # an empty batch
        return
    with torch.accelerator.device_index(projected.device.index):
        if layout.segments > 1:
            reduce_kernel[(programs * (layout.segments - 1),)](**shared, **upstream)
        kernel[(programs * layout.segments,)](**shared, **tensors, initial_state=inputs.initial_state.contiguous())


def compile_options(warps: int, nvidia: bool) -> dict[str, object]:
    """What the kernels are compiled with, but for their constants."""
    # Asked for by name: what Triton does with a * b + c when left alone depends on its version.
    options: dict[str, object] = {"num_warps": warps, "enable_fp_fusion": True}
    return options | {"maxnreg": MAX_REGISTERS} if nvidia else options


def _readable(x: Tensor) -> Tensor:
    """Any strides of batch and time will do, save where the offsets within a tile would not fit into 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 24 else x.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors (compute units, Xe cores) a device has; 1 for the interpreter's CPU."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device.type).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def _fuses(inputs: ScanInputs) -> bool:
    return inputs.cell.spec in FUSED


def triton_kernels(batch_invariant: bool) -> Kernels:
    fixed = functools.partial(functools.partial, batch_invariant=batch_invariant)
    devices = ("cpu",) if INTERPRETED else COMPILED["triton"]
    return Kernels(
        fixed(solve), None, lambda inputs: inputs.cell.spec in FUSED, fixed(forward), fixed(backward), devices
    )
