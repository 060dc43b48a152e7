"""The scan in forward mode: how its results change as its inputs change along a direction.

B batch, T time, D width of h, E log-sums, S = D + E. Along a direction the derivative of h = a h + b is itself a
linear recurrence with the same a: one more scan, of what the direction does to the gates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual

from .cells import Convex, Linear, advance, advance_log_sum, cell_of, softplus
from .matrix_recurrence import matrix_forward
from .scan_blocks import ScanInputs


def tangent(
    inputs: ScanInputs, tangents: Sequence[Tensor], outputs: Tensor, rest: Tensor, scan: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of (outputs, rest, final_state) of `scan`, which is `operators.scan`; called within forward mode.

    tangents: of projected, parameters, initial_state and reset_state.
    """
    cell, D = inputs.cell, inputs.D
    along = inputs._replace(projected=tangents[0], initial_state=tangents[2], reset_state=tangents[3])
    if cell.system is not None:  # linear in all that it reads
        return scan(along)
    if cell.has_matrices:
        duals = {name: make_dual(x, d) for name, x, d in zip(inputs._fields, inputs[:4], tangents)}
        d_outputs, d_rest, d_final_state = map(_change, matrix_forward(inputs._replace(**duals)))
        return d_outputs, d_rest, d_final_state
    x, parameters = make_dual(inputs.tokens(), along.tokens()), make_dual(inputs.parameters, tangents[1])
    start_h, start_L = along.initial_state.tensor_split([D], -1)
    reset_h, reset_L = along.reset_state.tensor_split([D])
    states, log_sums = cell.states_of(outputs, rest)
    before = inputs.before(torch.cat([states.to(rest.dtype), log_sums], -1), inputs.initial_state, inputs.reset_state)
    h, L = before.tensor_split([D], -1)
    d_log_sums, end_L = torch.zeros_like(log_sums), start_L
    if L.shape[-1]:
        log_sum = cell.log_sum_gates(x, parameters)
        log_kept = -softplus(_primal(log_sum.score) - L - _primal(log_sum.log_decay))
        changes = Linear(log_kept, _change(advance_log_sum(log_sum, L)))
        d_log_sums, end_L = _solve(changes, start_L, reset_L, along, scan)
        L = make_dual(L, along.before(d_log_sums, start_L, reset_L))
    terms = cell.gates(x, parameters, L)
    turn = () if isinstance(terms, Convex) else (x if x is None else _primal(x) for x in terms[2:])
    changes = Linear(_primal(terms.log_decay), _change(advance(terms, h)), *turn)
    d_states, end_h = _solve(changes, start_h, reset_h, along, scan)
    d_outputs, d_rest, d_final_state = d_states, d_log_sums, torch.cat([end_h, end_L], -1)
    if cell.reads_out:
        d_rest = torch.cat([d_states, d_log_sums], -1)
        d_before = along.before(d_rest, along.initial_state, along.reset_state)
        d_outputs = _change(cell.read_out(x, parameters, make_dual(before, d_before)))
        if inputs.padding_mask is not None:
            d_outputs = torch.where(inputs.padding_mask[..., None], d_states, d_outputs)
    return d_outputs.to(outputs.dtype), d_rest, d_final_state


def _solve(
    terms: Linear, start: Tensor, reset_state: Tensor, along: ScanInputs, scan: Callable
) -> tuple[Tensor, Tensor]:
    """States (B, T, N) and the last of a linear recurrence, in the dtype of its start."""
    turns = {name: turn for name, turn in (("sign", terms.sign), ("phase", terms.phase)) if turn is not None}
    columns = [terms.log_decay, *turns.values(), terms.inflow]
    projected = torch.cat([x.expand(*terms.inflow.shape[:2], -1) for x in columns], -1)
    states, _, end = scan(
        along._replace(
            projected=projected,  # of float64 where a phase is, which only one backend takes
            parameters=projected.new_empty(0),
            initial_state=start.to(projected.dtype),
            reset_state=reset_state.to(projected.dtype),
            cell=cell_of(":turned=".join(["linear", *turns])),
            backend="torch" if projected.dtype == torch.float64 else along.backend,
        )
    )
    return states.to(start.dtype), end.to(start.dtype)


def _primal(x: Tensor) -> Tensor:
    return unpack_dual(x).primal


def _change(x: Tensor) -> Tensor:
    primal, change = unpack_dual(x)
    return torch.zeros_like(primal) if change is None else change
