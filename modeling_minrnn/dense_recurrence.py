"""The recurrence h = A h + B u with a fixed matrix A for each channel of u: chunks of time by powers of A.

n tokens, B batch, C channels of u, N numbers of state a channel, D = C * N.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from .cells import Cell

CHUNK = 64  # tokens at a time


def dense_block(
    cell: Cell, u: Tensor, state: Tensor, reset_state: Tensor, reset: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h (n, B, D) of the tokens u (n, B, C) after `state` (B, D), and the last of it in the dtype of `state`.

    reset, padding: (n, B, 1), as in `scan.minrnn_scan`; with them the tokens are walked one by one.
    """
    if reset is not None or padding is not None:
        return _one_by_one(cell, u, state, reset_state, reset, padding)
    C = u.shape[-1]
    states, m = [], state.unflatten(-1, (C, -1))
    for part in u.split(CHUNK):
        length = len(part)
        from_state, from_input = (torch.tensor(x, dtype=u.dtype, device=u.device) for x in _powers(cell, length))
        # (B, C, length) @ (length, length * N) and (B, C, N) @ (N, length * N)
        h = (part.permute(1, 2, 0) @ from_input + m.to(u.dtype) @ from_state).unflatten(-1, (length, -1))
        m = h[:, :, -1].to(state.dtype)
        states.append(h.permute(2, 0, 1, 3).flatten(2))
    return torch.cat(states), m.flatten(1)


def _one_by_one(cell, u, state, reset_state, reset, padding) -> tuple[Tensor, Tensor]:
    A, B = (torch.tensor(x, dtype=state.dtype, device=u.device) for x in cell.system)
    states = []
    for t, token in enumerate(u):
        if reset is not None:
            state = torch.where(reset[t], reset_state.to(state.dtype), state)
        new = dense_step(A, B, token.to(state.dtype), state)
        state = new if padding is None else torch.where(padding[t], state, new)
        states.append(state.to(u.dtype))
    return torch.stack(states), state


def dense_step(A: Tensor, B: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """A h + B u of one token: u (B, C), state (B, D)."""
    h = state.unflatten(-1, (u.shape[-1], -1))
    return (h @ A.T + u[..., None] * B).flatten(-2)


@functools.cache
def _powers(cell: Cell, length: int) -> tuple[np.ndarray, np.ndarray]:
    """What the state before a chunk (N,), and its tokens (length,), make of the states in it (length * N,)."""
    A, B = cell.system
    powers = [np.eye(len(A))]
    for _ in range(length):
        powers.append(A @ powers[-1])
    responses = [power @ B for power in powers]
    from_input = np.zeros((length, length, len(A)))
    for t in range(length):
        from_input[: t + 1, t] = responses[t::-1]
    return np.stack(powers[1:]).transpose(2, 0, 1).reshape(len(A), -1), from_input.reshape(length, -1)
