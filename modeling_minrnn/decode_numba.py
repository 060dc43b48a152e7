"""One token through all layers as one CPU kernel, so that a decoding step costs little more than to read the weights.

B batch, H hidden size, D width of h, E log-sums, P width of `projected`, K kernel size, M width of the MLP.
Everything is computed in float32, and the recurrence is that of a scan, `scan_numba.forward_row`. The projections may
also be eight-bit integers with a scale a row, as torchao's Int8WeightOnlyConfig keeps them. Other dtypes take the
modules: they round between them, and a sequence read token by token must end as one that is read at once.
Weights are read at each call where the modules keep them, so a change of them is seen.
A row's results do not depend on the other rows of its batch, nor on how many there are, to the last bit.
"""

import array
import functools
import itertools
import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .cache_minrnn import LayerState
from .modeling_minrnn import MinRNNCausalConv, MinRNNDecoderLayer, MinRNNMLP, MinRNNRecurrence
from .scan_numba import (
    ANY_LENGTH,
    OPTIONS,
    RWKV,
    allocate,
    blocks_at,
    clear,
    code_of,
    compile_kernel,
    copy,
    dense,
    derived,
    exp_nonpositive,
    fetch_line,
    floats,
    forward_row,
    int64,
    intrinsic,
    ir,
    np,
    numba,
    release,
    run,
    rwkv_forward_row,
    scalar,
    sigmoids,
    state_at,
    void,
    voidptr,
)

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


@numba.njit(error_model="numpy", fastmath={"contract", "nsz", "arcp", "reassoc"})  # a sum in any order
def normalize(x, weight, y, B, H, eps):
    for b in range(B):
        row, out = x[b * H : b * H + H], y[b * H : b * H + H]
        total = np.float32(0.0)
        for i in range(H):
            total += row[i] * row[i]
        scale = np.float32(1.0 / math.sqrt(total / H + eps))
        for i in range(H):
            out[i] = row[i] * scale * weight[i]


@intrinsic
def pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return voidptr(int64), generate


LANES = 8  # of a sum of products, added up at its end: alike for every tile, and with them the bits of the result
FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


