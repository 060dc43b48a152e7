"""CPU kernels of the cells whose state is a matrix, `HGRN2` and `GatedDelta`, gates and all: token by token.

A matrix is held as N rows of N, one for each number of its value and so of what it reads: its columns, in the terms of
`cells.Matrix`. n numbers and zeros up to N, a multiple of 8. Rows know nothing of each other. Four of them are walked
at a time through C tokens, whose gates are computed before, with the state in float64: it stays in the first cache,
and nothing is rounded that adds up.

Backwards, a first walk keeps the state before every C tokens and a second one, from the last of these to the first,
the states of four rows in C tokens. With C about the root of T that is little memory.
"""

import math

from .scan_numba import (
    ANY_ORDER,
    DELTA,
    GRADIENTS,
    INPUTS,
    STRIDED,
    allocate,
    both,
    code_of,
    compile_kernel,
    doubles,
    floats,
    hgrn_gates,
    int64,
    is_set,
    np,
    numba,
    release,
    run,
    sigmoids,
    voidptr,
)

CHUNK = 32  # tokens at a time at least: the gates of more would leave the second cache

# Sums in any order. What is called and not inlined is compiled once.
inlined, called = numba.njit(forceinline=True, **ANY_ORDER), numba.njit(**ANY_ORDER)


@inlined
def copy(target, start, source, from_, count):
    target, source = target[start : start + count], source[from_ : from_ + count]
    for i in range(count):
        target[i] = source[i]


@inlined
def clear(x, count):
    for i in range(count):
        x[i] = 0.0


# The gates of a token, into float64 (N,): `a` what is kept, of the delta rule one number, key, value and query.


@called
def silu_row(x, y):
    for i in range(len(x)):
        y[i] = x[i] * sigmoids(x[i])[0]


@called
def silu_back(x, d_y, d_x):
    for i in range(len(x)):
        s, rest = sigmoids(x[i])
        d_x[i] = d_y[i] * s * (np.float32(1.0) + x[i] * rest)


@called
def unit_row(x, y):
    """silu(x) over its length, as `GatedDelta._unit`."""
    silu_row(x, y)
    total = 1e-6
    for i in range(len(x)):
        total += y[i] * y[i]
    scale = 1.0 / math.sqrt(total)
    for i in range(len(x)):
        y[i] *= scale
    return scale


@called
def unit_back(x, y, d_y, d_x):
    """y is overwritten."""
    scale, along = unit_row(x, y), 0.0
    for i in range(len(x)):
        along += y[i] * d_y[i]
    for i in range(len(x)):
        y[i] = scale * (d_y[i] - along * y[i])
    silu_back(x, y, d_x)


@called
def share_row(forget, bound, a, k):
    """a of HGRN, and 1 - a."""
    for i in range(len(a)):
        a[i], k[i] = both(np.float64(hgrn_gates(forget[i], np.float32(0.0), bound[i])[0]))


@called
def share_back(forget, bound, d_a, d_forget, d_bound):
    for i in range(len(forget)):
        keep, rest = sigmoids(forget[i])
        d_forget[i] = np.float32(d_a[i]) * (np.float32(1.0) - bound[i]) * keep * rest
        d_bound[i] += d_a[i] * rest


@inlined
def decay_of(gate, rate, step):
    """a of log a = -rate softplus(gate + step), that softplus and its derivative, of which the sums are gradients."""
    x = np.float64(gate) + np.float64(step)
    e = math.exp(-abs(x))
    softplus = max(x, 0.0) + math.log1p(e)
    return math.exp(-rate * softplus), softplus, (1.0 if x >= 0.0 else e) / (1.0 + e)


@inlined
def columns_of(cell, h, start, s):
    """Of the token at `start` and a head, where gate, rate, key, value and query of step s are in `projected`."""
    is_delta, steps, heads, n, _ = cell
    D = heads * n
    own = start + h * n
    if not is_delta:
        return own, own, own, own + D, own + 2 * D
    key = own + heads * (1 + steps) + s * D
    return start + h, start + heads * (1 + s) + h, key, key + steps * D, own + heads * (1 + steps) + 2 * steps * D


