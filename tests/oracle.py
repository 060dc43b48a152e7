"""What the fast code is held against: the papers' equations and a plain convolution in float64, one token at a time.

Written from the papers and not from the package, so that no mistake is made twice. B batch, T time, D width of h, H
channels, K kernel size. Also random inputs, and the distance of a result from what it should be.
"""

from types import SimpleNamespace

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus


def scan(
    projected: Tensor,
    cell_type: str,
    initial_state: Tensor | None = None,
    reset_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    parameters: Tensor | None = None,
    **options,
) -> tuple[Tensor, Tensor]:
    """(outputs (B, T, D), final_state (B, S)) in float64, differentiable; arguments as in `scan.minrnn_scan`.

    cell_type: with ":linear" behind "mingru" or "minlstm", their candidate is the projection itself. parameters: (P,
    channels). options: num_heads, householder_steps, memory_order and memory_window of the cells that have them.
    """
    B, T, _ = projected.shape
    name, _, variant = cell_type.partition(":")
    inputs = SimpleNamespace(
        x=projected.double(),
        parameters=() if parameters is None else parameters.double(),
        start=None if initial_state is None else initial_state.double(),
        reset_state=None if reset_state is None else reset_state.double(),
        resets=torch.zeros(B, T, dtype=torch.bool) if reset_mask is None else reset_mask,
        padding=torch.zeros(B, T, dtype=torch.bool) if padding_mask is None else padding_mask,
        is_linear=variant == "linear",
        **options,
    )
    inputs.x = torch.where(inputs.padding[..., None], 0.0, inputs.x)  # what padding holds is nobody's business
    inputs.name = name
    return EQUATIONS[name](inputs)


def recurrence(forget: Tensor, added: Tensor, start, reset_state, inputs) -> Tensor:
    """h[t] = forget[t] * h[t-1] + added[t], (B, T, D), with the masks of `inputs`; states None for zero. Of matrices,
    (B, T, ..., n, n), the product is that of matrices."""
    B, zero = len(added), torch.zeros_like(added[0, 0])
    forget = forget.expand(added.shape)
    rows = []
    for b in range(B):
        first = zero if start is None else start[b]
        after_reset = zero if reset_state is None else reset_state
        masks = inputs.resets[b].tolist(), inputs.padding[b].tolist()
        rows.append(Recurrence.apply(forget[b], added[b], first, after_reset, *masks))
    return torch.stack(rows)


def before(states: Tensor, start, reset_state, inputs) -> Tensor:
    """The states (B, T, D) before each token, from those after them."""
    zero = states.new_zeros(states.shape[-1])
    start = zero.expand(len(states), -1) if start is None else start
    shifted = torch.cat([start[:, None], states[:, :-1]], 1)
    return torch.where(inputs.resets[..., None], zero if reset_state is None else reset_state, shifted)


def convex(inputs) -> tuple[Tensor, Tensor]:
    forget, input_, candidate = gates_and_candidate(inputs.x, inputs.name, inputs.is_linear)
    states = recurrence(forget, input_ * candidate, inputs.start, inputs.reset_state, inputs)
    return states, states[:, -1]


