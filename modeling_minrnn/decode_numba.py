"""One token through all layers as one CPU kernel, so that a decoding step costs little more than to read the weights.

B batch, H hidden size, D width of h, E log-sums, P width of `projected`, K kernel size, M width of the MLP.
Everything is computed in float32, and the recurrence is that of a scan, `scan_numba.forward_row`. The projections may
also be eight-bit integers with a scale a row, as torchao's Int8WeightOnlyConfig keeps them. With weights in bfloat16
every part rounds what it hands on, as the modules do: a sequence read token by token ends as one that is read at once.
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
from .matrix_numba import decode_token, free, room_for_gates
from .modeling_minrnn import MinRNNCausalConv, MinRNNDecoderLayer, MinRNNMLP, MinRNNRecurrence
from .norm import MinRNNRMSNorm
from .scan_numba import (
    ANY_LENGTH,
    ANY_ORDER,
    OPTIONS,
    RWKV,
    UNWRAPPED,
    allocate,
    array_at,
    blocks_at,
    clear,
    code_of,
    compile_kernel,
    dense,
    derived,
    exp_nonpositive,
    floats,
    forward_row,
    get_or_insert_function,
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


LANES = 8  # of a sum of products, added up at its end: alike for every tile, and with them the bits of the result
FLOAT, INT8, INT16, INT32, INT64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))

# `kept` is a number of the type in which a layer keeps its weights: float32, an eight-bit integer, or the 16 bits of
# bfloat16. Beside integers, what is not the weight of a projection is float32.


@intrinsic
def numbers(typing_context, address, kept):
    """The array at an address, of anything but the weights of projections."""
    kind = kept if kept == numba.types.uint16 else numba.float32

    def generate(context, builder, signature, arguments):
        return array_at(context, builder, kind, arguments[0])

    return numba.types.Array(kind, 1, "C")(address, kept), generate


@intrinsic
def is_scaled(typing_context, kept):
    """Whether the weights of projections have a scale a row."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(1), kept == numba.types.int8)

    return numba.types.boolean(kept), generate


@intrinsic
def loaded(typing_context, number):
    """The float32 that is kept."""

    def generate(context, builder, signature, arguments):
        if arguments[0].type == FLOAT:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], INT32), INT32(16)), FLOAT)

    return numba.float32(number), generate


@intrinsic
def stored(typing_context, x, kept):
    """What is kept of a float32 that is rounded."""

    def generate(context, builder, signature, arguments):
        x, kept = arguments
        return builder.trunc(builder.lshr(builder.bitcast(x, INT32), INT32(16)), INT16) if kept.type == INT16 else x

    return (kept if kept == numba.types.uint16 else numba.float32)(numba.float32, kept), generate


@intrinsic
def rounded(typing_context, x, kept):
    """As a module hands it on: the nearest number of its dtype, of two the even one."""

    def generate(context, builder, signature, arguments):
        x, kept = arguments
        if kept.type != INT16:
            return x
        bits = builder.bitcast(x, INT32)
        half = builder.add(INT32(0x7FFF), builder.and_(builder.lshr(bits, INT32(16)), INT32(1)))
        nearest = builder.and_(builder.add(bits, half), INT32(0xFFFF0000))
        return builder.select(builder.fcmp_unordered("uno", x, x), x, builder.bitcast(nearest, FLOAT))  # NaN stays NaN

    return numba.float32(numba.float32, kept), generate


@numba.njit(**ANY_ORDER)
def normalize(kept, x, weight, y, B, H, eps):
    for b in range(B):
        row, out = x[b * H : b * H + H], y[b * H : b * H + H]
        total = np.float32(0.0)
        for i in range(H):
            total += row[i] * row[i]
        scale = np.float32(1.0 / math.sqrt(total / H + eps))
        for i in range(H):
            out[i] = rounded(row[i] * scale * loaded(weight[i]), kept)


BYTES = {FLOAT: 4, INT16: 2, INT8: 1}


