"""CPU kernels of the cells whose state is a matrix, `HGRN2` and `GatedDelta`, gates and all: token by token.

A matrix is held as N rows of N, one for each number of its value and so of what it reads: its columns, in the terms of
`cells.Matrix`. n numbers and zeros up to N, a multiple of 8. Rows know nothing of each other. Four of them are walked
at a time through C tokens, whose gates are computed before, with the state in float64: it stays in the first cache,
and nothing is rounded that adds up.

Backwards, a first walk keeps the state before every C tokens and a second one, from the last of these to the first,
the states of four rows in C tokens. With C about the root of T that is little memory.
"""

import functools
import math

import torch

from .scan_blocks import derivative, empty_outputs
from .scan_numba import (
    ANY_ORDER,
    allocate,
    both,
    compile_kernel,
    dense,
    derived,
    doubles,
    flags,
    floats,
    hgrn_gates,
    int64,
    np,
    numba,
    output,
    release,
    row_groups,
    run,
    sigmoids,
    strided,
    voidptr,
)

CHUNK = 32  # tokens at a time at least: the gates of more would leave the second cache
LARGEST = 256  # numbers of a head: of more, products of matrices are as fast

# Sums in any order. What is called and not inlined is compiled once.
inlined, called = numba.njit(forceinline=True, **ANY_ORDER), numba.njit(**ANY_ORDER)


def fuses(inputs) -> bool:
    return inputs.cell.name in ("hgrn2", "gated_delta") and inputs.D // inputs.cell.num_heads <= LARGEST


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


# Four rows of a matrix, and one token or one step of it. v: the numbers of the value that are theirs.


@inlined
def rows_at(x, start, N):
    second, third, fourth, stop = start + N, start + 2 * N, start + 3 * N, start + 4 * N
    return x[start:second], x[second:third], x[third:fourth], x[fourth:stop]


@inlined
def hgrn2_step(rows, a, k, q, v):
    """S = a S + k v, and what q reads of it."""
    (s0, s1, s2, s3), (v0, v1, v2, v3), y0, y1, y2, y3 = rows, v, 0.0, 0.0, 0.0, 0.0
    for i in range(len(a)):
        new0, new1 = a[i] * s0[i] + k[i] * v0, a[i] * s1[i] + k[i] * v1
        new2, new3 = a[i] * s2[i] + k[i] * v2, a[i] * s3[i] + k[i] * v3
        y0 += q[i] * new0
        y1 += q[i] * new1
        y2 += q[i] * new2
        y3 += q[i] * new3
        s0[i], s1[i], s2[i], s3[i] = new0, new1, new2, new3
    return y0, y1, y2, y3


@inlined
def hgrn2_back(d_rows, before, after, a, k, q, v, d_y, d_a, d_q):
    """The gradients of v; `d_rows` moves on to the state before, d_a and d_q are added to."""
    (d0, d1, d2, d3), (p0, p1, p2, p3), (s0, s1, s2, s3) = d_rows, before, after
    (v0, v1, v2, v3), (g0, g1, g2, g3), w0, w1, w2, w3 = v, d_y, 0.0, 0.0, 0.0, 0.0
    for i in range(len(a)):
        e0, e1, e2, e3 = d0[i] + g0 * q[i], d1[i] + g1 * q[i], d2[i] + g2 * q[i], d3[i] + g3 * q[i]
        d_q[i] += g0 * s0[i] + g1 * s1[i] + g2 * s2[i] + g3 * s3[i]
        d_a[i] += e0 * (p0[i] - v0) + e1 * (p1[i] - v1) + e2 * (p2[i] - v2) + e3 * (p3[i] - v3)
        w0 += k[i] * e0
        w1 += k[i] * e1
        w2 += k[i] * e2
        w3 += k[i] * e3
        d0[i], d1[i], d2[i], d3[i] = a[i] * e0, a[i] * e1, a[i] * e2, a[i] * e3
    return w0, w1, w2, w3


@inlined
def dots(rows, x):
    (s0, s1, s2, s3), y0, y1, y2, y3 = rows, 0.0, 0.0, 0.0, 0.0
    for i in range(len(x)):
        y0 += x[i] * s0[i]
        y1 += x[i] * s1[i]
        y2 += x[i] * s2[i]
        y3 += x[i] * s3[i]
    return y0, y1, y2, y3


