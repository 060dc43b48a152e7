"""The scan of any cell on any backend: gates by torch, a block of time at a go, around the backend's `solve`.

n tokens of a block, B batch, D width of h, E log-sums. A block is time-major, (n, B, ...), and small enough to stay in
cache between its gates and its recurrence. The backward pass computes each block again, but for its recurrences: their
states are kept, and their derivative is by hand. That of the gates is the cell's where it has one, else autograd's, of
(log a, b) and never of a, which is as exact.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import Kernels
from .cells import NOTHING_SEEN, Cell, Convex, Linear, LogSum, carry_dtype
from .dense_recurrence import dense_block
from .matrix_recurrence import block_length, matrix_block
from .scan_torch import log_sum


class ScanInputs(NamedTuple):
    """What a scan computes from; B batch, T time, D width of h, E log-sums, S = D + E.

    Attributes:
        projected: (B, T, width).
        parameters: (P, channels), those of the cell; (0,) where it has none.
        initial_state, reset_state: (B, S) and (S,), in float32, or float64 for float64.
        reset_mask, padding_mask: (B, T) bool.
        cell: the recurrence.
        backend: of `configuration_minrnn.BACKENDS`.
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

    def blocks(self, block_elements: int | None) -> list[tuple[int, int]]:
        """(start, stop) of the blocks that cover T; block_elements: of state in one, None for all of T."""
        (B, T, _), D = self.projected.shape, self.D
        length = T if block_elements is None else max(1, block_elements // max(1, B * D))
        length = block_length(B, D) if self.cell.has_matrices else length
        return [(start, min(start + length, T)) for start in range(0, T, length)]

    def block(self, start: int, stop: int) -> "Block":
        x = time_major(self.projected, start, stop, self.initial_state.dtype)
        reset, padding = (x if x is None else time_major(x[..., None], start, stop, torch.bool) for x in self[4:6])
        return Block(_masked(x, padding, 0), reset, padding)  # whatever padding holds, its gradient is zero


class Block(NamedTuple):
    """Some tokens: x (n, B, width), zero where padding; masks (n, B, 1)."""

    x: Tensor
    reset: Tensor | None
    padding: Tensor | None

    def before(self, after: Tensor, start: Tensor, reset_state: Tensor) -> Tensor:
        """(n, B, N), the state before each token, from the states `after` them and `start` (B, N) before them all."""
        before = torch.cat([start[None].to(after.dtype), after[:-1]])
        return before if self.reset is None else torch.where(self.reset, reset_state.to(after.dtype), before)


class ScanOutputs(NamedTuple):
    """outputs (B, T, D), final_state (B, S), and rest, what outputs do not hold of the states, as `Cell.states_of`; of
    matrices all states, but only of the latest tokens, as many as were asked for."""

    outputs: Tensor
    rest: Tensor
    final_state: Tensor

    def all_states(self) -> Tensor:
        """(B, T, S), after each token; of matrices after the latest."""
        missing = self.final_state.shape[-1] - self.rest.shape[-1]
        if missing == 0:
            return self.rest
        return torch.cat([self.outputs[..., :missing], self.rest], -1) if self.rest.shape[-1] else self.outputs


def time_major(x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """(stop - start, B, ...) of x (B, T, ...), a copy that may be written to."""
    return x[:, start:stop].transpose(0, 1).to(dtype, memory_format=torch.contiguous_format, copy=True)


def empty_outputs(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `forward` returns."""
    (B, T, _), S = inputs.projected.shape, inputs.reset_state.shape[-1]  # `len` would fix it for a compiler
    if inputs.cell.has_matrices:
        rest = inputs.initial_state.new_empty(B, 0, S)
    else:
        rest = inputs.initial_state.new_empty(B, T, S if inputs.cell.reads_out else S - inputs.D)
    return inputs.projected.new_empty(B, T, inputs.D), rest, inputs.initial_state.new_empty(B, S)


def scan_block(
    cell: Cell,
    block: Block,
    solver: Callable,
    x: Tensor,
    parameters: Tensor,
    reset_state: Tensor,
    state: Tensor,
) -> ScanOutputs:
    """Of a block, time-major, after `state` (B, S); the final state is in the dtype of `state`.

    solver: (terms, block, reset_state, start) -> (states after each token, the last of them in the dtype of `start`),
        for `terms` of h and of L.
    """
    if cell.has_matrices:
        return ScanOutputs(*matrix_block(cell, x, parameters, state, reset_state, block.reset, block.padding))
    D = cell.state_width(x.shape[-1])
    (h, L), (reset_h, reset_L) = state.tensor_split([D], -1), reset_state.tensor_split([D])
    log_sums = before = x.new_empty(*x.shape[:2], 0)  # as a part of x it would have a gradient as large as x
    if cell.system is not None:
        states, h = dense_block(cell, x, h, reset_h, block.reset, block.padding)
        return ScanOutputs(states, log_sums, h)
    if L.shape[-1]:
        log_sums, last_L = solver(cell.log_sum_gates(x, parameters), block, reset_L, L)
        before, L = block.before(log_sums.to(x.dtype), L, reset_L), last_L
    states, h = solver(cell.gates(x, parameters, before), block, reset_h, h)
    if not cell.reads_out:
        return ScanOutputs(states, log_sums, torch.cat([h, L], -1))
    rest = torch.cat([states, log_sums], -1).to(x.dtype)
    outputs = cell.read_out(x, parameters, block.before(rest, state, reset_state))
    outputs = outputs if block.padding is None else torch.where(block.padding, rest[..., :D], outputs)
    return ScanOutputs(outputs, rest, torch.cat([h, L], -1))


def forward(inputs: ScanInputs, chosen: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, rest, final_state) of `operators.scan`."""
    if chosen.fuses(inputs):
        return chosen.forward(inputs)
    outputs, rest, final_state = empty_outputs(inputs)
    state, solver = inputs.initial_state.to(carry_dtype(rest.device)), functools.partial(_solve, solve=chosen.solve)
    for start, stop in inputs.blocks(chosen.block_elements):
        block = inputs.block(start, stop)
        given = block.x, inputs.parameters, inputs.reset_state, state
        *scanned, state = scan_block(inputs.cell, block, solver, *given)
        outputs[:, start:stop], rest[:, start:stop] = (x.transpose(0, 1) for x in scanned)
    return outputs, rest, final_state.copy_(state)


def backward(
    inputs: ScanInputs,
    chosen: Kernels,
    outputs: Tensor,
    rest: Tensor,
    d_outputs: Tensor,
    d_rest: Tensor,
    d_final_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, parameters, initial_state and reset_state."""
    if chosen.fuses(inputs):
        return chosen.backward(inputs, outputs, rest, d_outputs, d_rest, d_final_state)
    cell, dtype, like = inputs.cell, carry_dtype(inputs.projected.device), inputs.initial_state.dtype
    states, bounds = cell.states_of(outputs, rest), inputs.blocks(chosen.block_elements)
    d_projected = torch.empty(inputs.projected.shape, dtype=inputs.projected.dtype, device=inputs.projected.device)
    d_parameters, d_reset_state = (torch.zeros_like(x, dtype=dtype) for x in (inputs.parameters, inputs.reset_state))
    d_state = d_final_state.to(dtype)
    for (start, stop), state in reversed(list(zip(bounds, _starts(inputs, bounds, states)))):
        block = inputs.block(start, stop)
        known = (x[:, start:stop].transpose(0, 1).to(like) for x in states)
        upstream = (time_major(d, start, stop, like) for d in (d_outputs, d_rest))
        if cell.gates_backward is not None:
            terms = cell.gates(block.x, inputs.parameters, block.x)
            before = block.before(next(known), state, inputs.reset_state)
            d_terms, d_r, d_state = _solve_backward(terms, block, before, next(upstream), d_state, chosen.solve)
            parts = cell.gates_backward(block.x, terms, *d_terms)
        else:
            solver = functools.partial(_Known.solve, () if cell.has_matrices else list(known), chosen.solve)
            given = block.x, inputs.parameters, inputs.reset_state.to(dtype), state
            _, pull_back = derivative(functools.partial(scan_block, cell, block, solver), *given)
            *parts, d_p, d_r, d_state = pull_back(*upstream, d_state)
            d_parameters += d_p
        d_reset_state += d_r
        parts = [_masked(part, block.padding, 0) for part in parts]
        torch.cat(parts, -1, out=d_projected[:, start:stop].transpose(0, 1))
    return d_projected, d_parameters.to(like), d_state.to(like), d_reset_state.to(like)


def _starts(inputs: ScanInputs, bounds: list[tuple[int, int]], states: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The state before each block, from the h and L after each token. Matrices are not kept: they are computed."""
    starts = [inputs.initial_state.to(carry_dtype(inputs.initial_state.device))]
    for start, stop in bounds[:-1]:
        if inputs.cell.has_matrices:
            block = inputs.block(start, stop)
            given = block.x, inputs.parameters, inputs.reset_state, starts[-1]
            starts.append(scan_block(inputs.cell, block, NotImplemented, *given).final_state)
        else:
            starts.append(torch.cat([x[:, stop - 1] for x in states], -1).to(starts[0].dtype))
    return starts


def derivative(function: Callable, *arguments: Tensor) -> tuple[list[Tensor], Callable]:
    """function(*arguments), a tuple of tensors, and the map of their gradients to those of the arguments."""
    leaves, keys = [x.detach().requires_grad_() for x in arguments], torch._C.DispatchKey
    # Within an operator torch does not record what autograd needs, unless its dispatcher is told to.
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(keys.AutogradOther).remove(keys.AutogradCPU)
    recording = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with recording, torch.enable_grad():
        outputs = function(*leaves)

    def pull_back(*d_outputs: Tensor) -> tuple[Tensor, ...]:
        roots, gradients = zip(*((y, d.to(y.dtype)) for y, d in zip(outputs, d_outputs) if y.requires_grad))
        return torch.autograd.grad(roots, leaves, gradients, materialize_grads=True)

    return [y.detach() for y in outputs], pull_back


def _masked(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """x with a value where the mask is True."""
    return x if mask is None else torch.where(mask, value, x)


# The recurrence of h, from the gates. `solve` knows positive a alone: where a token turns h, by a sign or as a complex
# number, the block is solved in a frame that turns along.


def _turns(terms: Convex | Linear, block: Block) -> tuple[Convex | Linear, ...]:
    """What turns h as each token does; as all since the start of the block up to each; and as all of them do."""
    if isinstance(terms, Linear) and terms.sign is not None:
        sign = _masked(terms.sign, block.padding, 1).expand(*block.x.shape[:2], -1)
        signs = sign.cumprod(0)
        return terms._replace(sign=sign), terms._replace(sign=signs), terms._replace(sign=signs[-1])
    if isinstance(terms, Linear) and terms.phase is not None:
        phase, n = _masked(terms.phase, block.padding, 0), len(block.x)
        phase = phase.expand(n, *phase.shape[1:]) if phase.dim() == 3 else phase.expand(n, 1, -1)
        angle = phase.to(carry_dtype(phase.device)).cumsum(0)  # float32 would keep few digits of many turns
        return terms._replace(phase=phase), terms._replace(phase=angle), terms._replace(phase=angle[-1])
    return terms, terms, terms


def _share(terms: Convex | Linear, block: Block) -> Tensor:
    """share (n, B, D) of `scan_torch.solve`: a = share - floor(share), 1 - a = ceil(share) - share. Without resets;
    never zero, which is what a reset makes it."""
    tiny = torch.finfo(block.x.dtype).tiny
    if isinstance(terms, Convex):
        share = terms.log_odds.abs().neg_().sigmoid_().clamp_(min=tiny)
        share = torch.copysign(share, terms.log_odds, out=share)
    else:
        kept = terms.log_decay
        share = torch.where(kept < -math.log(2), kept.exp(), kept.expm1().clamp(max=-tiny))
        share = share if terms.phase is None else torch.cat([share, share], -1)
    return _masked(share.expand(*block.x.shape[:2], -1), block.padding, -tiny)


def _kept(share: Tensor) -> Tensor:
    """a of a share."""
    return share - share.floor()


def _solve(
    terms: Convex | Linear | LogSum, block: Block, reset_state: Tensor, carry: Tensor, solve: Callable
) -> tuple[Tensor, Tensor]:
    """h or L (n, B, N) of a block that starts from `carry` (B, N), and the last of it in the dtype of `carry`."""
    if isinstance(terms, LogSum):
        return _log_sums(terms, block, reset_state, carry)
    share, (each, frame, end) = _share(terms, block), _turns(terms, block)
    if isinstance(terms, Convex):
        inflow = share.ceil().sub_(share).mul_(terms.candidate)
    else:
        inflow = terms.inflow
    inflow = _masked(inflow, block.padding, 0).expand(share.shape)
    if block.reset is not None:
        state = _kept(share) * each.turned(reset_state)
        inflow = torch.where(block.reset, inflow + state, inflow)
        share = torch.where(block.reset, 0, share)
    states, carry = solve(share, frame.turned(inflow, back=True), carry)
    return frame.turned(states), end.turned(carry)


class _Known(torch.autograd.Function):
    """`_solve` with its derivative, where the states are known."""

    @staticmethod
    def solve(known, solve, terms, block, reset_state, start):
        """known: h and L after each token of the block."""
        states = known[1] if isinstance(terms, LogSum) else known[0]
        return _Known.apply(solve, type(terms), block, states, reset_state, start, *terms)

    @staticmethod
    def forward(ctx, solve, kind, block, states, reset_state, start, *terms):
        ctx.solve, ctx.kind, ctx.block = solve, kind, block
        ctx.save_for_backward(states, reset_state, start, *terms)
        return states, states[-1].to(start.dtype)

    @staticmethod
    def backward(ctx, d_states, d_last):
        (states, reset_state, start, *terms), block = ctx.saved_tensors, ctx.block
        before = block.before(states, start, reset_state)
        upstream = d_states.clone(memory_format=torch.contiguous_format)
        d_terms, *d_states = _solve_backward(ctx.kind(*terms), block, before, upstream, d_last, ctx.solve)
        d_terms = [None if d is None else d.sum_to_size(x.shape) for d, x in zip(d_terms, terms)]
        return None, None, None, None, *d_states, *d_terms


def _solve_backward(
    terms: Convex | Linear | LogSum, block: Block, before: Tensor, upstream: Tensor, carry: Tensor, solve: Callable
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """The gradients of the terms, of the state that resets return to and of the one before the block, by hand.

    before: the states before each token, overwritten. upstream, carry: the gradients of the states after each from the
    outputs, overwritten, and of the last one from the block on the right.
    """
    if isinstance(terms, LogSum):
        # dL/d(L + log_decay) is a and dL/d score is 1 - a, with these log-odds.
        log_decay, score = _log_sum_terms(terms, block, before)
        gates: Convex | Linear = Convex(score - (before + log_decay), score)
    else:
        gates = terms
    share, (each, frame, end) = _share(gates, block), _turns(gates, block)
    # d, of the states after each token in total: d[t] = upstream[t] + a[t+1] * d[t+1], a recurrence from the right.
    flowing, d = _masked(share, block.reset, 0), frame.turned(upstream, back=True)
    first = last = d[-1] + end.turned(carry, back=True)
    if len(d) > 1:
        d[:-1], first = solve(flowing[1:], d[:-1], last, reverse=True)
    d[-1], d_start = last, _kept(flowing[0].to(carry.dtype)) * first
    d, d_reset_state = frame.turned(d), d_start.new_zeros(d_start.shape[-1])
    if block.reset is not None:
        d_reset_state = (each.turned(_kept(share) * d, back=True) * block.reset).sum((0, 1))
    d = _masked(d, block.padding, 0)
    if isinstance(terms, Linear):
        kept = _kept(share) * each.turned(before)  # of h before each token
        d_decay, d_phase = kept * d, None
        if terms.phase is not None:
            (real, imaginary), (d_real, d_imaginary) = kept.chunk(2, -1), d.chunk(2, -1)
            d_decay, d_phase = torch.add(*d_decay.chunk(2, -1)), real * d_imaginary - imaginary * d_real
        return [d_decay, d, None, d_phase], d_reset_state, d_start
    d_inflow = share.ceil().sub_(share).mul_(d)
    if isinstance(terms, LogSum):
        return [_kept(share) * d, d_inflow], d_reset_state, d_start
    # a * (1 - a) is the slope of sigmoid, to all digits from the smaller of the two.
    slope_of = torch.ops.aten.sigmoid_backward
    return [slope_of(before.neg_().add_(terms.candidate).mul_(d), share.abs()), d_inflow], d_reset_state, d_start


# The recurrence of L: the same with additions for products, and logaddexp for additions.


def _log_sum_terms(terms: LogSum, block: Block, like: Tensor) -> tuple[Tensor, Tensor]:
    """log_decay and score (n, B, E), where padding adds nothing."""
    # Copies: what solves them writes over them.
    log_decay, score = (term.to(like.dtype, copy=True).expand(*block.x.shape[:2], like.shape[-1]) for term in terms)
    return _masked(log_decay, block.padding, 0), _masked(score, block.padding, NOTHING_SEEN)


def _log_sums(terms: LogSum, block: Block, reset_state: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    log_decay, score = _log_sum_terms(terms, block, carry)
    if block.reset is not None:
        score = torch.where(block.reset, torch.logaddexp(reset_state.to(carry.dtype) + log_decay, score), score)
        log_decay = torch.where(block.reset, -math.inf, log_decay)
    states = log_sum(log_decay.contiguous(), score.contiguous(), carry)
    return states, states[-1]
