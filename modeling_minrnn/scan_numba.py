"""CPU kernels of the scan: `solve`, the recurrence of any cell, and some cells fused, gates and all.

B batch, T time, D width of h. Called through `operators.py`; nothing here checks its arguments. Gates are computed in
float32, the state is carried in float64: a gate of 1 - 1e-7 applied for 1e5 tokens would lose the state in float32. A
fused kernel walks a row twice, first its gates and then its recurrence: in one loop the exponentials would be computed
by vectors of float64's length, half of what the processor can do.

Rows are walked one token at a time and vectorised over D. Threads share the work by batch rows, or by columns where
there are too few rows. They come from a pool of our own around kernels that run without the GIL, not from numba's
`parallel=True`, whose default threading layer aborts the process when two Python threads call it at once.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba.core.caching import FunctionCache
    from numba.core.cgutils import get_or_insert_function
    from numba.extending import intrinsic
    from numba.types import int64, void, voidptr
except ImportError as error:
    raise ImportError('the "numba" backend needs numba: pip install numba') from error

from .cells import NOTHING_SEEN, softplus
from .scan_blocks import ScanInputs, derivative

# Not "nnan" or "ninf": a NaN that comes in must go out.
OPTIONS = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}
# For functions of numbers, which LLVM puts into each loop; inline="always" would have each compiled with them anew.
scalar = numba.njit(forceinline=True, **OPTIONS)


def compile_kernel(*argument_types):
    """Compile to a C function of these arguments and (b_start, b_stop, d_start, d_stop), kept on disk between
    processes where numba finds a folder that it can write. A file there that a crash has damaged is replaced.

    Arrays come as addresses: slicing an array that Python owns costs two atomic operations, as much as a short row.
    """
    signature = void(*argument_types, int64, int64, int64, int64)

    def compile(function):
        kept = numba.cfunc(signature, cache=True, **OPTIONS)
        try:
            return kept(function).ctypes
        except (RuntimeError, OSError):  # no folder for the cache, or no room in it
            pass
        except Exception:  # pickle's, of any kind
            with suppress(RuntimeError, OSError):
                FunctionCache(function).flush()
                return kept(function).ctypes
        return numba.cfunc(signature, **OPTIONS)(function).ctypes

    return compile


ANY_LENGTH = 1 << 60


@numba.njit(inline="always")
def floats(address):
    """The float32 array at an address; its length is not known, and not needed for what is sliced from it."""
    return numba.carray(address, ANY_LENGTH, np.float32)


@numba.njit(inline="always")
def doubles(address):
    return numba.carray(address, ANY_LENGTH, np.float64)


@numba.njit(inline="always")
def flags(address):
    return numba.carray(address, ANY_LENGTH, np.uint8)


@numba.njit(inline="always")
def blocks_at(array, start, D, width, columns):
    """The rows of `width` numbers at `start` of each of two or three blocks of width D; the second twice for two."""
    first, second = array[start : start + width], array[start + D : start + D + width]
    third = start + (columns - 1) * D
    return first, second, array[third : third + width]


@intrinsic
def prefetch_line(typing_context, address):
    """Fetch the cache line at an address, which need not be a valid one, while other work goes on."""

    def generate(context, builder, signature, arguments):
        number = ir.IntType(32)
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, keep in all caches, data
        return context.get_dummy_value()

    return void(address), generate


@numba.njit(inline="always")
def prefetch(address, start, width):
    """The lines of array[start : start + width], float32, of the array at an address."""
    for offset in range(0, 4 * width, 64):
        prefetch_line(address + 4 * start + offset)


@numba.njit(inline="always")
def fetch_ahead(
    projected, d_projected, states, d_states, start, row, up, stride_t, d_stride_t, D, width, columns
):  # fmt: skip
    """Hardware prefetch runs forwards, and the backward kernel walks backwards: short rows then take twice as long."""
    ahead = max(1, PREFETCHED_AHEAD // (4 * columns * D))
    for column in range(columns):
        prefetch(projected.ctypes.data, start - ahead * stride_t + column * D, width)
        prefetch(d_projected.ctypes.data, ((row - ahead) * columns + column) * D, width)
    prefetch(states.ctypes.data, (row - 1 - ahead) * D, width)
    prefetch(d_states.ctypes.data, up - ahead * d_stride_t, width)


@scalar
def exp_and_rest(x):
    """exp(x) and 1 - exp(x), each to 2 ulp, for float32 x <= 0; below -87 as at -87, where exp is about 1e-38."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits, ready to become the exponent.
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)  # ln 2 in two parts
    # Degree-6 Chebyshev fit of exp on [-ln2/2, ln2/2], relative error 3e-9, less 1.
    p = np.float32(0.0013941108481958508)
    p = p * r + np.float32(0.00837512593716383)
    p = p * r + np.float32(0.04166635125875473)
    p = p * r + np.float32(0.16666415333747864)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    power = (np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23)
    exp = (p * r + np.float32(1.0)) * np.int32(power).view(np.float32)
    return exp, -p * r if n == np.float32(0.0) else np.float32(1.0) - exp


@scalar
def exp_nonpositive(x):
    return exp_and_rest(x)[0]


@scalar
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x)."""
    e = exp_nonpositive(-abs(x))
    large = np.float32(1.0) / (np.float32(1.0) + e)
    small = e * large
    is_large = x >= np.float32(0.0)
    return large if is_large else small, small if is_large else large


@scalar
def smaller(a, z):
    """The share of `scan_torch.solve` for a and z = 1 - a: the smaller one, with a sign that says which."""
    return a if a < z else -z


@scalar
def both(share):
    """(a, 1 - a) in the precision of the share."""
    one, is_a = type(share)(1.0), share >= type(share)(0.0)
    return share if is_a else one + share, one - share if is_a else -share


# The cells that are computed in one pass. `gates` of a token's p0, p1, p2, in the order of `projected`, and of q, what
# its parameters come to: share, sign of a and inflow, and two numbers that `pull_back` is spared.


@scalar
def mingru_gates(gate, x, is_linear):
    a, z = sigmoids(-gate)
    c, slope = candidate_and_slope(x, is_linear)
    return smaller(a, z), np.float32(1.0), z * c, c, slope


@scalar
def mingru_pull_back(share, c, slope, h, d):
    a, z = both(share)
    d_candidate = z * d
    return d_candidate * a * (c - h), d_candidate * slope


@scalar
def candidate_and_slope(x, is_linear):
    """x and 1, or g(x) = x + 0.5 where x >= 0, sigmoid(x) elsewhere, and g'(x)."""
    one = np.float32(1.0)
    nonnegative = x >= np.float32(0.0)
    e = exp_nonpositive(np.float32(0.0) if nonnegative else x)
    share = one / (one + e)
    sigmoid = e * share
    c, slope = x + np.float32(0.5) if nonnegative else sigmoid, one if nonnegative else sigmoid * share
    return x if is_linear else c, one if is_linear else slope


@scalar
def minlstm_gates(forget, input_, x, is_linear):
    """a = f / (f + i), f = sigmoid(forget), i = sigmoid(input_); spared: 1 - f and 1 - i.

    With 1 / f = 1 + exp(-forget): a = (1 + exp(-input_)) / (2 + exp(-input_) + exp(-forget)). Numerator and
    denominator are scaled by exp(low), low = min(forget, input_, 0), so that no exponent is positive.
    """
    low = forget if forget < input_ else input_
    low = low if low < np.float32(0.0) else np.float32(0.0)
    scale, e_forget, e_input = exp_nonpositive(low), exp_nonpositive(low - forget), exp_nonpositive(low - input_)
    over_f, over_i = scale + e_forget, scale + e_input  # scale / f, scale / i
    total = np.float32(1.0) / (over_f + over_i)
    a, z = over_i * total, over_f * total
    c, _ = candidate_and_slope(x, is_linear)
    return smaller(a, z), np.float32(1.0), z * c, e_forget / over_f, e_input / over_i


