"""Fused CPU kernels of the minimal-RNN scan: gates, recurrence and their gradients in one pass over memory.

B batch, T time, D state width. Called by `scan.py`, which states the recurrence and owns the contract; nothing here
checks its arguments. The gates are computed in float32, the state is carried in float64: a gate of 1 - 1e-7 applied
for 1e5 tokens would lose the state in float32, and the extra cost disappears behind the exponentials.

Rows are walked one token at a time and vectorised over D. Threads share the work by batch rows, or by columns where
there are too few rows. They come from a pool of our own around kernels that run without the GIL, not from numba's
`parallel=True`, whose default threading layer aborts the process when two Python threads call it at once.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba.core.cgutils import get_or_insert_function
    from numba.extending import intrinsic
    from numba.types import int64, void, voidptr
except ImportError as error:
    raise ImportError('the "numba" backend needs numba: pip install numba') from error


def compile_kernel(*argument_types):
    """Compile to a C function of these arguments and (b_start, b_stop, d_start, d_stop), kept on disk between
    processes where numba finds a folder that it can write.

    Arrays come as addresses: slicing an array that Python owns costs two atomic operations, as much as a short row.
    """
    signature = void(*argument_types, int64, int64, int64, int64)
    # Not "nnan" or "ninf": a NaN that comes in must go out.
    options = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}

    def compile(function):
        try:
            return numba.cfunc(signature, cache=True, **options)(function).ctypes
        except (RuntimeError, OSError):  # no folder for the cache, or no room in it
            return numba.cfunc(signature, **options)(function).ctypes

    return compile


ANY_LENGTH = 1 << 60


@numba.njit(inline="always")
def floats(address):
    """The float32 array at an address; its length is not known, and not needed for what is sliced from it."""
    return numba.carray(address, ANY_LENGTH, np.float32)


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
def exp_nonpositive(x):
    """exp(x) for float32 x <= 0, to 1 ulp; below -87 it stays at exp(-87), about 1e-38."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    # Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits, ready to become the exponent.
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = (x - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)  # ln 2 in two parts
    # Degree-6 Chebyshev fit of exp on [-ln2/2, ln2/2], relative error 3e-9.
    p = np.float32(0.0013941108481958508)
    p = p * r + np.float32(0.00837512593716383)
    p = p * r + np.float32(0.04166635125875473)
    p = p * r + np.float32(0.16666415333747864)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    power = (np.float32(shifted).view(np.int32) + np.int32(127)) << np.int32(23)
    return p * np.int32(power).view(np.float32)


@numba.njit(inline="always")
def complementary(small, first):
    """(small, 1 - small) in float64, where the subtraction is exact, swapped unless `first`."""
    small = np.float64(small)
    large = 1.0 - small
    return small if first else large, large if first else small


@numba.njit(inline="always")
def mingru_gates(gate):
    """(a, 1 - a) for a = sigmoid(-gate)."""
    e = exp_nonpositive(-abs(gate))
    return complementary(e / (np.float32(1.0) + e), gate >= np.float32(0.0))


@numba.njit(inline="always")
def minlstm_gates(forget, input_):
    """(a, 1 - a) for a = f / (f + i), f = sigmoid(forget), i = sigmoid(input_), and (1 - f, 1 - i).

    With 1 / f = 1 + exp(-forget): a = (1 + exp(-input_)) / (2 + exp(-input_) + exp(-forget)). Numerator and
    denominator are scaled by exp(low), low = min(forget, input_, 0), so that no exponent is positive.
    """
    one = np.float32(1.0)
    forget_is_low = forget < input_
    low = forget if forget_is_low else input_
    high = input_ if forget_is_low else forget
    low_is_negative = low < np.float32(0.0)
    e_low = exp_nonpositive(-abs(low))
    e_high = exp_nonpositive((low if low_is_negative else np.float32(0.0)) - high)
    scale = e_low if low_is_negative else one
    low_inverse = one + e_low  # scale / sigmoid(low)
    high_inverse = scale + e_high  # scale / sigmoid(high)
    a, z = complementary(high_inverse / (low_inverse + high_inverse), forget_is_low)
    one_minus_low = (one if low_is_negative else e_low) / low_inverse
    one_minus_high = e_high / high_inverse
    one_minus_f = one_minus_low if forget_is_low else one_minus_high
    one_minus_i = one_minus_high if forget_is_low else one_minus_low
    return a, z, one_minus_f, one_minus_i