@called
def load_token(cell, h, p, start, c, parameters, gates):
    """The gates of token c of a chunk, which is at `start` in p."""
    (is_delta, steps, heads, n, N), (a, k, v, q, rate) = cell, gates
    for s in range(steps):
        gate, r, key, value, query = columns_of(cell, h, start, s)
        at, first = c * steps + s, (c * steps + s) * N
        if is_delta:
            a[at] = decay_of(p[gate], parameters[h], parameters[heads + h])[0] if s == 0 else 1.0
            rate[at] = 2.0 / (1.0 + math.exp(-np.float64(p[r])))
            unit_row(p[key : key + n], k[first : first + n])
        else:
            share_row(p[gate : gate + n], parameters[h * n : h * n + n], a[first : first + n], k[first : first + n])
        copy(v, first, p, value, n)
    own = q[c * N : c * N + n]
    if is_delta:
        unit_row(p[query : query + n], own)
    else:
        silu_row(p[query : query + n], own)


@called
def pull_back_token(cell, h, p, start, d_p, d_start, c, parameters, a, d_gates, d_parameters, scratch):
    """From the gradients of its gates those of a token in `projected`, and of the parameters."""
    (is_delta, steps, heads, n, N), (d_a, d_k, d_v, d_q, d_rate), row = cell, d_gates, scratch[: cell[3]]
    for s in range(steps):
        gate, r, key, value, query = columns_of(cell, h, start, s)
        to_gate, to_r, to_key, to_value, to_query = columns_of(cell, h, d_start, s)
        at, first = c * steps + s, (c * steps + s) * N
        if is_delta:
            if s == 0:
                _, softplus, slope = decay_of(p[gate], parameters[h], parameters[heads + h])
                d_log_a = a[at] * d_a[at]
                d_gate = -d_log_a * parameters[h] * slope
                d_p[to_gate] = d_gate
                d_parameters[h] -= d_log_a * softplus
                d_parameters[heads + h] += d_gate
            open_, shut = sigmoids(p[r])
            d_p[to_r] = d_rate[at] * 2.0 * open_ * shut
            unit_back(p[key : key + n], row, d_k[first : first + n], d_p[to_key : to_key + n])
        else:
            bound, d_bound = parameters[h * n : h * n + n], d_parameters[h * n : h * n + n]
            share_back(p[gate : gate + n], bound, d_a[first : first + n], d_p[to_gate : to_gate + n], d_bound)
        copy(d_p, to_value, d_v, first, n)
    own = d_q[c * N : c * N + n]
    if is_delta:
        unit_back(p[query : query + n], row, own, d_p[to_query : to_query + n])
    else:
        silu_back(p[query : query + n], own, d_p[to_query : to_query + n])


# Four numbers, one of each of four rows.

NONE = (0.0, 0.0, 0.0, 0.0)


@inlined
def plus(x, y):
    return x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]


@inlined
def minus(x, y):
    return x[0] - y[0], x[1] - y[1], x[2] - y[2], x[3] - y[3]


@inlined
def times(number, x):
    return number * x[0], number * x[1], number * x[2], number * x[3]


@inlined
def dot(x, y):
    return x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]


@inlined
def get(x, start):
    return x[start], x[start + 1], x[start + 2], x[start + 3]


@inlined
def put(x, start, four):
    x[start], x[start + 1], x[start + 2], x[start + 3] = four


@inlined
def rows_at(x, start, N):
    second, third, fourth, stop = start + N, start + 2 * N, start + 3 * N, start + 4 * N
    return x[start:second], x[second:third], x[third:fourth], x[fourth:stop]


@inlined
def column(rows, i):
    return rows[0][i], rows[1][i], rows[2][i], rows[3][i]


@inlined
def put_column(rows, i, four):
    rows[0][i], rows[1][i], rows[2][i], rows[3][i] = four