@scalar
def minlstm_pull_back(x, is_linear, share, one_minus_f, one_minus_i, h, d):
    c, slope = candidate_and_slope(x, is_linear)
    d_log_odds, d_x = mingru_pull_back(share, c, slope, h, d)
    return -d_log_odds * one_minus_f, d_log_odds * one_minus_i, d_x


@scalar
def signed_gates(decay, gate, x):
    one = np.float32(1.0)
    e, rest = exp_and_rest(np.float32(-2.0) * abs(decay))
    scale = one / (one + e)
    share = smaller(rest * scale, np.float32(2.0) * e * scale)
    open_, shut = sigmoids(gate)
    return share, one if decay >= np.float32(0.0) else -one, open_ * x, open_, shut


@scalar
def signed_pull_back(x, share, open_, shut, h, d):
    a, z = both(share)
    return h * d * z * (np.float32(1.0) + a), x * d * open_ * shut, open_ * d


@scalar
def rglru_gates(r, i, x, rate, is_first):
    """rate: 8 softplus(decay); spared: what x is scaled by, and sigmoid(i)."""
    a, z = exp_and_rest(-rate * sigmoids(r)[0])
    scale = np.float32(1.0) if is_first else math.sqrt(z * (np.float32(1.0) + a))
    open_ = sigmoids(i)[0]
    return smaller(a, z), np.float32(1.0), scale * open_ * x, scale, open_


@scalar
def rglru_pull_back(r, i, x, rate, is_first, share, scale, open_, h, d):
    a, tiny = both(share)[0], np.float32(1e-19)
    decaying, rest = sigmoids(r)
    through_scale = np.float32(0.0) if is_first else a * a / (scale if scale > tiny else tiny) * open_ * x
    d_log_decay = (a * h - through_scale) * d
    d_rate = -decaying * d_log_decay
    return d_rate * rate * rest, scale * x * d * open_ * sigmoids(i)[1], scale * open_ * d, d_rate


@scalar
def hgrn_gates(forget, x, bound):
    """bound: l; spared: sigmoid(-forget) and sigmoid(x)."""
    keep, rest = sigmoids(forget)
    z = (np.float32(1.0) - bound) * rest
    s = sigmoids(x)[0]
    return smaller(bound + (np.float32(1.0) - bound) * keep, z), np.float32(1.0), z * x * s, rest, s


@scalar
def hgrn_pull_back(forget, x, bound, share, rest, s, h, d):
    one = np.float32(1.0)
    d_a = (h - x * s) * d
    d_x = both(share)[1] * d * s * (one + x * (one - s))
    return d_a * (one - bound) * rest * sigmoids(forget)[0], d_x, d_a * rest


MINGRU, MINLSTM, LINEAR, SIGNED, RGLRU, HGRN = 0, 1, 2, 4, 8, 16  # LINEAR: the candidate of the first two
CODES = {"mingru": MINGRU, "minlstm": MINLSTM, "mingru_signed": SIGNED, "rglru": RGLRU, "hgrn": HGRN}
CODES |= {f"{name}:candidate=linear": CODES[name] | LINEAR for name in ("mingru", "minlstm")}


@scalar
def gates(code, p0, p1, p2, q, is_first):
    if code == SIGNED:
        return signed_gates(p0, p1, p2)
    if code == RGLRU:
        return rglru_gates(p0, p1, p2, q, is_first)
    if code == HGRN:
        return hgrn_gates(p0, p1, q)
    if code & MINLSTM:
        return minlstm_gates(p0, p1, p2, code & LINEAR)
    return mingru_gates(p0, p1, code & LINEAR)