@numba.njit(inline="always")
def candidate_and_slope(x):
    """g(x) = x + 0.5 where x >= 0, sigmoid(x) elsewhere, and g'(x)."""
    one = np.float32(1.0)
    nonnegative = x >= np.float32(0.0)
    e = exp_nonpositive(np.float32(0.0) if nonnegative else x)
    share = one / (one + e)
    sigmoid = e * share
    return x + np.float32(0.5) if nonnegative else sigmoid, one if nonnegative else sigmoid * share


PREFETCHED_AHEAD = 2**14  # bytes of `projected`

INPUTS = (
    int64, voidptr, int64, int64,  # is_minlstm, projected, stride_b, stride_t
    int64, int64, voidptr, voidptr,  # T, D, initial_state, reset_state
    voidptr, int64, voidptr, int64,  # reset_mask and its length, padding_mask and its length; 0 for none
)  # fmt: skip


@compile_kernel(*INPUTS, voidptr, voidptr)
def forward_kernel(
    is_minlstm, projected, stride_b, stride_t, T, D, initial_state, reset_state, reset_mask, resets, padding_mask,
    paddings, states, final_state, b_start, b_stop, d_start, d_stop,
):  # fmt: skip
    projected, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
    states, final_state = floats(states), floats(final_state)
    reset_mask = numba.carray(reset_mask, resets, np.uint8)
    padding_mask = numba.carray(padding_mask, paddings, np.uint8)
    width = d_stop - d_start
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
            start = b * stride_b + t * stride_t + d_start
            first = projected[start : start + width]
            second = projected[start + D : start + D + width]
            if is_minlstm:
                third = projected[start + 2 * D : start + 2 * D + width]
                for d in range(width):
                    a, z, _, _ = minlstm_gates(first[d], second[d])
                    c, _ = candidate_and_slope(third[d])
                    state = a * carry[d] + z * c
                    carry[d] = state
                    out[d] = np.float32(state)
            else:
                for d in range(width):
                    a, z = mingru_gates(first[d])
                    c, _ = candidate_and_slope(second[d])
                    state = a * carry[d] + z * c
                    carry[d] = state
                    out[d] = np.float32(state)
        for d in range(width):
            final_state[b * D + d_start + d] = np.float32(carry[d])