@inlined
def copy_rows(target, source):
    for i in range(len(source[0])):
        put_column(target, i, column(source, i))


# One token, or one step of it, of four rows. v: the numbers of the value that are theirs.


@inlined
def hgrn2_step(rows, a, k, q, v):
    """S = a S + k v, and what q reads of it."""
    y = NONE
    for i in range(len(a)):
        new = plus(times(a[i], column(rows, i)), times(k[i], v))
        y = plus(y, times(q[i], new))
        put_column(rows, i, new)
    return y


@inlined
def hgrn2_back(d_rows, before, after, a, k, q, v, d_y, d_a, d_q):
    """The gradients of v; `d_rows` moves on to the state before, d_a and d_q are added to."""
    d_v = NONE
    for i in range(len(a)):
        d = plus(column(d_rows, i), times(q[i], d_y))
        d_q[i] += dot(d_y, column(after, i))
        d_a[i] += dot(d, minus(column(before, i), v))
        d_v = plus(d_v, times(k[i], d))
        put_column(d_rows, i, times(a[i], d))
    return d_v


@inlined
def delta_step(rows, a, k, q, v, rate):
    """S = a S + rate k (v - a S k): what k does not find, which is v - a S k, and what q reads of S."""
    found, y = NONE, NONE
    for i in range(len(k)):
        found = plus(found, times(k[i], column(rows, i)))
    missing = minus(v, times(a, found))
    written = times(rate, missing)
    for i in range(len(k)):
        new = plus(times(a, column(rows, i)), times(k[i], written))
        y = plus(y, times(q[i], new))
        put_column(rows, i, new)
    return missing, y


@inlined
def delta_back(d_rows, before, after, a, k, q, missing, rate, d_y, d_k, d_q):
    """The gradients of what is written, rate * missing, and of a; as `hgrn2_back`."""
    d_written, d_a = NONE, 0.0
    for i in range(len(k)):
        d = plus(column(d_rows, i), times(q[i], d_y))
        d_q[i] += dot(d_y, column(after, i))
        d_written = plus(d_written, times(k[i], d))
        put_column(d_rows, i, d)
    written, d_found = times(rate, missing), times(-rate, d_written)
    for i in range(len(k)):
        own, d = column(before, i), column(d_rows, i)
        d_k[i] += dot(d, written) + a * dot(d_found, own)
        d = plus(d, times(k[i], d_found))
        d_a += dot(d, own)
        put_column(d_rows, i, times(a, d))
    return d_written, d_a


# A chunk of `count` tokens, of which the first is token `row` of all: rows j..j + 3 of a matrix of N rows.
# `kept` has a place of four rows for the state before each step, and at the end for that to which resets return.


@called
def walk(cell, keeps, j, row, count, masks, gates, S, reset_state, y, kept, missing):
    """S moves on; y (tokens, N): what is read. keeps: whether states go to `kept`, and `missing` of the delta rule."""
    is_delta, steps, _, _, N = cell
    (reset_mask, padding_mask), (a, k, v, q, rate) = masks, gates
    rows = rows_at(S, j * N, N)
    if keeps:
        copy(kept, 0, S, j * N, 4 * N)
    for c in range(count):
        own_q, read = q[c * N : c * N + N], NONE
        if is_set(reset_mask, row + c):
            copy(S, j * N, reset_state, j * N, 4 * N)
        if is_set(padding_mask, row + c):
            if keeps:
                copy(kept, (c + 1) * steps * 4 * N, S, j * N, 4 * N)
        else:
            for s in range(steps):
                at, first = c * steps + s, (c * steps + s) * N
                own_k, own_v = k[first : first + N], get(v, first + j)
                if is_delta:
                    not_found, read = delta_step(rows, a[at], own_k, own_q, own_v, rate[at])
                    if keeps:
                        put(missing, at * 4, not_found)
                else:
                    read = hgrn2_step(rows, a[first : first + N], own_k, own_q, own_v)
                if keeps:
                    copy(kept, (at + 1) * 4 * N, S, j * N, 4 * N)
        put(y, c * N + j, read)