class Tile:
    """Builds sums (W, R) = w (W, k) @ x (R, k).T in LLVM's terms, whose own vectoriser would order the sums of each
    shape of tile differently. w and x: the addresses of their rows, of float32, bfloat16 or eight-bit integers."""

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
        of_kept, bits, of_float = (kind if lanes == 1 else ir.VectorType(kind, lanes) for kind in (kept, INT32, FLOAT))
        found = builder.load(builder.bitcast(builder.gep(row, [at]), of_kept.as_pointer()))
        found.align = BYTES[kept]  # no more than that of a single number
        if kept == INT8:
            return builder.sitofp(found, of_float)
        if kept != FLOAT:  # the upper half of a float32
            half = ir.Constant(bits, 16 if lanes == 1 else [16] * lanes)
            found = builder.bitcast(builder.shl(builder.zext(found, bits), half), of_float)
        return found

    def across(self, total):
        """The sum of the lanes."""
        for half in (LANES // 2, LANES // 4, LANES // 8):
            indices = (ir.Constant(ir.VectorType(INT32, half), list(range(i, i + half))) for i in (0, half))
            total = self.builder.fadd(*(self.builder.shuffle_vector(total, total, each) for each in indices))
        return self.builder.extract_element(total, INT32(0))


W = 4  # rows of a weight that are read at once


def tile_of(R: int):
    """sums (W, R) = weight[i::step][:W] @ x[b : b + R].T, of weight (n, k) and x (B, k), each past its end the last row.

    Of weight and x come the addresses. Rows far apart are fetched from memory as fast as one alone, neighbours at half
    the speed; and one alone would leave a cache faster than its products can be added, as each waits for the one before.
    """

    def build(builder, kept, weight, i, step, n, x, b, B, k, sums):
        def rows(kind, address, first, step, number, count):
            start, last = builder.inttoptr(address, kind.as_pointer()), builder.sub(number, INT64(1))
            for row in (builder.add(first, builder.mul(step, INT64(c))) for c in range(count)):
                row = builder.select(builder.icmp_signed("<", row, last), row, last)
                yield builder.gep(start, [builder.mul(row, k)])

        w_rows = list(rows(kept.type, weight, i, step, n, W))
        tile = Tile(builder, w_rows, list(rows(FLOAT, x, b, INT64(1), B, R)), k)
        start = builder.inttoptr(sums, FLOAT.as_pointer())
        for c, total in enumerate(tile.sums()):
            builder.store(total, builder.gep(start, [INT64(c)]))
        builder.ret_void()

    @intrinsic
    def tile(typing_context, kept, weight, i, step, n, x, b, B, k, sums):
        signature = void(kept, int64, int64, int64, int64, int64, int64, int64, int64, int64)

        def generate(context, builder, signature, arguments):
            # A function of its own: put into each product of a layer, it would take a second to compile.
            kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
            function = get_or_insert_function(builder.module, kind, f"minrnn_tile_{R}_{arguments[0].type}")
            if function.is_declaration:
                function.linkage = "linkonce_odr"
                function.attributes.add("noinline")
                build(ir.IRBuilder(function.append_basic_block()), *function.args)
            builder.call(function, arguments)
            return context.get_dummy_value()

        return signature, generate

    return tile


by_one, by_two = tile_of(1), tile_of(2)


@numba.njit(**OPTIONS)
def product(kept, projection, x, y, B, n, k, sums):
    """y (B, n) += x (B, k) @ weight (n, k).T * scale (n,) + bias (n,).

    projection: the addresses of weight, scale and bias; there is a scale for integers, and need not be a bias.
    """
    weight, x_address, sums_address = projection[0], x.ctypes.data, sums.ctypes.data
    scale, bias, biased = floats(projection[1]), numbers(projection[2], kept), projection[2] != 0
    R, step = min(B, 2), -(-n // W)
    for i in range(step):
        for b in range(0, B, R):
            if R == 2:
                by_two(kept, weight, i, step, n, x_address, b, B, k, sums_address)
            else:
                by_one(kept, weight, i, step, n, x_address, b, B, k, sums_address)
            for r in range(min(R, B - b)):
                for c in range(W):
                    row = i + c * step
                    if row >= n:
                        break
                    total, at = sums[c * R + r], (b + r) * n + row
                    if is_scaled(kept):
                        total *= scale[row]
                    if biased:
                        total += loaded(bias[row])
                    y[at] = rounded(y[at] + rounded(total, kept), kept)


@numba.njit(**UNWRAPPED)
def convolve(kept, x, window, weight, out_window, B, H, K):
    """x += conv(x), and the window after the token; weight: (H, K)."""
    W = (K - 1) * H
    for b in range(B):
        row, before, after = x[b * H : b * H + H], window[b * W : b * W + W], out_window[b * W : b * W + W]
        for i in range(W):
            after[i] = before[i + H] if i + H < W else stored(row[i + H - W], kept)
        for i in range(H):
            total = row[i] * loaded(weight[i * K + K - 1])
            for k in range(K - 1):
                total += loaded(before[k * H + i]) * loaded(weight[i * K + k])
            row[i] = rounded(row[i] + rounded(total, kept), kept)


MATRICES = {"hgrn2": 1 << 10, "gated_delta": 1 << 11}  # codes beside those of `scan_numba`
DELTA = MATRICES["gated_delta"]

# What the kernel is told of a layer: seven sizes, then addresses, 0 for a part that is not there.
WINDOW, STATE, OUT_WINDOW, OUT_STATE, Q, CONV, RNN_NORM, MLP_NORM = range(7, 15)
IN_PROJ, GATE_PROJ, OUT_PROJ, UP_PROJ, DOWN_PROJ, FIELDS = range(15, 31, 3)  # each with its scale and bias


def recur_of_matrices(code, columns, layer, projected, read, b_start, B, rows, carries):
    """`recur` of `HGRN2` and `GatedDelta`, S = D + E = D n numbers."""
    D, P, S, q = layer[1], layer[3], layer[1] + layer[2], floats(layer[Q])
    n, is_delta = S // D, code == DELTA
    heads = D // n
    steps = (P - heads - D) // (heads + 2 * D) if is_delta else 1
    rooms, gates, wide = room_for_gates(steps, 1, n)
    for b in range(B):
        start = (b_start + b) * S
        state, out_state = floats(layer[STATE])[start : start + S], floats(layer[OUT_STATE])[start : start + S]
        cell = is_delta, steps, heads, n, n
        decode_token(cell, projected[b * P : b * P + P], q, state, out_state, read[b * D : b * D + D], gates, wide)
    free(rooms)


def recur(code, columns, layer, projected, read, b_start, B, rows, carries):
    """What the cell makes of `projected` (B, P), into `read` (B, D), and its states after it."""


@numba.extending.overload(recur, prefer_literal=True, jit_options=OPTIONS)
def recur_of(code, columns, layer, projected, read, b_start, B, rows, carries):
    """Compiled for each cell: what is inlined is copied with all that it is inlined in, which takes seconds."""
    of_code, of_columns = code.literal_value, columns.literal_value
    if of_code in MATRICES.values():
        return recur_of_matrices

    def recur(code, columns, layer, projected, read, b_start, B, rows, carries):
        D, E, P, q = layer[1], layer[2], layer[3], floats(layer[Q])
        carry, L, larger, S = carries[0], carries[1][:E], carries[2], D + E
        for b in range(b_start, b_start + B):
            state, out_state = floats(layer[STATE])[b * S : b * S + S], floats(layer[OUT_STATE])[b * S : b * S + S]
            for d in range(D):
                carry[d] = state[d]
            for e in range(E):
                L[e] = state[D + e]
            h = read[(b - b_start) * D :]
            p = blocks_at(of_code, projected, (b - b_start) * P, D, E, of_columns, (0, D, 0, E))
            if of_code & RWKV:
                rwkv_forward_row(p, (q, q[D:]), carry, L, h, out_state, out_state[D:], rows, larger)
            else:
                forward_row(of_code, p, (q, q), carry, L, h, rows)
            for d in range(D):
                out_state[d] = np.float32(carry[d])
            for e in range(E):
                out_state[D + e] = np.float32(L[e])

    return recur


KEPT = {"float32": np.float32(0), "bfloat16": np.uint16(0), "int8": np.int8(0)}


@functools.cache  # compiled when it is used
def layers_kernel_of(code: int, columns: int, dtype: str):
    """The kernel of layers of a cell with so many blocks of `projected`, in place of x (B, H).

    dtype: of the weights of projections.
    """
    kept = KEPT[dtype]

    @compile_kernel(int64, voidptr, numba.float64, voidptr)
    def layers_kernel(number_of_layers, table, eps, x, b_start, b_stop, d_start, d_stop):
        table, B = numba.carray(table, ANY_LENGTH, np.int64), b_stop - b_start
        for i in range(number_of_layers):
            layer = table[i * FIELDS : (i + 1) * FIELDS]
            H, D, P, K, M, activation = layer[0], layer[1], layer[3], layer[4], layer[5], layer[6]
            W = max(K - 1, 0) * H
            out = floats(x)[b_start * H :]
            scratch, wide_scratch = allocate(4 * (8 + 6 * D + B * (H + P + D + max(M, D)))), allocate(8 * 3 * D)
            rows, carries = numba.carray(scratch, (6, D), np.float32), numba.carray(wide_scratch, (3, D), np.float64)
            sums = floats(scratch)[6 * D :]
            normed = sums[8:]
            projected = normed[B * H :]
            read = projected[B * P :]
            inner = read[B * D :]

            if K > 0:
                window = numbers(layer[WINDOW], kept)[b_start * W :]
                out_window = numbers(layer[OUT_WINDOW], kept)[b_start * W :]
                convolve(kept, out, window, numbers(layer[CONV], kept), out_window, B, H, K)
            normalize(kept, out, numbers(layer[RNN_NORM], kept), normed, B, H, eps)
            clear((projected[: B * P], inner[: B * max(M, D)]))
            product(kept, layer[IN_PROJ:], normed, projected, B, P, H, sums)
            recur(code, columns, layer, projected, read, b_start, B, rows, carries)
            for j in range(B * D):
                read[j] = rounded(read[j], kept)
            if layer[GATE_PROJ]:
                product(kept, layer[GATE_PROJ:], normed, inner, B, D, H, sums)
                for j in range(B * D):
                    read[j] = rounded(read[j] * rounded(inner[j] * sigmoids(inner[j])[0], kept), kept)
                    inner[j] = 0.0
            product(kept, layer[OUT_PROJ:], read, out, B, H, D, sums)
            if M > 0:
                normalize(kept, out, numbers(layer[MLP_NORM], kept), normed, B, H, eps)
                product(kept, layer[UP_PROJ:], normed, inner, B, M, H, sums)
                for j in range(B * M):
                    inner[j] = rounded(activated(activation, inner[j]), kept)
                product(kept, layer[DOWN_PROJ:], inner, out, B, H, M, sums)
            release(scratch)
            release(wide_scratch)

    return layers_kernel


class _NotStock(Exception):
    """A part of a layer is not as it was made."""


def decode_layers(layers, hidden_states: Tensor, cache_layers) -> Tensor | None:
    """What the layers make of one token a row, (B, 1, H), without masks and gradients; their states move on.

    None, and nothing has changed, where the kernel would not compute what the modules of all layers do: for a cell
    without gates in `scan_numba`, where a module is not the stock one or has hooks, and for weights that are neither
    dense and of the dtype of hidden_states, float32 or bfloat16, nor torchao's eight-bit integers with a scale a row.
    """
    try:
        told = [_told(layer, cache_layer.read(), hidden_states) for layer, cache_layer in zip(layers, cache_layers)]
    except _NotStock:
        return None
    out = hidden_states.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for (kernel, eps), group in itertools.groupby(told, lambda each: each[:2]):
        numbers = [each[2] for each in group]
        table = array.array("q", itertools.chain(*numbers))
        run(layers_kernel_of(*kernel), (len(numbers), table.buffer_info()[0], eps, out), len(out), 1)
    for cache_layer, (_, _, _, left, _) in zip(cache_layers, told):
        cache_layer.update(*left)
    return out.to(hidden_states.dtype)


def _told(layer, carried: LayerState, hidden_states: Tensor) -> tuple:
    """What `layers_kernel_of` is given and eps; what the kernel is told; what it leaves for the cache; what it reads.

    Raises _NotStock.
    """
    (B, _, H), dtype = hidden_states.shape, hidden_states.dtype
    # By the dictionaries behind the attributes, which nn.Module looks up at five times the price.
    parts = _stock(layer, MinRNNDecoderLayer)._modules
    rnn, mlp, K = _stock(parts["rnn"], MinRNNRecurrence), parts.get("mlp"), layer.window_size + 1
    (code, blocks, E), D, of_rnn = _of_cell(rnn.cell, rnn.state_size), rnn.state_size, rnn._modules
    (rnn_norm, eps), nothing = _norm(parts["rnn_norm"], H, dtype), (0, 0, 0)
    conv, mlp_norm, up_proj, down_proj, activation, M = 0, 0, nothing, nothing, 0, 0
    if code < 0 or eps is None:
        raise _NotStock
    if "conv" in parts:
        conv = _address(_stock(parts["conv"], MinRNNCausalConv)._parameters["weight"], (H, K), dtype)
    if mlp is not None:
        of_mlp = _stock(mlp, MinRNNMLP)._modules
        activation = ACTIVATIONS.get(type(_stock(of_mlp["act_fn"])), -1)
        mlp_norm, its_eps = _norm(parts["mlp_norm"], H, dtype)
        if activation < 0 or its_eps != eps:
            raise _NotStock
        M = getattr(of_mlp["up_proj"], "out_features", 0)
        up_proj, down_proj = _linear(of_mlp["up_proj"], M, H, dtype), _linear(of_mlp["down_proj"], H, M, dtype)
    P, gate_proj = sum(blocks), of_rnn.get("gate_proj")
    projections = [
        _linear(of_rnn["in_proj"], P, H, dtype),
        nothing if gate_proj is None else _linear(gate_proj, D, H, dtype),
        _linear(of_rnn["out_proj"], H, D, dtype),
        up_proj,
        down_proj,
    ]
    is_int8 = projections[0][1] != 0
    if any((scale != 0) != is_int8 for weight, scale, _ in projections if weight):
        raise _NotStock
    state, window = _kept(carried, (B, D + E), (B, K - 1, H), dtype)
    if state is None or window is None:
        state = dense(carried.state_or(rnn.start(hidden_states).expand(B, -1)))
        window = carried.window_or(hidden_states.new_zeros(B, K - 1, H)).detach().to(dtype).contiguous()
    q = state  # not read
    if rnn.cell.parameter_names:
        q = dense(derived(rnn.cell, rnn.parameters_of_cell(hidden_states.new_empty(0, P))))
    left = torch.empty_like(state), torch.empty_like(window)
    addresses = [tensor.data_ptr() for tensor in (window, state, left[1], left[0], q)]
    sizes = H, D, E, P, K if conv else 0, M, activation
    told = [*sizes, *addresses, conv, rnn_norm, mlp_norm, *itertools.chain(*projections)]
    kernel = code, len(blocks), "int8" if is_int8 else str(dtype).removeprefix("torch.")
    return kernel, eps, told, (*left, [left] if carried.record_past else []), (state, window, q)


def _kept(carried: LayerState, of_state: tuple[int, ...], of_window: tuple[int, ...], dtype) -> tuple:
    """State and window where the kernel may read them as they are, which as a rule it may; or (None, None)."""
    state, window, seen = carried.state, carried.window, carried.seen
    goes_on = type(seen) is int and seen > 0 and state is not None and window is not None
    if goes_on and _is_dense(state, of_state) and _is_dense(window, of_window, dtype):
        return state, window
    return None, None


@functools.cache
def _of_cell(cell, D: int) -> tuple[int, tuple[int, ...], int]:
    """Its code, -1 for a cell that has none, the blocks of `projected`, and the number of log-sums."""
    return MATRICES.get(cell.name, code_of(cell)), cell.blocks(D), cell.state_numbers(D) - D


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


def _norm(module, H: int, dtype) -> tuple[int, float | None]:
    return _address(_stock(module, MinRNNRMSNorm)._parameters["weight"], (H,), dtype), module.eps


def _linear(module, n: int, k: int, dtype) -> tuple[int, int, int]:
    """The addresses of weight (n, k), of its scale and of the bias, 0 for what there is not."""
    parameters = _stock(module, nn.Linear)._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    of_bias = 0 if bias is None else _address(bias, (n,), dtype)
    if type(weight).__name__ != "Int8Tensor":
        return _address(weight, (n, k), dtype), 0, of_bias
    of_activations = weight.act_quant_kwargs is not None or weight.act_pre_scale is not None
    if of_activations or dtype is not torch.float32:
        raise _NotStock
    return _address(weight.qdata, (n, k), torch.int8, Tensor), _address(weight.scale, (n, 1), kind=Tensor), of_bias
