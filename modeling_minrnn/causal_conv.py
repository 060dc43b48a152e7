"""Causal depthwise convolution over time that carries a window of tokens, and respects documents and padding.

B batch, T time, H channels, K kernel size. Used by the model on the residual stream; the fused CPU kernel is in
`causal_conv_numba.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan import NAMESPACE, resolve_backend


def conv_taps(kernel_size: int, reset_mask: Tensor | None, padding_mask: Tensor | None) -> Tensor | None:
    """Where each tap of each token reads: (B, T, K) positions along time in [window | x], -1 for nothing (zero).

    A token sees itself and the K - 1 real tokens before it in its document: padding is passed over, and nothing is
    read from before a reset. `taps[:, t, 1:]` is therefore the window that is left after token t, and a padding token
    sees no more than that: what it sees does not depend on whether x begins before it or with it. Without masks tap k
    of token t reads t + k, and None says so; it also stands for no taps at all.
    """
    mask = padding_mask if reset_mask is None else reset_mask
    if mask is None or kernel_size == 0:
        return None
    position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    document = torch.zeros_like(position) if reset_mask is None else reset_mask.long().cumsum(1)
    rank, at_rank = position, position  # of each token, or the last real one before it, among the real tokens
    if padding_mask is not None:
        rank = (~padding_mask).long().cumsum(1) - 1
        at_rank = padding_mask.long().argsort(dim=1, stable=True)
    back = torch.arange(kernel_size - 1, -1, -1, device=mask.device)
    source_rank = (rank[..., None] - back).flatten(1)  # negative: in the window, which belongs to document 0
    source = at_rank.gather(1, source_rank.clamp(min=0))
    source_document = document.gather(1, source).masked_fill(source_rank < 0, 0)
    source = torch.where(source_rank < 0, source_rank, source) + kernel_size - 1
    source = source.masked_fill(source_document != document.repeat_interleave(kernel_size, 1), -1)
    taps = source.unflatten(1, (mask.shape[1], kernel_size))
    if padding_mask is not None:
        taps = taps.masked_fill(padding_mask[..., None] & (back == kernel_size - 1), -1)
    return taps


def causal_conv(
    x: Tensor, weight: Tensor, window: Tensor, taps: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y[t] = sum over k of weight[:, k] * [window | x][taps[t, k]].

    Args:
        x: (B, T, H).
        weight: (H, K); tap K - 1 is the token itself.
        window: (B, K - 1, H), the inputs before x[:, 0].
        taps: of `conv_taps`; None without documents and padding.
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
    if numba and T > 1:
        return _conv(x, weight, window, taps)
    rows = torch.cat([window, x], 1)
    weight = weight.to(x.dtype)
    if T == 1 and taps is None:
        return (rows * weight.T).sum(1, keepdim=True)
    if taps is None:
        return F.conv1d(rows.transpose(1, 2), weight[:, None], groups=len(weight)).transpose(1, 2)
    return sum((read_rows(rows, taps[..., k]) * weight[:, k] for k in range(K)), start=x.new_zeros(()))


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
    return rows[batch, index.clamp(min=0)] * (index >= 0)[..., None].to(rows.dtype)


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


def _differentiate(ctx, d_y):
    return *_conv_backward(*ctx.saved_tensors, d_y), None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError('causal_conv can be differentiated once; for second derivatives use backend="torch"')


_conv.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
_conv_backward.register_autograd(_refuse_double_backward)