@inlined
def delta_step(rows, a, k, q, v, rate):
    """S = a S + rate k (v - a S k): what k does not find, which is v - a S k, and what q reads of S."""
    f0, f1, f2, f3 = dots(rows, k)
    missing = v[0] - a * f0, v[1] - a * f1, v[2] - a * f2, v[3] - a * f3
    w0, w1, w2, w3 = rate * missing[0], rate * missing[1], rate * missing[2], rate * missing[3]
    (s0, s1, s2, s3), y0, y1, y2, y3 = rows, 0.0, 0.0, 0.0, 0.0
    for i in range(len(k)):
        new0, new1 = a * s0[i] + k[i] * w0, a * s1[i] + k[i] * w1
        new2, new3 = a * s2[i] + k[i] * w2, a * s3[i] + k[i] * w3
        y0 += q[i] * new0
        y1 += q[i] * new1
        y2 += q[i] * new2
        y3 += q[i] * new3
        s0[i], s1[i], s2[i], s3[i] = new0, new1, new2, new3
    return missing, (y0, y1, y2, y3)


@inlined
def delta_back(d_rows, before, after, a, k, q, missing, rate, d_y, d_k, d_q):
    """The gradients of what is written, rate * missing, and of a; as `hgrn2_back`."""
    (d0, d1, d2, d3), (p0, p1, p2, p3), (s0, s1, s2, s3) = d_rows, before, after
    (g0, g1, g2, g3), w0, w1, w2, w3 = d_y, 0.0, 0.0, 0.0, 0.0
    for i in range(len(k)):
        e0, e1, e2, e3 = d0[i] + g0 * q[i], d1[i] + g1 * q[i], d2[i] + g2 * q[i], d3[i] + g3 * q[i]
        d_q[i] += g0 * s0[i] + g1 * s1[i] + g2 * s2[i] + g3 * s3[i]
        w0 += k[i] * e0
        w1 += k[i] * e1
        w2 += k[i] * e2
        w3 += k[i] * e3
        d0[i], d1[i], d2[i], d3[i] = e0, e1, e2, e3
    m0, m1, m2, m3 = rate * missing[0], rate * missing[1], rate * missing[2], rate * missing[3]
    f0, f1, f2, f3, d_a = -rate * w0, -rate * w1, -rate * w2, -rate * w3, 0.0
    for i in range(len(k)):
        e0, e1, e2, e3 = d0[i] + k[i] * f0, d1[i] + k[i] * f1, d2[i] + k[i] * f2, d3[i] + k[i] * f3
        kept = f0 * p0[i] + f1 * p1[i] + f2 * p2[i] + f3 * p3[i]
        d_k[i] += d0[i] * m0 + d1[i] * m1 + d2[i] * m2 + d3[i] * m3 + a * kept
        d_a += e0 * p0[i] + e1 * p1[i] + e2 * p2[i] + e3 * p3[i]
        d0[i], d1[i], d2[i], d3[i] = a * e0, a * e1, a * e2, a * e3
    return (w0, w1, w2, w3), d_a


@inlined
def put(target, start, four):
    target[start], target[start + 1], target[start + 2], target[start + 3] = four


@inlined
def get(x, start):
    return x[start], x[start + 1], x[start + 2], x[start + 3]


# A chunk of `count` tokens, of which the first is token `row` of all: rows j..j + 3 of a matrix of N rows.
# `kept` has a place of four rows for the state before each step, and at the end for that to which resets return.


@called
def walk(cell, keeps, j, row, count, masks, gates, S, reset_state, y, kept, missing):
    """S moves on; y (tokens, N): what is read. keeps: whether states go to `kept`, and `missing` of the delta rule."""
    is_delta, steps, _, _, N = cell
    (reset_mask, resets, padding_mask, paddings), (a, k, v, q, rate) = masks, gates
    rows = rows_at(S, j * N, N)
    if keeps:
        copy(kept, 0, S, j * N, 4 * N)
    for c in range(count):
        own_q, read = q[c * N : c * N + N], (0.0, 0.0, 0.0, 0.0)
        if resets and reset_mask[row + c]:
            copy(S, j * N, reset_state, j * N, 4 * N)
        if paddings and padding_mask[row + c]:
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


@inlined
def move(row, target, start):
    """Add a row to that at `start`, and clear it."""
    target = target[start : start + len(row)]
    for i in range(len(row)):
        target[i] += row[i]
        row[i] = 0.0


