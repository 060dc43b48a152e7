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
from .cells import NOTHING_SEEN, Cell, Convex, Linear, LogSum, carry_dtype
from .dense_recurrence import dense_block
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


def empty_outputs(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what `forward` returns."""
    (B, T, _), S = inputs.projected.shape, inputs.reset_state.shape[-1]  # `len` would fix it for a compiler
    if inputs.cell.has_matrices:
        rest = inputs.initial_state.new_empty(B, 0, S)
    else:
        rest = inputs.initial_state.new_empty(B, T, S if inputs.cell.reads_out else S - inputs.D)
    return inputs.projected.new_empty(B, T, inputs.D), rest, inputs.initial_state.new_empty(B, S)


def forward(inputs: ScanInputs, chosen: Kernels) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, rest, final_state) of `operators.scan`."""
    if chosen.fuses(inputs.cell):
        return chosen.forward(inputs)
    cell, D = inputs.cell, inputs.D
    outputs, rest, final_state = empty_outputs(inputs)
    states, log_sums = cell.states_of(outputs, rest)
    start_h, start_L = inputs.initial_state.tensor_split([D], -1)
    reset_h, reset_L = inputs.reset_state.tensor_split([D])
    h, L = (x.to(carry_dtype(x.device)) for x in (start_h, start_L))
    for start, stop in blocks(inputs, chosen):
        block = load(inputs, start, stop)
        if cell.system is not None:
            block_states, h = dense_block(cell, block.x, h, inputs.reset_state, block.reset, block.padding)
        else:
            if L.shape[-1]:
                after = _log_sums(block, inputs, L)
                log_sums[:, start:stop], L = after.transpose(0, 1), after[-1]
            terms = cell.gates(block.x, inputs.parameters, _before(log_sums, start_L, reset_L, block))
            block_states, h = _solve(terms, block, reset_h, h, chosen.solve)
        states[:, start:stop] = block_states.transpose(0, 1)
        if cell.reads_out:
            before = _before(rest, inputs.initial_state, inputs.reset_state, block)
            read = cell.read_out(block.x, inputs.parameters, before)
            read = read if block.padding is None else torch.where(block.padding, block_states.to(read.dtype), read)
            outputs[:, start:stop] = read.transpose(0, 1)
    return outputs, rest, final_state.copy_(torch.cat([h, L], -1))


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
    if chosen.fuses(inputs.cell):
        return chosen.backward(inputs, outputs, rest, d_outputs, d_rest, d_final_state)
    dtype, like = carry_dtype(inputs.projected.device), inputs.initial_state.dtype
    states = inputs.cell.states_of(outputs, rest)
    d_projected = torch.empty(inputs.projected.shape, dtype=inputs.projected.dtype, device=inputs.projected.device)
    d_parameters, d_reset_state = (torch.zeros_like(x, dtype=dtype) for x in (inputs.parameters, inputs.reset_state))
    carry = d_final_state.to(dtype).tensor_split([inputs.D], -1)
    for start, stop in reversed(blocks(inputs, chosen)):
        block = load(inputs, start, stop)
        upstream = [time_major(d, start, stop, like) for d in (d_outputs, d_rest)]
        d_x, d_p, *carry = _block_backward(block, inputs, states, upstream, carry, d_reset_state, chosen.solve)
        d_parameters += d_p
        d_projected[:, start:stop] = _masked(d_x, block.padding, 0).transpose(0, 1)
    return d_projected, d_parameters.to(like), torch.cat(carry, -1).to(like), d_reset_state.to(like)


def _block_backward(block: Block, inputs: ScanInputs, states, upstream, carry, d_reset_state: Tensor, solve):
    """The gradients of x, of the parameters, and of the h and L that the block starts from.

    states: h and L of all tokens. upstream: the gradients (n, B, ...) of outputs and rest. carry: those of the h and L
    after the block. d_reset_state is added to.
    """
    cell, D, x, parameters = inputs.cell, inputs.D, block.x, inputs.parameters
    starts, resets = inputs.initial_state.tensor_split([D], -1), inputs.reset_state.tensor_split([D])
    h, L = (_before(*of_one, block) for of_one in zip(states, starts, resets))
    (d_h, d_L), (d_reset_h, d_reset_L) = carry, d_reset_state.tensor_split([D])
    if cell.system is not None:
        walk = functools.partial(dense_block, cell, reset=block.reset, padding=block.padding)
        d_x, d_h, d_r = derivative(walk, x, h[0].to(d_h.dtype), resets[0])[1](upstream[0], d_h)
        d_reset_state += d_r
        return d_x, 0, d_h, d_L
    (up_h, up_L), gradients = upstream, []
    if cell.reads_out:
        _, pull_back = derivative(cell.read_out, x, parameters, torch.cat([h, L], -1))
        *d_inputs, d_before = pull_back(_masked(up_h, block.padding, 0))
        gradients.append(d_inputs)
        if block.padding is not None:
            up_L[..., :D] += _masked(up_h, ~block.padding, 0)
        h_first, L_first = _hand_back(d_before, up_L, block, d_reset_state).tensor_split([D], -1)
        up_h, up_L = up_L.tensor_split([D], -1)
    terms, pull_back = _gates_and_derivative(cell, x, parameters, L)
    d_terms, d_h = _solve_backward(terms, block, h, up_h, d_h, d_reset_h, solve)
    *d_inputs, d_before = pull_back(*d_terms)
    gradients.append(d_inputs)
    if L.shape[-1]:
        first = _hand_back(d_before, up_L, block, d_reset_L)
        d_inputs, d_L = _log_sums_backward(block, inputs, L, up_L, d_L, d_reset_L, solve)
        gradients.append(d_inputs)
        d_L = d_L + first
    if cell.reads_out:
        d_h, d_L = d_h + h_first, d_L + L_first
    d_x, d_p = (functools.reduce(torch.add, d) for d in zip(*gradients))
    return d_x, d_p, d_h, d_L


def _hand_back(d_before: Tensor, upstream: Tensor, block: Block, d_reset_state: Tensor) -> Tensor:
    """Add the gradients of the states before each token to those of the states after, `upstream`, and d_reset_state;
    return that of the state before the block."""
    if block.reset is not None:
        d_reset_state += (d_before * block.reset).sum((0, 1))
        d_before = _masked(d_before, block.reset, 0)
    upstream[:-1] += d_before[1:]
    return d_before[0]


def derivative(function: Callable, *arguments: Tensor) -> tuple[Any, Callable]:
    """function(*arguments), a tensor or a NamedTuple, and the map of its gradients to those of the arguments."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    # Within an operator torch does not record what autograd needs, unless its dispatcher is told to.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.AutogradCPU):
        excluded = excluded.remove(key)
    recording = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with recording, torch.enable_grad():
        outputs = function(*leaves)

    many = [outputs] if isinstance(outputs, Tensor) else outputs

    def pull_back(*d_outputs: Tensor) -> tuple[Tensor, ...]:
        pairs = [(y, d_y.to(y.dtype)) for y, d_y in zip(many, d_outputs) if d_y is not None and y.requires_grad]
        if not pairs:
            return tuple(map(torch.zeros_like, leaves))
        roots, gradients = zip(*pairs)
        return torch.autograd.grad(roots, leaves, gradients, materialize_grads=True)

    detached = [y if y is None else y.detach() for y in many]
    return detached[0] if isinstance(outputs, Tensor) else outputs._make(detached), pull_back


def _gates_and_derivative(cell: Cell, x: Tensor, parameters: Tensor, log_sums: Tensor) -> tuple[Any, Callable]:
    if type(cell).gates_backward is Cell.gates_backward:
        return derivative(cell.gates, x, parameters, log_sums)
    no_parameters = torch.zeros_like(parameters)
    return cell.gates(x, parameters, log_sums), lambda *d: (cell.gates_backward(x, *d), no_parameters, None)


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


def _turns(terms: Convex | Linear, block: Block) -> tuple[Linear, Linear, Linear] | None:
    """What turns h as each token does; as all since the start of the block up to each; and as all of them do."""
    if isinstance(terms, Convex) or (terms.sign is None and terms.phase is None):
        return None
    (n, B), dtype = block.x.shape[:2], carry_dtype(block.x.device)
    if terms.sign is not None:
        sign = _masked(terms.sign, block.padding, 1).expand(n, B, -1)
        signs = sign.cumprod(0)
        return terms._replace(sign=sign), terms._replace(sign=signs), terms._replace(sign=signs[-1])
    assert terms.phase is not None
    phase = _masked(terms.phase, block.padding, 0)
    phase = phase.expand(n, *phase.shape[1:]) if phase.dim() == 3 else phase.expand(n, 1, -1)
    angle = phase.to(dtype).cumsum(0)  # float32 would keep few digits of many turns
    return terms._replace(phase=phase), terms._replace(phase=angle), terms._replace(phase=angle[-1])


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


def _flow(share: Tensor, a: Tensor, upstream: Tensor, carry: Tensor, block: Block, solve) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each token in total, and of the one before the block.

    With d[t] = dL/dh[t] in total and e[t] = a[t] * d[t] the part that flows on to h[t-1]:
    e[t] = a[t] * (upstream[t] + e[t+1]), a linear recurrence from the right. `carry` is e of the block on the right.
    """
    share, flow = _masked(share, block.reset, 0), _masked(a * upstream, block.reset, 0)
    flow, start = solve(share, flow, carry, reverse=True)
    d = upstream.clone()
    d[:-1] += flow[1:]
    d[-1] += carry
    return d, start


def _solve(
    terms: Convex | Linear, block: Block, reset_state: Tensor, carry: Tensor, solve: Callable
) -> tuple[Tensor, Tensor]:
    """h (n, B, D) of a block that starts from `carry` (B, D), and the last of it in the dtype of `carry`."""
    share, turns = _share(terms, block), _turns(terms, block)
    if isinstance(terms, Convex):
        inflow = share.ceil().sub_(share).mul_(terms.candidate)
    else:
        inflow = terms.inflow
    inflow = _masked(inflow, block.padding, 0).expand(share.shape)
    if block.reset is not None:
        state = (share - share.floor()) * (reset_state if turns is None else turns[0].turned(reset_state))
        inflow = torch.where(block.reset, inflow + state, inflow)
        share = torch.where(block.reset, 0, share)
    if turns is None:
        return solve(share, inflow, carry)
    _, frame, end = turns
    states, carry = solve(share, frame.turned(inflow, back=True), carry)
    return frame.turned(states), end.turned(carry)


def _solve_backward(
    terms: Convex | Linear,
    block: Block,
    before: Tensor,
    upstream: Tensor,
    carry: Tensor,
    d_reset_state: Tensor,
    solve: Callable,
) -> tuple[list[Tensor | None], Tensor]:
    """The gradients of the terms, and of the h that the block starts from; d_reset_state is added to."""
    share, turns = _share(terms, block), _turns(terms, block)
    a = share - share.floor()
    if turns is None:
        d, start = _flow(share, a, upstream, carry, block, solve)
    else:
        each, frame, end = turns
        d, start = _flow(share, a, frame.turned(upstream, back=True), end.turned(carry, back=True), block, solve)
        d = frame.turned(d)
    if block.reset is not None:
        to_reset_state = a * d if turns is None else each.turned(a * d, back=True)
        d_reset_state += (to_reset_state * block.reset).sum((0, 1))
    d = _masked(d, block.padding, 0)
    if isinstance(terms, Convex):
        d_candidate = share.ceil().sub_(share).mul_(d)
        return [before.neg_().add_(terms.candidate).mul_(a).mul_(d_candidate), d_candidate], start
    kept = a * (before if turns is None else each.turned(before))  # of h before the token
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


def _log_sums(block: Block, inputs: ScanInputs, carry: Tensor) -> Tensor:
    """L after each token of a block that starts from `carry` (B, E)."""
    log_decay, score = _log_sum_terms(inputs.cell.log_sum_gates(block.x, inputs.parameters), block, carry)
    if block.reset is not None:
        reset_state = inputs.reset_state[inputs.D :].to(carry.dtype)
        score = torch.where(block.reset, torch.logaddexp(reset_state + log_decay, score), score)
        log_decay = torch.where(block.reset, -math.inf, log_decay)
    return log_sum(log_decay.contiguous(), score.contiguous(), carry)


def _log_sums_backward(
    block: Block, inputs: ScanInputs, before: Tensor, upstream: Tensor, carry: Tensor, d_reset_state: Tensor, solve
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the log-sums add to the gradients of x and the parameters, and the gradient of the L that the block starts
    from; d_reset_state is added to."""
    terms, pull_back = derivative(inputs.cell.log_sum_gates, block.x, inputs.parameters)
    log_decay, score = _log_sum_terms(terms, block, before)
    # dL/d(L + log_decay) is a and dL/d score is 1 - a, with these log-odds.
    log_odds = score - (before + log_decay)
    share = _share(Convex(log_odds, score), block)
    a, z = share - share.floor(), share.ceil() - share
    d, start = _flow(share, a, upstream, carry, block, solve)
    if block.reset is not None:
        d_reset_state += (a * d * block.reset).sum((0, 1))
    d_log_decay, d_score = _masked(a * d, block.padding, 0), _masked(z * d, block.padding, 0)
    return pull_back(d_log_decay.sum_to_size(terms[0].shape), d_score.sum_to_size(terms[1].shape)), start