@scalar
def pull_back(code, p0, p1, p2, q, is_first, share, spared0, spared1, h, d):
    """The gradients of p0, p1, p2 and q, from h before the token and the gradient d of h after it."""
    zero = np.float32(0.0)
    if code == SIGNED:
        d0, d1, d2 = signed_pull_back(p2, share, spared0, spared1, h, d)
        return d0, d1, d2, zero
    if code == RGLRU:
        return rglru_pull_back(p0, p1, p2, q, is_first, share, spared0, spared1, h, d)
    if code == HGRN:
        d0, d1, dq = hgrn_pull_back(p0, p1, q, share, spared0, spared1, h, d)
        return d0, d1, d1, dq
    if code & MINLSTM:
        d0, d1, d2 = minlstm_pull_back(p2, code & LINEAR, share, spared0, spared1, h, d)
        return d0, d1, d2, zero
    d0, d1 = mingru_pull_back(share, spared0, spared1, h, d)
    return d0, d1, d1, zero


@numba.njit(inline="always")
def backward_row(code, p0, p1, p2, q, is_first, previous, upstream, carry, d0, d1, d2, d_q, rows):
    """The gradients of a token's projections, and `carry` on its way to the token before. Gates, recurrence and their
    derivatives are loops of their own, with rows of scratch between them."""
    width = len(p0)
    share, sign, total, spared0, spared1, to_q = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    for d in range(width):
        share[d], sign[d], _, spared0[d], spared1[d] = gates(code, p0[d], p1[d], p2[d], q[d], is_first)
    for d in range(width):
        d_state = carry[d] + upstream[d]
        total[d] = np.float32(d_state)
        carry[d] = both(np.float64(share[d]))[0] * (sign[d] * d_state)
    for d in range(width):
        d0[d], d1[d], d2[d], to_q[d] = pull_back(
            code, p0[d], p1[d], p2[d], q[d], is_first, share[d], spared0[d], spared1[d], previous[d], total[d]
        )
    if code & (RGLRU | HGRN):
        for d in range(width):
            d_q[d] += to_q[d]


PREFETCHED_AHEAD = 2**14  # bytes of `projected`

INPUTS = (
    voidptr, int64, int64, int64, int64,  # projected, stride_b, stride_t, T, D
    voidptr, voidptr, voidptr,  # initial_state, reset_state, q
    voidptr, int64, voidptr, int64, voidptr, int64,  # reset, padding and first tokens with lengths; 0 for none
)  # fmt: skip


@functools.cache  # each cell is compiled by itself, when it is used
def forward_kernel_of(code: int, columns: int):
    """The kernel of a cell with so many blocks of `projected`."""

    @compile_kernel(*INPUTS, voidptr, voidptr)
    def forward_kernel(
        projected, stride_b, stride_t, T, D, initial_state, reset_state, q, reset_mask, resets, padding_mask, paddings,
        firsts, has_firsts, states, final_state, b_start, b_stop, d_start, d_stop,
    ):  # fmt: skip
        projected, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
        states, final_state, q = floats(states), floats(final_state), floats(q)[d_start:d_stop]
        reset_mask, padding_mask, firsts = flags(reset_mask), flags(padding_mask), flags(firsts)
        width = d_stop - d_start
        rows = np.empty((3, width), np.float32)
        share, sign, inflow = rows[0], rows[1], rows[2]
        carry = np.empty(width, np.float64)
        for b in range(b_start, b_stop):
            for d in range(width):
                carry[d] = initial_state[b * D + d_start + d]
            for t in range(T):
                row = b * T + t
                out = states[row * D + d_start : row * D + d_stop]
                if resets and reset_mask[row]:
                    for d in range(width):
                        carry[d] = reset_state[d_start + d]
                if paddings and padding_mask[row]:
                    for d in range(width):
                        out[d] = np.float32(carry[d])
                    continue
                p0, p1, p2 = blocks_at(projected, b * stride_b + t * stride_t + d_start, D, width, columns)
                is_first = has_firsts > 0 and firsts[row] != 0
                for d in range(width):
                    share[d], sign[d], inflow[d], _, _ = gates(code, p0[d], p1[d], p2[d], q[d], is_first)
                for d in range(width):
                    carry[d] = both(np.float64(share[d]))[0] * (sign[d] * carry[d]) + inflow[d]
                    out[d] = np.float32(carry[d])
            for d in range(width):
                final_state[b * D + d_start + d] = np.float32(carry[d])

    return forward_kernel


@functools.cache
def backward_kernel_of(code: int, columns: int):
    """As `forward_kernel_of`."""

    @compile_kernel(*INPUTS, voidptr, voidptr, int64, int64, voidptr, voidptr, voidptr, voidptr, voidptr)
    def backward_kernel(
        projected, stride_b, stride_t, T, D, initial_state, reset_state, q, reset_mask, resets, padding_mask, paddings,
        firsts, has_firsts, states, d_states, d_stride_b, d_stride_t, d_final_state,
        d_projected, d_initial_state, d_reset_state, d_q, b_start, b_stop, d_start, d_stop,
    ):  # fmt: skip
        projected, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
        states, d_states, d_final_state = floats(states), floats(d_states), floats(d_final_state)
        d_projected, d_initial_state, q = floats(d_projected), floats(d_initial_state), floats(q)[d_start:d_stop]
        d_reset_state, d_q = doubles(d_reset_state), doubles(d_q)
        reset_mask, padding_mask, firsts = flags(reset_mask), flags(padding_mask), flags(firsts)
        width = d_stop - d_start
        rows = np.empty((7, width), np.float32)
        carry = np.empty(width, np.float64)  # gradient of the state that the token on the right received
        for b in range(b_start, b_stop):
            for d in range(width):
                carry[d] = d_final_state[b * D + d_start + d]
            for t in range(T - 1, -1, -1):
                row = b * T + t
                start, up = b * stride_b + t * stride_t + d_start, b * d_stride_b + t * d_stride_t + d_start
                upstream = d_states[up : up + width]
                d0, d1, d2 = blocks_at(d_projected, row * columns * D + d_start, D, width, columns)
                if columns == 2:
                    d2 = rows[6]
                fetch_ahead(
                    projected, d_projected, states, d_states, start, row, up, stride_t, d_stride_t, D, width, columns
                )
                if paddings and padding_mask[row]:
                    for d in range(width):
                        carry[d] += upstream[d]
                        d0[d] = d1[d] = d2[d] = np.float32(0.0)
                else:
                    p0, p1, p2 = blocks_at(projected, start, D, width, columns)
                    is_first = has_firsts > 0 and firsts[row] != 0
                    previous = states[(row - 1) * D + d_start : (row - 1) * D + d_stop]
                    if resets and reset_mask[row]:
                        previous = reset_state[d_start:d_stop]
                    elif t == 0:
                        previous = initial_state[b * D + d_start : b * D + d_stop]
                    d_q_row = d_q[b * D + d_start : b * D + d_stop]
                    backward_row(code, p0, p1, p2, q, is_first, previous, upstream, carry, d0, d1, d2, d_q_row, rows)
                if resets and reset_mask[row]:
                    for d in range(width):
                        d_reset_state[b * D + d_start + d] += carry[d]
                        carry[d] = 0.0
            for d in range(width):
                d_initial_state[b * D + d_start + d] = np.float32(carry[d])

    return backward_kernel


@compile_kernel(voidptr, voidptr, voidptr, int64, int64)
def log_sum_kernel(log_decay, score, carry, T, D, b_start, b_stop, d_start, d_stop):
    """score (T, D) becomes L; all in float64, but for what exp and log are taken of, which float32 can hold."""
    log_decay, score, carry = doubles(log_decay), doubles(score), doubles(carry)[d_start:d_stop]
    larger, less = np.empty(d_stop - d_start, np.float64), np.empty(d_stop - d_start, np.float32)
    for t in range(T):
        decay, out = log_decay[t * D + d_start : t * D + d_stop], score[t * D + d_start : t * D + d_stop]
        for d in range(d_stop - d_start):
            kept = carry[d] + decay[d]
            larger[d] = max(kept, out[d])
            less[d] = np.float32(min(kept, out[d]) - larger[d])
        for d in range(d_stop - d_start):
            e = exp_nonpositive(less[d])
            s = e / (np.float32(2.0) + e)  # log(1 + e) = 2 atanh(s), s <= 1/3
            q = s * s
            p = np.float32(1 / 13) + q * np.float32(1 / 15)
            p = np.float32(1 / 9) + q * (np.float32(1 / 11) + q * p)
            p = np.float32(1 / 5) + q * (np.float32(1 / 7) + q * p)
            less[d] = np.float32(2.0) * s * (np.float32(1.0) + q * (np.float32(1 / 3) + q * p))
        for d in range(d_stop - d_start):
            carry[d] = larger[d] + less[d]
            out[d] = carry[d]


