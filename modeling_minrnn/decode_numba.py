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
import operator
import weakref
from collections.abc import Callable
from typing import Any

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
    DELTA,
    HGRN2,
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


@intrinsic
def scaled(typing_context, total, scale):
    """Their product, rounded. Whether it is fused with the sum after it would depend on the batch."""

    def generate(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return numba.float32(numba.float32, numba.float32), generate


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
    """sums (W, R) = weight[i::step][:W] @ x[b : b + R].T, of weight (n, k) and x (B, k), past their ends the last row.

    Of weight and x come the addresses. From memory rows far apart come as fast as one alone, neighbours at half the
    speed. From a cache one alone would come faster than its products add up, as each waits for the one before.
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
def product(kept, projection, x, y, B, start, stop, n, k, sums):
    """y (B, n) += x (B, k) @ weight (n, k).T * scale (n,) + bias (n,), its columns from start to stop.

    projection: the addresses of weight, scale and bias; there is a scale for integers, and need not be a bias.
    """
    weight, x_address, sums_address = projection[0], x.ctypes.data, sums.ctypes.data
    scale, bias, biased = floats(projection[1]), numbers(projection[2], kept), projection[2] != 0
    R, step = min(B, 2), -((start - stop) // W)
    for i in range(start, start + step):
        for b in range(0, B, R):
            if R == 2:
                by_two(kept, weight, i, step, stop, x_address, b, B, k, sums_address)
            else:
                by_one(kept, weight, i, step, stop, x_address, b, B, k, sums_address)
            for r in range(min(R, B - b)):
                for c in range(W):
                    row = i + c * step
                    if row >= stop:
                        break
                    total, at = sums[c * R + r], (b + r) * n + row
                    if is_scaled(kept):
                        total = scaled(total, scale[row])
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


# The row of a layer in the table of the kernel: seven sizes, then addresses, 0 for a part that is not there.
WINDOW, STATE, OUT_WINDOW, OUT_STATE, Q, CONV, RNN_NORM, MLP_NORM = range(7, 15)
IN_PROJ, GATE_PROJ, OUT_PROJ, UP_PROJ, DOWN_PROJ, FIELDS = range(15, 31, 3)  # each with its scale and bias


def recur_of_matrices(code, columns, layer, projected, read, b_start, B, rows, carries):
    """`recur` of `HGRN2` and `GatedDelta`, S = D + E = D n numbers."""
    D, P, S, q = layer[1], layer[3], layer[1] + layer[2], floats(layer[Q])
    n, is_delta = S // D, code == DELTA
    heads = D // n
    steps = (P - heads - D) // (heads + 2 * D) if is_delta else 1
    gates, wide = room_for_gates(steps, 1, n)
    for b in range(B):
        start = (b_start + b) * S
        state, out_state = floats(layer[STATE])[start : start + S], floats(layer[OUT_STATE])[start : start + S]
        cell = is_delta, steps, heads, n, n
        decode_token(cell, projected[b * P : b * P + P], q, state, out_state, read[b * D : b * D + D], gates, wide)
    free(gates)
    free((wide,))


def recur(code, columns, layer, projected, read, b_start, B, rows, carries):
    """What the cell makes of `projected` (B, P), into `read` (B, D), and its states after it."""


@numba.extending.overload(recur, prefer_literal=True, jit_options=OPTIONS)
def recur_of(code, columns, layer, projected, read, b_start, B, rows, carries):
    """Compiled for each cell: what is inlined is copied with all that it is inlined in, which takes seconds."""
    of_code, of_columns = code.literal_value, columns.literal_value
    if of_code & (HGRN2 | DELTA):
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

    dtype: of the weights of projections. embeddings: the address of those of ids (B,), which x is to begin with, or 0.
    """
    kept = KEPT[dtype]

    @compile_kernel(int64, voidptr, numba.float64, voidptr, voidptr, int64)
    def layers_kernel(number_of_layers, table, eps, x, ids, embeddings, b_start, b_stop, d_start, d_stop):
        table, B = numba.carray(table, ANY_LENGTH, np.int64), b_stop - b_start
        if embeddings:
            H, ids, weight = table[0], numba.carray(ids, b_stop, np.int64), numbers(embeddings, kept)
            for b in range(b_start, b_stop):
                for j in range(H):
                    floats(x)[b * H + j] = loaded(weight[ids[b] * H + j])
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
            product(kept, layer[IN_PROJ:], normed, projected, B, 0, P, P, H, sums)
            recur(code, columns, layer, projected, read, b_start, B, rows, carries)
            for j in range(B * D):
                read[j] = rounded(read[j], kept)
            if layer[GATE_PROJ]:
                product(kept, layer[GATE_PROJ:], normed, inner, B, 0, D, D, H, sums)
                for j in range(B * D):
                    read[j] = rounded(read[j] * rounded(inner[j] * sigmoids(inner[j])[0], kept), kept)
                    inner[j] = 0.0
            product(kept, layer[OUT_PROJ:], read, out, B, 0, H, H, D, sums)
            if M > 0:
                normalize(kept, out, numbers(layer[MLP_NORM], kept), normed, B, H, eps)
                product(kept, layer[UP_PROJ:], normed, inner, B, 0, M, M, H, sums)
                for j in range(B * M):
                    inner[j] = rounded(activated(activation, inner[j]), kept)
                product(kept, layer[DOWN_PROJ:], inner, out, B, 0, H, H, M, sums)
            release(scratch)
            release(wide_scratch)

    return layers_kernel


@functools.cache
def head_kernel_of(dtype: str):
    """The kernel of the last norm and of logits (B, V), of x (B, H).

    head: H, V, the addresses of the weight of the norm, and of that of the head, its scale and bias.
    """
    kept = KEPT[dtype]

    @compile_kernel(voidptr, numba.float64, voidptr, voidptr)
    def head_kernel(head, eps, x, logits, b_start, b_stop, d_start, d_stop):
        head, B = numba.carray(head, 6, np.int64), b_stop - b_start
        H, V, norm = head[0], head[1], numbers(head[2], kept)
        scratch = allocate(4 * (8 + B * H))
        sums, out = floats(scratch), floats(logits)[b_start * V :]
        normed = sums[8:]
        normalize(kept, floats(x)[b_start * H :], norm, normed, B, H, eps)
        for b in range(B):
            clear((out[b * V + d_start : b * V + d_stop],))
        product(kept, head[3:], normed, out, B, d_start, d_stop, V, H, sums)
        release(scratch)

    return head_kernel


class _NotStock(Exception):
    """A part of a model is not as it was made."""


_READ: tuple[Callable, ...] = (
    type, operator.attrgetter("dtype", "shape"), Tensor.data_ptr, Tensor.is_contiguous
)  # fmt: skip
_NO_TENSOR = torch.empty(0)


class _Arguments:
    """What the kernels take of a model, sizes and addresses, and whether it still holds.

    Parts are read from the dictionaries behind attributes, which nn.Module looks up at five times the price.
    """

    def __init__(self, model, num_layers: int, head: nn.Module | None, like: Tensor | None) -> None:
        """Raises _NotStock where kernels would not compute what the modules do, without a head with hidden states like
        these."""
        self.modules: list[nn.Module] = []  # without the model, which may go
        self.hooks: list[dict] = []
        self.values: list[tuple[dict, str, Any]] = []
        self.tensors: list[tuple[dict, str]] = []
        own, self.head = vars(model), head
        if head is not None:
            self.child(own, "dropout", nn.Dropout)
            of_embedding = self.child(own, "embed_tokens", nn.Embedding)
            like = of_embedding["_parameters"]["weight"]
        assert like is not None
        self.H, self.dtype = H, dtype = like.shape[-1], like.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise _NotStock
        if head is not None:
            if self.value(of_embedding, "max_norm") is not None:
                raise _NotStock
            self.size = self.value(of_embedding, "num_embeddings")
            self.embeddings = self.address(of_embedding["_parameters"], "weight", (self.size, H), dtype)
            norm, self.eps = self.norm(own, "norm", H, dtype)
            V = self.value(self.module(head, nn.Linear), "out_features")
            projection = self.linear(head, V, H, dtype)
            self.of_head, self.kept_in_head = array.array("q", [H, V, norm, *projection]), _kept(projection, dtype)
        layers = vars(self.value(own["_modules"], "layers"))["_modules"]
        parts = [self.layer(self.value(layers, str(i)), H, dtype) for i in range(num_layers)]
        self.kernels, tables, self.recurrences = zip(*parts)
        self.table = array.array("q", itertools.chain(*tables))
        self.kinds = [*map(type, self.modules)]
        self.owners, self.names, self.held = zip(*self.values)
        self.homes, self.of_homes = zip(*self.tensors)
        self.read = self.read_tensors()

    def holds(self, head: nn.Module | None) -> bool:
        return (
            head is self.head
            and all(map(operator.is_, map(dict.get, self.owners, self.names), self.held))
            and not any(self.hooks)
            and [*map(type, self.modules)] == self.kinds
            and self.read_tensors() == self.read
        )

    def read_tensors(self) -> list[list]:
        tensors = [*map(dict.get, self.homes, self.of_homes, itertools.repeat(_NO_TENSOR))]
        return [[*map(read, tensors)] for read in _READ]

    def value(self, owner: dict, name: str):
        self.values.append((owner, name, owner.get(name)))
        return owner.get(name)

    def module(self, module, kind) -> dict:
        """What is behind its attributes, if it is of no other class and computes what the class says."""
        if type(module) is not kind:
            raise _NotStock
        own = vars(module)
        hooks = own["_forward_hooks"], own["_forward_pre_hooks"]
        if any(hooks) or self.value(own, "forward") is not None:
            raise _NotStock
        self.modules.append(module)
        self.hooks += hooks
        return own

    def child(self, own: dict, name: str, kind) -> dict:
        return self.module(self.value(own["_modules"], name), kind)

    def address(self, owner: dict, name: str, shape: tuple[int, ...], dtype=torch.float32, kind=nn.Parameter) -> int:
        tensor: Any = owner.get(name)
        if type(tensor) is not kind or not _is_dense(tensor, shape, dtype):
            raise _NotStock
        self.tensors.append((owner, name))
        return tensor.data_ptr()

    def norm(self, own: dict, name: str, H: int, dtype) -> tuple[int, float]:
        of_norm = self.child(own, name, MinRNNRMSNorm)
        eps = self.value(of_norm, "eps")
        if eps is None:
            raise _NotStock
        return self.address(of_norm["_parameters"], "weight", (H,), dtype), eps

    def linear(self, module, n: int, k: int, dtype) -> tuple[int, int, int]:
        """The addresses of weight (n, k), of its scale and of the bias, 0 for what there is not."""
        parameters = self.module(module, nn.Linear)["_parameters"]
        has_bias = self.value(parameters, "bias") is not None
        bias = self.address(parameters, "bias", (n,), dtype) if has_bias else 0
        if type(parameters.get("weight")).__name__ != "Int8Tensor":
            return self.address(parameters, "weight", (n, k), dtype), 0, bias
        own = vars(self.value(parameters, "weight"))
        of_activations = [self.value(own, name) is not None for name in ("act_quant_kwargs", "act_pre_scale")]
        if any(of_activations) or dtype is not torch.float32:
            raise _NotStock
        return (
            self.address(own, "qdata", (n, k), torch.int8, Tensor),
            self.address(own, "scale", (n, 1), kind=Tensor),
            bias,
        )

    def layer(self, layer, H: int, dtype) -> tuple:
        """What `layers_kernel_of` is given, and eps; the row of the table, its states left open; the recurrence."""
        own, nothing = self.module(layer, MinRNNDecoderLayer), (0, 0, 0)
        of_rnn, K = self.child(own, "rnn", MinRNNRecurrence), self.value(own, "window_size") + 1
        D, parts = self.value(of_rnn, "state_size"), of_rnn["_modules"]
        code, blocks, E = _of_cell(self.value(of_rnn, "cell"), D)
        P, gate_proj, conv, mlp = sum(blocks), self.value(parts, "gate_proj"), 0, (0, 0, 0, nothing, nothing)
        if self.value(own, "has_conv"):
            conv = self.address(self.child(own, "conv", MinRNNCausalConv)["_parameters"], "weight", (H, K), dtype)
        rnn_norm, eps = self.norm(own, "rnn_norm", H, dtype)
        if self.value(own, "has_mlp"):
            mlp = self.mlp(own, H, dtype, eps)
        M, activation, mlp_norm, up_proj, down_proj = mlp
        in_proj = self.linear(self.value(parts, "in_proj"), P, H, dtype)
        gate_proj = nothing if gate_proj is None else self.linear(gate_proj, D, H, dtype)
        out_proj = self.linear(self.value(parts, "out_proj"), H, D, dtype)
        projections, kept = (in_proj, gate_proj, out_proj, up_proj, down_proj), _kept(in_proj, dtype)
        if code < 0 or any(_kept(each, dtype) != kept for each in projections if each != nothing):
            raise _NotStock
        sizes, states = (H, D, E, P, K if conv else 0, M, activation), [0] * (CONV - WINDOW)
        row = [*sizes, *states, conv, rnn_norm, mlp_norm, *itertools.chain(*projections)]
        return ((code, len(blocks), kept), eps), row, own["_modules"]["rnn"]

    def mlp(self, own: dict, H: int, dtype, eps: float) -> tuple:
        """The width, the activation, and what of its weights is where."""
        norm, its_eps = self.norm(own, "mlp_norm", H, dtype)
        parts = self.child(own, "mlp", MinRNNMLP)["_modules"]
        up_proj, down_proj, act_fn = (self.value(parts, name) for name in ("up_proj", "down_proj", "act_fn"))
        activation, M = ACTIVATIONS.get(type(act_fn), -1), getattr(up_proj, "out_features", 0)
        self.module(act_fn, type(act_fn))
        if activation < 0 or its_eps != eps:
            raise _NotStock
        return M, activation, norm, self.linear(up_proj, M, H, dtype), self.linear(down_proj, H, M, dtype)


_ARGUMENTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _arguments_of(model, num_layers: int, head: nn.Module | None, like: Tensor | None = None) -> _Arguments | None:
    """None where a part is not stock."""
    known, key = _ARGUMENTS.setdefault(model, {}), (num_layers, None if like is None else (like.dtype, like.shape[-1]))
    arguments = known.get(key)
    if arguments is None or not arguments.holds(head):
        try:
            arguments = known[key] = _Arguments(model, num_layers, head, like)
        except _NotStock:
            known.pop(key, None)
            return None
    return arguments


def decode_layers(model, num_layers: int, hidden_states: Tensor, cache_layers) -> Tensor | None:
    """What the first layers of a model make of one token a row, (B, 1, H), without masks and gradients; their states
    move on.

    None, and nothing has changed, where kernels would not compute what the modules do: for a cell without gates in
    `scan_numba`, where a module is not the stock one or has hooks, and for weights that are neither dense and of the
    dtype of hidden_states, float32 or bfloat16, nor torchao's eight-bit integers with a scale a row.
    """
    arguments = _arguments_of(model, num_layers, None, hidden_states)
    if arguments is None:
        return None
    out = hidden_states.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    _run_layers(arguments, cache_layers, out)
    return out.to(hidden_states.dtype)


def decode_tokens(model, num_layers: int, ids: Tensor, cache_layers, head: nn.Module) -> Tensor | None:
    """The logits (B, 1, V) after one token a row, ids (B, 1), embedding and head by kernels too; or None.

    Each operation of torch that this path does without saves more than its own time: weights that are larger than a
    cache leave nothing of its code there, and it is read from memory at every token.
    """
    arguments, rows = _arguments_of(model, num_layers, head), ids.tolist()
    if arguments is None or not rows or ids.dtype is not torch.int64 or not ids.is_contiguous():
        return None
    if not 0 <= min(rows)[0] <= max(rows)[0] < arguments.size:
        return None
    out = torch.empty(len(rows), 1, arguments.H, dtype=torch.float32)
    _run_layers(arguments, cache_layers, out, ids, arguments.embeddings)
    V, table_of_head = arguments.of_head[1], arguments.of_head.buffer_info()[0]
    logits = torch.empty(len(rows), 1, V, dtype=torch.float32)
    run(head_kernel_of(arguments.kept_in_head), (table_of_head, arguments.eps, out, logits), len(rows), V)
    return logits.to(arguments.dtype)


def _run_layers(arguments: _Arguments, cache_layers, out: Tensor, ids: Tensor | int = 0, embeddings: int = 0) -> None:
    like = out if arguments.dtype is torch.float32 else out.to(arguments.dtype)
    table, carried = arguments.table[:], []
    for start, rnn, cache_layer in zip(range(0, len(table), FIELDS), arguments.recurrences, cache_layers):
        carried.append(_carried(rnn, cache_layer.read(), table[start : start + WINDOW], like))
        addresses = array.array("q", [tensor.data_ptr() for tensor in carried[-1]])
        table[start + WINDOW : start + CONV] = addresses
    first = table.buffer_info()[0]
    for (kernel, eps), group in itertools.groupby(arguments.kernels):
        count = len([*group])
        run(layers_kernel_of(*kernel), (count, first, eps, out, ids, embeddings), len(out), 1)
        first, embeddings = first + 8 * FIELDS * count, 0
    for cache_layer, (_, _, window, state, _) in zip(cache_layers, carried):
        cache_layer.update(state, window, [(state, window)] if cache_layer.record_past else [])


def _carried(rnn, carried: LayerState, sizes, like: Tensor) -> tuple[Tensor, ...]:
    """Window and state that the kernel reads, those that it writes, and the parameters of the cell."""
    (B, _, _), (H, D, E, P, K, *_) = like.shape, sizes
    state: Any = carried.state
    window: Any = carried.window
    goes_on = type(carried.seen) is int and carried.seen > 0 and state is not None and window is not None
    if not (goes_on and _is_dense(state, (B, D + E)) and _is_dense(window, (B, max(K - 1, 0), H), like.dtype)):
        state = dense(carried.state_or(rnn.start(like).expand(B, -1)))
        window = carried.window_or(like.new_zeros(B, max(K - 1, 0), H)).detach().to(like.dtype).contiguous()
    q = state  # not read
    if rnn.cell.parameter_names:
        (q,) = map(dense, derived(rnn.cell, rnn.parameters_of_cell(like.new_empty(0, P))))
    return window, state, torch.empty_like(window), torch.empty_like(state), q


@functools.cache
def _of_cell(cell, D: int) -> tuple[int, tuple[int, ...], int]:
    """Its code, -1 for a cell that has none, the blocks of `projected`, and the number of log-sums."""
    return code_of(cell), cell.blocks(D), cell.state_numbers(D) - D


def _kept(projection: tuple[int, int, int], dtype) -> str:
    """A key of KEPT: an address of scales says that weights are integers."""
    return "int8" if projection[1] else str(dtype).removeprefix("torch.")


def _is_dense(tensor, shape: tuple[int, ...], dtype=torch.float32) -> bool:
    return tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu
