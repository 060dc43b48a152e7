"""Causal depthwise convolution over time that carries a window of tokens, and respects documents and padding.

B batch, T time, H channels, K kernel size. Used by the model on the residual stream; the fused CPU kernel is in
`causal_conv_numba.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import NAMESPACE, is_transformed, register_derivative, resolve_backend


def causal_conv(
    x: Tensor, weight: Tensor, window: Tensor, taps: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y[t] = sum over k of weight[:, k] * [window | x][taps[t, k]].

    Args:
        x: (B, T, H).
        weight: (H, K); tap K - 1 is the token itself.
        window: (B, K - 1, H), the inputs before x[:, 0].
        taps: of `masks.conv_taps`; None without documents and padding.
        backend: as in `scan.minrnn_scan`; all but "auto" and "numba" use torch.

    Returns:
        (B, T, H) in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together.
    """
    (B, T, H), K = x.shape, weight.shape[-1]
    shapes = {"weight": (weight, (H, K)), "window": (window, (B, K - 1, H)), "taps": (taps, (B, T, K))}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for x {(B, T, H)}, not {tuple(tensor.shape)}")
    numba = backend in ("auto", "numba") and resolve_backend(backend, x.device.type, x.dtype) == "numba"
    if numba and T > 1 and not is_transformed():
        return _conv(x, weight, window, taps)
    rows = torch.cat([window, x], 1)
    weight = weight.to(x.dtype)
    if T == 1 and taps is None:
        return (rows * weight.T).sum(1, keepdim=True)
    if taps is None:
        return F.conv1d(rows.transpose(1, 2), weight[:, None], groups=len(weight)).transpose(1, 2)
    return (read_rows(rows, taps) * weight.T).sum(2)


def windows_after(x: Tensor, window: Tensor, taps: Tensor | None, first: int) -> list[Tensor]:
    """The windows (B, K - 1, H) that each of the tokens x[:, first:] leaves; copies, which do not keep x alive."""
    size, T = window.shape[1], x.shape[1]
    if taps is not None:
        return list(read_rows(torch.cat([window, x], 1), taps[:, first:, 1:]).unbind(1))
    oldest = first + 1 - size  # negative: in the old window
    rows = x[:, oldest:] if oldest >= 0 else torch.cat([window[:, oldest:], x], 1)
    return [rows[:, start : start + size].clone() for start in range(T - first)]


def read_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, N, H) at index (B, ...), zero where the index is -1: (B, ..., H)."""
    batch = torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (index.dim() - 1))
    return F.pad(rows, (0, 0, 0, 1))[batch, index]  # -1 is the last one


@torch.library.custom_op(f"{NAMESPACE}::causal_conv", mutates_args=(), device_types="cpu")
def _conv(x: Tensor, weight: Tensor, window: Tensor, taps: Tensor | None) -> Tensor:
    from .causal_conv_numba import forward

    return forward(x, weight, window, taps)


@torch.library.custom_op(f"{NAMESPACE}::causal_conv_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    x: Tensor, weight: Tensor, window: Tensor, taps: Tensor | None, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from .causal_conv_numba import backward

    return backward(x, weight, window, taps, d_y)


@_conv.register_fake
def _(x, weight, window, taps):
    return x.new_empty(x.shape)


@_conv_backward.register_fake
def _(x, weight, window, taps, d_y):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), window.new_empty(window.shape)


register_derivative(
    _conv,
    _conv_backward,
    lambda ctx, d_y: (*_conv_backward(*ctx.saved_tensors, d_y), None),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    "causal_conv",
)