@inlined  # where LLVM sees that no two of the arrays overlap, without which it would not vectorise
def walk_back(cell, C, j, row, count, masks, gates, d_gates, d_S, d_reset_state, d_y, kept, missing, d_rows):
    """After `walk`: d_S moves on to the state before the chunk, and d_gates, but for values, are added to."""
    is_delta, steps, _, _, N = cell
    (reset_mask, resets, padding_mask, paddings), (a, k, v, q, rate) = masks, gates
    d_a, d_k, d_v, d_q, d_rate = d_gates
    d0, d1, d2, d3 = d_rows
    copy(d0, 0, d_S, j * N, N)
    copy(d1, 0, d_S, (j + 1) * N, N)
    copy(d2, 0, d_S, (j + 2) * N, N)
    copy(d3, 0, d_S, (j + 3) * N, N)
    for c in range(count - 1, -1, -1):
        is_reset = resets and reset_mask[row + c]
        if not (paddings and padding_mask[row + c]):
            own_q, own_d_q = q[c * N : c * N + N], d_q[c * N : c * N + N]
            for s in range(steps - 1, -1, -1):
                at, first = c * steps + s, (c * steps + s) * N
                place = C * steps + 1 if is_reset and s == 0 else at
                before, after = rows_at(kept, place * 4 * N, N), rows_at(kept, (at + 1) * 4 * N, N)
                own_k, own_d_y = k[first : first + N], get(d_y, c * N + j)
                if is_delta:
                    if s < steps - 1:
                        own_d_y = (0.0, 0.0, 0.0, 0.0)
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
            move(d0, d_reset_state, j * N)
            move(d1, d_reset_state, (j + 1) * N)
            move(d2, d_reset_state, (j + 2) * N)
            move(d3, d_reset_state, (j + 3) * N)
    copy(d_S, j * N, d0, 0, N)
    copy(d_S, (j + 1) * N, d1, 0, N)
    copy(d_S, (j + 2) * N, d2, 0, N)
    copy(d_S, (j + 3) * N, d3, 0, N)


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
    """The address of float64 zeros, and they."""
    address = allocate(8 * count)
    array = numba.carray(address, (count,), np.float64)
    clear(array, count)
    return address, array


@inlined
def matrices(N):
    S_at, S = room(N * N)
    R_at, R = room(N * N)
    return (S_at, R_at), S, R


@inlined
def room_for_gates(steps, C, N):
    a_at, a = room(C * steps * N)
    k_at, k = room(C * steps * N)
    v_at, v = room(C * steps * N)
    q_at, q = room(C * N)
    rate_at, rate = room(C * steps)
    y_at, y = room(C * N)
    return (a_at, k_at, v_at, q_at, rate_at, y_at), (a, k, v, q, rate), y


@inlined
def four_rows(N):
    at0, row0 = room(N)
    at1, row1 = room(N)
    at2, row2 = room(N)
    at3, row3 = room(N)
    return (at0, at1, at2, at3), (row0, row1, row2, row3)


@inlined
def free(addresses):
    for address in addresses:
        release(address)


@called
def load_gates(cell, C, p, place, t, masks, parameters, gates):
    """Of the tokens from t on, and how many they are. place: row, head, strides and length of `projected`."""
    b, h, stride_b, stride_t, T = place
    count = min(C, T - t)
    for c in range(count):
        if not (masks[3] and masks[2][b * T + t + c]):
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
        if masks[3] and masks[2][row + c]:
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


INPUTS = (
    voidptr, int64, int64, int64, int64, int64, int64,  # projected, stride_b, stride_t, T, heads, n, C
    voidptr, voidptr, voidptr,  # initial_state, reset_state, parameters as of `scan_numba.derived`
    voidptr, int64, voidptr, int64,  # reset and padding tokens, each with whether there are any
    int64, int64,  # whether it is the delta rule, and steps a token
)  # fmt: skip


@compile_kernel(*INPUTS, voidptr, voidptr)
def forward_kernel(
    projected, stride_b, stride_t, T, heads, n, C, initial_state, reset_state, parameters, reset_mask, resets,
    padding_mask, paddings, is_delta, steps, outputs, final_state, start, stop, d_start, d_stop,
):  # fmt: skip
    p, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
    outputs, final_state, parameters = floats(outputs), floats(final_state), floats(parameters)
    masks = flags(reset_mask), resets, flags(padding_mask), paddings
    N = (n + 7) // 8 * 8
    cell = is_delta, steps, heads, n, N
    matrix_rooms, S, R = matrices(N)
    gate_rooms, gates, y = room_for_gates(steps, C, N)
    for i in range(start, stop):
        b, h = i // heads, i % heads
        load_matrix(initial_state, i * n * n, n, N, S)
        load_matrix(reset_state, h * n * n, n, N, R)
        for t in range(0, T, C):
            place = b, h, stride_b, stride_t, T
            for c in range(chunk_forward(cell, C, p, place, t, masks, parameters, gates, S, R, y)):
                copy(outputs, ((b * T + t + c) * heads + h) * n, y, c * N, n)
        store_matrix(S, n, N, final_state, i * n * n)
    free(matrix_rooms)
    free(gate_rooms)


