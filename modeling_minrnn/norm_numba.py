"""CPU kernels of the RMSNorm in `norm.py`, which owns the contract: one pass forward, one backward.

N rows of H numbers.
"""

import math

import torch

try:
    import numba
    import numpy as np
    from numba.types import float64, int64, voidptr
except ImportError as error:
    raise ImportError('the "numba" backend needs numba: pip install numba') from error

from .scan_numba import ANY_ORDER, compile_kernel, dense, floats, run

ROWS_AT_ONCE = 64  # whose share of the weight's gradient is summed in float32
summing = numba.njit(**ANY_ORDER)


@summing
def sum_of_squares(x):
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return total


@summing
def sum_of_products(x, y, z):
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * y[i] * z[i]
    return total


@compile_kernel(voidptr, voidptr, float64, int64, voidptr, voidptr)
def forward_kernel(x, weight, eps, H, y, scale, start, stop, _, __):
    x, weight, y, scale = floats(x), floats(weight)[:H], floats(y), floats(scale)
    for n in range(start, stop):
        row, out = x[n * H : n * H + H], y[n * H : n * H + H]
        by = np.float32(1.0 / math.sqrt(sum_of_squares(row) / H + eps))
        scale[n] = by
        for i in range(H):
            out[i] = row[i] * by * weight[i]


@compile_kernel(voidptr, voidptr, voidptr, voidptr, int64, int64, voidptr, voidptr)
def backward_kernel(x, weight, scale, d_y, N, H, d_x, d_weight, start, stop, _, __):
    """start, stop: groups of ROWS_AT_ONCE rows; d_weight (groups, H) arrives as zeros."""
    x, weight, scale, d_y = floats(x), floats(weight)[:H], floats(scale), floats(d_y)
    d_x, d_weight = floats(d_x), floats(d_weight)
    for group in range(start, stop):
        d_w = d_weight[group * H : group * H + H]
        for n in range(group * ROWS_AT_ONCE, min(N, (group + 1) * ROWS_AT_ONCE)):
            row, up, out = x[n * H : n * H + H], d_y[n * H : n * H + H], d_x[n * H : n * H + H]
            by = scale[n]
            along = np.float32(sum_of_products(row, up, weight) * np.float64(by) * by * by / H)
            for i in range(H):
                out[i] = up[i] * weight[i] * by - row[i] * along
                d_w[i] += up[i] * row[i] * by


def forward(x, weight, eps):
    """y of `norm.MinRNNRMSNorm`, and what each row was multiplied by."""
    x, H = dense(x), x.shape[-1]
    y, scale = torch.empty_like(x), torch.empty(x.shape[:-1])
    run(forward_kernel, (x, dense(weight), eps, H, y, scale), scale.numel(), H, unit=H)
    return y, scale


def backward(x, weight, scale, d_y):
    """Gradients of x and weight."""
    x, N, H = dense(x), scale.numel(), x.shape[-1]
    groups = -(-N // ROWS_AT_ONCE)
    d_x, d_weight = torch.empty_like(x), torch.zeros(groups, H)
    run(backward_kernel, (x, dense(weight), scale, dense(d_y), N, H, d_x, d_weight), groups, H, unit=H)
    return d_x, d_weight.sum(0)