def gates_and_candidate(projected: Tensor, cell_type: str, is_linear: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(f', i', c) of h[t] = f' * h[t-1] + i' * c (arXiv 2410.01201)."""
    *logits, x = projected.chunk({"mingru": 2, "minlstm": 3}[cell_type], dim=-1)
    if cell_type == "mingru":  # f' = 1 - z, i' = z, z = sigmoid(logit)
        log_odds = logits[0]
    else:  # f' = f / (f + i), i' = i / (f + i): functions of i / f, which has a logarithm even where both underflow
        log_odds = logsigmoid(logits[1]) - logsigmoid(logits[0])
    candidate = x if is_linear else torch.where(x >= 0, x + 0.5, torch.sigmoid(x))
    return torch.sigmoid(-log_odds), torch.sigmoid(log_odds), candidate


def mingru_signed(inputs):
    decay, gate, x = inputs.x.chunk(3, -1)
    states = recurrence(torch.tanh(decay), torch.sigmoid(gate) * x, inputs.start, inputs.reset_state, inputs)
    return states, states[:, -1]


def weighted_mean(log_weights: Tensor, values: Tensor, kept: Tensor, inputs):
    """num[t] = kept * num[t-1] + exp(log_weights[t]) * values[t] and den alike, as one mean and its log-sum, (B, T, D)
    each; states are [mean | log-sum], and a log-sum of -1e30 is that of nothing."""
    largest = log_weights.detach().amax((0, 1))
    weights = torch.where(inputs.padding[..., None], 0.0, torch.exp(log_weights - largest))

    def weighed(state):
        """(num, den) of a state, over exp(largest)."""
        if state is None:
            return None, None
        mean, log_sum = state.tensor_split([values.shape[-1]], -1)
        den = torch.exp(log_sum.repeat_interleave(mean.shape[-1] // log_sum.shape[-1], -1) - largest)
        return mean * den, den

    (num0, den0), (num_r, den_r) = weighed(inputs.start), weighed(inputs.reset_state)
    num = recurrence(kept, weights * values, num0, num_r, inputs)
    den = recurrence(kept, weights.expand_as(values), den0, den_r, inputs)
    seen = den > 0
    mean = torch.where(seen, num / torch.where(seen, den, 1.0), 0.0)
    # Of nothing seen the mean is the start itself, which counts for nothing.
    D = values.shape[-1]
    if inputs.start is not None:
        own_start = recurrence(
            torch.ones_like(mean), torch.zeros_like(mean), inputs.start[:, :D],
            None if inputs.reset_state is None else inputs.reset_state[:D], inputs,
        )  # fmt: skip
        mean = torch.where(seen, mean, own_start)
    log_sum = torch.where(seen, torch.log(torch.where(seen, den, 1.0)) + largest, -1e30)
    return mean, log_sum


def aaren(inputs):
    """arXiv 2405.13956: attention of one constant query a head, read as a many-to-many RNN."""
    heads = inputs.num_heads
    score, v = inputs.x.tensor_split([heads], -1)
    size = v.shape[-1] // heads
    mean, log_sum = weighted_mean(score.repeat_interleave(size, -1), v, torch.ones_like(v[0, 0]), inputs)
    return mean, torch.cat([mean[:, -1], log_sum[:, -1, ::size]], -1)


def rwkv4(inputs):
    """arXiv 2305.13048, eq. 14 with the receptance."""
    k, v, r = inputs.x.chunk(3, -1)
    decay, bonus = inputs.parameters
    mean, log_sum = weighted_mean(k, v, torch.exp(-torch.exp(decay)), inputs)
    D = v.shape[-1]
    halves = [(None, None) if s is None else s.chunk(2, -1) for s in (inputs.start, inputs.reset_state)]
    nothing = torch.full((D,), -1e30, dtype=torch.float64)
    starts = [s[1] if s[1] is not None else nothing for s in halves]
    h = before(mean, halves[0][0], halves[1][0], inputs)
    L = before(log_sum, starts[0].expand(len(v), -1), starts[1], inputs)
    share = torch.sigmoid(k + bonus - L)  # exp(u + k) over itself and the sum of the past
    outputs = torch.sigmoid(r) * ((1 - share) * h + share * v)
    outputs = torch.where(inputs.padding[..., None], mean, outputs)
    return outputs, torch.cat([mean[:, -1], log_sum[:, -1]], -1)


def lru(inputs):
    """arXiv 2303.06349, eq. 4: Lambda = exp(-exp(nu) + i exp(theta)), gamma normalised input."""
    nu, theta, gamma = inputs.parameters
    eigenvalues = torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta)))

    def numbers(x):
        return None if x is None else torch.complex(*x.chunk(2, -1))

    states = recurrence(
        eigenvalues, torch.exp(gamma) * numbers(inputs.x), numbers(inputs.start), numbers(inputs.reset_state), inputs
    )
    states = torch.cat([states.real, states.imag], -1)
    return states, states[:, -1]


def rglru(inputs):
    """arXiv 2402.19427, eq. 1 to 4; the first token of a document is not scaled, as in the authors' library."""
    r, i, x = inputs.x.chunk(3, -1)
    log_a = -8 * softplus(inputs.parameters[0]) * torch.sigmoid(r)
    D = x.shape[-1]
    real = torch.where(inputs.padding[..., None], 0.0, torch.ones_like(x[..., :1]))
    (h0, n0), (h_r, n_r) = (
        (None, None) if s is None else (s[..., :D], torch.exp(s[..., D:])) for s in (inputs.start, inputs.reset_state)
    )
    count = recurrence(torch.ones_like(real), real, n0, n_r, inputs)
    first = before(count, n0, n_r, inputs) == 0
    scale = torch.where(first, 1.0, torch.sqrt(-torch.expm1(2 * log_a)))
    states = recurrence(torch.exp(log_a), scale * torch.sigmoid(i) * x, h0, h_r, inputs)
    log_count = torch.where(count > 0, torch.log(torch.where(count > 0, count, 1.0)), -1e30)
    return states, torch.cat([states[:, -1], log_count[:, -1]], -1)


def hgrn(inputs):
    """arXiv 2311.04823, eq. 4: f = l + (1 - l) sigmoid, h = f * h + (1 - f) * silu."""
    forget, x = inputs.x.chunk(2, -1)
    bound = torch.sigmoid(inputs.parameters[0])
    added = (1 - bound) * torch.sigmoid(-forget) * silu(x)
    states = recurrence(bound + (1 - bound) * torch.sigmoid(forget), added, inputs.start, inputs.reset_state, inputs)
    return states, states[:, -1]


def hgrn2(inputs):
    """arXiv 2404.07904, eq. 6 and 7: S = diag(f) S + (1 - f) v^T, y = S^T silu(q), a head; f as of hgrn."""
    forget, v, q = (x.unflatten(-1, (inputs.num_heads, -1)) for x in inputs.x.chunk(3, -1))
    bound = torch.sigmoid(inputs.parameters[0]).view(forget[0, 0].shape)
    f = (bound + (1 - bound) * torch.sigmoid(forget))[..., None]
    added = ((1 - bound) * torch.sigmoid(-forget))[..., None] * v[..., None, :]
    states = recurrence(f.expand_as(added).flatten(2), added.flatten(2), inputs.start, inputs.reset_state, inputs)
    outputs = (silu(q)[..., None] * states.view_as(added)).sum(-2).flatten(2)
    return outputs, states[:, -1]


def gated_delta(inputs):
    """arXiv 2412.06464, eq. 10, with the rate doubled (2411.12537) and several keys a token (2502.10297, eq. 8): S =
    a (I - rate k k^T) S + rate k v^T in each head, the decay a before the first of the keys alone."""
    heads, steps = inputs.num_heads, inputs.householder_steps
    D = (inputs.x.shape[-1] - heads * (1 + steps)) // (1 + 2 * steps)
    gate, rate, k, v, q = inputs.x.split([heads, steps * heads, steps * D, steps * D, D], -1)
    k, v, rate = (x.unflatten(-1, (steps, heads, -1)) for x in (k, v, rate))
    k, q = silu(k), silu(q.unflatten(-1, (heads, -1)))
    k, q = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (k, q))
    decay, step = inputs.parameters
    n = D // heads
    kept = torch.exp(-torch.exp(decay) * softplus(gate + step))[..., None, None] * torch.eye(n, dtype=torch.float64)
    added = torch.zeros_like(kept)
    for k_j, v_j, rate_j in zip(k.unbind(2), v.unbind(2), (2 * torch.sigmoid(rate)).unbind(2)):
        column, row = (rate_j * k_j)[..., None], k_j[..., None, :]
        kept, added = kept - column * (row @ kept), added + column * (v_j[..., None, :] - row @ added)

    def matrices(state):
        return None if state is None else state.unflatten(-1, (heads, n, n))

    states = recurrence(kept, added, matrices(inputs.start), matrices(inputs.reset_state), inputs)
    return (q[..., None, :] @ states).flatten(2), states[:, -1].flatten(1)


