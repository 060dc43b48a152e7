"""The scan in operations that torch itself differentiates and maps, in either mode and as often as wanted.

B batch, T time, D width of h, E log-sums. It is for torch.func and forward mode. The sequence is cut into sqrt(T)
chunks that are walked side by side: what the tokens of a chunk up to each one do to a state is a pair (a, b).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import NOTHING_SEEN, Convex, Linear, carry_dtype, complex_product
from .dense_recurrence import dense_block
from .matrix_recurrence import matrix_forward
from .scan_blocks import ScanInputs


def plain_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.scan`."""
    cell, D, parameters, dtype = inputs.cell, inputs.D, inputs.parameters, inputs.initial_state.dtype
    if cell.has_matrices:
        return matrix_forward(inputs)
    x = inputs.tokens()
    start_h, start_L = inputs.initial_state.tensor_split([D], -1)
    reset_h, reset_L = inputs.reset_state.tensor_split([D])
    if cell.system is not None:
        reset, padding = (None if mask is None else mask.T[..., None] for mask in inputs[4:6])
        states, final_state = dense_block(cell, x.transpose(0, 1), start_h, reset_h, reset, padding)
        return states.transpose(0, 1).to(inputs.projected.dtype), x[..., :0], final_state
    L = before = x[..., :0]
    if start_L.shape[-1]:
        terms = cell.log_sum_gates(x, parameters)
        L = _solve(inputs, *terms, LOGARITHMS, start_L, reset_L).to(dtype)
        before = inputs.before(L, start_L, reset_L)
    h = _solve(inputs, *_decay_and_inflow(cell.gates(x, parameters, before)), start_h, reset_h).to(dtype)
    outputs, states = h, torch.cat([h, L], -1)
    if cell.reads_out:
        outputs = cell.read_out(x, parameters, inputs.before(states, inputs.initial_state, inputs.reset_state))
        if inputs.padding_mask is not None:
            outputs = torch.where(inputs.padding_mask[..., None], h, outputs)
    return outputs.to(inputs.projected.dtype), states if cell.reads_out else L, states[:, -1]


def _log_of_sum(x: Tensor, y: Tensor) -> Tensor:
    """log(exp(x) + exp(y)), which torch.logaddexp has no second derivative of where one is NOTHING_SEEN."""
    larger = torch.maximum(x, y).detach()
    return larger + torch.log(torch.exp(x - larger) + torch.exp(y - larger))


class Numbers(NamedTuple):
    """What a recurrence x = a * x + b is of: `one` and `zero` are the a and the b that change nothing."""

    times: Callable[[Tensor, Tensor], Tensor]
    plus: Callable[[Tensor, Tensor], Tensor]
    one: float | Tensor
    zero: float


REALS = Numbers(torch.mul, torch.add, 1.0, 0.0)
LOGARITHMS = Numbers(torch.add, _log_of_sum, 0.0, NOTHING_SEEN)


def _decay_and_inflow(terms: Convex | Linear) -> tuple[Tensor, Tensor, Numbers]:
    dtype = carry_dtype(terms[0].device)
    if isinstance(terms, Convex):
        odds = terms.log_odds.to(dtype)
        return torch.sigmoid(-odds), torch.sigmoid(odds) * terms.candidate, REALS
    decay = terms.log_decay.to(dtype).exp()
    if terms.phase is None:
        return decay if terms.sign is None else terms.sign * decay, terms.inflow, REALS
    cosine, sine = terms.phase.to(dtype).cos(), terms.phase.to(dtype).sin()
    one = torch.cat([torch.ones_like(cosine), torch.zeros_like(sine)], -1)
    return torch.cat([decay * cosine, decay * sine], -1), terms.inflow, REALS._replace(times=complex_product, one=one)


def _solve(inputs: ScanInputs, a: Tensor, b: Tensor, numbers: Numbers, start: Tensor, reset_state: Tensor) -> Tensor:
    """x (B, T, N) of x[t] = a[t] * x[t-1] + b[t], from `start` (B, N)."""
    times, plus, one, zero = numbers
    (B, T, _), N, dtype = inputs.projected.shape, start.shape[-1], carry_dtype(start.device)
    a, b = (x.to(dtype).expand(B, T, N) for x in (a, b))
    if inputs.padding_mask is not None:
        padding = inputs.padding_mask[..., None]
        a, b = torch.where(padding, one, a), torch.where(padding, zero, b)
    if inputs.reset_mask is not None:
        reset = inputs.reset_mask[..., None]
        b = torch.where(reset, plus(times(a, reset_state.to(dtype)), b), b)
        a = torch.where(reset, zero, a)
    length = math.isqrt(T)
    chunks = (F.pad(x, (0, 0, 0, -T % length)).unflatten(1, (-1, length)).unbind(2) for x in (a, b))
    (a, *later_a), (b, *later_b) = chunks  # of one token of each chunk, (B, chunks, N)
    rows = [(a, b)]
    for a, b in zip(later_a, later_b):
        rows.append((times(a, rows[-1][0]), plus(times(a, rows[-1][1]), b)))
    a, b = (torch.stack(x, 2) for x in zip(*rows))
    starts = [start.to(dtype)]
    for chunk_a, chunk_b in zip(a[:, :-1, -1].unbind(1), b[:, :-1, -1].unbind(1)):
        starts.append(plus(times(chunk_a, starts[-1]), chunk_b))
    return plus(times(a, torch.stack(starts, 1)[:, :, None]), b).flatten(1, 2)[:, :T]
