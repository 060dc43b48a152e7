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

from .cells import NOTHING_SEEN, Convex, Linear, LogSum, carry_dtype, complex_product
from .scan_blocks import Block, ScanInputs, scan_block


def plain_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.scan`."""
    block, dtype = inputs.block(0, inputs.projected.shape[1]), inputs.initial_state.dtype
    start = inputs.initial_state.to(carry_dtype(inputs.initial_state.device))
    scanned = scan_block(inputs.cell, block, _solve, block.x, inputs.parameters, inputs.reset_state, start)
    outputs, rest = (x.transpose(0, 1) for x in scanned[:2])
    return outputs.to(inputs.projected.dtype), rest.to(dtype), scanned.final_state.to(dtype)


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


def _decay_and_inflow(terms: Convex | Linear | LogSum, dtype: torch.dtype) -> tuple[Tensor, Tensor, Numbers]:
    if isinstance(terms, LogSum):
        return *terms, LOGARITHMS
    if isinstance(terms, Convex):
        odds = terms.log_odds.to(dtype)
        return torch.sigmoid(-odds), torch.sigmoid(odds) * terms.candidate, REALS
    decay = terms.log_decay.to(dtype).exp()
    if terms.phase is None:
        return decay if terms.sign is None else terms.sign * decay, terms.inflow, REALS
    cosine, sine = terms.phase.to(dtype).cos(), terms.phase.to(dtype).sin()
    one = torch.cat([torch.ones_like(cosine), torch.zeros_like(sine)], -1)
    return torch.cat([decay * cosine, decay * sine], -1), terms.inflow, REALS._replace(times=complex_product, one=one)


def _solve(terms: Convex | Linear | LogSum, block: Block, reset_state: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, B, N) of x[t] = a[t] * x[t-1] + b[t], from `start` (B, N), and the last."""
    a, b, (times, plus, one, zero) = _decay_and_inflow(terms, start.dtype)
    T = len(block.x)
    a, b = (x.to(start.dtype).expand(T, *start.shape) for x in (a, b))
    if block.padding is not None:
        a, b = torch.where(block.padding, one, a), torch.where(block.padding, zero, b)
    if block.reset is not None:
        b = torch.where(block.reset, plus(times(a, reset_state.to(start.dtype)), b), b)
        a = torch.where(block.reset, zero, a)
    length = math.isqrt(T)
    chunks = (F.pad(x, (0, 0, 0, 0, 0, -T % length)).unflatten(0, (-1, length)).unbind(1) for x in (a, b))
    (a, *later_a), (b, *later_b) = chunks  # of one token of each chunk, (chunks, B, N)
    rows = [(a, b)]
    for a, b in zip(later_a, later_b):
        rows.append((times(a, rows[-1][0]), plus(times(a, rows[-1][1]), b)))
    a, b = (torch.stack(x, 1) for x in zip(*rows))
    starts = [start]
    for chunk_a, chunk_b in zip(a[:-1, -1], b[:-1, -1]):
        starts.append(plus(times(chunk_a, starts[-1]), chunk_b))
    states = plus(times(a, torch.stack(starts)[:, None]), b).flatten(0, 1)[:T]
    return states, states[-1]