def lmu(inputs):
    """The Legendre memory unit's state (Voelker et al. 2019, eq. 1 and 2), zero-order hold of a step of one token."""
    N, theta = inputs.memory_order, inputs.memory_window
    A, B = np.zeros((N, N)), np.zeros((N, 1))
    for i in range(N):
        B[i] = (2 * i + 1) * (-1) ** i
        for j in range(N):
            A[i, j] = (2 * i + 1) * (-1 if i < j else (-1) ** (i - j + 1))
    step = scipy.linalg.expm(np.block([[A, B], [np.zeros((1, N + 1))]]) / theta)
    A, B = torch.from_numpy(step[:N, :N]), torch.from_numpy(step[:N, N])
    state = inputs.start
    if state is None:
        state = inputs.x.new_zeros(len(inputs.x), inputs.x.shape[-1] * N)
    reset_state = torch.zeros_like(state[0]) if inputs.reset_state is None else inputs.reset_state
    states = []
    for t, u in enumerate(inputs.x.unbind(1)):
        state = torch.where(inputs.resets[:, t, None], reset_state, state)
        new = (state.unflatten(-1, (-1, N)) @ A.T + u[..., None] * B).flatten(1)
        state = torch.where(inputs.padding[:, t, None], state, new)
        states.append(state)
    return torch.stack(states, 1), state