@compile_kernel(*INPUTS, voidptr, voidptr, int64, int64, voidptr, voidptr, voidptr, voidptr)
def backward_kernel(
    is_minlstm, projected, stride_b, stride_t, T, D, initial_state, reset_state, reset_mask, resets, padding_mask,
    paddings, states, d_states, d_stride_b, d_stride_t, d_final_state,
    d_projected, d_initial_state, d_reset_state, b_start, b_stop, d_start, d_stop,
):  # fmt: skip
    projected, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
    states, d_states, d_final_state = floats(states), floats(d_states), floats(d_final_state)
    d_projected, d_initial_state = floats(d_projected), floats(d_initial_state)
    d_reset_state = numba.carray(d_reset_state, ANY_LENGTH, np.float64)
    reset_mask = numba.carray(reset_mask, resets, np.uint8)
    padding_mask = numba.carray(padding_mask, paddings, np.uint8)
    gates = 3 if is_minlstm else 2
    width = d_stop - d_start
    # Processors foresee the next line, not the row before this one: fetched ahead, short rows take half the time.
    ahead = max(1, PREFETCHED_AHEAD // (4 * gates * D))
    projected_at, states_at = projected.ctypes.data, states.ctypes.data
    d_states_at, d_projected_at = d_states.ctypes.data, d_projected.ctypes.data
    carry = np.empty(width, np.float64)  # gradient of the state that the token on the right received
    for b in range(b_start, b_stop):
        for d in range(width):
            carry[d] = d_final_state[b * D + d_start + d]
        for t in range(T - 1, -1, -1):
            row = b * T + t
            is_reset = resets > 0 and reset_mask[row] != 0
            upstream_start = b * d_stride_b + t * d_stride_t + d_start
            upstream = d_states[upstream_start : upstream_start + width]
            out = row * gates * D + d_start
            d_first = d_projected[out : out + width]
            d_second = d_projected[out + D : out + D + width]
            d_third = d_projected[out + (gates - 1) * D : out + (gates - 1) * D + width]
            for gate in range(gates):
                prefetch(projected_at, b * stride_b + (t - ahead) * stride_t + gate * D + d_start, width)
                prefetch(d_projected_at, out + (gate - ahead * gates) * D, width)
            prefetch(states_at, (row - 1 - ahead) * D + d_start, width)
            prefetch(d_states_at, upstream_start - ahead * d_stride_t, width)
            if paddings and padding_mask[row]:
                for d in range(width):
                    carry[d] += upstream[d]
                    d_first[d] = np.float32(0.0)
                    d_second[d] = np.float32(0.0)
                    d_third[d] = np.float32(0.0)
            else:
                if is_reset:
                    previous = reset_state[d_start:d_stop]
                elif t == 0:
                    previous = initial_state[b * D + d_start : b * D + d_stop]
                else:
                    previous = states[(row - 1) * D + d_start : (row - 1) * D + d_stop]
                start = b * stride_b + t * stride_t + d_start
                first = projected[start : start + width]
                second = projected[start + D : start + D + width]
                if is_minlstm:
                    third = projected[start + 2 * D : start + 2 * D + width]
                    for d in range(width):
                        a, z, one_minus_f, one_minus_i = minlstm_gates(first[d], second[d])
                        c, slope = candidate_and_slope(third[d])
                        d_state = carry[d] + upstream[d]
                        carry[d] = a * d_state
                        d_candidate = np.float32(z * d_state)
                        d_gate = d_candidate * np.float32(a) * (c - previous[d])
                        d_first[d] = -d_gate * one_minus_f
                        d_second[d] = d_gate * one_minus_i
                        d_third[d] = d_candidate * slope
                else:
                    for d in range(width):
                        a, z = mingru_gates(first[d])
                        c, slope = candidate_and_slope(second[d])
                        d_state = carry[d] + upstream[d]
                        carry[d] = a * d_state
                        d_candidate = np.float32(z * d_state)
                        d_first[d] = d_candidate * np.float32(a) * (c - previous[d])
                        d_second[d] = d_candidate * slope
            if is_reset:
                for d in range(width):
                    d_reset_state[b * D + d_start + d] += carry[d]
                    carry[d] = 0.0
        for d in range(width):
            d_initial_state[b * D + d_start + d] = np.float32(carry[d])


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


def _inputs(rows, projected, cell_type, initial_state, reset_state, reset_mask, padding_mask):
    T, D = projected.shape[1], initial_state.shape[1]
    masks = [None if mask is None else mask[rows].contiguous() for mask in (reset_mask, padding_mask)]
    sizes = [(mask, 0 if mask is None else mask.numel()) for mask in masks]
    states = (dense(initial_state[rows]), dense(reset_state))
    return cell_type == "minlstm", *strided(projected[rows]), T, D, *states, *sizes[0], *sizes[1]


def forward(projected, cell_type, initial_state, reset_state, reset_mask, padding_mask):
    """(states, final_state) of `scan.minrnn_scan`; initial_state (B, D), reset_state (D,)."""
    B, D = initial_state.shape
    states = torch.empty(B, projected.shape[1], D, dtype=projected.dtype)
    final_state = torch.empty(B, D, dtype=torch.float32)
    for rows in row_groups(projected):
        inputs = _inputs(rows, projected, cell_type, initial_state, reset_state, reset_mask, padding_mask)
        part = states[rows]
        written = output(part)
        run(forward_kernel, (*inputs, written, final_state[rows]), len(part), D)
        part.copy_(written)
    return states, final_state


def backward(
    projected, cell_type, initial_state, reset_state, reset_mask, padding_mask, states, d_states, d_final_state
):
    """Gradients of projected (B, T, gates * D), initial_state (B, D) and reset_state (D,)."""
    B, D = initial_state.shape
    d_projected = torch.empty(projected.shape, dtype=projected.dtype)
    d_initial_state = torch.empty(B, D, dtype=torch.float32)
    d_reset_state = torch.zeros(B, D, dtype=torch.float64)
    for rows in row_groups(projected):
        inputs = _inputs(rows, projected, cell_type, initial_state, reset_state, reset_mask, padding_mask)
        upstream = (*strided(d_states[rows]), dense(d_final_state[rows]))
        part = d_projected[rows]
        written = output(part)
        downstream = (written, d_initial_state[rows], d_reset_state[rows])
        run(backward_kernel, (*inputs, dense(states[rows]), *upstream, *downstream), len(part), D)
        part.copy_(written)
    return d_projected, d_initial_state, d_reset_state.sum(0).to(torch.float32)