@inlined  # where LLVM sees that no two of the arrays overlap, without which it would not vectorise
def walk_back(cell, C, j, row, count, masks, gates, d_gates, d_S, d_reset_state, d_y, kept, missing, d_rows):
    """After `walk`: d_S moves on to the state before the chunk, and d_gates, but for values, are added to."""
    is_delta, steps, _, _, N = cell
    (reset_mask, padding_mask), (a, k, v, q, rate) = masks, gates
    d_a, d_k, d_v, d_q, d_rate = d_gates
    copy_rows(d_rows, rows_at(d_S, j * N, N))
    for c in range(count - 1, -1, -1):
        is_reset = is_set(reset_mask, row + c)
        if not is_set(padding_mask, row + c):
            own_q, own_d_q = q[c * N : c * N + N], d_q[c * N : c * N + N]
            for s in range(steps - 1, -1, -1):
                at, first = c * steps + s, (c * steps + s) * N
                place = C * steps + 1 if is_reset and s == 0 else at
                before, after = rows_at(kept, place * 4 * N, N), rows_at(kept, (at + 1) * 4 * N, N)
                own_k, own_d_y = k[first : first + N], get(d_y, c * N + j)
                if is_delta:
                    if s < steps - 1:
                        own_d_y = NONE
                    not_found, own_d_k = get(missing, at * 4), d_k[first : first + N]
                    d_w, own_d_a = delta_back(
                        d_rows, before, after, a[at], own_k, own_q, not_found, rate[at], own_d_y, own_d_k, own_d_q
                    )
                    for i in range(4):
                        d_v[first + j + i] = rate[at] * d_w[i]
                        d_rate[at] += d_w[i] * not_found[i]
                    d_a[at] += own_d_a
                else:
                    own_a, own_d_a, own_v = a[first : first + N], d_a[first : first + N], get(v, first + j)
                    own_d_v = hgrn2_back(d_rows, before, after, own_a, own_k, own_q, own_v, own_d_y, own_d_a, own_d_q)
                    put(d_v, first + j, own_d_v)
        if is_reset:
            to_reset = rows_at(d_reset_state, j * N, N)
            for i in range(N):
                put_column(to_reset, i, plus(column(to_reset, i), column(d_rows, i)))
                put_column(d_rows, i, NONE)
    copy_rows(rows_at(d_S, j * N, N), d_rows)


@called
def clear_token(cell, h, d_p, start):
    is_delta, steps, _, n, _ = cell
    for s in range(steps):
        gate, r, key, value, query = columns_of(cell, h, start, s)
        for i in range(n):
            d_p[key + i] = d_p[value + i] = d_p[query + i] = 0.0
        d_p[r] = d_p[gate] = 0.0


@called
def load_matrix(state, start, n, N, S):
    clear(S, N * N)
    for i in range(n):
        for j in range(n):
            S[j * N + i] = state[start + i * n + j]


@called
def store_matrix(S, n, N, state, start):
    for i in range(n):
        for j in range(n):
            state[start + i * n + j] = S[j * N + i]


@inlined
def room(count):
    """float64 zeros, which `free` gives back."""
    array = numba.carray(allocate(8 * count), (count,), np.float64)
    clear(array, count)
    return array


@inlined
def room_for_gates(steps, C, N):
    """(a, k, v, q, rate) of C tokens, and what they read."""
    keys, tokens = C * steps * N, C * N
    return (room(keys), room(keys), room(keys), room(tokens), room(C * steps)), room(tokens)


@inlined
def free(arrays):
    for array in arrays:
        release(array.ctypes.data)


@called
def load_gates(cell, C, p, place, t, masks, parameters, gates):
    """Of the tokens from t on, and how many they are. place: row, head, strides and length of `projected`."""
    b, h, stride_b, stride_t, T = place
    count = min(C, T - t)
    for c in range(count):
        if not is_set(masks[1], b * T + t + c):
            load_token(cell, h, p, b * stride_b + (t + c) * stride_t, c, parameters, gates)
    return count


