"""What the fast code is held against: the paper's equations and a plain convolution in float64, one token at a time.

Written from arXiv 2410.01201 and not from the package, so that no mistake is made twice. B batch, T time, D state
width, H channels, K kernel size. Also random inputs, and the distance of a result from what it should be.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def scan(
    projected: Tensor,
    cell_type: str,
    initial_state: Tensor | None = None,
    reset_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(states (B, T, D), final_state (B, D)) in float64, differentiable; arguments as in `scan.minrnn_scan`."""
    forget, input_, candidate = gates_and_candidate(projected.double(), cell_type)
    B, T, D = candidate.shape
    zero = torch.zeros(D, dtype=torch.float64)
    states = []
    for b in range(B):
        states.append(
            Recurrence.apply(
                forget[b],
                input_[b] * candidate[b],
                zero if initial_state is None else initial_state[b].double(),
                zero if reset_state is None else reset_state.double(),
                [False] * T if reset_mask is None else reset_mask[b].tolist(),
                [False] * T if padding_mask is None else padding_mask[b].tolist(),
            )
        )
    states = torch.stack(states)
    return states, states[:, -1]


def gates_and_candidate(projected: Tensor, cell_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """(f', i', c) of h[t] = f' * h[t-1] + i' * c."""
    *logits, x = projected.chunk({"mingru": 2, "minlstm": 3}[cell_type], dim=-1)
    if cell_type == "mingru":  # f' = 1 - z, i' = z, z = sigmoid(logit)
        log_odds = logits[0]
    else:  # f' = f / (f + i), i' = i / (f + i): functions of i / f, which has a logarithm even where both underflow
        log_odds = logsigmoid(logits[1]) - logsigmoid(logits[0])
    return torch.sigmoid(-log_odds), torch.sigmoid(log_odds), torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class Recurrence(torch.autograd.Function):
    """state = forget * state + added (T, D), in numpy: autograd takes a minute for the longest sequences."""

    @staticmethod
    def forward(ctx, forget, added, state, reset_state, resets, padding):
        ctx.resets, ctx.padding = resets, padding
        forget, added, state, reset_state = (x.detach().numpy() for x in (forget, added, state, reset_state))
        ctx.forget, ctx.before, states = forget, np.empty_like(added), np.empty_like(added)
        for t in range(len(added)):
            if resets[t]:
                state = reset_state
            ctx.before[t] = state
            if not padding[t]:
                state = forget[t] * state + added[t]
            states[t] = state
        return torch.from_numpy(states)

    @staticmethod
    def backward(ctx, d_states):
        d_states = d_states.numpy()
        d_forget, d_added = np.zeros_like(ctx.forget), np.zeros_like(ctx.forget)
        d_state, d_reset_state = np.zeros_like(ctx.forget[0]), np.zeros_like(ctx.forget[0])
        for t in reversed(range(len(d_states))):
            d_state = d_state + d_states[t]
            if not ctx.padding[t]:
                d_forget[t], d_added[t] = d_state * ctx.before[t], d_state
                d_state = d_state * ctx.forget[t]
            if ctx.resets[t]:
                d_reset_state = d_reset_state + d_state
                d_state = np.zeros_like(d_state)
        return *map(torch.from_numpy, (d_forget, d_added, d_state, d_reset_state)), None, None


def conv(
    x: Tensor,
    weight: Tensor,
    window: Tensor,
    reset_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution (B, T, H), and the windows (B, T, K - 1, H) that its tokens leave; float64.

    y[t] = sum over j of weight[:, K - 1 - j] * (the j-th real token before t in the document of t). A padding token
    sees the K - 1 tokens of the window alone, where they are.
    """
    x, weight, window = x.double(), weight.double(), window.double()
    (B, T, H), K = x.shape, weight.shape[1]
    nothing = torch.zeros(H, dtype=torch.float64)
    outputs, windows = [], []
    for b in range(B):
        seen = [nothing, *window[b].unbind()]  # the K newest real tokens, the newest last
        for t in range(T):
            if reset_mask is not None and reset_mask[b, t]:
                seen = [nothing] * K
            if padding_mask is None or not padding_mask[b, t]:
                seen = [*seen[1:], x[b, t]]
            else:
                seen = [nothing, *seen[1:]]
            outputs.append(sum(weight[:, k] * seen[k] for k in range(K)))
            windows.append(torch.stack(seen)[1:])
    return torch.stack(outputs).view(B, T, H), torch.stack(windows).view(B, T, K - 1, H)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(*shape: int, seed: int, share: float) -> Tensor:
    """True with probability `share`."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error; NaN where anything is. Below 1e-25, at the end of float32, relative to that."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-25)).item()
