"""The scan of any cell on any backend: gates by torch, a block of time at a go, around the backend's `solve`.

n tokens of a block, B batch, D width of h, E log-sums. A block is time-major, (n, B, ...), and small enough to stay in
cache between its gates and its recurrence. The backward pass computes the gates again. Their derivative is the cell's
own where it has one, else autograd of what the cell gives, which is as exact: of (log a, b), never of a.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Kernels
from .cells import NOTHING_SEEN, Cell, Convex, Linear, LogSum
from .dense_recurrence import dense_block


class ScanInputs(NamedTuple):
    """What a scan computes from; B batch, T time, D width of h, E log-sums, S = D + E.

    Attributes:
        projected: (B, T, width).
        parameters: (P, channels), those of the cell; (0,) where it has none.
        initial_state, reset_state: (B, S) and (S,), in float32, or float64 for float64.
        reset_mask, padding_mask: (B, T) bool.
        cell: the recurrence.
        backend: of `backends.BACKENDS`.
    """

    projected: Tensor
    parameters: Tensor
    initial_state: Tensor
    reset_state: Tensor
    reset_mask: Tensor | None
    padding_mask: Tensor | None
    cell: Cell
    backend: str

    @property
    def D(self) -> int:
        return self.cell.state_width(self.projected.shape[-1])

    def tokens(self) -> Tensor:
        """`projected` in the dtype of the state, zero where padding: whatever is there, its gradient is zero."""
        tokens = self.projected.to(self.initial_state.dtype)
        return tokens if self.padding_mask is None else tokens.masked_fill(self.padding_mask[..., None], 0)

    def before(self, after: Tensor, start: Tensor, reset_state: Tensor) -> Tensor:
        """(B, T, N), the state before each token, from the states `after` them and `start` (B, N) before them all."""
        before = torch.cat([start[:, None], after], 1)[:, :-1]
        return before if self.reset_mask is None else torch.where(self.reset_mask[..., None], reset_state, before)


class Block(NamedTuple):
    """Tokens start..stop: x (n, B, width), zero where padding; masks (n, B, 1)."""

    start: int
    stop: int
    x: Tensor
    reset: Tensor | None
    padding: Tensor | None


def blocks(inputs: ScanInputs, chosen: Kernels) -> list[tuple[int, int]]:
    """(start, stop) of the blocks that cover T."""
    B, T, _ = inputs.projected.shape
    length = T if chosen.block_elements is None else max(1, chosen.block_elements // max(1, B * inputs.D))
    return [(start, min(start + length, T)) for start in range(0, T, length)]


def time_major(x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """(stop - start, B, ...) of x (B, T, ...), a copy that may be written to."""
    return x[:, start:stop].transpose(0, 1).to(dtype, memory_format=torch.contiguous_format, copy=True)


def load(inputs: ScanInputs, start: int, stop: int) -> Block:
    x = time_major(inputs.projected, start, stop, inputs.initial_state.dtype)
    reset, padding = (
        None if mask is None else time_major(mask[..., None], start, stop, torch.bool)
        for mask in (inputs.reset_mask, inputs.padding_mask)
    )
    if padding is not None:
        x.masked_fill_(padding, 0)  # whatever is there, its gradient is zero
    return Block(start, stop, x, reset, padding)


def carry_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def forward(inputs: ScanInputs, chosen: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    """(states, log_sums, final_state) of `operators.scan`."""
    cell, D = inputs.cell, inputs.D
    if cell.spec in chosen.fused:
        return _fused_forward(inputs, chosen)
    B, T, _ = inputs.projected.shape
    dtype = carry_dtype(inputs.projected.device)
    h, L = inputs.initial_state.to(dtype).tensor_split([D], -1)
    states = inputs.projected.new_empty(B, T, D)
    log_sums = inputs.initial_state.new_empty(B, T, L.shape[-1])
    for start, stop in blocks(inputs, chosen):
        block = load(inputs, start, stop)
        if cell.system is not None:
            block_states, h = dense_block(cell, block.x, h, inputs.reset_state, block.reset, block.padding)
        else:
            before, after = _log_sums(block, inputs, chosen, L)
            L = after[-1] if L.shape[-1] else L
            log_sums[:, start:stop] = after.transpose(0, 1)
            terms = cell.gates(block.x, inputs.parameters, before.to(block.x.dtype))
            block_states, h = _solve(terms, block, inputs.reset_state[:D], h, chosen.solve)
        states[:, start:stop] = block_states.transpose(0, 1)
    return states, log_sums, torch.cat([h, L], -1).to(inputs.initial_state.dtype)


def backward(
    inputs: ScanInputs,
    chosen: Kernels,
    states: Tensor,
    log_sums: Tensor,
    d_states: Tensor,
    d_log_sums: Tensor,
    d_final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, parameters, initial_state and reset_state."""
    cell, D = inputs.cell, inputs.D
    if cell.spec in chosen.fused:
        return _fused_backward(inputs, chosen, states, log_sums, d_states, d_log_sums, d_final_state)
    dtype = carry_dtype(inputs.projected.device)
    d_projected = torch.empty(inputs.projected.shape, dtype=inputs.projected.dtype, device=inputs.projected.device)
    d_parameters = torch.zeros_like(inputs.parameters, dtype=dtype)
    d_reset_state = torch.zeros_like(inputs.reset_state, dtype=dtype)
    d_reset_h, d_reset_L = d_reset_state.tensor_split([D])
    d_h, d_L = d_final_state.to(dtype).tensor_split([D], -1)
    start_h, start_L = inputs.initial_state.tensor_split([D], -1)
    reset_h, reset_L = inputs.reset_state.tensor_split([D])
    for start, stop in reversed(blocks(inputs, chosen)):
        block = load(inputs, start, stop)
        upstream = time_major(d_states, start, stop, block.x.dtype)
        if cell.system is not None:
            carry = (start_h if start == 0 else states[:, start - 1]).to(dtype)
            solve = functools.partial(dense_block, cell, reset=block.reset, padding=block.padding)
            _, pull_back = derivative(solve, block.x, carry, reset_h)
            d_x, d_h, d_r = pull_back(upstream, d_h)
            d_reset_h += d_r
        else:
            L = _before(log_sums, start_L, reset_L, block)
            terms, pull_back = _gates_and_derivative(cell, block.x, inputs.parameters, L)
            h = _before(states, start_h, reset_h, block)
            d_terms, d_h = _solve_backward(terms, block, h, upstream, d_h, d_reset_h, chosen.solve)
            d_x, d_p, d_before = pull_back(*d_terms)
            if L.shape[-1]:
                ups = time_major(d_log_sums, start, stop, L.dtype)
                after = time_major(log_sums, start, stop, dtype)
                (d_more, d_q), d_L = _log_sums_backward(
                    block, inputs, L, after, ups, d_before, d_L, d_reset_L, chosen.solve
                )
                d_x, d_p = d_x + d_more, d_p + d_q
            if d_p is not None:
                d_parameters += d_p
        d_projected[:, start:stop] = _masked(d_x, block.padding, 0).transpose(0, 1)
    return (
        d_projected,
        d_parameters.to(inputs.parameters.dtype),
        torch.cat([d_h, d_L], -1).to(inputs.initial_state.dtype),
        d_reset_state.to(inputs.reset_state.dtype),
    )


