"""RMSNorm that reads its input once, forward and backward, where a CPU kernel can; elsewhere it is torch's, which
makes some ten passes. The kernel is in `norm_numba.py`.

B batch, T time, H channels.
"""

import torch
from torch import Tensor, nn

from .backends import NAMESPACE, is_transformed, resolve_backend

SMALLEST = 1 << 15  # numbers in x; with fewer the call of an operator costs more than the kernel saves


class MinRNNRMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

    backend: as in `scan.minrnn_scan`; all but "auto" and "numba" use torch.
    """

    def __init__(self, hidden_size: int, eps: float, backend: str = "auto"):
        super().__init__(hidden_size, eps)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        if _fuses(x, self.weight, self.backend):
            return _norm(x, self.weight, self.eps)[0]
        return super().forward(x)


def _fuses(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether the kernel may take torch's place. What is exported or traced is to run elsewhere too."""
    return (
        not torch.compiler.is_exporting()
        and torch._C._get_tracing_state() is None  # or the sizes below would be traced
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() >= SMALLEST
        and x.shape[-1:] == weight.shape
        and backend in ("auto", "numba")
        and not is_transformed()
        and resolve_backend(backend, "cpu", x.dtype) == "numba"
    )


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=(), device_types="cpu")
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .norm_numba import forward

    return forward(x, weight, eps)


@torch.library.custom_op(f"{NAMESPACE}::rms_norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(x: Tensor, weight: Tensor, scale: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
    from .norm_numba import backward

    return backward(x, weight, scale, d_y)


@_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


@_norm_backward.register_fake
def _(x, weight, scale, d_y):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])


def _refuse_double_backward(ctx, *_):
    raise RuntimeError(
        'MinRNNRMSNorm can be differentiated once; for second derivatives set scan_backend="loop" in the configuration'
    )


_norm.register_autograd(
    lambda ctx, d_y, _: (*_norm_backward(*ctx.saved_tensors, d_y), None), setup_context=_save_for_backward
)
_norm_backward.register_autograd(_refuse_double_backward)