@called
def chunk_forward(cell, C, p, place, t, masks, parameters, gates, S, R, y):
    """`load_gates`, and the state after these tokens."""
    count = load_gates(cell, C, p, place, t, masks, parameters, gates)
    for j in range(0, cell[3], 4):
        walk(cell, False, j, place[0] * place[4] + t, count, masks, gates, S, R, y, y, y)
    return count


@inlined
def chunk_back(
    cell, C, p, place, t, masks, parameters, gates, d_gates, S, R, d_S, d_R, y, d_y, kept, missing, d_rows, d_p,
    d_stride, d_parameters,
):  # fmt: skip
    """The gradients of the tokens from t on, whose gates are there, from that of the state after them."""
    (_, steps, _, n, N), (b, h, stride_b, stride_t, T) = cell, place
    d_a, d_k, _, d_q, d_rate = d_gates
    count, row = min(C, T - t), b * T + t
    clear(d_a, C * steps * N)
    clear(d_k, C * steps * N)
    clear(d_q, C * N)
    clear(d_rate, C * steps)
    for j in range(0, n, 4):
        copy(kept, (C * steps + 1) * 4 * N, R, j * N, 4 * N)
        walk(cell, True, j, row, count, masks, gates, S, R, y, kept, missing)
        walk_back(cell, C, j, row, count, masks, gates, d_gates, d_S, d_R, d_y, kept, missing, d_rows)
    for c in range(count):
        back_to = (row + c) * d_stride
        if is_set(masks[1], row + c):
            clear_token(cell, h, d_p, back_to)
        else:
            start = b * stride_b + (t + c) * stride_t
            pull_back_token(cell, h, p, start, d_p, back_to, c, parameters, gates[0], d_gates, d_parameters, y)


@called
def decode_token(cell, p, parameters, state, after, read, gates, wide):
    """A token `p` of one row: `after` it, and what is read of that, in float32, from `state`.

    N is n here; wide: (n,) scratch.
    """
    (is_delta, steps, heads, n, _), (a, k, v, q, rate) = cell, gates
    for h in range(heads):
        load_token(cell, h, p, 0, 0, parameters, gates)
        before, now = state[h * n * n : (h + 1) * n * n], after[h * n * n : (h + 1) * n * n]
        for s in range(steps):
            own_k, own_v = k[s * n : s * n + n], v[s * n : s * n + n]
            if is_delta:
                rows_times(own_k, before, n, wide)
                for j in range(n):
                    wide[j] = rate[s] * (own_v[j] - a[s] * wide[j])
            else:
                copy(wide, 0, own_v, 0, n)
            for i in range(n):
                row, new, kept = before[i * n : i * n + n], now[i * n : i * n + n], a[s] if is_delta else a[i]
                for j in range(n):
                    new[j] = np.float32(kept * row[j] + own_k[i] * wide[j])
            before = now
        rows_times(q, now, n, wide)
        copy(read, h * n, wide, 0, n)


@inlined
def rows_times(x, matrix, n, y):
    clear(y, n)
    for i in range(n):
        row = matrix[i * n : i * n + n]
        for j in range(n):
            y[j] += x[i] * row[j]


CELL = (int64, int64, int64)  # tokens of a chunk, steps a token, and whether it is the delta rule


