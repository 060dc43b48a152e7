"""CPU kernels of the scan: `solve`, the recurrence of any cell, and some cells fused, gates and all.

B batch, T time, D width of h, E log-sums. Called through `operators.py`; nothing here checks its arguments. Gates are
computed in float32, the state is carried in float64: a gate of 1 - 1e-7 applied for 1e5 tokens would lose the state in
float32. A fused kernel walks a row twice, first its gates and then its recurrence: in one loop the exponentials would
be computed by vectors of float64's length, half of what the processor can do.

Rows are walked one token at a time and vectorised over D. Threads share the work by batch rows, or by columns where
there are too few rows. They come from a pool of our own around kernels that run without the GIL, not from numba's
`parallel=True`, whose default threading layer aborts the process when two Python threads call it at once.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba.core.caching import FunctionCache
    from numba.core.cgutils import get_or_insert_function
    from numba.extending import intrinsic
    from numba.np.arrayobj import populate_array
    from numba.types import int64, void, voidptr
except ImportError as error:
    raise ImportError('the "numba" backend needs numba: pip install numba') from error

from .backends import COMPILED, Kernels
from .cells import NOTHING_SEEN, Cell, softplus
from .scan_blocks import ScanInputs, derivative, empty_outputs

# Nothing but a kernel is called from Python: what would take its arguments apart is left out of what is compiled.
UNWRAPPED = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# Not "nnan" or "ninf": a NaN that comes in must go out.
FASTMATH = {"contract", "nsz", "arcp"}
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH} | UNWRAPPED
ANY_ORDER = OPTIONS | {"fastmath": FASTMATH | {"reassoc"}}  # of sums
# For functions of numbers, which LLVM puts into each loop; inline="always" would have each compiled with them anew.
scalar = numba.njit(forceinline=True, **OPTIONS)


def compile_kernel(*argument_types):
    """A function that compiles once: a C function of these arguments and (b_start, b_stop, d_start, d_stop), kept on
    disk between processes where numba finds a folder that it can write. A file there that a crash damaged is replaced.

    Arrays come as addresses: slicing an array that Python owns costs two atomic operations, as much as a short row.
    """
    signature = void(*argument_types, int64, int64, int64, int64)

    def compile_later(function):
        @functools.cache  # when it is used: compiling takes seconds
        def compile():
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

    return compile_later


ANY_LENGTH, int64_of = 1 << 60, ir.IntType(64)


def array_of(kind):
    """array(address), of numbers of a kind of numba's: its length is not known, and not needed for what is sliced."""

    @intrinsic
    def array(typing_context, address):
        def generate(context, builder, signature, arguments):
            return array_at(context, builder, kind, arguments[0])

        return numba.types.Array(kind, 1, "C")(address), generate

    return array


def array_at(context, builder, kind, address):
    found, size = context.make_array(numba.types.Array(kind, 1, "C"))(context, builder), kind.bitwidth // 8
    pointer = context.get_value_type(kind).as_pointer()
    convert = builder.inttoptr if isinstance(address.type, ir.IntType) else builder.bitcast
    populate_array(found, convert(address, pointer), (int64_of(ANY_LENGTH),), (int64_of(size),), size, None)
    return found._getvalue()


floats, doubles, flags = array_of(numba.float32), array_of(numba.float64), array_of(numba.uint8)


@numba.njit(inline="always")
def is_set(mask, token):
    """Of a mask at an address, which is 0 where there is none."""
    return mask != 0 and flags(mask)[token] != 0


@numba.njit(inline="always")
def state_at(h, h_start, L, L_start, place):
    """Of rows that begin at h_start and L_start: the channels, and log-sums, of `place`."""
    return h[h_start + place[0] : h_start + place[1]], L[L_start + place[2] : L_start + place[3]]


@numba.njit(inline="always")
def whole_state_at(states, start, D, place):
    """Of h and log-sums that lie one behind the other: what is at `place`."""
    return state_at(states, start, states, start + D, place)


@numba.njit(inline="always")
def blocks_at(code, array, start, D, E, columns, place):
    """Of the token at `start`: the part of each block of `projected` at `place`. Two blocks have the second twice."""
    first, from_, to = (E, place[2], place[3]) if code & AAREN else (D, place[0], place[1])
    second, third = start + first + place[0], start + first + (columns - 2) * D + place[0]
    width = place[1] - place[0]
    return array[start + from_ : start + to], array[second : second + width], array[third : third + width]