class Recurrence(torch.autograd.Function):
    """state = forget * state + added (T, D), real or complex, in numpy: autograd takes a minute for the longest
    sequences. Or of matrices (T, ..., n, n)."""

    @staticmethod
    def forward(ctx, forget, added, state, reset_state, resets, padding):
        ctx.resets, ctx.padding = resets, padding
        forget, added, state, reset_state = (x.detach().numpy() for x in (forget, added, state, reset_state))
        ctx.forget, ctx.before, states = forget, np.empty_like(added), np.empty_like(added)
        ctx.times = times = np.multiply if added.ndim == 2 else np.matmul
        for t in range(len(added)):
            if resets[t]:
                state = reset_state
            ctx.before[t] = state
            if not padding[t]:
                state = times(forget[t], state) + added[t]
            states[t] = state
        return torch.from_numpy(states)

    @staticmethod
    def backward(ctx, d_states):
        d_states, times = d_states.numpy(), ctx.times

        def adjoint(x):
            return x.conj() if times is np.multiply else x.swapaxes(-1, -2)

        d_forget, d_added = np.zeros_like(ctx.forget), np.zeros_like(ctx.forget)
        d_state, d_reset_state = np.zeros_like(ctx.forget[0]), np.zeros_like(ctx.forget[0])
        for t in reversed(range(len(d_states))):
            d_state = d_state + d_states[t]
            if not ctx.padding[t]:
                d_forget[t], d_added[t] = times(d_state, adjoint(ctx.before[t])), d_state
                d_state = times(adjoint(ctx.forget[t]), d_state)
            if ctx.resets[t]:
                d_reset_state = d_reset_state + d_state
                d_state = np.zeros_like(d_state)
        return *map(torch.from_numpy, (d_forget, d_added, d_state, d_reset_state)), None, None


EQUATIONS = {
    "mingru": convex, "minlstm": convex, "mingru_signed": mingru_signed, "aaren": aaren, "rwkv4": rwkv4, "lru": lru,
    "rglru": rglru, "hgrn": hgrn, "hgrn2": hgrn2, "gated_delta": gated_delta, "lmu": lmu,
}  # fmt: skip


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