@compile_kernel(*CELL, *INPUTS, voidptr, voidptr)
def forward_kernel(
    C, steps, is_delta, projected, stride_b, stride_t, T, D, states, initial_state, reset_state, parameters,
    reset_mask, padding_mask, outputs, final_state, start, stop, d_start, d_stop,
):  # fmt: skip
    p, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
    outputs, final_state, parameters = floats(outputs), floats(final_state), floats(parameters)
    masks, n = (reset_mask, padding_mask), states // D
    heads, N = D // n, (n + 7) // 8 * 8
    cell = is_delta, steps, heads, n, N
    S, R = room(N * N), room(N * N)
    gates, y = room_for_gates(steps, C, N)
    for i in range(start, stop):
        b, h = i // heads, i % heads
        load_matrix(initial_state, i * n * n, n, N, S)
        load_matrix(reset_state, h * n * n, n, N, R)
        for t in range(0, T, C):
            place = b, h, stride_b, stride_t, T
            for c in range(chunk_forward(cell, C, p, place, t, masks, parameters, gates, S, R, y)):
                copy(outputs, ((b * T + t + c) * heads + h) * n, y, c * N, n)
        store_matrix(S, n, N, final_state, i * n * n)
    free((S, R, y))
    free(gates)


@compile_kernel(*CELL, *INPUTS, *STRIDED, voidptr, *GRADIENTS)
def backward_kernel(
    C, steps, is_delta, projected, stride_b, stride_t, T, D, states, initial_state, reset_state, parameters,
    reset_mask, padding_mask, d_outputs, out_b, out_t, d_final_state, d_projected, d_stride, d_initial_state,
    d_reset_state, d_parameters, P, start, stop, d_start, d_stop,
):  # fmt: skip
    p, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
    parameters, d_outputs, d_final_state = floats(parameters), floats(d_outputs), floats(d_final_state)
    d_p, d_initial_state = floats(d_projected), floats(d_initial_state)
    d_reset_state, d_parameters = doubles(d_reset_state), doubles(d_parameters)
    masks, n = (reset_mask, padding_mask), states // D
    heads, N, chunks = D // n, (n + 7) // 8 * 8, (T + C - 1) // C
    cell = is_delta, steps, heads, n, N
    S, R, d_S, d_R = room(N * N), room(N * N), room(N * N), room(N * N)
    gates, d_y = room_for_gates(steps, C, N)
    d_gates, y = room_for_gates(steps, C, N)
    starts, kept, missing = room(chunks * N * N), room((C * steps + 2) * 4 * N), room(C * steps * 4)
    d_rows = room(N), room(N), room(N), room(N)
    for i in range(start, stop):
        b, h = i // heads, i % heads
        place = b, h, stride_b, stride_t, T
        load_matrix(initial_state, i * n * n, n, N, S)
        load_matrix(reset_state, h * n * n, n, N, R)
        load_matrix(d_final_state, i * n * n, n, N, d_S)
        clear(d_R, N * N)
        for chunk in range(chunks):
            copy(starts, chunk * N * N, S, 0, N * N)
            if chunk < chunks - 1:
                chunk_forward(cell, C, p, place, chunk * C, masks, parameters, gates, S, R, y)
        for chunk in range(chunks - 1, -1, -1):
            t = chunk * C
            copy(S, 0, starts, chunk * N * N, N * N)
            for c in range(load_gates(cell, C, p, place, t, masks, parameters, gates)):
                copy(d_y, c * N, d_outputs, b * out_b + (t + c) * out_t + h * n, n)
            chunk_back(
                cell, C, p, place, t, masks, parameters, gates, d_gates, S, R, d_S, d_R, y, d_y, kept, missing, d_rows,
                d_p, d_stride, d_parameters[b * P : b * P + P],
            )  # fmt: skip
        store_matrix(d_S, n, N, d_initial_state, i * n * n)
        store_matrix(d_R, n, N, d_reset_state, i * n * n)
    free((S, R, d_S, d_R, d_y, y, starts, kept, missing))
    free(gates)
    free(d_gates)
    free(d_rows)


def launcher(inputs, is_forward: bool):
    """As `scan_numba.launcher`."""
    cell, T = inputs.cell, inputs.projected.shape[1]
    steps, chunk = getattr(cell, "householder_steps", 1), CHUNK if is_forward else max(CHUNK, math.isqrt(T))
    own = max(1, min(T, chunk) // steps), steps, code_of(cell) == DELTA
    kernel = forward_kernel if is_forward else backward_kernel
    return lambda arguments, B: run(kernel, (*own, *arguments), B * cell.num_heads, 1)