@numba.njit(inline="always")
def copy(targets, sources):
    for i in range(2):
        for j in range(len(targets[i])):
            targets[i][j] = sources[i][j]


@numba.njit(inline="always")
def add(targets, sources):
    for i in range(2):
        for j in range(len(targets[i])):
            targets[i][j] += sources[i][j]


@numba.njit(inline="always")
def clear(targets):
    for target in targets:
        target[:] = 0.0


@numba.njit(inline="always")
def pass_over(code, carry, d_after, d_out, d_p):
    """What `backward_row` does of padding: nothing comes of its projections."""
    add(carry, d_after)
    if code & RWKV:
        for d in range(len(d_out)):
            carry[0][d] += d_out[d]
    clear(d_p)


@intrinsic
def allocate(typing_context, size):
    """Memory that nothing else points to. Arrays of numba's own are counted, by atomic operations for each row."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(8).as_pointer(), [ir.IntType(64)])
        function = get_or_insert_function(builder.module, kind, "malloc")
        function.return_value.add_attribute("noalias")
        return builder.call(function, arguments)

    return voidptr(int64), generate


@intrinsic
def release(typing_context, address):
    """address: of `allocate`, or of the data of an array that lies there."""

    def generate(context, builder, signature, arguments):
        (address,), pointer = arguments, ir.IntType(8).as_pointer()
        address = builder.inttoptr(address, pointer) if isinstance(address.type, ir.IntType) else address
        kind = ir.FunctionType(ir.VoidType(), [pointer])
        builder.call(get_or_insert_function(builder.module, kind, "free"), [address])
        return context.get_dummy_value()

    return void(address), generate


def fetch_line(builder, address):
    """Fetch the cache line at an address, which need not be a valid one, while other work goes on."""
    number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To read, keep in all caches, data.
    builder.call(function, [builder.inttoptr(address, pointer), number(0), number(3), number(1)])


@intrinsic
def prefetch_line(typing_context, address):
    def generate(context, builder, signature, arguments):
        fetch_line(builder, arguments[0])
        return context.get_dummy_value()

    return void(address), generate


@numba.njit(inline="always")
def prefetch(row, back):
    """The lines of as many numbers, `back` numbers before a row.

    Hardware prefetch runs forwards, and the backward kernel walks backwards: short rows then take twice as long. Only
    a few rows before each loop: a core waits for so many lines at a time, and would compute nothing meanwhile.
    """
    for offset in range(0, 4 * len(row), 64):
        prefetch_line(row.ctypes.data - 4 * back + offset)


@scalar
def exp_ratio(x):
    """p, q and q - p with exp(x) = p / q, for float32 x <= 0; below -87 as at -87, where exp is about 1e-38.

    To 2 ulp where the processor multiplies and adds at once. A sigmoid, p / (p + q), divides but once.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits, ready to be added to an exponent.
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.6931471805599453)
    # Pade's approximant on [-ln2/2, ln2/2], relative error 7e-9: AVX2 has no registers for a polynomial's constants.
    square = r * r
    even, odd = np.float32(1.0) + np.float32(0.1) * square, r * (np.float32(0.5) + np.float32(1 / 120) * square)
    p, q = np.float32(even + odd), np.float32(even - odd)
    p = np.int32(p.view(np.int32) + (np.float32(shifted).view(np.int32) << np.int32(23))).view(np.float32)
    return p, q, np.float32(-2.0) * odd if n == np.float32(0.0) else q - p


@scalar
def exp_nonpositive(x):
    p, q, _ = exp_ratio(x)
    return p / q


@scalar
def log1p_exp(x):
    """log(1 + exp(x)), x <= 0."""
    p, q, _ = exp_ratio(x)
    s = p / (np.float32(2.0) * q + p)  # log(1 + e) = 2 atanh(e / (2 + e)), at most 1/3
    q = s * s
    p = np.float32(1 / 13) + q * np.float32(1 / 15)
    p = np.float32(1 / 9) + q * (np.float32(1 / 11) + q * p)
    p = np.float32(1 / 5) + q * (np.float32(1 / 7) + q * p)
    return np.float32(2.0) * s * (np.float32(1.0) + q * (np.float32(1 / 3) + q * p))


@scalar
def log_sum_step(kept, score):
    """The log-odds of score against kept, and log(exp(kept) + exp(score))."""
    odds = np.float32(score - kept)
    return odds, max(kept, score) + log1p_exp(-abs(odds))