def _fused_forward(inputs: ScanInputs, chosen: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    D = inputs.D
    if not inputs.cell.log_sums(D):
        states, h = chosen.forward(inputs, None)
        return states, h.new_empty(*states.shape[:2], 0), h
    before, after = _log_sums(_without_tokens(inputs), inputs, chosen, inputs.initial_state[:, D:].double())
    states, h = chosen.forward(inputs, before.transpose(0, 1))
    log_sums = after.transpose(0, 1).to(h.dtype, memory_format=torch.contiguous_format)
    return states, log_sums, torch.cat([h, log_sums[:, -1]], -1)


def _fused_backward(inputs, chosen, states, log_sums, d_states, d_log_sums, d_final_state):
    if not inputs.cell.log_sums(inputs.D):
        return chosen.backward(inputs, None, states, d_states, d_final_state)
    D, block = inputs.D, _without_tokens(inputs)
    reset_L = inputs.reset_state[D:]
    before = _before(log_sums, inputs.initial_state[:, D:], reset_L, block)
    d_x, d_p, d_h, d_reset_h = chosen.backward(inputs, before.transpose(0, 1), states, d_states, d_final_state[:, :D])
    d_L, d_reset_L = d_final_state[:, D:].double(), torch.zeros_like(reset_L, dtype=torch.float64)
    after, upstream = (
        time_major(log_sums, 0, len(block.x), d_L.dtype),
        time_major(d_log_sums, 0, len(block.x), d_h.dtype),
    )
    zero = torch.zeros_like(before)
    _, d_L = _log_sums_backward(block, inputs, before, after, upstream, zero, d_L, d_reset_L, chosen.solve)
    return d_x, d_p, torch.cat([d_h, d_L.to(d_h.dtype)], -1), torch.cat([d_reset_h, d_reset_L.to(d_h.dtype)])


def _without_tokens(inputs: ScanInputs) -> Block:
    """All of T with its masks, for log-sums that do not depend on what the tokens are: those of the fused cells."""
    B, T, _ = inputs.projected.shape
    return load(inputs._replace(projected=inputs.initial_state.new_empty(B, T, 0)), 0, T)


def derivative(function: Callable, *arguments: Tensor) -> tuple[Any, Callable]:
    """The NamedTuple that function(*arguments) is, and the map of its fields' gradients to the arguments'."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    # Within an operator torch does not record what autograd needs, unless its dispatcher is told to.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.AutogradCPU):
        excluded = excluded.remove(key)
    recording = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with recording, torch.enable_grad():
        outputs = function(*leaves)

    def pull_back(*d_outputs: Tensor) -> tuple[Tensor, ...]:
        pairs = [(y, d_y.to(y.dtype)) for y, d_y in zip(outputs, d_outputs) if d_y is not None and y.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, leaves))
        roots, gradients = zip(*pairs)
        return torch.autograd.grad(roots, leaves, gradients, materialize_grads=True)

    return outputs._make(y if y is None else y.detach() for y in outputs), pull_back


def _gates_and_derivative(cell: Cell, x: Tensor, parameters: Tensor, log_sums: Tensor) -> tuple[Any, Callable]:
    if type(cell).gates_backward is Cell.gates_backward:
        return derivative(cell.gates, x, parameters, log_sums)
    return cell.gates(x, parameters, log_sums), lambda *d_terms: (cell.gates_backward(x, *d_terms), None, None)


def _before(states: Tensor, start: Tensor, reset_state: Tensor, block: Block) -> Tensor:
    """(n, B, D), the state before each token of a block, from the states (B, T, D) after them."""
    before = torch.empty(*block.x.shape[:2], states.shape[-1], dtype=start.dtype, device=states.device)
    before[0] = start if block.start == 0 else states[:, block.start - 1]
    before[1:] = states[:, block.start : block.stop - 1].transpose(0, 1)
    return before if block.reset is None else torch.where(block.reset, reset_state, before)


def _masked(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """x with a value where the mask is True."""
    return x if mask is None else torch.where(mask, value, x)


# The recurrence of h, from the gates. `solve` knows positive a alone: where a token turns h, by a sign or as a complex
# number, the block is solved in a frame that turns along.


class Turn(NamedTuple):
    """A sign (sine None), or the cosine and sine by which complex numbers, [real | imaginary], are turned."""

    cosine: Tensor
    sine: Tensor | None

    def __call__(self, x: Tensor, back: bool = False) -> Tensor:
        if self.sine is None:
            return self.cosine * x
        real, imaginary = x.chunk(2, -1)
        sine = -self.sine if back else self.sine
        return torch.cat([real * self.cosine - imaginary * sine, real * sine + imaginary * self.cosine], -1)


class Turns(NamedTuple):
    """How each token turns h; and how h has turned since the start of the block, after each token and at its end."""

    each: Turn
    frame: Turn
    end: Turn


def _turns(terms: Convex | Linear, block: Block) -> Turns | None:
    (n, B), dtype = block.x.shape[:2], carry_dtype(block.x.device)
    if isinstance(terms, Convex) or (terms.sign is None and terms.phase is None):
        return None
    if terms.sign is not None:
        sign = _masked(terms.sign, block.padding, 1).expand(n, B, -1)
        signs = sign.cumprod(0)
        return Turns(Turn(sign, None), Turn(signs, None), Turn(signs[-1].to(dtype), None))
    assert terms.phase is not None
    phase = _masked(terms.phase, block.padding, 0)
    phase = phase.expand(n, *phase.shape[1:]) if phase.dim() == 3 else phase.expand(n, 1, -1)
    angle = phase.to(dtype).cumsum(0)  # float32 would keep few digits of many turns
    end = Turn(angle[-1].cos(), angle[-1].sin())
    each, frame = (Turn(x.cos().to(block.x.dtype), x.sin().to(block.x.dtype)) for x in (phase, angle))
    return Turns(each, frame, end)


def _share(terms: Convex | Linear, block: Block) -> Tensor:
    """share (n, B, D) of `scan_torch.solve`, a = share - floor(share), without masks. Never zero where 1 - a is."""
    tiny = torch.finfo(block.x.dtype).tiny
    if isinstance(terms, Convex):
        share = terms.log_odds.abs().neg_().sigmoid_().clamp_(min=tiny)
        return torch.copysign(share, terms.log_odds, out=share)
    share = torch.where(
        terms.log_decay < -math.log(2), terms.log_decay.exp(), terms.log_decay.expm1().clamp(max=-tiny)
    )
    if terms.phase is not None:
        share = torch.cat([share, share], -1)
    return share.expand(*block.x.shape[:2], -1)


def _solve(
    terms: Convex | Linear, block: Block, reset_state: Tensor, carry: Tensor, solve: Callable
) -> tuple[Tensor, Tensor]:
    """h (n, B, D) of a block that starts from `carry` (B, D), and the last of it in the dtype of `carry`."""
    share, turns = _share(terms, block), _turns(terms, block)
    if isinstance(terms, Convex):
        inflow = torch.sigmoid(terms.log_odds).mul_(terms.candidate)
    else:
        inflow = terms.inflow
    inflow = _masked(inflow, block.padding, 0).expand(share.shape)
    share = _masked(share, block.padding, -torch.finfo(share.dtype).tiny)
    if block.reset is not None:
        state = (share - share.floor()) * (reset_state if turns is None else turns.each(reset_state))
        inflow = torch.where(block.reset, inflow + state, inflow)
        share = torch.where(block.reset, 0, share)
    if turns is None:
        return solve(share, inflow, carry)
    states, carry = solve(share, turns.frame(inflow, back=True), carry)
    return turns.frame(states), turns.end(carry)


def _solve_backward(
    terms: Convex | Linear,
    block: Block,
    before: Tensor,
    upstream: Tensor,
    carry: Tensor,
    d_reset_state: Tensor,
    solve: Callable,
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of the terms, and of the h that the block starts from; d_reset_state is added to.

    With d[t] = dL/dh[t] in total and e[t] = a[t] * d[t] the part that flows on to h[t-1]:
    e[t] = a[t] * (upstream[t] + e[t+1]), a linear recurrence from the right. `carry` is e of the block on the right.
    """
    share, turns = _share(terms, block), _turns(terms, block)
    share = _masked(share, block.padding, -torch.finfo(share.dtype).tiny)
    a = share - share.floor()
    d = upstream if turns is None else turns.frame(upstream, back=True)
    carry = carry if turns is None else turns.end(carry, back=True)
    flow, start = solve(_masked(share, block.reset, 0), _masked(a * d, block.reset, 0), carry, reverse=True)
    d = d.clone()
    d[:-1] += flow[1:]
    d[-1] += carry
    d = d if turns is None else turns.frame(d)
    if block.reset is not None:
        to_reset_state = a * d if turns is None else turns.each(a * d, back=True)
        d_reset_state += (to_reset_state * block.reset).sum((0, 1))
    d = _masked(d, block.padding, 0)
    if isinstance(terms, Convex):
        d_candidate = torch.sigmoid(terms.log_odds).mul_(d)
        return [before.neg_().add_(terms.candidate).mul_(a).mul_(d_candidate), d_candidate], start
    kept = a * (before if turns is None else turns.each(before))  # of h before the token
    d_log_decay, d_phase = kept * d, None
    if terms.phase is not None:
        (real, imaginary), (d_real, d_imaginary) = kept.chunk(2, -1), d.chunk(2, -1)
        d_log_decay = torch.add(*d_log_decay.chunk(2, -1))
        d_phase = (real * d_imaginary - imaginary * d_real).sum_to_size(terms.phase.shape)
    return [d_log_decay.sum_to_size(terms.log_decay.shape), d.sum_to_size(terms.inflow.shape), None, d_phase], start


# The recurrence of L: the same with additions for products, and logaddexp for additions.


def _log_sum_terms(terms: LogSum, block: Block, like: Tensor) -> tuple[Tensor, Tensor]:
    """log_decay and score (n, B, E), where padding adds nothing."""
    # Copies: what solves them writes over them.
    log_decay, score = (term.to(like.dtype, copy=True).expand(*block.x.shape[:2], like.shape[-1]) for term in terms)
    return _masked(log_decay, block.padding, 0), _masked(score, block.padding, NOTHING_SEEN)


def _log_sums(block: Block, inputs: ScanInputs, chosen: Kernels, carry: Tensor) -> tuple[Tensor, Tensor]:
    """L before and after each token of a block that starts from `carry` (B, E)."""
    if not carry.shape[-1]:
        empty = carry.new_empty(*block.x.shape[:2], 0)
        return empty, empty
    log_decay, score = _log_sum_terms(inputs.cell.log_sum_gates(block.x, inputs.parameters), block, carry)
    reset_state = inputs.reset_state[inputs.D :].to(carry.dtype)
    if block.reset is not None:
        score = torch.where(block.reset, torch.logaddexp(reset_state + log_decay, score), score)
        log_decay = torch.where(block.reset, -math.inf, log_decay)
    after = chosen.log_sum(log_decay.contiguous(), score.contiguous(), carry)
    before = torch.cat([carry[None], after[:-1]])
    return before if block.reset is None else torch.where(block.reset, reset_state, before), after


def _log_sums_backward(
    block: Block,
    inputs: ScanInputs,
    before: Tensor,
    after: Tensor,
    upstream: Tensor,
    d_before: Tensor,
    carry: Tensor,
    d_reset_state: Tensor,
    solve: Callable,
) -> tuple[Any, Tensor]:
    """What the log-sums add to the gradients of projected and parameters, and the gradient of the L that the block
    starts from; d_reset_state is added to. As `_solve_backward`, with d_before (n, B, E) what the gates make of L."""
    terms, pull_back = derivative(inputs.cell.log_sum_gates, block.x, inputs.parameters)
    log_decay, score = _log_sum_terms(terms, block, after)
    # A difference of large numbers, which float32 can hold.
    log_kept = (before.to(after.dtype) + log_decay - after).clamp(max=0).to(before.dtype)
    kept = log_kept.exp()
    share = torch.where(log_kept < -math.log(2), kept, log_kept.expm1().clamp(max=-torch.finfo(kept.dtype).tiny))
    inflow = torch.addcmul(d_before, kept, upstream)
    flow, start = solve(_masked(share, block.reset, 0), _masked(inflow, block.reset, 0), carry, reverse=True)
    d = upstream.clone()
    d[:-1] += flow[1:]
    d[-1] += carry
    if block.reset is not None:
        d_reset_state += ((kept * d + d_before) * block.reset).sum((0, 1))
    d_score = (score - after).to(d.dtype).exp() * d
    d_log_decay, d_score = _masked(kept * d, block.padding, 0), _masked(d_score, block.padding, 0)
    shapes = [term.shape for term in terms]
    return pull_back(d_log_decay.sum_to_size(shapes[0]), d_score.sum_to_size(shapes[1])), start
