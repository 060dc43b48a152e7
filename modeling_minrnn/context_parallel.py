"""One long sequence over the processes of a group: each holds a chunk of it, and reads on from the chunks before.

B batch, T time of a chunk, D width of h, E log-sums, H channels, K convolution kernel size. Chunks may differ in
length; they follow each other in the order of the ranks. What a chunk makes of the state that it starts from is a map
of a few numbers, and so is what it makes of the convolution window: the maps are exchanged in a small all-gather,
whatever T is, and each rank applies those of the ranks before it, in their order.

Gradients are those of the sum of the ranks' losses: sum them over the group. What every rank returns alike, the state
and the window after the last chunk, counts once, on the last rank.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import is_transformed
from .causal_conv import windows_after
from .cells import NOTHING_SEEN, carry_dtype, complex_product
from .operators import scan
from .scan_blocks import Block, ScanInputs

BACKWARD_ALONE = (
    "a sequence over several processes is differentiated by backward(), without create_graph; for torch.func, forward "
    'mode and second derivatives read it in one process, with backend="loop"'
)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, *x.shape): the x of every rank."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=group)
    return gathered


class AllGather(torch.autograd.Function):
    """`all_gather` with its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, d_gathered: Tensor):
        # torch's own once_differentiable lets torch.autograd.grad pass over this part of a second derivative.
        if torch.is_grad_enabled() or is_transformed():
            raise RuntimeError(BACKWARD_ALONE)
        d_gathered = d_gathered.contiguous()
        dist.all_reduce(d_gathered, group=ctx.group)
        return d_gathered[ctx.group.rank()], None


def _chain(start: Tensor, own: Tensor, apply: Callable, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """What each rank starts from, and what is left after the last one, when the map of each chunk is apply(own, x)."""
    if is_transformed():
        raise RuntimeError(BACKWARD_ALONE)
    values = [start]
    for sent in AllGather.apply(own, group):
        values.append(apply(sent, values[-1]))
    last = values[-1] if group.rank() == group.size() - 1 else values[-1].detach()
    # Out of one tensor: the first rank has no use for what was gathered, but must take part in its backward.
    return torch.stack(values)[group.rank()], last


def context_parallel_scan(inputs: ScanInputs, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.scan` of this rank's chunk; `initial_state` and the final state are those of the whole sequence.

    The h after a chunk is decay * (h before it) + end: decay is the product of a, end what a scan from zero ends with.
    The L after it is log(exp(L before it + log_decay) + exp(end)), and is settled first, as the gates depend on it.

    Sent by each rank and layer: 2 B (D + E) numbers of the state's dtype, and backwards as many for each rank.
    """
    if inputs.backend == "loop":
        raise ValueError('the "loop" backend reads a sequence in one process; use "torch" with a group')
    cell, D = inputs.cell, inputs.D
    if cell.system is not None:
        raise ValueError(f"{cell.name!r} reads a sequence in one process: its matrix has no decay to send on")
    if cell.has_matrices:
        return _matrices(inputs, group)
    (h, L), block = inputs.initial_state.tensor_split([D], -1), inputs.block(0, inputs.projected.shape[1])
    last_L = L
    if L.shape[-1]:
        from_nothing = torch.cat([torch.zeros_like(h), torch.full_like(L, NOTHING_SEEN)], -1)
        end = scan(inputs._replace(initial_state=from_nothing))[2][:, D:]
        log_decay = _total(cell.log_sum_gates(block.x, inputs.parameters).log_decay, block, end)
        L, last_L = _chain(L, torch.stack([log_decay, end]), lambda own, x: torch.logaddexp(x + own[0], own[1]), group)
    outputs, rest, end = scan(inputs._replace(initial_state=torch.cat([torch.zeros_like(h), L], -1)))
    log_sums = cell.states_of(outputs, rest)[1].transpose(0, 1)
    terms = cell.gates(block.x, inputs.parameters, block.before(log_sums, L, inputs.reset_state[D:]))
    multiply = complex_product if getattr(terms, "phase", None) is not None else torch.mul
    own = torch.stack([_decay(terms, block, h), end[:, :D]])
    h, last_h = _chain(h, own, lambda own, x: multiply(own[0], x) + own[1], group)
    outputs, rest, _ = scan(inputs._replace(initial_state=torch.cat([h, L], -1)))
    return outputs, rest, torch.cat([last_h, last_L], -1)


def _matrices(inputs: ScanInputs, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix of a head after a chunk is kept @ (that before it) + end: `kept` is what becomes of the identity."""
    start = inputs.initial_state
    n = start.shape[-1] // inputs.D  # S = heads * n^2 and D = heads * n
    identity = torch.eye(n, dtype=start.dtype, device=start.device).flatten().repeat(start.shape[-1] // n**2)
    end = scan(inputs._replace(initial_state=torch.zeros_like(start)))[2]
    kept = scan(inputs._replace(initial_state=identity.expand_as(start)))[2] - end

    def apply(own: Tensor, state: Tensor) -> Tensor:
        kept, state = (x.unflatten(-1, (-1, n, n)) for x in (own[0], state))
        return (kept @ state).flatten(1) + own[1]

    start, last = _chain(start, torch.stack([kept, end]), apply, group)
    outputs, rest, _ = scan(inputs._replace(initial_state=start))
    return outputs, rest, last


def _total(x: Tensor, block: Block, like: Tensor, after_reset: float = -math.inf) -> Tensor:
    """The sum (B, N) of x over the chunk, like (B, N), without padding; `after_reset` where there is a reset."""
    x = x.expand(len(block.x), *like.shape).to(carry_dtype(like.device))
    if block.padding is not None:
        x = x.masked_fill(block.padding, 0)
    total = x.sum(0)
    if block.reset is not None:
        total = total.masked_fill(block.reset.any(0), after_reset)
    return total.to(like.dtype)


def _decay(terms, block: Block, like: Tensor) -> Tensor:
    """The product of a over the chunk, like h (B, D); for a complex one [real | imaginary]."""
    if getattr(terms, "phase", None) is not None:
        like = like[:, : like.shape[1] // 2]
        decay = _total(terms.log_decay, block, like).exp()
        angle = _total(terms.phase, block, like.to(carry_dtype(like.device)), 0)
        return torch.cat([decay * angle.cos(), decay * angle.sin()], -1).to(like.dtype)
    decay = _total(terms.log_decay, block, like).exp()
    if getattr(terms, "sign", None) is not None:
        negative = _total((terms.sign < 0).to(like.dtype), block, like, 0)
        decay = decay * (1 - 2 * (negative % 2))
    return decay


def conv_windows(x: Tensor, window: Tensor, taps: Tensor | None, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The convolution windows (B, K - 1, H) before this rank's chunk and after the last one.

    Each slot of the window after a chunk holds a token of the chunk, nothing, or what some slot held before: sent are
    the tokens of the chunk beside a matrix of zeros and ones that moves the slots, (B, K - 1, H + K - 1).

    Args:
        x: (B, T, H), this rank's chunk.
        window: (B, K - 1, H), before the first chunk.
        taps: of `masks.conv_taps`, for this chunk alone.
    """
    (B, T, H), size = x.shape, window.shape[1]
    own = windows_after(x, torch.zeros_like(window), taps, T - 1)[0]
    positions = torch.arange(size, device=x.device)
    source = (positions + T).expand(B, -1) if taps is None else taps[:, -1, 1:]
    moved = (source[..., None] == positions).to(x.dtype)
    own = torch.cat([own, moved], -1)
    return _chain(window, own, lambda own, window: own[..., :H] + own[..., H:] @ window, group)
