"""One token through one layer as one CPU kernel, so that a decoding step costs little more than to read the weights.

B batch, H hidden size, D width of h, E log-sums, P width of `projected`, K kernel size, M width of the MLP.
All is in float32, and the recurrence is that of a scan, `scan_numba.forward_row`. Other dtypes take the modules: they
round between them, and a sequence read token by token must end as one that is read at once.
Weights are read at each call where the modules keep them, so a change of them is seen.
"""

import functools
import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .cache_minrnn import LayerState
from .modeling_minrnn import MinRNNCausalConv, MinRNNDecoderLayer, MinRNNMLP, MinRNNRecurrence
from .scan_numba import (
    RWKV,
    allocate,
    blocks_at,
    code_of,
    compile_kernel,
    copy,
    dense,
    derived,
    exp_nonpositive,
    floats,
    forward_row,
    int64,
    np,
    numba,
    release,
    run,
    rwkv_forward_row,
    scalar,
    sigmoids,
    state_at,
    voidptr,
)

# Sums of products may be taken in any order, as a matrix product takes them.
REDUCTION = {"error_model": "numpy", "fastmath": {"contract", "nsz", "arcp", "reassoc"}}
ACTIVATIONS = {type(ACT2FN["gelu"]): 0, type(ACT2FN["silu"]): 1, type(ACT2FN["relu"]): 2}


