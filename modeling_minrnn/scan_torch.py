"""The recurrence in plain torch, on any device: blocks of time that stay in cache, each a short loop of whole rows."""

import math

import torch
from torch import Tensor

BLOCK_ELEMENTS = 65536  # of state in a block: with 1 MiB of L2 a core the fastest of 2^14 to 2^17
BLOCK_ELEMENTS_ACCELERATOR = 1 << 22  # enough for a launch to be worth its latency


def solve(share: Tensor, inflow: Tensor, carry: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Solve h[t] = a[t] * h[t-1] + inflow[t] over T; return h and the last h, in the dtype of `carry`.

    Args:
        share: (T, B, D), the smaller of a and 1 - a: a itself, or -(1 - a) < 0, which keeps the digits of an a near 1.
        inflow: (T, B, D) in the dtype of `share`; may be overwritten.
        carry: (B, D), h before the first token, in float64 (where the device has it).
        reverse: from the last token to the first.
    """
    a = share.to(carry.dtype, copy=True)
    a.sub_(a.floor())
    states = inflow.to(carry.dtype)
    return states, _linear_scan_(a, states, carry, reverse)


def _linear_scan_(a: Tensor, b: Tensor, carry: Tensor, reverse: bool) -> Tensor:
    """Solve h[i] = a[i] * h[i-1] + b[i] in place of b (n, B, D), h[-1] = carry (B, D); return the last h.

    a is overwritten. reverse: from the last row to the first.

    A long block is cut into chunks of `length` rows that are solved side by side from zero, with their products of a;
    then each is corrected by the state that it should have started from: 2 * length + n / length calls instead of n.
    """
    n = len(b)
    length = math.isqrt(n // 2)
    whole = n - n % length if length >= 4 else 0  # rows in chunks; the others are walked one by one
    if whole:
        part = slice(n - whole, n) if reverse else slice(0, whole)
        a_chunks, b_chunks = (x[part].unflatten(0, (-1, length)) for x in (a, b))
        a_rows, b_rows = a_chunks.unbind(1), b_chunks.unbind(1)
        if reverse:
            a_rows, b_rows = a_rows[::-1], b_rows[::-1]
        for i in range(1, length):
            b_rows[i].addcmul_(a_rows[i], b_rows[i - 1])
            a_rows[i].mul_(a_rows[i - 1])
        starts = torch.empty_like(b_rows[0])
        order = range(len(starts))
        for chunk in reversed(order) if reverse else order:
            starts[chunk] = carry
            carry = torch.addcmul(b_rows[-1][chunk], a_rows[-1][chunk], carry)
        b_chunks.addcmul_(a_chunks, starts[:, None])
        rest = slice(0, n - whole) if reverse else slice(whole, n)
        a, b = a[rest], b[rest]
    a_rows, b_rows = a.unbind(0), b.unbind(0)
    for a_row, b_row in zip(a_rows[::-1], b_rows[::-1]) if reverse else zip(a_rows, b_rows):
        carry = b_row.addcmul_(a_row, carry)
    return carry


def log_sum(log_decay: Tensor, score: Tensor, carry: Tensor) -> Tensor:
    """Solve L[t] = log(exp(L[t-1] + log_decay[t]) + exp(score[t])) over T, from `carry` (B, E).

    log_decay, score: (T, B, E) in the dtype of `carry`; overwritten. log_decay may be -inf, score not.
    """
    score[0] = torch.logaddexp(carry + log_decay[0], score[0])
    step = 1
    while step < len(score):  # what 2 * step tokens do, from what step tokens do
        score[step:] = torch.logaddexp(score[:-step] + log_decay[step:], score[step:])
        log_decay[step:] = log_decay[:-step] + log_decay[step:]
        step *= 2
    return score