@scalar
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x)."""
    p, q, _ = exp_ratio(-abs(x))
    scale = np.float32(1.0) / (p + q)
    small, large = p * scale, q * scale
    is_large = x >= np.float32(0.0)
    return large if is_large else small, small if is_large else large


@scalar
def share_of(log_odds):
    """The share of `scan_torch.solve`, and 1 - a."""
    p, q, _ = exp_ratio(-abs(log_odds))
    scale = np.float32(1.0) / (p + q)
    small, large, is_a = p * scale, q * scale, log_odds >= np.float32(0.0)
    return small if is_a else -small, large if is_a else small


@scalar
def smaller(a, z):
    """The share for a and z = 1 - a: the smaller one, with a sign that says which."""
    return a if a < z else -z


@scalar
def both(share):
    """(a, 1 - a) in the precision of the share."""
    one, is_a = type(share)(1.0), share >= type(share)(0.0)
    return share if is_a else one + share, one - share if is_a else -share


@scalar
def a_of(share):
    """a in float64: with AVX2 in fewer instructions than `both`."""
    share = np.float64(share)
    return share - np.floor(share)


# The cells that are computed in one pass. `gates` of a token's p0, p1, p2, in the order of `projected`, and of q, what
# its parameters come to: share, sign of a and inflow, and two numbers that `pull_back` is spared.


@scalar
def mingru_gates(gate, x, is_linear):
    share, z = share_of(gate)
    c, slope = candidate_and_slope(x, is_linear)
    return share, np.float32(1.0), z * c, c, slope


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
    p, q, _ = exp_ratio(np.float32(0.0) if nonnegative else x)
    scale = one / (p + q)
    sigmoid = p * scale
    c, slope = x + np.float32(0.5) if nonnegative else sigmoid, one if nonnegative else sigmoid * (q * scale)
    return x if is_linear else c, one if is_linear else slope


@scalar
def minlstm_gates(forget, input_, x, is_linear):
    """a = f / (f + i), f = sigmoid(forget), i = sigmoid(input_); spared: (1 - f) a z and (1 - i) a z.

    With 1 / f = 1 + exp(-forget): a = (1 + exp(-input_)) / (2 + exp(-input_) + exp(-forget)). Numerator and
    denominator are scaled by exp(min(forget, input_, 0)), so that no exponent is positive; one of the three that are
    left is 0. The other two are ratios, brought to one denominator.
    """
    one, zero = np.float32(1.0), np.float32(0.0)
    is_less = forget < input_
    less, more = forget if is_less else input_, input_ if is_less else forget
    is_negative = less < zero
    (p_less, q_less, _), (p_more, q_more, _) = exp_ratio(-abs(less)), exp_ratio(less - more if is_negative else -more)
    scale, e_less = (p_less, q_less) if is_negative else (q_less, p_less)
    scale, e_less, e_more = scale * q_more, e_less * q_more, p_more * q_less
    e_forget, e_input = e_less if is_less else e_more, e_more if is_less else e_less
    over_f, over_i = scale + e_forget, scale + e_input  # scale / f, scale / i
    total = one / (over_f + over_i)
    a, z = over_i * total, over_f * total
    c, _ = candidate_and_slope(x, is_linear)
    return smaller(a, z), one, z * c, e_forget * total * a, e_input * total * z


@scalar
def minlstm_pull_back(x, is_linear, share, to_forget, to_input, h, d):
    c, slope = candidate_and_slope(x, is_linear)
    d_a = d * (h - c)
    return d_a * to_forget, -d_a * to_input, d * both(share)[1] * slope


@scalar
def signed_gates(decay, gate, x):
    one = np.float32(1.0)
    p, q, rest = exp_ratio(np.float32(-2.0) * abs(decay))
    scale = one / (p + q)
    share = smaller(rest * scale, np.float32(2.0) * p * scale)
    open_, shut = sigmoids(gate)
    return share, one if decay >= np.float32(0.0) else -one, open_ * x, open_, shut


@scalar
def signed_pull_back(x, share, open_, shut, h, d):
    a, z = both(share)
    return h * d * z * (np.float32(1.0) + a), x * d * open_ * shut, open_ * d


@scalar
def rglru_gates(r, i, x, rate, is_first):
    """rate: 8 softplus(decay); spared: what x is scaled by, and sigmoid(i)."""
    p, q, rest = exp_ratio(-rate * sigmoids(r)[0])
    a, z = p / q, rest / q
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


MINGRU, MINLSTM, LINEAR, SIGNED, RGLRU, HGRN, AAREN, RWKV = 0, 1, 2, 4, 8, 16, 32, 64
HGRN2, DELTA = 128, 256  # of `matrix_numba.py`
LARGEST = 256  # numbers of a head of these: of more, products of matrices are as fast
# LINEAR: the candidate is x itself. AAREN and RWKV are minGRU with log-odds by log-sums.
LOG_SUMS = AAREN | RWKV | RGLRU
CODES = {"mingru": MINGRU, "minlstm": MINLSTM, "mingru_signed": SIGNED, "rglru": RGLRU, "hgrn": HGRN}
CODES |= {f"{name}:candidate=linear": CODES[name] | LINEAR for name in ("mingru", "minlstm")}
CODES |= {"aaren": AAREN | LINEAR, "rwkv4": RWKV | LINEAR, "hgrn2": HGRN2, "gated_delta": DELTA}
OPTIONS_OF_SHAPES = ("num_heads=", "householder_steps=")  # which a kernel sees


@functools.cache
def code_of(cell: Cell) -> int:
    """Which kernel computes a cell in one pass; -1 for a cell that has none."""
    return CODES.get(":".join(x for x in cell.spec.split(":") if not x.startswith(OPTIONS_OF_SHAPES)), -1)


@numba.njit(inline="always")
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


@numba.njit(inline="always")
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


# A token, forward and backward. Gates, recurrence and their derivatives are loops of their own, with rows of scratch
# between them.


@numba.njit(inline="always")
def forward_row(code, p, q, carry, L, states, rows):
    """`carry` and L move on by the token; states: h after it."""
    share, sign, inflow, wide = rows[0], rows[1], rows[2], rows[3]
    gate, x, is_first = p[0], p[1], False
    if code == RGLRU:
        is_first = L[0] < NOTHING_SEEN / 2
        _, L[0] = log_sum_step(L[0], 0.0)
    if code & AAREN:
        size = len(x) // len(L)
        for e in range(len(L)):
            odds, L[e] = log_sum_step(L[e], np.float64(gate[e]))
            for d in range(e * size, (e + 1) * size):
                wide[d] = odds
        gate = wide
    for d in range(len(x)):
        share[d], turn, inflow[d], _, _ = gates(code, gate[d], x[d], p[2][d], q[0][d], is_first)
        if code == SIGNED:
            sign[d] = turn
    for d in range(len(x)):
        turned = sign[d] * carry[d] if code == SIGNED else carry[d]
        carry[d] = a_of(share[d]) * turned + inflow[d]
        states[d] = np.float32(carry[d])


@numba.njit(inline="always")
def backward_row(code, columns, p, q, before, d_after, carries, d_p, d_q, rows, back):
    """The gradients of a token's projections, and `carries` on their way to the token before, whose state is `before`.

    d_after: the gradient of the state after the token.
    back: what is fetched meanwhile lies so many numbers before p, d_p, h, L and d_out.
    """
    (h, L), (upstream, d_L), (carry, L_carry) = before, d_after, carries
    share, sign, total, spared0, spared1, wide = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    gate, x, z, d_gate = p[0], p[1], p[2], d_p[0]
    is_first, size = code == RGLRU and L[0] < NOTHING_SEEN / 2, len(x) // max(len(L), 1)
    if code & AAREN:
        for e in range(len(L)):
            for d in range(e * size, (e + 1) * size):
                wide[d] = gate[e] - L[e]
        gate, d_gate = wide, rows[6]
    prefetch(p[0], back[0])
    prefetch(x, back[0])
    prefetch(d_p[0], back[1])
    for d in range(len(x)):
        share[d], turn, _, spared0[d], spared1[d] = gates(code, gate[d], x[d], z[d], q[0][d], is_first)
        if code == SIGNED:
            sign[d] = turn
    prefetch(upstream, back[4])
    prefetch(h, back[2])
    for d in range(len(x)):
        d_state = carry[d] + upstream[d]
        total[d] = np.float32(d_state)
        carry[d] = a_of(share[d]) * (sign[d] * d_state if code == SIGNED else d_state)
    prefetch(d_p[1], back[1])
    if columns == 3:
        prefetch(z, back[0])
        prefetch(d_p[2], back[1])
    for d in range(len(x)):
        d_gate[d], d_p[1][d], third, to_q = pull_back(
            code, gate[d], x[d], z[d], q[0][d], is_first, share[d], spared0[d], spared1[d], h[d], total[d]
        )
        if columns == 3:
            d_p[2][d] = third
        if code & (RGLRU | HGRN):
            wide[d] = to_q
    if code & (RGLRU | HGRN):
        for d in range(len(x)):
            d_q[0][d] += wide[d]
    if code == RGLRU:
        L_carry[0] = a_of(share_of(-L[0])[0]) * (L_carry[0] + d_L[0])
    if code & AAREN:
        for e in range(len(L)):
            d_odds, (a, not_a) = row_sum(d_gate, e * size, (e + 1) * size), both(np.float64(share[e * size]))
            d_log_sum = L_carry[e] + d_L[e]
            d_p[0][e], L_carry[e] = d_odds + not_a * d_log_sum, a * d_log_sum - d_odds


@numba.njit(forceinline=True, fastmath=True)
def row_sum(row, start, stop):
    total = np.float32(0.0)
    for d in range(start, stop):
        total += row[d]
    return total


# RWKV-4, of which each channel has a log-sum of its own, in fewer loops.


@numba.njit(inline="always")
def rwkv_forward_row(p, q, carry, L, out, states, log_sums, rows, larger):
    (k, v, r), (w, bonus) = p, q
    odds, out_odds, before, share, inflow, less = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    for d in range(len(k)):
        kept = L[d] - w[d]
        odds[d], larger[d] = np.float32(k[d] - kept), max(kept, np.float64(k[d]))
        out_odds[d], before[d] = np.float32(k[d] - L[d]) + bonus[d], np.float32(carry[d])
    for d in range(len(k)):
        share[d], _, inflow[d], _, _ = mingru_gates(odds[d], v[d], True)
        less[d] = log1p_exp(-abs(odds[d]))
        out[d] = sigmoids(r[d])[0] * (before[d] + sigmoids(out_odds[d])[0] * (v[d] - before[d]))
    for d in range(len(k)):
        carry[d] = a_of(share[d]) * carry[d] + inflow[d]
        L[d] = larger[d] + less[d]
        states[d], log_sums[d] = np.float32(carry[d]), np.float32(L[d])


@numba.njit(inline="always")
def rwkv_backward_row(p, q, before, d_out, d_after, carries, d_p, d_q, rows, back):
    """As `backward_row`."""
    (k, v, r), (h, L), (upstream, d_L), (carry, L_carry) = p, before, d_after, carries
    share, to_h, to_L, to_v, d_r = rows[0], rows[1], rows[2], rows[3], d_p[2]
    prefetch(k, back[0])
    prefetch(v, back[0])
    prefetch(r, back[0])
    prefetch(h, back[2])
    prefetch(L, back[3])
    for d in range(len(k)):
        odds, change = k[d] - L[d], v[d] - h[d]
        share[d], _, _, _, _ = mingru_gates(odds + q[0][d], v[d], True)
        (s, rest), (open_, shut) = sigmoids(odds + q[1][d]), sigmoids(r[d])
        read = d_out[d] * open_
        d_r[d] = read * shut * (h[d] + s * change)
        to_h[d], to_v[d], to_L[d] = read * rest, read * s, -read * change * s * rest
    prefetch(d_out, back[4])
    prefetch(d_p[0], back[1])
    prefetch(d_p[1], back[1])
    prefetch(d_r, back[1])
    for d in range(len(k)):
        d_state, d_log_sum = carry[d] + upstream[d], L_carry[d] + d_L[d]
        a, z = both(np.float64(share[d]))
        d_odds, d_v = mingru_pull_back(np.float64(share[d]), np.float64(v[d]), 1.0, np.float64(h[d]), d_state)
        d_kept = a * d_log_sum - d_odds
        d_p[0][d], d_p[1][d] = z * d_log_sum + d_odds - to_L[d], d_v + to_v[d]
        carry[d], L_carry[d] = a * d_state + to_h[d], d_kept + to_L[d]
        d_q[0][d] -= d_kept
        d_q[1][d] -= to_L[d]


PREFETCHED_AHEAD = 2**14  # bytes of `projected`

INPUTS = (
    voidptr, int64, int64, int64, int64, int64,  # projected, stride_b, stride_t, T, D, S
    voidptr, voidptr, voidptr,  # initial_state, reset_state, q
    int64, int64,  # addresses of the masks of resets and padding, 0 for none
)  # fmt: skip
STATES = (voidptr, int64, voidptr, int64)  # h and log-sums, each with how many numbers from one token to the next
STRIDED = (voidptr, int64, int64)  # with strides of B and T
GRADIENTS = (voidptr, int64, voidptr, voidptr, voidptr, int64)  # of projected, with its stride of T, and as `backward`


@functools.cache  # each cell is compiled by itself, when it is used
def forward_kernel_of(code: int, columns: int):
    """The kernel of a cell with so many blocks of `projected`."""

    @compile_kernel(*INPUTS, *STATES, voidptr, voidptr)
    def forward_kernel(
        projected, stride_b, stride_t, T, D, S, initial_state, reset_state, q, reset_mask, padding_mask, states, H,
        log_sums, R, outputs, final_state, b_start, b_stop, d_start, d_stop,
    ):  # fmt: skip
        projected, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
        states, log_sums, outputs, final_state = floats(states), floats(log_sums), floats(outputs), floats(final_state)
        q, E = floats(q), S - D
        place = d_start, d_stop, d_start * E // D, (d_stop * E + D - 1) // D
        q = whole_state_at(q, 0, D, (d_start, d_stop, d_start, d_stop))
        width, n = d_stop - d_start, place[3] - place[2]
        scratch, wide_scratch = allocate(4 * 6 * width), allocate(8 * 3 * width)
        rows, wide = numba.carray(scratch, (6, width), np.float32), numba.carray(wide_scratch, (3, width), np.float64)
        carry, L, larger = wide[0], wide[1][:n], wide[2]
        for b in range(b_start, b_stop):
            copy((carry, L), whole_state_at(initial_state, b * S, D, place))
            for t in range(T):
                row = b * T + t
                after = state_at(states, row * H, log_sums, row * R, place)
                out = outputs[row * D + d_start : row * D + d_stop]
                if is_set(reset_mask, row):
                    copy((carry, L), whole_state_at(reset_state, 0, D, place))
                if is_set(padding_mask, row):
                    copy(after, (carry, L))
                    for d in range(width):  # `out[:] = after[0]` would compile, for seconds, the text of an error
                        out[d] = after[0][d]
                    continue
                p = blocks_at(code, projected, b * stride_b + t * stride_t, D, E, columns, place)
                if code & RWKV:
                    rwkv_forward_row(p, q, carry, L, out, after[0], after[1], rows, larger)
                else:
                    forward_row(code, p, q, carry, L, after[0], rows)
                    if code & LOG_SUMS:
                        for e in range(n):
                            after[1][e] = L[e]
            copy(whole_state_at(final_state, b * S, D, place), (carry, L))
        release(scratch)
        release(wide_scratch)

    return forward_kernel


@functools.cache
def backward_kernel_of(code: int, columns: int):
    """As `forward_kernel_of`."""

    @compile_kernel(*INPUTS, *STATES, *STRIDED, *STRIDED, *STRIDED, voidptr, *GRADIENTS)
    def backward_kernel(
        projected, stride_b, stride_t, T, D, S, initial_state, reset_state, q, reset_mask, padding_mask, states, H,
        log_sums, R, d_outputs, out_b, out_t, d_states, h_b, h_t, d_log_sums, L_b, L_t, d_final_state, d_projected,
        d_stride, d_initial_state, d_reset_state, d_q, Q, b_start, b_stop, d_start, d_stop,
    ):  # fmt: skip
        projected, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
        states, log_sums, d_outputs, d_states = floats(states), floats(log_sums), floats(d_outputs), floats(d_states)
        d_log_sums, d_final_state, d_projected = floats(d_log_sums), floats(d_final_state), floats(d_projected)
        d_initial_state, d_reset_state, d_q = floats(d_initial_state), doubles(d_reset_state), doubles(d_q)
        E, place = S - D, (d_start, d_stop, d_start * (S - D) // D, (d_stop * (S - D) + D - 1) // D)
        channels = d_start, d_stop, d_start, d_stop
        q = whole_state_at(floats(q), 0, D, channels)
        width, n = d_stop - d_start, place[3] - place[2]
        ahead = max(1, PREFETCHED_AHEAD // (4 * columns * D))
        back = ahead * stride_t, ahead * d_stride, ahead * H, ahead * R, ahead * out_t
        scratch, wide_scratch = allocate(4 * 7 * width), allocate(8 * 4 * width)
        rows, wide = numba.carray(scratch, (7, width), np.float32), numba.carray(wide_scratch, (4, width), np.float64)
        # Gradients of the state that the token on the right received, and of what resets return to.
        carry, to_reset = (wide[0], wide[1][:n]), (wide[2], wide[3][:n])
        for b in range(b_start, b_stop):
            copy(carry, whole_state_at(d_final_state, b * S, D, place))
            clear(to_reset)
            for t in range(T - 1, -1, -1):
                row = b * T + t
                start, up, up_h = b * stride_b + t * stride_t, b * out_b + t * out_t, b * h_b + t * h_t
                p = blocks_at(code, projected, start, D, E, columns, place)
                d_p = blocks_at(code, d_projected, row * d_stride, D, E, columns, place)
                before = state_at(states, (row - 1) * H, log_sums, (row - 1) * R, place)
                d_after = state_at(d_states, up_h, d_log_sums, b * L_b + t * L_t, place)
                d_out = d_outputs[up + d_start : up + d_stop]
                if is_set(padding_mask, row):
                    pass_over(code, carry, d_after, d_out, d_p)
                else:
                    if is_set(reset_mask, row):
                        before = whole_state_at(reset_state, 0, D, place)
                    elif t == 0:
                        before = whole_state_at(initial_state, b * S, D, place)
                    d_q_row = whole_state_at(d_q, b * Q, D, channels)
                    if code & RWKV:
                        rwkv_backward_row(p, q, before, d_out, d_after, carry, d_p, d_q_row, rows, back)
                    else:
                        backward_row(code, columns, p, q, before, d_after, carry, d_p, d_q_row, rows, back)
                if is_set(reset_mask, row):
                    add(to_reset, carry)
                    clear(carry)
            copy(whole_state_at(d_initial_state, b * S, D, place), carry)
            copy(whole_state_at(d_reset_state, b * S, D, place), to_reset)
        release(scratch)
        release(wide_scratch)

    return backward_kernel


@compile_kernel(voidptr, int64, voidptr, voidptr, int64, int64, int64)
def solve_kernel(share, share_stride, states, carry, T, D, is_reverse, b_start, b_stop, d_start, d_stop):
    """states (T, D) arrives as the inflow, carry (D,) as the state before; share_stride: 0 where all rows are one."""
    share, states, carry = floats(share), floats(states), doubles(carry)[d_start:d_stop]
    for i in range(T):
        t = T - 1 - i if is_reverse else i
        row = share[t * share_stride + d_start : t * share_stride + d_stop]
        out = states[t * D + d_start : t * D + d_stop]
        for d in range(d_stop - d_start):
            carry[d] = a_of(row[d]) * carry[d] + out[d]
            out[d] = np.float32(carry[d])


_pool = None


def _drop_pool():
    global _pool
    _pool = None  # its threads do not exist in a forked child


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_drop_pool)


def run(kernel, arguments, B, D, unit=16):
    """Call kernel()(*arguments, b_start, b_stop, d_start, d_stop) over all rows and columns, on torch's thread count.

    unit: columns that stay together; by default a cache line.
    """
    global _pool
    compiled = kernel()

    def call(part):  # holds the tensors of `arguments` for as long as the kernel has their addresses
        compiled(*(value.data_ptr() if isinstance(value, torch.Tensor) else value or 0 for value in arguments), *part)

    threads = torch.get_num_threads()
    if B >= threads:
        bounds = [B * i // threads for i in range(threads + 1)]
        parts = [(start, stop, 0, D) for start, stop in zip(bounds, bounds[1:])]
    else:
        bounds = [min(D, unit * (-(-D // unit) * i // threads)) for i in range(threads + 1)]
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


def by_rows(inputs: ScanInputs, q, target):
    """Of some rows of the batch at a time: a slice of B, INPUTS, and where a kernel writes what goes to `target`.

    Of other dtypes than float32 a few rows are converted at a time: copies of all of them would cost more than the
    recurrence, most of it for memory that the system hands out and takes back at each call.
    """
    B, T, width = inputs.projected.shape
    is_float32 = inputs.projected.dtype == torch.float32
    size = max(1, B) if is_float32 else max(torch.get_num_threads(), CONVERTED_AT_ONCE // (T * width))
    for start in range(0, B, size):
        rows = slice(start, start + size)
        masks = [None if x is None else x[rows].contiguous() for x in (inputs.reset_mask, inputs.padding_mask)]
        given = (
            *strided(inputs.projected[rows]), T, inputs.D, len(inputs.reset_state),
            dense(inputs.initial_state[rows]), dense(inputs.reset_state), q, *masks,
        )  # fmt: skip
        part = target[rows]
        written = part if is_float32 else torch.empty(part.shape, dtype=torch.float32)
        yield rows, given, written
        part.copy_(written)  # nothing to do in float32, where they are the same


OF_FIRST = {RGLRU: lambda x: 8 * softplus(x), HGRN: torch.sigmoid, HGRN2: torch.sigmoid}


def derived(cell, parameters):
    """(q,) of the kernels, (1 or 2, channels), from the parameters of a cell."""
    first, *others = parameters
    return (torch.stack([OF_FIRST.get(code_of(cell), torch.exp)(first), *others]),)


def q_and_derivative(inputs: ScanInputs):
    """`derived`, or zeros for a cell without parameters, and the map of its gradient to theirs."""
    if not len(inputs.parameters):
        return torch.zeros(1, inputs.D, dtype=torch.float32), lambda d_q: [torch.zeros_like(inputs.parameters)]
    (q,), pull_back = derivative(functools.partial(derived, inputs.cell), inputs.parameters)
    return dense(q), pull_back


def launcher(inputs: ScanInputs, is_forward: bool):
    """What runs a kernel with its arguments on B rows."""
    if inputs.cell.has_matrices:
        from .matrix_numba import launcher as of_matrices

        return of_matrices(inputs, is_forward)
    D, code = inputs.D, code_of(inputs.cell)
    kernel = (forward_kernel_of if is_forward else backward_kernel_of)(code, len(inputs.cell.blocks(D)))
    unit = math.lcm(16, D // inputs.cell.log_sums(D)) if code & AAREN else 16  # heads stay whole
    return lambda arguments, B: run(kernel, arguments, B, D, unit)


def states_of(inputs: ScanInputs, outputs, rest):
    """STATES, of cells that have them."""
    if inputs.cell.has_matrices:
        return ()
    (h, L), R = inputs.cell.states_of(outputs, rest), rest.shape[-1]
    return h, R if inputs.cell.reads_out else inputs.D, L, R


def fuses(inputs: ScanInputs) -> bool:
    """Whether `forward` and `backward` compute a cell."""
    is_small = not inputs.cell.has_matrices or len(inputs.reset_state) // inputs.D <= LARGEST
    return code_of(inputs.cell) >= 0 and is_small


def forward(inputs: ScanInputs):
    """As `scan_blocks.forward`, for a cell that `fuses`."""
    outputs, rest, final_state = empty_outputs(inputs)
    launch, (q, _) = launcher(inputs, True), q_and_derivative(inputs)
    for rows, given, written in by_rows(inputs, q, outputs):
        launch((*given, *states_of(inputs, written, rest[rows]), written, final_state[rows]), len(written))
    return outputs, rest, final_state


def backward(inputs: ScanInputs, outputs, rest, d_outputs, d_rest, d_final_state):
    """As `scan_blocks.backward`, for a cell that `fuses`."""
    launch, (q, pull_back) = launcher(inputs, False), q_and_derivative(inputs)
    d_projected = torch.empty(inputs.projected.shape, dtype=inputs.projected.dtype)
    d_initial_state = torch.empty(d_final_state.shape, dtype=torch.float32)
    d_reset_state = torch.empty(d_final_state.shape, dtype=torch.float64)  # of each row of the batch
    d_q = torch.zeros(len(d_final_state), *q.shape, dtype=torch.float64)
    for rows, given, written in by_rows(inputs, q, d_projected):
        states = states_of(inputs, dense(outputs[rows]), rest[rows].contiguous())
        d_out, upstream = strided(d_outputs[rows]), ()
        if states:
            d_h, d_L = inputs.cell.states_of(d_out[0], d_rest[rows])
            upstream = *strided(d_h), *strided(d_L)
        downstream = written, written.shape[-1], d_initial_state[rows], d_reset_state[rows], d_q[rows], q.numel()
        launch((*given, *states, *d_out, *upstream, dense(d_final_state[rows]), *downstream), len(written))
    (d_parameters,) = pull_back(d_q.sum(0))
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


NUMBA_KERNELS = Kernels(solve, BLOCK_ELEMENTS, fuses, forward, backward, COMPILED["numba"])
