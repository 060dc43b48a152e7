"""The scan as one pair of custom operators around every implementation: what a compiler or an exporter sees of it."""

import torch
from torch import Tensor

from .backends import NAMESPACE, Kernels, kernels, resolve_backend
from .cells import cell_of
from .scan_blocks import ScanInputs, backward, forward


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, T, D) in the dtype of `projected`, L (B, T, E) and the final state (B, S) in that of the state."""
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
    states: Tensor,
    log_sums: Tensor,
    d_states: Tensor,
    d_log_sums: Tensor,
    d_final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = ScanInputs(
        projected, parameters, initial_state, reset_state, reset_mask, padding_mask, cell_of(spec), backend
    )
    return backward(inputs, _kernels(inputs), states, log_sums, d_states, d_log_sums, d_final_state)


@_scan.register_fake
def _(projected, parameters, initial_state, reset_state, reset_mask, padding_mask, spec, backend):
    (B, T, width), S = projected.shape, initial_state.shape[-1]
    D = cell_of(spec).state_width(width)
    states, log_sums = projected.new_empty(B, T, D), initial_state.new_empty(B, T, S - D)
    return states, log_sums, initial_state.new_empty(initial_state.shape)


@_scan_backward.register_fake
def _(projected, parameters, initial_state, reset_state, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (projected, parameters, initial_state, reset_state))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.spec, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[:2])
    ctx.set_materialize_grads(True)


def _differentiate(ctx, d_states, d_log_sums, d_final_state):
    *tensors, states, log_sums = ctx.saved_tensors
    gradients = _scan_backward(*tensors, ctx.spec, ctx.backend, states, log_sums, d_states, d_log_sums, d_final_state)
    return *gradients, None, None, None, None


def _refuse_double_backward(ctx, *_):
    raise RuntimeError('minrnn_scan can be differentiated once; for second derivatives use backend="loop"')


_scan.register_autograd(_differentiate, setup_context=_save_for_backward)
_scan_backward.register_autograd(_refuse_double_backward)
