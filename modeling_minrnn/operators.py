"""The scan as one pair of custom operators around every implementation: what a compiler or an exporter sees of it.

Under torch.func and in forward mode two autograd functions take the place of the operators' derivatives.
"""

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor
from torch._C._functorch import TransformType

from .backends import NAMESPACE, Kernels, is_transformed, kernels, resolve_backend
from .cells import cell_of
from .matrix_recurrence import matrix_kernels
from .scan_blocks import ScanInputs, backward, empty_outputs, forward
from .tangent import tangent


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, T, D) in the dtype of `projected`; in that of the state the rest, what these do not hold of the
    states: L (B, T, E), or (B, T, S) where a cell reads out, but (B, 0, S) of matrices; and the final state (B, S)."""
    *tensors, cell, backend = inputs
    arguments = (*tensors, cell.spec, backend)
    return _apply(Scan, *arguments) if is_transformed() else _scan(*arguments)


def _kernels(inputs: ScanInputs) -> Kernels:
    device_type = inputs.projected.device.type
    backend = resolve_backend(inputs.backend, device_type, inputs.projected.dtype)
    return matrix_kernels(inputs, backend) if inputs.cell.has_matrices else kernels(backend, device_type)


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
    arguments = (*tensors, ctx.spec, ctx.backend, outputs, rest, *upstream)
    gradients = _apply(ScanBackward, *arguments) if is_transformed() else _scan_backward(*arguments)
    return *gradients, None, None, None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        'minrnn_scan can be differentiated once; for second derivatives use backend="loop" (in the configuration of a '
        'model scan_backend="loop")'
    )


_scan.register_autograd(_differentiate, setup_context=_save_for_backward)
_scan_backward.register_autograd(_refuse)


@torch.compiler.disable(reason='within torch.compile torch.func and forward mode need backend="loop"')
def _apply(function, *arguments):
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is not None and transform.key() == TransformType.Functionalize:  # takes operators alone
        return function.forward(*arguments)
    return function.apply(*arguments)


def _one_by_one(function, info, in_dims, arguments):
    calls = (
        _apply(function, *(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims)))
        for i in range(info.batch_size)
    )
    return tuple(map(torch.stack, zip(*calls)))


class Scan(torch.autograd.Function):
    """The first of the operators."""

    @staticmethod
    def forward(*arguments):
        return _scan(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save_for_backward(ctx, inputs, output)
        ctx.set_materialize_grads(True)
        ctx.save_for_forward(*inputs[:6], *output[:2])

    backward = staticmethod(_differentiate)

    @staticmethod
    def jvp(ctx, *tangents):
        # Of jvp in jvp torch would drop the outer one here, without a word; and what was saved has this one, too.
        with forward_mode._set_fwd_grad_enabled(True):
            saved = [None if x is None else forward_mode.unpack_dual(x).primal for x in ctx.saved_tensors]
            inputs = ScanInputs(*saved[:6], cell_of(ctx.spec), ctx.backend)
            return tangent(inputs, tangents[:4], *saved[6:], scan)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        if in_dims[1] is not None or in_dims[3] is not None:  # not one vector for all rows
            return _one_by_one(Scan, info, in_dims, arguments), 0
        rows = list(arguments)
        for i in (0, 2, 4, 5):
            if (x := arguments[i]) is not None:
                x = x.expand(info.batch_size, *x.shape) if in_dims[i] is None else x.movedim(in_dims[i], 0)
                rows[i] = x.flatten(0, 1)
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in _apply(Scan, *rows)), 0


class ScanBackward(torch.autograd.Function):
    """The second."""

    @staticmethod
    def forward(*arguments):
        return _scan_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = jvp = staticmethod(_refuse)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _one_by_one(ScanBackward, info, in_dims, arguments), 0
