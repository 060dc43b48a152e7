"""The scan as one pair of custom operators around every implementation: what a compiler or an exporter sees of it.

Under torch.func and in forward mode, which know nothing of operators' derivatives, `scan_plain.py` takes their place.
"""

import torch
from torch import Tensor

from .backends import NAMESPACE, Kernels, is_transformed, kernels, register_derivative, resolve_backend
from .cells import cell_of
from .scan_blocks import ScanInputs, backward, empty_outputs, forward
from .scan_plain import plain_scan


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, T, D) in the dtype of `projected`; in that of the state the rest, what these do not hold of the
    states: L (B, T, E), or (B, T, S) where a cell reads out, but (B, 0, S) of matrices; and the final state (B, S)."""
    *tensors, cell, backend = inputs
    return plain_scan(inputs) if is_transformed() else _scan(*tensors, cell.spec, backend)


def _kernels(inputs: ScanInputs) -> Kernels:
    device_type = inputs.projected.device.type
    return kernels(resolve_backend(inputs.backend, device_type, inputs.projected.dtype), device_type)


def _inputs(*arguments):
    *tensors, spec, backend = arguments
    return ScanInputs(*tensors, cell_of(spec), backend)


INPUTS = (
    "Tensor projected, Tensor parameters, Tensor initial_state, Tensor reset_state, Tensor? reset_mask, "
    "Tensor? padding_mask, str spec, str backend"
)
RESULTS = "Tensor outputs, Tensor rest, Tensor d_outputs, Tensor d_rest, Tensor d_final_state"
FORWARD = f"({INPUTS}) -> (Tensor, Tensor, Tensor)"
BACKWARD = f"({INPUTS}, {RESULTS}) -> (Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(f"{NAMESPACE}::scan", mutates_args=(), schema=FORWARD)
def _scan(*arguments):
    inputs = _inputs(*arguments)
    return forward(inputs, _kernels(inputs))


@torch.library.custom_op(f"{NAMESPACE}::scan_backward", mutates_args=(), schema=BACKWARD)
def _scan_backward(*arguments):
    inputs = _inputs(*arguments[:8])
    return backward(inputs, _kernels(inputs), *arguments[8:])


@_scan.register_fake
def _(*arguments):
    return empty_outputs(_inputs(*arguments))


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


register_derivative(_scan, _scan_backward, _differentiate, _save_for_backward, "minrnn_scan")