@scalar
def erf(x):
    """To 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    size = abs(x)
    t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * size)
    p = np.float32(1.061405429) * t - np.float32(1.453152027)
    p = ((p * t + np.float32(1.421413741)) * t - np.float32(0.284496736)) * t + np.float32(0.254829592)
    y = np.float32(1.0) - p * t * exp_nonpositive(-size * size)
    return y if x >= np.float32(0.0) else -y


@scalar
def activated(activation, x):
    if activation == 0:
        return np.float32(0.5) * x * (np.float32(1.0) + erf(x * np.float32(0.70710678)))
    if activation == 1:
        return x * sigmoids(x)[0]
    return x if x >= np.float32(0.0) else np.float32(0.0)


@numba.njit(**REDUCTION)
def normalize(x, weight, y, B, H, eps):
    for b in range(B):
        row, out = x[b * H : b * H + H], y[b * H : b * H + H]
        total = np.float32(0.0)
        for i in range(H):
            total += row[i] * row[i]
        scale = np.float32(1.0 / math.sqrt(total / H + eps))
        for i in range(H):
            out[i] = row[i] * scale * weight[i]


MANY_ROWS = 16  # of a batch: from here on it pays to read x less often than to read the weights in one stream


@numba.njit(**REDUCTION)
def product(weight, bias, has_bias, x, y, B, n, k, accumulates):
    """y (B, n) = x (B, k) @ weight (n, k).T + bias, or that added to y."""
    if B < MANY_ROWS:
        for i in range(n):
            w, shift = weight[i * k : i * k + k], bias[i] if has_bias else np.float32(0.0)
            for b in range(0, B - 3, 4):
                x0, x1 = x[b * k : b * k + k], x[(b + 1) * k : (b + 1) * k + k]
                x2, x3 = x[(b + 2) * k : (b + 2) * k + k], x[(b + 3) * k : (b + 3) * k + k]
                s0 = s1 = s2 = s3 = shift
                for j in range(k):
                    value = w[j]
                    s0 += value * x0[j]
                    s1 += value * x1[j]
                    s2 += value * x2[j]
                    s3 += value * x3[j]
                for c, total in enumerate((s0, s1, s2, s3)):
                    at = (b + c) * n + i
                    y[at] = total + y[at] if accumulates else total
            for b in range(B - B % 4, B):
                x0, total = x[b * k : b * k + k], shift
                for j in range(k):
                    total += w[j] * x0[j]
                y[b * n + i] = total + y[b * n + i] if accumulates else total
        return
    for i in range(0, n, 4):
        # Past the last weight or row the last one is taken again, and the result not kept.
        i1, i2, i3 = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)
        w0, w1 = weight[i * k : i * k + k], weight[i1 * k : i1 * k + k]
        w2, w3 = weight[i2 * k : i2 * k + k], weight[i3 * k : i3 * k + k]
        for b in range(0, B, 2):
            last = min(b + 1, B - 1)
            x0, x1 = x[b * k : b * k + k], x[last * k : last * k + k]
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = np.float32(0.0)
            for j in range(k):
                u, v = x0[j], x1[j]
                a0, a1, a2, a3 = w0[j], w1[j], w2[j], w3[j]
                s0 += a0 * u
                s1 += a1 * u
                s2 += a2 * u
                s3 += a3 * u
                t0 += a0 * v
                t1 += a1 * v
                t2 += a2 * v
                t3 += a3 * v
            for c, totals in enumerate(((s0, t0), (s1, t1), (s2, t2), (s3, t3))):
                if i + c < n:
                    shift = bias[i + c] if has_bias else np.float32(0.0)
                    for row in range(b, last + 1):
                        at = row * n + i + c
                        y[at] = totals[row - b] + shift + (y[at] if accumulates else np.float32(0.0))


@numba.njit
def convolve(x, window, weight, out, out_window, B, H, K):
    """out = x + conv(x), and the window after the token; weight: (H, K)."""
    W = (K - 1) * H
    for b in range(B):
        for i in range(H):
            total = x[b * H + i] * weight[i * K + K - 1]
            for k in range(K - 1):
                total += window[b * W + k * H + i] * weight[i * K + k]
            out[b * H + i] = x[b * H + i] + total
        for i in range(W - H):
            out_window[b * W + i] = window[b * W + H + i]
        for i in range(max(W - H, 0), W):
            out_window[b * W + i] = x[b * H + i - (W - H)]


@functools.cache  # compiled when it is used
def layer_kernel_of(code: int, columns: int):
    """The kernel of a cell with so many blocks of `projected`.

    Sizes, then what comes in, what goes out, and the weights; an address may be anything where the part is missing: no
    convolution for K = 0, no MLP for M = 0, and flags.
    """

    @compile_kernel(*[int64] * 10, numba.float64, *[voidptr] * 18)
    def layer_kernel(
        H, D, E, P, K, M, has_bias, is_gated, has_mlp_bias, activation, eps,
        x, window, state, out, out_window, out_state, conv, rnn_norm, in_proj, in_bias, q, gate_proj, out_proj,
        mlp_norm, up_proj, up_bias, down_proj, down_bias, b_start, b_stop, d_start, d_stop,
    ):  # fmt: skip
        B, S, W, wide = b_stop - b_start, D + E, max(K - 1, 0) * H, max(M, D)
        x, out = floats(x)[b_start * H :], floats(out)[b_start * H :]
        window, out_window = floats(window)[b_start * W :], floats(out_window)[b_start * W :]
        state, out_state, q = floats(state)[b_start * S :], floats(out_state)[b_start * S :], floats(q)
        bias = floats(in_bias)
        scratch, wide_scratch = allocate(4 * (B * (H + P + D + wide) + 6 * D)), allocate(8 * 3 * D)
        rows, carries = numba.carray(scratch, (6, D), np.float32), numba.carray(wide_scratch, (3, D), np.float64)
        carry, L, larger = carries[0], carries[1][:E], carries[2]
        memory = floats(scratch)[6 * D :]
        normed, projected = memory[: B * H], memory[B * H : B * (H + P)]
        read, inner = memory[B * (H + P) : B * (H + P + D)], memory[B * (H + P + D) : B * (H + P + D + wide)]

        if K > 0:
            convolve(x, window, floats(conv), out, out_window, B, H, K)
        else:
            out[: B * H] = x[: B * H]
        normalize(out, floats(rnn_norm), normed, B, H, eps)
        product(floats(in_proj), bias, has_bias, normed, projected, B, P, H, False)
        place, of_cell = (0, D, 0, E), state_at(q, 0, q, D, (0, D, 0, D))
        for b in range(B):
            copy((carry, L), state_at(state, b * S, state, b * S + D, place))
            after, h = state_at(out_state, b * S, out_state, b * S + D, place), read[b * D : b * D + D]
            p = blocks_at(code, projected, b * P, D, E, columns, place)
            if code & RWKV:
                rwkv_forward_row(p, of_cell, carry, L, h, after[0], after[1], rows, larger)
            else:
                forward_row(code, p, of_cell, carry, L, h, rows)
            copy(after, (carry, L))
        if is_gated:
            product(floats(gate_proj), bias, False, normed, inner, B, D, H, False)
            for i in range(B * D):
                read[i] *= activated(1, inner[i])
        product(floats(out_proj), bias, False, read, out, B, H, D, True)
        if M > 0:
            normalize(out, floats(mlp_norm), normed, B, H, eps)
            up_bias, down_bias = floats(up_bias), floats(down_bias)
            up_proj, down_proj = floats(up_proj), floats(down_proj)
            product(up_proj, up_bias, has_mlp_bias, normed, inner, B, M, H, False)
            for i in range(B * M):
                inner[i] = activated(activation, inner[i])
            product(down_proj, down_bias, has_mlp_bias, inner, out, B, H, M, True)
        release(scratch)
        release(wide_scratch)

    return layer_kernel


def decode_layer(layer, hidden_states: Tensor, carried: LayerState) -> tuple[Tensor, Tensor, Tensor, list] | None:
    """MinRNNDecoderLayer.forward for one token a row, (B, 1, H), without masks and gradients.

    None where the kernel would not compute what the modules of the layer do: for a cell without gates in `scan_numba`,
    where a module is not the stock one or has hooks, and for weights that are not dense float32.
    """
    rnn, mlp, (B, _, H) = layer.rnn, layer._modules.get("mlp"), hidden_states.shape
    if type(rnn) is not MinRNNRecurrence or not (mlp is None or type(mlp) is MinRNNMLP):
        return None
    cell, D, code = rnn.cell, rnn.state_size, code_of(rnn.cell)
    P, activation = sum(cell.blocks(D)), 0 if mlp is None else ACTIVATIONS.get(type(mlp.act_fn), -1)
    weights = _stock_weights(layer, H, D, P) if code >= 0 and activation >= 0 else None
    if weights is None:
        return None
    conv, _, _, in_bias, gate_proj, _, _, up_proj, up_bias, *_ = weights
    state = dense(carried.state_or(rnn.start(hidden_states).expand(B, -1)))
    window = dense(carried.window_or(hidden_states.new_zeros(B, layer.window_size, H)))
    out, out_window, out_state = (torch.empty_like(x, dtype=torch.float32) for x in (hidden_states, window, state))
    q = state  # not read
    if cell.parameter_names:
        q = dense(derived(cell, rnn.parameters_of_cell(hidden_states.new_empty(0, P))))
    sizes = H, D, state.shape[1] - D, P, 0 if conv is None else conv.shape[1], 0 if up_proj is None else len(up_proj)
    arguments = (
        *sizes, in_bias is not None, gate_proj is not None, up_bias is not None, activation, layer.rnn_norm.eps,
        dense(hidden_states), window, state, out, out_window, out_state, *weights[:4], q, *weights[4:],
    )  # fmt: skip
    run(layer_kernel_of(code, len(cell.blocks(D))), arguments, B, 1)
    return out, out_state, out_window, [(out_state, out_window)] if carried.record_past else []


def _stock_weights(layer, H: int, D: int, P: int) -> list[Tensor | None] | None:
    """The weights in the order of the kernel, None for each that is not there; or None, if a module is not as made."""
    # By the dictionaries behind the attributes, which nn.Module looks up at five times the price.
    parts, of_rnn = layer._modules, layer._modules["rnn"]._modules
    mlp = parts.get("mlp")
    of_mlp = {} if mlp is None else mlp._modules
    up_proj, act_fn = of_mlp.get("up_proj"), of_mlp.get("act_fn")
    up_weight = None if up_proj is None else up_proj._parameters.get("weight")
    M = 0 if up_weight is None else len(up_weight)
    table: list[tuple[nn.Module | None, type, dict[str, tuple]]] = [
        (layer, MinRNNDecoderLayer, {}),
        (parts["rnn"], MinRNNRecurrence, {}),
        (mlp, MinRNNMLP, {}),
        (act_fn, type(act_fn), {}),
        (parts.get("conv"), MinRNNCausalConv, {"weight": (H, layer.window_size + 1)}),
        (parts["rnn_norm"], nn.RMSNorm, {"weight": (H,)}),
        (of_rnn["in_proj"], nn.Linear, {"weight": (P, H), "bias": (P,)}),
        (of_rnn.get("gate_proj"), nn.Linear, {"weight": (D, H)}),
        (of_rnn["out_proj"], nn.Linear, {"weight": (H, D)}),
        (parts.get("mlp_norm"), nn.RMSNorm, {"weight": (H,)}),
        (up_proj, nn.Linear, {"weight": (M, H), "bias": (M,)}),
        (of_mlp.get("down_proj"), nn.Linear, {"weight": (H, M), "bias": (H,)}),
    ]
    weights: list[Tensor | None] = []
    for module, kind, shapes in table:
        if module is None:
            weights += [None] * len(shapes)
            continue
        if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        parameters = module._parameters
        if shapes and ("weight" not in parameters or (parameters.get("bias") is not None and "bias" not in shapes)):
            return None
        for name, shape in shapes.items():
            weight = parameters[name]
            if weight is not None or name == "weight":
                if type(weight) is not nn.Parameter or weight.dtype != torch.float32:
                    return None
                if weight.shape != shape or not weight.is_contiguous():
                    return None
            weights.append(weight)
    up_bias, down_bias = weights[-3], weights[-1]
    eps = layer.rnn_norm.eps
    norms_differ = mlp is not None and layer.mlp_norm.eps != eps
    if eps is None or norms_differ or (up_bias is None) != (down_bias is None):
        return None
    return weights