class Tile:
    """Builds sums (W, R) = w (W, k) @ x (R, k).T in LLVM's terms, whose own vectoriser would order the sums of each
    shape of tile differently. w and x: the addresses of their rows, of float32 or eight-bit integers."""

    def __init__(self, builder, w, x, k):
        self.builder, self.w, self.x, self.k = builder, w, x, k

    def sums(self) -> list:
        builder, vector = self.builder, ir.VectorType(FLOAT, LANES)
        whole = builder.and_(self.k, INT64(-LANES))
        zeros = [ir.Constant(vector, None)] * (len(self.w) * len(self.x))
        sums = self.add_products(LANES, INT64(0), whole, zeros)
        return self.add_products(1, whole, self.k, [self.across(total) for total in sums])

    def add_products(self, lanes, start, stop, sums) -> list:
        """The sums and the products from start to stop, so many at a time."""
        builder, before = self.builder, self.builder.block
        head, body, after = (builder.append_basic_block(part) for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        phis = [builder.phi(value.type) for value in (start, *sums)]
        at, *totals = phis
        builder.cbranch(builder.icmp_signed("<", at, stop), body, after)
        builder.position_at_end(body)
        if lanes > 1 and len(self.w) > 1:
            self.fetch_next(at)
        w, x = ([self.values(row, at, lanes) for row in rows] for rows in (self.w, self.x))
        products = [builder.fmul(a, b, flags=("contract",)) for a in w for b in x]
        following = [builder.fadd(*pair, flags=("contract",)) for pair in zip(totals, products)]
        following.insert(0, builder.add(at, INT64(lanes)))
        builder.branch(head)
        for phi, first, later in zip(phis, (start, *sums), following):
            phi.add_incoming(first, before)
            phi.add_incoming(later, body)
        builder.position_at_end(after)
        return totals

    def values(self, row, at, lanes):
        builder, kept = self.builder, row.type.pointee
        of_kept, of_float = (kind if lanes == 1 else ir.VectorType(kind, lanes) for kind in (kept, FLOAT))
        found = builder.load(builder.bitcast(builder.gep(row, [at]), of_kept.as_pointer()))
        found.align = 4 if kept == FLOAT else 1  # no more than that of a single number
        return found if kept == FLOAT else builder.sitofp(found, of_float)

    def across(self, total):
        """The sum of the lanes."""
        for half in (LANES // 2, LANES // 4, LANES // 8):
            indices = (ir.Constant(ir.VectorType(INT32, half), list(range(i, i + half))) for i in (0, half))
            total = self.builder.fadd(*(self.builder.shuffle_vector(total, total, each) for each in indices))
        return self.builder.extract_element(total, INT32(0))

    def fetch_next(self, at):
        """Into the cache: a part of the rows of w after these, which follow them in memory."""
        builder, size = self.builder, 4 if self.w[0].type.pointee == FLOAT else 1
        start = builder.mul(builder.add(self.k, at), INT64(len(self.w) * size))
        start = builder.add(builder.ptrtoint(self.w[0], INT64), start)
        for line in range(0, len(self.w) * size * LANES, 64):
            fetch_line(builder, builder.add(start, INT64(line)))


def tile_of(W: int, R: int):
    """sums (W, R) = weight[i : i + W] @ x[b : b + R].T, of weight (n, k) and x (B, k), each past its end the last row.

    Of weight and x come the addresses; `zero` is a number of the type of the weights.
    """

    @intrinsic
    def tile(typing_context, zero, weight, i, n, x, b, B, k, sums):
        signature = void(zero, int64, int64, int64, int64, int64, int64, int64, int64)

        def generate(context, builder, signature, arguments):
            zero, weight, i, n, x, b, B, k, sums = arguments

            def rows(kind, address, first, number, count):
                start, last = builder.inttoptr(address, kind.as_pointer()), builder.sub(number, INT64(1))
                for row in (builder.add(first, INT64(c)) for c in range(count)):
                    row = builder.select(builder.icmp_signed("<", row, last), row, last)
                    yield builder.gep(start, [builder.mul(row, k)])

            tile = Tile(builder, list(rows(zero.type, weight, i, n, W)), list(rows(FLOAT, x, b, B, R)), k)
            start = builder.inttoptr(sums, FLOAT.as_pointer())
            for c, total in enumerate(tile.sums()):
                builder.store(total, builder.gep(start, [INT64(c)]))
            return context.get_dummy_value()

        return signature, generate

    return tile


one_by_one, eight_by_one, four_by_two = tile_of(1, 1), tile_of(8, 1), tile_of(4, 2)
IN_CACHE = 1 << 22  # float32 weights of all layers


@numba.njit(**OPTIONS)
def product(zero, projection, x, y, B, n, k, sums, at_once):
    """y (B, n) += x (B, k) @ weight (n, k).T * scale (n,) + bias (n,).

    projection: the addresses of weight, scale and bias; there is a scale for integers, and need not be a bias.
    at_once: rows of the weight for a single x, 1 or 8.
    """
    weight, x_address, sums_address = projection[0], x.ctypes.data, sums.ctypes.data
    scale, bias = floats(pointer(projection[1])), floats(pointer(projection[2]))
    scaled, biased = projection[1] != 0, projection[2] != 0
    W, R = (4, 2) if B > 1 else (at_once, 1)
    for i in range(0, n, W):
        for b in range(0, B, R):
            if R == 2:
                four_by_two(zero, weight, i, n, x_address, b, B, k, sums_address)
            elif W == 1:
                one_by_one(zero, weight, i, n, x_address, b, B, k, sums_address)
            else:
                eight_by_one(zero, weight, i, n, x_address, b, B, k, sums_address)
            for r in range(min(R, B - b)):
                for c in range(min(W, n - i)):
                    total, at = sums[c * R + r], (b + r) * n + i + c
                    if scaled:
                        total *= scale[i + c]
                    if biased:
                        total += bias[i + c]
                    y[at] += total


@numba.njit
def convolve(x, window, weight, out_window, B, H, K):
    """x += conv(x), and the window after the token; weight: (H, K)."""
    W = (K - 1) * H
    for b in range(B):
        row, before, after = x[b * H : b * H + H], window[b * W : b * W + W], out_window[b * W : b * W + W]
        for i in range(W):
            after[i] = before[i + H] if i + H < W else row[i + H - W]
        for i in range(H):
            total = row[i] * weight[i * K + K - 1]
            for k in range(K - 1):
                total += before[k * H + i] * weight[i * K + k]
            row[i] += total


# What the kernel is told of a layer: seven sizes, then addresses, 0 for a part that is not there.
WINDOW, STATE, OUT_WINDOW, OUT_STATE, Q, CONV, RNN_NORM, MLP_NORM = range(7, 15)
IN_PROJ, GATE_PROJ, OUT_PROJ, UP_PROJ, DOWN_PROJ, FIELDS = range(15, 31, 3)  # each with its scale and bias


@functools.cache  # compiled when it is used
def layers_kernel_of(code: int, columns: int, is_int8: bool):
    """The kernel of layers of a cell with so many blocks of `projected`, in place of x (B, H)."""

    @compile_kernel(int64, voidptr, numba.float64, voidptr)
    def layers_kernel(number_of_layers, table, eps, x, b_start, b_stop, d_start, d_stop):
        table, B = numba.carray(table, ANY_LENGTH, np.int64), b_stop - b_start
        if is_int8:
            zero = np.int8(0)
        else:
            zero = np.float32(0.0)
        for i in range(number_of_layers):
            layer = table[i * FIELDS : (i + 1) * FIELDS]
            H, D, E, P, K, M, activation = layer[0], layer[1], layer[2], layer[3], layer[4], layer[5], layer[6]
            S, W = D + E, max(K - 1, 0) * H
            # Memory is read fastest a row at a time. From a cache, or of eight bits, the sum of a row takes longer:
            # each of its products waits for the one before.
            at_once = 8 if is_int8 or number_of_layers * H * (P + D + 2 * M) < IN_CACHE else 1
            out, q = floats(x)[b_start * H :], floats(pointer(layer[Q]))
            state, out_state = floats(pointer(layer[STATE])), floats(pointer(layer[OUT_STATE]))
            scratch, wide_scratch = allocate(4 * (8 + 6 * D + B * (H + P + D + max(M, D)))), allocate(8 * 3 * D)
            rows, carries = numba.carray(scratch, (6, D), np.float32), numba.carray(wide_scratch, (3, D), np.float64)
            carry, L, larger = carries[0], carries[1][:E], carries[2]
            sums = floats(scratch)[6 * D :]
            normed = sums[8:]
            projected = normed[B * H :]
            read = projected[B * P :]
            inner = read[B * D :]

            if K > 0:
                window, out_window = floats(pointer(layer[WINDOW])), floats(pointer(layer[OUT_WINDOW]))
                convolve(out, window[b_start * W :], floats(pointer(layer[CONV])), out_window[b_start * W :], B, H, K)
            normalize(out, floats(pointer(layer[RNN_NORM])), normed, B, H, eps)
            clear((projected[: B * P], inner[: B * max(M, D)]))
            product(zero, layer[IN_PROJ:], normed, projected, B, P, H, sums, at_once)
            place, of_cell = (0, D, 0, E), state_at(q, 0, q, D, (0, D, 0, D))
            for b in range(B):
                start, h = (b_start + b) * S, read[b * D : b * D + D]
                copy((carry, L), state_at(state, start, state, start + D, place))
                after = state_at(out_state, start, out_state, start + D, place)
                p = blocks_at(code, projected, b * P, D, E, columns, place)
                if code & RWKV:
                    rwkv_forward_row(p, of_cell, carry, L, h, after[0], after[1], rows, larger)
                else:
                    forward_row(code, p, of_cell, carry, L, h, rows)
                copy(after, (carry, L))
            if layer[GATE_PROJ]:
                product(zero, layer[GATE_PROJ:], normed, inner, B, D, H, sums, at_once)
                for j in range(B * D):
                    read[j] *= inner[j] * sigmoids(inner[j])[0]
                    inner[j] = 0.0
            product(zero, layer[OUT_PROJ:], read, out, B, H, D, sums, at_once)
            if M > 0:
                normalize(out, floats(pointer(layer[MLP_NORM])), normed, B, H, eps)
                product(zero, layer[UP_PROJ:], normed, inner, B, M, H, sums, at_once)
                for j in range(B * M):
                    inner[j] = activated(activation, inner[j])
                product(zero, layer[DOWN_PROJ:], inner, out, B, H, M, sums, at_once)
            release(scratch)
            release(wide_scratch)

    return layers_kernel


class _NotStock(Exception):
    """A part of a layer is not as it was made."""


def decode_layers(layers, hidden_states: Tensor, cache_layers) -> Tensor | None:
    """What the layers make of one token a row, (B, 1, H), without masks and gradients; their states move on.

    None, and nothing has changed, where the kernel would not compute what the modules of all layers do: for a cell
    without gates in `scan_numba`, where a module is not the stock one or has hooks, and for weights that are neither
    dense float32 nor torchao's eight-bit integers with a scale a row.
    """
    try:
        told = [_told(layer, cache_layer.read(), hidden_states) for layer, cache_layer in zip(layers, cache_layers)]
    except _NotStock:
        return None
    out = hidden_states.clone(memory_format=torch.contiguous_format)
    for (kernel, eps), group in itertools.groupby(told, lambda each: each[:2]):
        numbers = [each[2] for each in group]
        table = array.array("q", itertools.chain(*numbers))
        run(layers_kernel_of(*kernel), (len(numbers), table.buffer_info()[0], eps, out), len(out), 1)
    for cache_layer, (_, _, _, left, _) in zip(cache_layers, told):
        cache_layer.update(*left)
    return out


def _told(layer, carried: LayerState, hidden_states: Tensor) -> tuple:
    """What `layers_kernel_of` is given and eps; what the kernel is told; what it leaves for the cache; what it reads.

    Raises _NotStock.
    """
    B, _, H = hidden_states.shape
    # By the dictionaries behind the attributes, which nn.Module looks up at five times the price.
    parts = _stock(layer, MinRNNDecoderLayer)._modules
    rnn, mlp, K = _stock(parts["rnn"], MinRNNRecurrence), parts.get("mlp"), layer.window_size + 1
    (code, blocks, E), D, of_rnn = _of_cell(rnn.cell, rnn.state_size), rnn.state_size, rnn._modules
    (rnn_norm, eps), nothing = _norm(parts["rnn_norm"], H), (0, 0, 0)
    conv, mlp_norm, up_proj, down_proj, activation, M = 0, 0, nothing, nothing, 0, 0
    if code < 0 or eps is None:
        raise _NotStock
    if "conv" in parts:
        conv = _address(_stock(parts["conv"], MinRNNCausalConv)._parameters["weight"], (H, K))
    if mlp is not None:
        of_mlp = _stock(mlp, MinRNNMLP)._modules
        activation = ACTIVATIONS.get(type(_stock(of_mlp["act_fn"])), -1)
        mlp_norm, its_eps = _norm(parts["mlp_norm"], H)
        if activation < 0 or its_eps != eps:
            raise _NotStock
        M = getattr(of_mlp["up_proj"], "out_features", 0)
        up_proj, down_proj = _linear(of_mlp["up_proj"], M, H), _linear(of_mlp["down_proj"], H, M)
    P, gate_proj = sum(blocks), of_rnn.get("gate_proj")
    projections = [
        _linear(of_rnn["in_proj"], P, H),
        nothing if gate_proj is None else _linear(gate_proj, D, H),
        _linear(of_rnn["out_proj"], H, D),
        up_proj,
        down_proj,
    ]
    is_int8 = projections[0][1] != 0
    if any((scale != 0) != is_int8 for weight, scale, _ in projections if weight):
        raise _NotStock
    state, window = _kept(carried, (B, D + E), (B, K - 1, H))
    if state is None or window is None:
        state = dense(carried.state_or(rnn.start(hidden_states).expand(B, -1)))
        window = dense(carried.window_or(hidden_states.new_zeros(B, K - 1, H)))
    q = state  # not read
    if rnn.cell.parameter_names:
        q = dense(derived(rnn.cell, rnn.parameters_of_cell(hidden_states.new_empty(0, P))))
    left = torch.empty_like(state), torch.empty_like(window)
    addresses = [tensor.data_ptr() for tensor in (window, state, left[1], left[0], q)]
    sizes = H, D, E, P, K if conv else 0, M, activation
    told = [*sizes, *addresses, conv, rnn_norm, mlp_norm, *itertools.chain(*projections)]
    return (code, len(blocks), is_int8), eps, told, (*left, [left] if carried.record_past else []), (state, window, q)


def _kept(carried: LayerState, of_state: tuple[int, ...], of_window: tuple[int, ...]) -> tuple:
    """State and window where the kernel may read them as they are, which as a rule it may; or (None, None)."""
    state, window, seen = carried.state, carried.window, carried.seen
    goes_on = type(seen) is int and seen > 0 and state is not None and window is not None
    if goes_on and _is_dense(state, of_state) and _is_dense(window, of_window):
        return state, window
    return None, None


@functools.cache
def _of_cell(cell, D: int) -> tuple[int, tuple[int, ...], int]:
    """Its code, -1 for a cell that has none, the blocks of `projected`, and the number of log-sums."""
    return code_of(cell), cell.blocks(D), cell.log_sums(D)


def _stock(module, kind=None):
    """The module, if it is of no other class and computes what the class says."""
    own = module.__dict__
    if (kind and type(module) is not kind) or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        raise _NotStock
    return module


def _is_dense(tensor, shape: tuple[int, ...], dtype=torch.float32) -> bool:
    return tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu


def _address(tensor, shape: tuple[int, ...], dtype=torch.float32, kind=nn.Parameter) -> int:
    if type(tensor) is not kind or not _is_dense(tensor, shape, dtype):
        raise _NotStock
    return tensor.data_ptr()


def _norm(module, H: int) -> tuple[int, float | None]:
    return _address(_stock(module, nn.RMSNorm)._parameters["weight"], (H,)), module.eps


def _linear(module, n: int, k: int) -> tuple[int, int, int]:
    """The addresses of weight (n, k), of its scale and of the bias, 0 for what there is not."""
    parameters = _stock(module, nn.Linear)._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    of_bias = 0 if bias is None else _address(bias, (n,))
    if type(weight).__name__ != "Int8Tensor":
        return _address(weight, (n, k)), 0, of_bias
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:  # torchao's, not of weights alone
        raise _NotStock
    return _address(weight.qdata, (n, k), torch.int8, Tensor), _address(weight.scale, (n, 1), kind=Tensor), of_bias
