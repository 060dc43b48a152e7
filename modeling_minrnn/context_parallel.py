"""One long sequence over the processes of a group: each holds a chunk of it, and reads on from the chunks before.

B batch, T time of a chunk, D state width, H channels, K convolution kernel size. Chunks may differ in length; they
follow each other in the order of the ranks. What a chunk makes of the state that it starts from is an affine map, and
so is what it makes of the convolution window: the maps are exchanged in one small all-gather, whatever T is, and each
rank applies those of the ranks before it, in their order. The maps come from the scan and the window themselves.

Gradients are those of the sum of the ranks' losses: sum them over the group. What every rank returns alike, the state
and the window after the last chunk, counts once, on the last rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .causal_conv import windows_after
from .scan import GATES, _scan, _scan_backward


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(ranks, *x.shape): the x of every rank."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group=group)
    return gathered


class ContextParallelScan(torch.autograd.Function):
    """`scan.minrnn_scan` of this rank's chunk; `initial_state` is the state before the first chunk.

    The state after a chunk is decay * (state before it) + end: end is what a scan from zero ends with, and decay, the
    product of a, what a scan from one ends with where nothing comes in. Backwards, the gradient of the state before a
    chunk is decay * (that of the state after it) + what the chunk itself adds: its own backward with zero after it.

    Sent by each rank and layer: 2 B D numbers of the state's dtype forwards, B D backwards.
    """

    @staticmethod
    def forward(
        ctx,
        projected: Tensor,
        cell_type: str,
        initial_state: Tensor,
        reset_state: Tensor,
        reset_mask: Tensor | None,
        padding_mask: Tensor | None,
        backend: str,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        def final_state(projected: Tensor, state: Tensor, reset_state: Tensor) -> Tensor:
            return _scan(projected, cell_type, state, reset_state, reset_mask, padding_mask, backend)[1]

        nothing_in = projected.clone()
        nothing_in.chunk(GATES[cell_type], -1)[-1].fill_(torch.finfo(projected.dtype).min)  # g of this is zero
        decay = final_state(nothing_in, torch.ones_like(initial_state), torch.zeros_like(reset_state))
        del nothing_in
        end = final_state(projected, torch.zeros_like(initial_state), reset_state)

        decays, ends = all_gather(torch.stack([decay, end]), group).unbind(1)
        starts = [initial_state]
        for decay, end in zip(decays, ends):
            starts.append(torch.addcmul(end, decay, starts[-1]))
        rank = group.rank()
        start, later_decays = starts[rank], decays[rank + 1 :].clone()
        states, _ = _scan(projected, cell_type, start, reset_state, reset_mask, padding_mask, backend)
        ctx.cell_type, ctx.backend, ctx.group = cell_type, backend, group
        ctx.save_for_backward(projected, start, reset_state, reset_mask, padding_mask, states, later_decays)
        return states, starts[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_states: Tensor, d_final_state: Tensor):
        projected, start, reset_state, reset_mask, padding_mask, states, later_decays = ctx.saved_tensors
        rank = ctx.group.rank()

        def gradients(d_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _scan_backward(
                projected, ctx.cell_type, start, reset_state, reset_mask, padding_mask, ctx.backend,
                states, d_states, d_end,
            )  # fmt: skip

        d_end = torch.zeros_like(start) if len(later_decays) else d_final_state
        d_projected, d_start, d_reset_state = gradients(d_end)
        later_d_starts = all_gather(d_start, ctx.group)[rank + 1 :]
        if len(later_decays):
            for decay, d_start in zip(later_decays.flip(0), later_d_starts.flip(0)):
                d_end = torch.addcmul(d_start, decay, d_end)
            d_projected, d_start, d_reset_state = gradients(d_end)
        d_initial_state = d_start if rank == 0 else torch.zeros_like(d_start)
        return d_projected, None, d_initial_state, d_reset_state, None, None, None, None


class AllGather(torch.autograd.Function):
    """`all_gather` with its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_gathered: Tensor):
        d_gathered = d_gathered.contiguous()
        dist.all_reduce(d_gathered, group=ctx.group)
        return d_gathered[ctx.group.rank()], None


def conv_windows(x: Tensor, window: Tensor, taps: Tensor | None, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The convolution windows (B, K - 1, H) before this rank's chunk and after the last one.

    Each slot of the window after a chunk holds a token of the chunk, nothing, or what some slot held before: sent are
    the tokens of the chunk beside a matrix of zeros and ones that moves the slots, (B, K - 1, H + K - 1).

    Args:
        x: (B, T, H), this rank's chunk.
        window: (B, K - 1, H), before the first chunk.
        taps: of `causal_conv.conv_taps`, for this chunk alone.
    """
    (B, T, H), size = x.shape, window.shape[1]
    own = windows_after(x, torch.zeros_like(window), taps, T - 1)[0]
    positions = torch.arange(size, device=x.device)
    source = (positions + T).expand(B, -1) if taps is None else taps[:, -1, 1:]
    moved = (source[..., None] == positions).to(x.dtype)
    windows = [window]
    for sent in AllGather.apply(torch.cat([own, moved], -1), group):
        own, moved = sent.split([H, size], -1)
        windows.append(own + moved @ windows[-1])
    final = windows[-1] if group.rank() == group.size() - 1 else windows[-1].detach()
    # Out of one tensor: the first rank has no use for what was gathered, but must take part in its backward.
    return torch.stack(windows)[group.rank()], final