@compile_kernel(*INPUTS, voidptr, int64, int64, voidptr, voidptr, int64, voidptr, voidptr, voidptr, int64)
def backward_kernel(
    projected, stride_b, stride_t, T, heads, n, C, initial_state, reset_state, parameters, reset_mask, resets,
    padding_mask, paddings, is_delta, steps, d_outputs, out_b, out_t, d_final_state, d_projected, d_stride,
    d_initial_state, d_reset_state, d_parameters, P, start, stop, d_start, d_stop,
):  # fmt: skip
    p, initial_state, reset_state = floats(projected), floats(initial_state), floats(reset_state)
    parameters, d_outputs, d_final_state = floats(parameters), floats(d_outputs), floats(d_final_state)
    d_p, d_initial_state = floats(d_projected), floats(d_initial_state)
    d_reset_state, d_parameters = doubles(d_reset_state), doubles(d_parameters)
    masks = flags(reset_mask), resets, flags(padding_mask), paddings
    N, chunks = (n + 7) // 8 * 8, (T + C - 1) // C
    cell = is_delta, steps, heads, n, N
    matrix_rooms, S, R = matrices(N)
    d_matrix_rooms, d_S, d_R = matrices(N)
    gate_rooms, gates, d_y = room_for_gates(steps, C, N)
    d_gate_rooms, d_gates, y = room_for_gates(steps, C, N)
    starts_room, starts = room(chunks * N * N)
    kept_room, kept = room((C * steps + 2) * 4 * N)
    missing_room, missing = room(C * steps * 4)
    d_row_rooms, d_rows = four_rows(N)
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
    free(matrix_rooms)
    free(d_matrix_rooms)
    free(gate_rooms)
    free(d_gate_rooms)
    free(d_row_rooms)
    free((starts_room, kept_room, missing_room))


def _arguments(rows, inputs, chunk: int, q):
    """INPUTS, for some rows of the batch."""
    cell, T = inputs.cell, inputs.projected.shape[1]
    masks = [None if x is None else x[rows].contiguous() for x in (inputs.reset_mask, inputs.padding_mask)]
    sizes, steps = [0 if mask is None else 1 for mask in masks], getattr(cell, "householder_steps", 1)
    return (
        *strided(inputs.projected[rows]), T, cell.num_heads, inputs.D // cell.num_heads,
        max(1, min(T, chunk) // steps), dense(inputs.initial_state[rows]), dense(inputs.reset_state), q,
        masks[0], sizes[0], masks[1], sizes[1], cell.name == "gated_delta", steps,
    )  # fmt: skip


def forward(inputs):
    """As `scan_blocks.forward`, for a cell that `fuses`."""
    outputs, rest, final_state = empty_outputs(inputs)
    q = dense(derived(inputs.cell, inputs.parameters))
    for rows in row_groups(inputs.projected):
        part = outputs[rows]
        written = output(part)
        given = _arguments(rows, inputs, CHUNK, q)
        run(forward_kernel, (*given, written, final_state[rows]), len(part) * inputs.cell.num_heads, 1)
        part.copy_(written)
    return outputs, rest, final_state


def backward(inputs, outputs, rest, d_outputs, d_rest, d_final_state):
    """As `scan_blocks.backward`, for a cell that `fuses`."""
    (B, S), T = d_final_state.shape, inputs.projected.shape[1]
    d_projected = torch.empty(inputs.projected.shape, dtype=inputs.projected.dtype)
    d_initial_state = torch.empty(B, S, dtype=torch.float32)
    d_reset_state = torch.empty(B, S, dtype=torch.float64)
    q, pull_back = derivative(functools.partial(derived, inputs.cell), inputs.parameters)
    q, d_q = dense(q), torch.zeros(B, q.numel(), dtype=torch.float64)
    for rows in row_groups(inputs.projected):
        part = d_projected[rows]
        written = output(part)
        given = _arguments(rows, inputs, max(CHUNK, math.isqrt(T)), q)
        upstream = *strided(d_outputs[rows]), dense(d_final_state[rows])
        downstream = written, written.shape[-1], d_initial_state[rows], d_reset_state[rows], d_q[rows], q.numel()
        run(backward_kernel, (*given, *upstream, *downstream), len(part) * inputs.cell.num_heads, 1)
        part.copy_(written)
    (d_parameters,) = pull_back(d_q.sum(0).view_as(q))
    return d_projected, d_parameters, d_initial_state, d_reset_state.sum(0).to(torch.float32)
