"""Fused CPU kernels of the causal depthwise convolution in `causal_conv.py`, which owns the contract.

B batch, T time, H channels, K kernel size. One pass over x forward, one over x and the gradients backward.
"""

import torch

try:
    import numba
    import numpy as np
    from numba.types import int64, voidptr
except ImportError as error:
    raise ImportError('the "numba" backend needs numba: pip install numba') from error

from .scan_numba import compile_kernel, dense, floats, run, strided

INPUTS = (
    voidptr, int64, int64, voidptr, voidptr,  # x, stride_b, stride_t, weight (K, H), window
    voidptr, int64, int64, int64, int64,  # taps and their number, 0 for none; T, H, K
)  # fmt: skip


@numba.njit(inline="always")
def row_at(x, stride_b, stride_t, window, b, source, H, K, h_start, width):
    """The row of [window | x] that a tap reads."""
    if source >= K - 1:
        start = b * stride_b + (source - K + 1) * stride_t + h_start
        return x[start : start + width]
    start = (b * (K - 1) + source) * H + h_start
    return window[start : start + width]


@compile_kernel(*INPUTS, voidptr)
def forward_kernel(
    x, stride_b, stride_t, weight, window, taps, number_of_taps, T, H, K, y, b_start, b_stop, h_start, h_stop
):
    x, weight, window, y = floats(x), floats(weight), floats(window), floats(y)
    taps = numba.carray(taps, number_of_taps, np.int64)
    width = h_stop - h_start
    for b in range(b_start, b_stop):
        for t in range(T):
            out = y[(b * T + t) * H + h_start : (b * T + t) * H + h_stop]
            out[:] = np.float32(0.0)
            for k in range(K):
                source = taps[(b * T + t) * K + k] if number_of_taps else t + k
                if source >= 0:
                    row = row_at(x, stride_b, stride_t, window, b, source, H, K, h_start, width)
                    w = weight[k * H + h_start : k * H + h_stop]
                    for h in range(width):
                        out[h] += w[h] * row[h]


@compile_kernel(*INPUTS, voidptr, int64, int64, voidptr, voidptr, voidptr)
def backward_kernel(
    x, stride_b, stride_t, weight, window, taps, number_of_taps, T, H, K, d_y, d_y_stride_b, d_y_stride_t,
    d_x, d_weight, d_window, b_start, b_stop, h_start, h_stop,
):  # fmt: skip
    """d_x and d_window arrive as zeros, and so does d_weight (B, K, H): a sum for each row of the batch."""
    x, weight, window, d_y = floats(x), floats(weight), floats(window), floats(d_y)
    d_x, d_weight, d_window = floats(d_x), floats(d_weight), floats(d_window)
    taps = numba.carray(taps, number_of_taps, np.int64)
    width = h_stop - h_start
    for b in range(b_start, b_stop):
        for t in range(T):
            start = b * d_y_stride_b + t * d_y_stride_t + h_start
            upstream = d_y[start : start + width]
            for k in range(K):
                source = taps[(b * T + t) * K + k] if number_of_taps else t + k
                if source >= 0:
                    row = row_at(x, stride_b, stride_t, window, b, source, H, K, h_start, width)
                    d_row = row_at(d_x, T * H, H, d_window, b, source, H, K, h_start, width)
                    w = weight[k * H + h_start : k * H + h_stop]
                    d_w = d_weight[(b * K + k) * H + h_start : (b * K + k) * H + h_stop]
                    for h in range(width):
                        d_row[h] += w[h] * upstream[h]
                        d_w[h] += row[h] * upstream[h]


def _inputs(x, weight, window, taps):
    taps = (None, 0) if taps is None else (taps.contiguous(), taps.numel())
    return *strided(x), dense(weight.T), dense(window), *taps, x.shape[1], *weight.shape


def forward(x, weight, window, taps):
    """y of `causal_conv.causal_conv`."""
    y = torch.empty(x.shape, dtype=torch.float32)
    run(forward_kernel, (*_inputs(x, weight, window, taps), y), x.shape[0], x.shape[2])
    return y.to(x.dtype)


def backward(x, weight, window, taps, d_y):
    """Gradients of x, weight and window."""
    B, (H, K) = x.shape[0], weight.shape
    shapes = x.shape, (B, K, H), window.shape
    d_x, d_weight, d_window = (torch.zeros(shape, dtype=torch.float32) for shape in shapes)
    run(backward_kernel, (*_inputs(x, weight, window, taps), *strided(d_y), d_x, d_weight, d_window), B, H)
    return d_x.to(x.dtype), d_weight.sum(0).T.contiguous().to(weight.dtype), d_window.to(window.dtype)
