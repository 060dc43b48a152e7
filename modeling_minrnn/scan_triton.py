"""The recurrence on a GPU (Triton): gates, scan and gradients in one pass over the memory each way.

B batch, T time, D state width. A program walks `length` tokens of `BD` channels in tiles of W * U tokens. In a tile
row w holds U consecutive tokens in registers: it solves them from zero, one scan over the W rows gives each row the
state that enters it, and the row solves its tokens again from there. Only `projected` and `states` are read, so
that bf16 costs 6 bytes an element forward and 10.25 backward (minGRU), 8 and 14.25 (minLSTM).

Where B * D is too small to fill the chip T is cut into segments: a first kernel reduces each segment to what it does
to a state, and the second one folds the segments before its own, always in the same order: two runs agree to the bit.

What a stretch of tokens does to the state that enters it is held as (A, Z, H): h -> A * h + H, with A the product of
its a, and Z = 1 - A summed up by itself. Near A = 1 the state moves by H - Z * h, since float32 has no digits for
such an A, and keeps its rounding errors in a second float; elsewhere it is A * h + H, since A may be far below the
last digit of Z. That keeps float32 exact for gates that remember everything and for gates that forget everything.

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

# CELL, a constant of the kernels: minGRU 0, or the sum of those that apply. GIVEN is the recurrence alone, of `solve`.
LSTM, LINEAR, GIVEN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
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
def _load(pointer, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def _store(pointer, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty))


@triton.jit
def _gates(projected, mask, D: tl.constexpr, CELL: tl.constexpr, MASKED: tl.constexpr, NVIDIA: tl.constexpr):
    """(a, z = 1 - a, dz/d gate or dz/d forget, dz/d input): either share by itself, as 1 - a would lose its digits."""
    x = _load(projected, mask, MASKED)
    if GIVEN & CELL:  # the smaller share
        return tl.where(x < 0, 1.0 + x, x), tl.where(x < 0, -x, 1.0 - x), x, x
    elif LSTM & CELL:
        y = _load(projected + D, mask, MASKED)
        # Far below zero f / (f + i) depends on the difference alone, which the bound would swallow.
        shift = tl.maximum(-40.0 - tl.maximum(x, y), 0.0)
        x = _exp_of_minus(x + shift, NVIDIA)
        y = _exp_of_minus(y + shift, NVIDIA)
        r = _reciprocal(2.0 + x + y, NVIDIA)
        a = (1.0 + y) * r
        z = (1.0 + x) * r
        return a, z, -a * (x * r), z * (y * r)
    else:
        x = _exp_of_minus(x, NVIDIA)
        z = _reciprocal(1.0 + x, NVIDIA)
        a = x * z
        return a, z, a * z, a


@triton.jit
def _candidate(projected, z, mask, D: tl.constexpr, CELL: tl.constexpr, MASKED: tl.constexpr, NVIDIA: tl.constexpr):
    """(c, z * dc/dx) of c = g(x), or of x itself."""
    x = _load(projected + (2 * D if LSTM & CELL else D), mask, MASKED)
    if (LINEAR | GIVEN) & CELL:
        return x, z
    s = _reciprocal(1.0 + _exp2(x * -LOG2_E, NVIDIA), NVIDIA)
    return tl.where(x >= 0, x + 0.5, s), tl.where(x >= 0, z, z * s - (z * s) * s)


# What stretches of tokens do to a state.


@triton.jit
def _then(A1, H1, A1_before, H1_before, A2, H2, A2_before, H2_before):
    """The first stretch, then the second. `before`: the same, of all that comes before the last row."""
    return A1 * A2, A2 * H1 + H2, A1 * A2_before, A2_before * H1 + H2_before


@triton.jit
def _add(A1, Z1, H1, A2, Z2, H2):
    return A1 + A2, Z1 + Z2, H1 + H2


@triton.jit
def _rows(A, Z, H, W: tl.constexpr):
    """From (A, Z, H) of the rows (W, BD): (A, H) of all that comes before each, and (A, Z, H) (BD,) of the tile."""
    A_rows, H_rows, A_before, H_before = tl.associative_scan(
        (A, H, tl.full(A.shape, 1.0, tl.float32), tl.zeros(A.shape, tl.float32)), 0, _then
    )
    last = (tl.arange(0, W) == W - 1)[:, None]
    A, Z, H = tl.reduce((tl.where(last, A_rows, 0.0), Z * A_before, tl.where(last, H_rows, 0.0)), 0, _add)
    return A_before, H_before, A, Z, H


@triton.jit
def _advance(h, low, A, Z, H):
    """The state (h + low) after (A, Z, H). Near A = 1 `low` keeps what the sum rounds away (Dekker's fast two-sum)."""
    change = (H - Z * h) + low
    total = h + change
    near = Z < 0.5
    return tl.where(near, total, A * h + H), tl.where(near, change - (total - h), 0.0)


@triton.jit
def _prepend(A1, Z1, H1, A, Z, H):
    """The stretch 1, then the one after it, in the order of the walk of the state."""
    return A1 * A, Z1 + A1 * Z, A * H1 + H


@triton.jit
def _fold(h, A_segments, Z_segments, H_segments, first, count, step: tl.constexpr, mask, D: tl.constexpr):
    """The state h (BD,) after `count` segments, walking from `first` by `step`; pointers at segment 0."""
    low = h * 0.0
    for i in range(0, count):
        offset = (first + i * step) * D
        A = tl.load(A_segments + offset, mask=mask, other=1.0)
        Z = tl.load(Z_segments + offset, mask=mask, other=0.0)
        H = tl.load(H_segments + offset, mask=mask, other=0.0)
        h, low = _advance(h, low, A, Z, H)
    return h, low


# Forward.


@triton.jit
def _forward_rows(projected, reset_mask, padding_mask, r, row, left, d_mask,
                  D: tl.constexpr, stride: tl.constexpr, CELL: tl.constexpr, RAGGED: tl.constexpr,
                  NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """a and b of the tile, U tensors (W, BD) each, with h = a * h + b, and (A, Z, H) of its rows.

    projected: pointers (W, BD) at the first tokens of the rows, `row` (W,) in the tile; `left` tokens are in the tile.
    """
    TIME: tl.constexpr = RAGGED or padding_mask is not None
    MASKED: tl.constexpr = TIME or D % BD != 0
    a_, b_ = (), ()
    A = tl.full([W, BD], 1.0, tl.float32)
    Z = tl.zeros([W, BD], tl.float32)
    H = tl.zeros([W, BD], tl.float32)
    for u in tl.static_range(U):
        mask = d_mask[None, :]
        if TIME:
            skip = _skipped(padding_mask, row + u, left)[:, None]
            mask = mask & ~skip
        a, z, _, _ = _gates(projected + u * stride, mask, D, CELL, MASKED, NVIDIA)
        c, _ = _candidate(projected + u * stride, z, mask, D, CELL, MASKED, NVIDIA)
        if TIME:
            a = tl.where(skip, 1.0, a)
            z = tl.where(skip, 0.0, z)
        b = c if GIVEN & CELL else z * c
        Z = z * A + Z
        if reset_mask is not None:
            reset = _flag(reset_mask, row + u, left)
            b = tl.where(reset, a * r[None, :] + b, b)
            a = tl.where(reset, 0.0, a)
            Z = tl.where(reset, 1.0, Z)
        A = A * a
        H = a * H + b
        a_ = a_ + (a,)
        b_ = b_ + (b,)
    return a_, b_, A, Z, H


@triton.jit
def _flag(mask, t, left):
    """(W, 1), from pointers at the tile."""
    return (tl.load(mask + t, mask=t < left, other=0) != 0)[:, None]


@triton.jit
def _skipped(padding_mask, t, left):
    skip = t >= left
    if padding_mask is not None:
        skip = skip | (tl.load(padding_mask + t, mask=t < left, other=1) != 0)
    return skip


@triton.jit
def _forward_tile(projected, states, reset_mask, padding_mask, r, h, low, left, d, d_mask,
                  D: tl.constexpr, stride: tl.constexpr, CELL: tl.constexpr, RAGGED: tl.constexpr,
                  NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Store the states of one tile, entered with (h, low) (BD,); return what it leaves."""
    row = tl.arange(0, W) * U
    a_, b_, A, Z, H = _forward_rows(
        projected + row[:, None] * stride + d[None, :], reset_mask, padding_mask, r, row, left, d_mask,
        D, stride, CELL, RAGGED, NVIDIA, W, U, BD,
    )  # fmt: skip
    A_before, H_before, A, Z, H = _rows(A, Z, H, W)
    state = A_before * h[None, :] + H_before
    pointers = states + row[:, None] * D + d[None, :]
    for u in tl.static_range(U):
        state = a_[u] * state + b_[u]
        _store(pointers + u * D, state, (row + u < left)[:, None] & d_mask[None, :], RAGGED or D % BD != 0)
    return _advance(h, low, A, Z, H)


@triton.jit
def _place(T, length, first_segment, last_segment, D: tl.constexpr, BD: tl.constexpr):
    """Of this program: batch row (int64), segment, its first token and number of tokens, channels and their mask."""
    columns: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    d = program % columns * BD + tl.arange(0, BD)
    segments = last_segment - first_segment + 1
    segment = first_segment + program // columns % segments
    b = (program // columns // segments).to(tl.int64)
    start = segment * length
    return b, segment, start, tl.minimum(length, T - start), d, d < D


@triton.jit(do_not_specialize=["T", "length", "segments"])
def forward_reduce_kernel(projected, reset_state, reset_mask, padding_mask, A_segments, Z_segments, H_segments,
                          T, length, segments, batch_stride,
                          D: tl.constexpr, stride: tl.constexpr, CELL: tl.constexpr, NVIDIA: tl.constexpr,
                          W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """(A, Z, H) (B, segments, D) of every segment but the last. Walks from a segment's end, and no further than A > 0:
    what lies before an A that has underflowed does not reach the end."""
    b, segment, start, count, d, d_mask = _place(T, length, 0, segments - 2, D, BD)
    r = tl.zeros([BD], tl.float32)
    t = b * T + start + count
    if reset_mask is not None:
        r = tl.load(reset_state + d, mask=d_mask, other=0.0).to(tl.float32)
        reset_mask += t
    if padding_mask is not None:
        padding_mask += t
    projected += b * batch_stride + (start + count).to(tl.int64) * stride
    row = tl.arange(0, W) * U
    A = tl.full([BD], 1.0, tl.float32)
    Z = tl.zeros([BD], tl.float32)
    H = tl.zeros([BD], tl.float32)
    tiles = count // (W * U)
    while (tiles > 0) & (tl.max(A, axis=0) > 0):
        tiles -= 1
        projected -= W * U * stride
        if reset_mask is not None:
            reset_mask -= W * U
        if padding_mask is not None:
            padding_mask -= W * U
        _, _, A_rows, Z_rows, H_rows = _forward_rows(
            projected + row[:, None] * stride + d[None, :], reset_mask, padding_mask, r, row, W * U, d_mask,
            D, stride, CELL, False, NVIDIA, W, U, BD,
        )  # fmt: skip
        _, _, A_tile, Z_tile, H_tile = _rows(A_rows, Z_rows, H_rows, W)
        A, Z, H = _prepend(A_tile, Z_tile, H_tile, A, Z, H)
    offset = (b * segments + segment) * D + d
    tl.store(A_segments + offset, A, mask=d_mask)
    tl.store(Z_segments + offset, Z, mask=d_mask)
    tl.store(H_segments + offset, H, mask=d_mask)


@triton.jit(do_not_specialize=["T", "length", "segments"])
def forward_kernel(projected, initial_state, reset_state, reset_mask, padding_mask, A_segments, Z_segments, H_segments,
                   states, final_state, T, length, segments, batch_stride,
                   D: tl.constexpr, stride: tl.constexpr, CELL: tl.constexpr, NVIDIA: tl.constexpr,
                   W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    b, segment, start, count, d, d_mask = _place(T, length, 0, segments - 1, D, BD)
    h = tl.load(initial_state + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    offset = b * segments * D + d
    h, low = _fold(h, A_segments + offset, Z_segments + offset, H_segments + offset, 0, segment, 1, d_mask, D)
    r = h
    if reset_mask is not None:
        r = tl.load(reset_state + d, mask=d_mask, other=0.0).to(tl.float32)
        reset_mask += b * T + start
    if padding_mask is not None:
        padding_mask += b * T + start
    projected += b * batch_stride + start.to(tl.int64) * stride
    states += (b * T + start) * D
    for _ in range(0, count // (W * U)):
        h, low = _forward_tile(
            projected, states, reset_mask, padding_mask, r, h, low, W * U, d, d_mask,
            D, stride, CELL, False, NVIDIA, W, U, BD,
        )  # fmt: skip
        projected += W * U * stride
        states += W * U * D
        if reset_mask is not None:
            reset_mask += W * U
        if padding_mask is not None:
            padding_mask += W * U
    left = count % (W * U)
    if left != 0:
        h, low = _forward_tile(
            projected, states, reset_mask, padding_mask, r, h, low, left, d, d_mask,
            D, stride, CELL, True, NVIDIA, W, U, BD,
        )  # fmt: skip
    if segment == segments - 1:
        tl.store(final_state + b * D + d, h, mask=d_mask)


# Backward: with d[t] = dL/dh[t] in total, e[t] = a[t] * (d_states[t] + e[t+1]) flows on to h[t-1].


@triton.jit
def _backward_factors(projected, states, d_states, reset_mask, padding_mask, h0, r, first, left, row, d_mask,
                      D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                      RAGGED: tl.constexpr, NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr,
                      BD: tl.constexpr):  # fmt: skip
    """Of each token of a tile: a, upstream gradient, and what makes gradients of its projections of that of its state;
    and (A, Z) of the rows. The pointers are (W, BD), at the first tokens of the rows."""
    TIME: tl.constexpr = RAGGED or padding_mask is not None
    EVEN: tl.constexpr = D % BD == 0
    begins = (first + row == 0)[:, None]
    inside = d_mask[None, :]
    state = tl.load(states - D, mask=inside & ~begins & (row <= left)[:, None], other=0.0).to(tl.float32)
    state = tl.where(begins, h0[None, :], state)
    a_, g_, gate_, input_, candidate_ = (), (), (), (), ()
    A = tl.full([W, BD], 1.0, tl.float32)
    Z = tl.zeros([W, BD], tl.float32)
    for u in tl.static_range(U):
        mask = inside
        if TIME:
            skip = _skipped(padding_mask, row + u, left)[:, None]
            mask = mask & ~skip
        a, z, dz0, dz1 = _gates(projected + u * stride, mask, D, CELL, TIME or not EVEN, NVIDIA)
        if TIME:
            a = tl.where(skip, 1.0, a)
            z = tl.where(skip, 0.0, z)
        c, dc = _candidate(projected + u * stride, z, mask, D, CELL, TIME or not EVEN, NVIDIA)
        Z = z * A + Z
        A = A * a
        if reset_mask is not None:
            reset = _flag(reset_mask, row + u, left)
            state = tl.where(reset, r[None, :], state)
            Z = tl.where(reset, 1.0, Z)
            A = tl.where(reset, 0.0, A)
        change = c - state
        if TIME:
            change = tl.where(skip, 0.0, change)
        state = z * change + state
        a_ = a_ + (a,)
        g_ = g_ + (_load(d_states + u * d_stride, inside & (row + u < left)[:, None], RAGGED or not EVEN),)
        gate_ = gate_ + (dz0 * change,)
        input_ = input_ + (dz1 * change,)
        candidate_ = candidate_ + (dc,)
    return a_, g_, gate_, input_, candidate_, A, Z


@triton.jit
def _backward_tile(projected, states, d_states, d_projected, reset_mask, padding_mask, h0, r, e, low, d_r, first, left,
                   d, d_mask, D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                   RAGGED: tl.constexpr, NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr,
                   BD: tl.constexpr):  # fmt: skip
    """Store the gradients of one tile, entered from the right with (e, low) (BD,); return what leaves it to the left.

    first: token of the sequence that the tile begins with. d_r (W, BD): the reset state's gradient so far.
    """
    EVEN: tl.constexpr = D % BD == 0
    DP: tl.constexpr = (3 if LSTM & CELL else 2) * D
    row = (W - 1 - tl.arange(0, W)) * U  # the scan runs from row 0, the latest
    projected += row[:, None] * stride + d[None, :]
    states += row[:, None] * D + d[None, :]
    d_states += row[:, None] * d_stride + d[None, :]
    d_projected += row[:, None] * DP + d[None, :]

    a_, g_, gate_, input_, candidate_, A, Z = _backward_factors(
        projected, states, d_states, reset_mask, padding_mask, h0, r, first, left, row, d_mask,
        D, stride, d_stride, CELL, RAGGED, NVIDIA, W, U, BD,
    )  # fmt: skip
    inside = d_mask[None, :]
    E = tl.zeros([W, BD], tl.float32)
    for u in tl.static_range(U - 1, -1, -1):
        E = a_[u] * (g_[u] + E)
        if reset_mask is not None:
            E = tl.where(_flag(reset_mask, row + u, left), 0.0, E)
    A_before, E_before, A, Z, E = _rows(A, Z, E, W)

    flow = A_before * e[None, :] + E_before
    for u in tl.static_range(U - 1, -1, -1):
        d_state = g_[u] + flow
        flow = a_[u] * d_state
        if reset_mask is not None:
            reset = _flag(reset_mask, row + u, left)
            d_r += tl.where(reset, flow, 0.0)
            flow = tl.where(reset, 0.0, flow)
        stored = inside & (row + u < left)[:, None]
        _store(d_projected + u * DP, d_state * gate_[u], stored, RAGGED or not EVEN)
        if LSTM & CELL:
            _store(d_projected + u * DP + D, d_state * input_[u], stored, RAGGED or not EVEN)
        _store(
            d_projected + u * DP + (2 * D if LSTM & CELL else D), d_state * candidate_[u], stored, RAGGED or not EVEN
        )
    e, low = _advance(e, low, A, Z, E)
    return e, low, d_r


@triton.jit
def _backward_rows(projected, d_states, reset_mask, padding_mask, row, left, d_mask, D: tl.constexpr,
                   stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr, RAGGED: tl.constexpr,
                   NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """(A, Z, E) of the rows of a tile, for e: the part of `_backward_tile` that needs no states."""
    TIME: tl.constexpr = RAGGED or padding_mask is not None
    EVEN: tl.constexpr = D % BD == 0
    A = tl.full([W, BD], 1.0, tl.float32)
    Z = tl.zeros([W, BD], tl.float32)
    E = tl.zeros([W, BD], tl.float32)
    for u in tl.static_range(U - 1, -1, -1):
        mask = d_mask[None, :]
        g = _load(d_states + u * d_stride, mask & (row + u < left)[:, None], RAGGED or not EVEN)
        if TIME:
            skip = _skipped(padding_mask, row + u, left)[:, None]
            mask = mask & ~skip
        a, z, _, _ = _gates(projected + u * stride, mask, D, CELL, TIME or not EVEN, NVIDIA)
        if TIME:
            a = tl.where(skip, 1.0, a)
            z = tl.where(skip, 0.0, z)
        Z = z * A + Z
        A = A * a
        E = a * (g + E)
        if reset_mask is not None:
            reset = _flag(reset_mask, row + u, left)
            Z = tl.where(reset, 1.0, Z)
            A = tl.where(reset, 0.0, A)
            E = tl.where(reset, 0.0, E)
    return A, Z, E


@triton.jit(do_not_specialize=["T", "length", "segments"])
def backward_reduce_kernel(projected, reset_mask, padding_mask, d_states, A_segments, Z_segments, E_segments,
                           T, length, segments, batch_stride, d_batch_stride,
                           D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                           NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """(A, Z, E) (B, segments, D) of every segment but the first, walking from its beginning while A > 0."""
    b, segment, start, count, d, d_mask = _place(T, length, 1, segments - 1, D, BD)
    row = (W - 1 - tl.arange(0, W)) * U
    projected += b * batch_stride + start.to(tl.int64) * stride
    d_states += b * d_batch_stride + start.to(tl.int64) * d_stride
    if reset_mask is not None:
        reset_mask += b * T + start
    if padding_mask is not None:
        padding_mask += b * T + start
    A = tl.full([BD], 1.0, tl.float32)
    Z = tl.zeros([BD], tl.float32)
    E = tl.zeros([BD], tl.float32)
    left = count
    while (left > 0) & (tl.max(A, axis=0) > 0):
        A_rows, Z_rows, E_rows = _backward_rows(
            projected + row[:, None] * stride + d[None, :], d_states + row[:, None] * d_stride + d[None, :],
            reset_mask, padding_mask, row, left, d_mask, D, stride, d_stride, CELL, True, NVIDIA, W, U, BD,
        )  # fmt: skip
        _, _, A_tile, Z_tile, E_tile = _rows(A_rows, Z_rows, E_rows, W)
        A, Z, E = _prepend(A_tile, Z_tile, E_tile, A, Z, E)
        left -= W * U
        projected += W * U * stride
        d_states += W * U * d_stride
        if reset_mask is not None:
            reset_mask += W * U
        if padding_mask is not None:
            padding_mask += W * U
    offset = (b * segments + segment) * D + d
    tl.store(A_segments + offset, A, mask=d_mask)
    tl.store(Z_segments + offset, Z, mask=d_mask)
    tl.store(E_segments + offset, E, mask=d_mask)


@triton.jit(do_not_specialize=["T", "length", "segments"])
def backward_kernel(projected, initial_state, reset_state, reset_mask, padding_mask, states, d_states, d_final_state,
                    A_segments, Z_segments, E_segments, d_projected, d_initial_state, d_reset_state,
                    T, length, segments, batch_stride, d_batch_stride,
                    D: tl.constexpr, stride: tl.constexpr, d_stride: tl.constexpr, CELL: tl.constexpr,
                    NVIDIA: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """d_reset_state: (B, segments, D), to be summed."""
    b, segment, start, count, d, d_mask = _place(T, length, 0, segments - 1, D, BD)
    h0 = tl.load(initial_state + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    e = tl.load(d_final_state + b * D + d, mask=d_mask, other=0.0).to(tl.float32)
    offset = b * segments * D + d
    e, low = _fold(
        e, A_segments + offset, Z_segments + offset, E_segments + offset,
        segments - 1, segments - 1 - segment, -1, d_mask, D,
    )  # fmt: skip
    r = h0
    d_r = tl.zeros([W, BD], tl.float32)
    tiles = count // (W * U)
    at = tiles * W * U  # of the segment's tokens: where the tile at hand begins
    t = b * T + start + at
    if reset_mask is not None:
        r = tl.load(reset_state + d, mask=d_mask, other=0.0).to(tl.float32)
        reset_mask += t
    if padding_mask is not None:
        padding_mask += t
    projected += b * batch_stride + (start + at).to(tl.int64) * stride
    states += t * D
    d_states += b * d_batch_stride + (start + at).to(tl.int64) * d_stride
    d_projected += t * (3 if LSTM & CELL else 2) * D
    if at != count:
        e, low, d_r = _backward_tile(
            projected, states, d_states, d_projected, reset_mask, padding_mask, h0, r, e, low, d_r,
            start + at, count - at, d, d_mask, D, stride, d_stride, CELL, True, NVIDIA, W, U, BD,
        )  # fmt: skip
    for _ in range(0, tiles):
        at -= W * U
        projected -= W * U * stride
        states -= W * U * D
        d_states -= W * U * d_stride
        d_projected -= W * U * (3 if LSTM & CELL else 2) * D
        if reset_mask is not None:
            reset_mask -= W * U
        if padding_mask is not None:
            padding_mask -= W * U
        e, low, d_r = _backward_tile(
            projected, states, d_states, d_projected, reset_mask, padding_mask, h0, r, e, low, d_r,
            start + at, W * U, d, d_mask, D, stride, d_stride, CELL, False, NVIDIA, W, U, BD,
        )  # fmt: skip
    if segment == 0:
        tl.store(d_initial_state + b * D + d, e, mask=d_mask)
    if reset_mask is not None:
        tl.store(d_reset_state + offset + segment * D, tl.sum(d_r, axis=0), mask=d_mask)


# Launch.


CELLS = {"mingru": 0, "minlstm": LSTM.value, "linear": GIVEN.value}
CELLS |= {f"{name}:candidate=linear": CELLS[name] | LINEAR.value for name in ("mingru", "minlstm")}
FUSED = frozenset(CELLS) - {"linear"}


def forward(inputs: ScanInputs, batch_invariant=False):
    """As `scan_blocks.forward`, for a cell of FUSED; "linear" has what `solve` is given."""
    projected, _, initial_state, reset_state, reset_mask, padding_mask, cell, _ = inputs
    B, T, _ = projected.shape
    D = initial_state.shape[1]
    layout = _layout(FORWARD_TILES, projected, D, reset_mask, padding_mask, batch_invariant)
    projected, reset_mask, padding_mask = _readable(projected), _bytes(reset_mask), _bytes(padding_mask)
    states = projected.new_empty(B, T, D)
    final_state = initial_state.new_empty(B, D)
    summaries = initial_state.new_empty(3, B, layout.segments, D)
    constants = dict(D=D, stride=projected.stride(1), CELL=CELLS[cell.spec])
    sizes = (T, layout.length, layout.segments, projected.stride(0))
    if layout.segments > 1:
        _launch(
            forward_reduce_kernel, layout, B * (layout.segments - 1), constants,
            projected, reset_state, reset_mask, padding_mask, *summaries, *sizes,
        )  # fmt: skip
    _launch(
        forward_kernel, layout, B * layout.segments, constants,
        projected, initial_state.contiguous(), reset_state, reset_mask, padding_mask, *summaries,
        states, final_state, *sizes,
    )  # fmt: skip
    return states, final_state.new_empty(B, T, 0), final_state


def backward(inputs: ScanInputs, states, rest, d_states, d_rest, d_final_state, batch_invariant=False):
    """As `scan_blocks.backward`, for a cell of FUSED."""
    projected, _, initial_state, reset_state, reset_mask, padding_mask, cell, _ = inputs
    B, T, _ = projected.shape
    D = initial_state.shape[1]
    layout = _layout(BACKWARD_TILES, projected, D, reset_mask, padding_mask, batch_invariant)
    d_projected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    d_initial_state = initial_state.new_empty(B, D)
    d_reset_state = initial_state.new_zeros(B, layout.segments, D)
    projected, d_states = _readable(projected), _readable(d_states)
    reset_mask, padding_mask = _bytes(reset_mask), _bytes(padding_mask)
    summaries = initial_state.new_empty(3, B, layout.segments, D)
    constants = dict(D=D, stride=projected.stride(1), d_stride=d_states.stride(1), CELL=CELLS[cell.spec])
    sizes = (T, layout.length, layout.segments, projected.stride(0), d_states.stride(0))
    if layout.segments > 1:
        _launch(
            backward_reduce_kernel, layout, B * (layout.segments - 1), constants,
            projected, reset_mask, padding_mask, d_states, *summaries, *sizes,
        )  # fmt: skip
    _launch(
        backward_kernel, layout, B * layout.segments, constants,
        projected, initial_state.contiguous(), reset_state, reset_mask, padding_mask, states.contiguous(), d_states,
        d_final_state.contiguous(), *summaries, d_projected, d_initial_state, d_reset_state, *sizes,
    )  # fmt: skip
    return d_projected, torch.zeros_like(inputs.parameters), d_initial_state, d_reset_state.sum((0, 1))


def solve(share: Tensor, inflow: Tensor, carry: Tensor, reverse: bool = False, batch_invariant=False):
    """`scan_torch.solve` in float32, with the rounding of h kept in a second float."""
    given = torch.cat([share, inflow], -1).transpose(0, 1)
    start = carry.to(torch.float32)
    inputs = ScanInputs(
        given.flip(1) if reverse else given.contiguous(),
        share,
        start,
        start[0],
        None,
        None,
        PRIMITIVES["linear"],
        "triton",
    )
    states, _, final_state = forward(inputs, batch_invariant=batch_invariant)
    return (states.flip(1) if reverse else states).transpose(0, 1), final_state


def _layout(tiles, projected, D, reset_mask, padding_mask, batch_invariant) -> Plan:
    B, T, _ = projected.shape
    # A mask may be there for the sake of another row.
    plain = reset_mask is None and padding_mask is None and not batch_invariant
    return plan(1 if batch_invariant else B, T, D, choose_tile(tiles, D, plain), processors(projected.device))


def choose_tile(tiles, D: int, plain: bool) -> tuple[int, int, int, int]:
    return tiles[0] if plain and D % tiles[0][2] == 0 else tiles[1]


def _launch(kernel, layout: Plan, programs_per_column: int, constants: dict, *arguments) -> None:
    projected = arguments[0]
    nvidia = projected.is_cuda and torch.version.hip is None
    grid = (programs_per_column * triton.cdiv(constants["D"], layout.BD),)
    if not grid[0]:  # an empty batch
        return
    with torch.accelerator.device_index(projected.device.index):
        kernel[grid](
            *arguments, **constants, NVIDIA=nvidia, W=layout.W, U=layout.U, BD=layout.BD,
            **compile_options(layout.warps, nvidia),
        )  # fmt: skip


def compile_options(warps: int, nvidia: bool) -> dict[str, object]:
    """What the kernels are compiled with, but for their constants."""
    # Asked for by name: what Triton does with a * b + c when left alone depends on its version.
    options: dict[str, object] = {"num_warps": warps, "enable_fp_fusion": True}
    return options | {"maxnreg": MAX_REGISTERS} if nvidia else options


def _readable(x: Tensor) -> Tensor:
    """Any strides of batch and time will do, save where the offsets within a tile would not fit into 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 24 else x.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors (compute units, Xe cores) a device has; 1 for the interpreter's CPU."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device.type).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
