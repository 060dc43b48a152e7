"""The scan as one pair of custom operators around every implementation: what a compiler or an exporter sees of it."""

import torch
from torch import Tensor

from .backends import NAMESPACE, Kernels, kernels, resolve_backend
from .cells import cell_of
from .scan_blocks import ScanInputs, backward, empty_outputs, forward


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, T, D) in the dtype of `projected`; in that of the state the rest, what these do not hold of the
    states: L (B, T, E), or (B, T, S) where a cell reads out; and the final state (B, S)."""
    *tensors, cell, backend = inputs
    return _scan(*tensors, cell.spec, backend)


def _kernels(inputs: ScanInputs) -> Kernels:
    device_type = inputs.projected.device.type
    return kernels(resolve_backend(inputs.backend, device_type, inputs.projected.dtype), device_type)


@torch.library.custom_op(f"{NAMESPACE}::scan", mutates_args=())
def _scan(
    projected: Tensor,
    parameters: Tensor,
    initial_state: Tensor,
    reset_state: Tensor,
    reset_mask: Tensor | None,
    padding_mask: Tensor | None,
    spec: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(
        projected, parameters, initial_state, reset_state, reset_mask, padding_mask, cell_of(spec), backend
    )
    return forward(inputs, _kernels(inputs))


@torch.library.custom_op(f"{NAMESPACE}::scan_backward", mutates_args=())
def _scan_backward(
    projected: Tensor,
    parameters: Tensor,
    initial_state: Tensor,
    reset_state: Tensor,
    reset_mask: Tensor | None,
    padding_mask: Tensor | None,
    spec: str,
    backend: str,
    outputs: Tensor,
    rest: Tensor,
    d_outputs: Tensor,
    d_rest: Tensor,
    d_final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = ScanInputs(
        projected, parameters, initial_state, reset_state, reset_mask, padding_mask, cell_of(spec), backend
    )
    return backward(inputs, _kernels(inputs), outputs, rest, d_outputs, d_rest, d_final_state)


@_scan.register_fake
def _(*arguments):
    *tensors, spec, backend = arguments
    return empty_outputs(ScanInputs(*tensors, cell_of(spec), backend))


@_scan_backward.register_fake
def _(projected, parameters, initial_state, reset_state, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (projected, parameters, initial_state, reset_state))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.spec, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, *d_outputs):
    *tensors, outputs, rest = ctx.saved_tensors
    # Zeros in one row: rarely does a gradient come from `rest`.
    shapes = zip(d_outputs, (outputs, rest, tensors[2]))
    upstream = [y.new_zeros(y.shape[-1]).expand(y.shape) if d is None else d for d, y in shapes]
    gradients = _scan_backward(*tensors, ctx.spec, ctx.backend, outputs, rest, *upstream)
    return *gradients, None, None, None, None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError('minrnn_scan can be differentiated once; for second derivatives use backend="loop"')


_scan.register_autograd(_differentiate, setup_context=_save_for_backward)
_scan_backward.register_autograd(_refuse_double_backward)