@compile_kernel(voidptr, int64, voidptr, voidptr, int64, int64, int64)
def solve_kernel(share, share_stride, states, carry, T, D, is_reverse, b_start, b_stop, d_start, d_stop):
    """states (T, D) arrives as the inflow, carry (D,) as the state before; share_stride: 0 where all rows are one."""
    share, states, carry = floats(share), floats(states), doubles(carry)[d_start:d_stop]
    for i in range(T):
        t = T - 1 - i if is_reverse else i
        row = share[t * share_stride + d_start : t * share_stride + d_stop]
        out = states[t * D + d_start : t * D + d_stop]
        for d in range(d_stop - d_start):
            carry[d] = both(np.float64(row[d]))[0] * carry[d] + out[d]
            out[d] = np.float32(carry[d])


_pool = None


def _drop_pool():
    global _pool
    _pool = None  # its threads do not exist in a forked child


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_drop_pool)


def run(kernel, arguments, B, D):
    """Call kernel(*arguments, b_start, b_stop, d_start, d_stop) over all rows and columns, on torch's thread count."""
    global _pool

    def call(part):  # holds the tensors of `arguments` for as long as the kernel has their addresses
        kernel(*(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments), *part)

    threads = torch.get_num_threads()
    if B >= threads:
        bounds = [B * i // threads for i in range(threads + 1)]
        parts = [(start, stop, 0, D) for start, stop in zip(bounds, bounds[1:])]
    else:
        blocks = -(-D // 16)  # whole cache lines
        bounds = [min(D, 16 * (blocks * i // threads)) for i in range(threads + 1)]
        parts = [(0, B, start, stop) for start, stop in zip(bounds, bounds[1:]) if start < stop]
    if len(parts) == 1:
        return call(parts[0])
    if _pool is None or _pool._max_workers < threads - 1:
        _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="minrnn")
    others = [_pool.submit(call, part) for part in parts[1:]]
    call(parts[0])
    for other in others:
        other.result()


def strided(tensor):
    """(B, T, ...) as what a kernel takes: float32 values, contiguous in the last dimension, and strides of B and T."""
    tensor = tensor.detach().to(torch.float32)
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0), tensor.stride(1)


def dense(tensor):
    """A tensor as what a kernel takes where it takes no strides."""
    return tensor.detach().to(torch.float32).contiguous()


CONVERTED_AT_ONCE = 2**17  # elements of `projected`; with what is computed from them they stay in the cache of a core


def row_groups(projected):
    """Slices of B. Of other dtypes than float32 a few rows are converted at a time: copies of all of them would cost
    more than the recurrence, most of it for memory that the system hands out and takes back at each call."""
    B, T, width = projected.shape
    rows = max(torch.get_num_threads(), CONVERTED_AT_ONCE // (T * width))
    return [slice(B)] if projected.dtype == torch.float32 else [slice(i, i + rows) for i in range(0, B, rows)]


def output(tensor):
    """Where a kernel writes what is then copied to `tensor`: itself in float32, which a copy leaves as it is."""
    return tensor if tensor.dtype == torch.float32 else torch.empty(tensor.shape, dtype=torch.float32)


def _derived(cell, parameters):
    """q (D,) of the kernels, from the parameters of a cell."""
    return Derived(8 * softplus(parameters[0]) if cell.name == "rglru" else torch.sigmoid(parameters[0]))


class Derived(NamedTuple):
    q: torch.Tensor


def _inputs(rows, inputs: ScanInputs, q, log_sums):
    D, T = inputs.D, inputs.projected.shape[1]
    firsts = None if log_sums is None else (log_sums[rows, :, 0] < NOTHING_SEEN / 2).contiguous()
    masks = [None if x is None else x[rows].contiguous() for x in (inputs.reset_mask, inputs.padding_mask)]
    sizes = [(mask, 0 if mask is None else mask.numel()) for mask in (*masks, firsts)]
    states = dense(inputs.initial_state[rows, :D]), dense(inputs.reset_state[:D]), q
    return *strided(inputs.projected[rows]), T, D, *states, *sizes[0], *sizes[1], *sizes[2]


def _kernel_and_q(inputs: ScanInputs):
    columns = len(inputs.cell.blocks(inputs.D))
    q, pull_back_q = torch.empty(inputs.D), None
    if len(inputs.parameters):
        (q,), pull_back_q = derivative(functools.partial(_derived, inputs.cell), inputs.parameters)
    return (CODES[inputs.cell.spec], columns), dense(q), pull_back_q


def forward(inputs: ScanInputs, log_sums):
    """h (B, T, D) and the last of it (B, D), for a cell of CODES; log_sums: (B, T, E), before each token, or None."""
    B, T, _ = inputs.projected.shape
    states = torch.empty(B, T, inputs.D, dtype=inputs.projected.dtype)
    final_state = torch.empty(B, inputs.D, dtype=torch.float32)
    which, q, _ = _kernel_and_q(inputs)
    for rows in row_groups(inputs.projected):
        part = states[rows]
        written = output(part)
        run(
            forward_kernel_of(*which),
            (*_inputs(rows, inputs, q, log_sums), written, final_state[rows]),
            len(part),
            inputs.D,
        )
        part.copy_(written)
    return states, final_state


def backward(inputs: ScanInputs, log_sums, states, d_states, d_final_state):
    """Gradients of projected, parameters, and h of initial_state and reset_state, for a cell of CODES."""
    B, D = d_final_state.shape
    d_projected = torch.empty(inputs.projected.shape, dtype=inputs.projected.dtype)
    d_initial_state = torch.empty(B, D, dtype=torch.float32)
    d_reset_state, d_q = torch.zeros(2, B, D, dtype=torch.float64)
    which, q, pull_back_q = _kernel_and_q(inputs)
    for rows in row_groups(inputs.projected):
        upstream = (*strided(d_states[rows]), dense(d_final_state[rows]))
        part = d_projected[rows]
        written = output(part)
        downstream = (written, d_initial_state[rows], d_reset_state[rows], d_q[rows])
        arguments = (*_inputs(rows, inputs, q, log_sums), dense(states[rows]), *upstream, *downstream)
        run(backward_kernel_of(*which), arguments, len(part), D)
        part.copy_(written)
    d_parameters = torch.zeros_like(inputs.parameters) if pull_back_q is None else pull_back_q(d_q.sum(0))[0]
    return d_projected, d_parameters, d_initial_state, d_reset_state.sum(0).to(torch.float32)


BLOCK_ELEMENTS = 2**19  # of state in a block: of 2^15 to 2^22 the fastest for Aaren, RWKV-4 and LRU at (8, 1024, 512)


def solve(share, inflow, carry, reverse=False):
    """`scan_torch.solve`, in place of inflow (T, B, D) where that is contiguous; h stays in float32."""
    T, D = len(inflow), carry.numel()
    stride = D if share.stride(0) or T == 1 else 0
    share = share.contiguous() if stride else share[0].contiguous()
    states, carry = inflow.contiguous(), carry.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    run(solve_kernel, (share, stride, states, carry, T, D, reverse), 1, D)
    return states, carry


def log_sum(log_decay, score, carry):
    """`scan_torch.log_sum`."""
    T, carry = len(score), carry.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    run(log_sum_kernel, (log_decay, score, carry, T, carry.numel()), 1, carry.numel())
    return score
