"""Mamba's selective scan (arXiv 2312.00752, algorithm 2) fused for one CPU thread, so that Mamba can be trained here.

transformers' scan and mambapy's hold B T D N numbers several times over and take seconds a step; here the N states of
a channel stay in registers. `with fused_scan():` puts it in the place of transformers' while the block lasts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from transformers.models.mamba import modeling_mamba

from modeling_minrnn.scan_numba import exp_nonpositive

N = 16  # MambaConfig.state_size; known to the compiler, so that a state is one vector
compile_kernel = numba.njit(cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})  # sums over N


@numba.njit(fastmath={"contract"})
def decay(exponent):
    """A function of its own because reassociating it would undo its rounding."""
    return exp_nonpositive(exponent)


@compile_kernel
def scan_forward(u, dt, A, B, C, y):
    h = np.empty(N, np.float32)
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            h[:] = 0.0
            for t in range(u.shape[2]):
                step, inflow, out = dt[b, d, t], dt[b, d, t] * u[b, d, t], np.float32(0.0)
                for n in range(N):
                    h[n] = decay(step * A[d, n]) * h[n] + inflow * B[b, t, n]
                    out += h[n] * C[b, t, n]
                y[b, d, t] = out


@compile_kernel
def scan_backward(u, dt, A, B, C, grad_y, grad_u, grad_dt, grad_A, grad_B, grad_C):
    """Adds to grad_A, grad_B and grad_C, fills the others. The states are computed again, a channel at a time."""
    T = u.shape[2]
    a, h = np.empty((T, N), np.float32), np.zeros((T + 1, N), np.float32)  # h[t + 1] after token t
    grad_h = np.empty(N, np.float32)
    for b in range(u.shape[0]):
        for d in range(u.shape[1]):
            for t in range(T):
                step, inflow = dt[b, d, t], dt[b, d, t] * u[b, d, t]
                for n in range(N):
                    a[t, n] = decay(step * A[d, n])
                    h[t + 1, n] = a[t, n] * h[t, n] + inflow * B[b, t, n]
            grad_h[:] = 0.0
            for t in range(T - 1, -1, -1):
                step, inflow, slope = dt[b, d, t], dt[b, d, t] * u[b, d, t], grad_y[b, d, t]
                by_step, by_inflow = np.float32(0.0), np.float32(0.0)
                for n in range(N):
                    grad = grad_h[n] + slope * C[b, t, n]
                    grad_C[b, t, n] += slope * h[t + 1, n]
                    grad_B[b, t, n] += grad * inflow
                    by_exponent = grad * h[t, n] * a[t, n]
                    grad_A[d, n] += by_exponent * step
                    by_step += by_exponent * A[d, n]
                    by_inflow += grad * B[b, t, n]
                    grad_h[n] = grad * a[t, n]
                grad_dt[b, d, t] = by_step + by_inflow * u[b, d, t]
                grad_u[b, d, t] = by_inflow * step


class SelectiveScan(torch.autograd.Function):
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t], y[t] = C[t] . h[t] for u, dt, y (B, D, T), A (D, N) <= 0 and
    B, C (B, T, N), all float32 and contiguous."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        y = torch.empty_like(inputs[0])
        scan_forward(*(tensor.numpy() for tensor in (*inputs, y)))
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.zeros_like(tensor) for tensor in inputs)
        scan_backward(*(tensor.detach().numpy() for tensor in (*inputs, grad_y.contiguous(), *grads)))
        return grads


def selective_scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state=False, **backends):
    """Arguments and result (B, D, T) are those of transformers' mamba_selective_scan, where no state is asked for."""
    if not delta_softplus or return_last_state or A.shape[1] != N:
        raise ValueError(f"the fused scan trains Mamba of {N} states with softplus, without a cache")
    u, C, B, gate = (tensor.float() for tensor in (hidden_states, C.transpose(1, 2), B.transpose(1, 2), z))
    dt = softplus(dt.float() + delta_bias[:, None])
    y = SelectiveScan.apply(*(tensor.contiguous() for tensor in (u, dt, A, B, C)))
    return (y + u * D[:, None]) * silu(gate)


@contextmanager
def fused_scan() -> Iterator[None]:
    with mock.patch.object(modeling_mamba, "mamba_selective_scan", selective_scan):
        yield
