"""The recurrence of matrices S = diag(a) S + key value^T, y = S^T query: chunks of time by products of matrices.

B batch, T time, C tokens of a chunk, K chunks, heads of n x n numbers, D = heads * n, S = heads * n * n.

What of a token j is left at a later one, i, is the product of a over j + 1 .. i. As a quotient of two running products
it would overflow, and as a difference of their logarithms lose its digits, and its gradient with it. Hence a chunk is
halved, and halved again: what its first half leaves for the second is a product of keys that decay to the middle and
queries that decay from there.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Kernels
from .cells import Matrix, carry_dtype
from .scan_blocks import ScanInputs, derivative

CHUNK = 64  # tokens at a time
BLOCK_ELEMENTS = 1 << 20  # of outputs that are differentiated at a time


class MatrixStates(NamedTuple):
    outputs: Tensor
    final_state: Tensor


def matrix_forward(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs, rest, final_state) of `operators.scan`: of the states the last alone, and of `rest` nothing."""
    outputs, state = [], inputs.initial_state.to(carry_dtype(inputs.projected.device))
    for x, masks in _blocks(inputs):
        block, state = _block(inputs, masks, x, inputs.parameters, inputs.reset_state, state)
        outputs.append(block.to(inputs.projected.dtype))
    rest = inputs.initial_state.new_empty(len(state), 0, state.shape[-1])
    return torch.cat(outputs, 1), rest, state.to(rest.dtype)


def matrix_backward(
    inputs: ScanInputs, outputs: Tensor, rest: Tensor, d_outputs: Tensor, d_rest: Tensor, d_final_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, parameters, initial_state and reset_state, by autograd of a block at a time."""
    dtype, like = carry_dtype(inputs.projected.device), inputs.initial_state.dtype
    blocks, starts = _blocks(inputs), [inputs.initial_state.to(dtype)]
    for x, masks in blocks[:-1]:
        starts.append(_block(inputs, masks, x, inputs.parameters, inputs.reset_state, starts[-1]).final_state)
    d_projected, d_state, sums = [], d_final_state.to(dtype), []
    lengths = [x.shape[1] for x, _ in blocks]
    for (x, masks), start, upstream in zip(reversed(blocks), reversed(starts), reversed(d_outputs.split(lengths, 1))):
        block = functools.partial(_block, inputs, masks)
        _, pull_back = derivative(block, x, inputs.parameters, inputs.reset_state, start)
        d_x, *d, d_state = pull_back(upstream, d_state)
        d_projected.append(d_x if masks[1] is None else d_x.masked_fill(masks[1][..., None], 0))
        sums.append([gradient.to(dtype) for gradient in d])
    d_parameters, d_reset_state = (functools.reduce(torch.add, d).to(like) for d in zip(*sums))
    return torch.cat(d_projected[::-1], 1).to(inputs.projected.dtype), d_parameters, d_state.to(like), d_reset_state


# On every device and for every choice of a backend: products of matrices, as torch has them.
MATRIX_KERNELS = Kernels(NotImplemented, None, lambda cell: cell.has_matrices, matrix_forward, matrix_backward)


def _blocks(inputs: ScanInputs) -> list[tuple[Tensor, list[Tensor | None]]]:
    """Tokens (B, length, width), zero where padding, and their masks for resets and padding."""
    B, T, _ = inputs.projected.shape
    length = max(1, BLOCK_ELEMENTS // max(1, B * inputs.D * CHUNK)) * CHUNK
    masks = [
        [None] * -(-T // length) if mask is None else mask.split(length, 1)
        for mask in (inputs.reset_mask, inputs.padding_mask)
    ]
    return list(zip(inputs.tokens().split(length, 1), map(list, zip(*masks))))


def _block(inputs: ScanInputs, masks, x: Tensor, parameters: Tensor, reset_state: Tensor, state: Tensor):
    """Outputs (B, length, D) of the tokens x after `state` (B, S), and the last state in the dtype of `state`."""
    length, reset, padding = x.shape[1], *masks
    size = min(CHUNK, 1 << (length - 1).bit_length())
    if extra := -length % size:
        x = F.pad(x, (0, 0, 0, extra))
        padding = torch.zeros_like(x[:, :length, 0], dtype=torch.bool) if padding is None else padding
        padding = F.pad(padding, (0, extra), value=True)
        reset = None if reset is None else F.pad(reset, (0, extra))
    terms: Matrix = inputs.cell.gates(x, parameters, x[..., :0])
    if padding is not None:
        log_decay, key = (term.masked_fill(padding[..., None, None], 0) for term in (terms.log_decay, terms.key))
        terms = terms._replace(log_decay=log_decay, key=key)
    # (B, heads, K, C, n)
    terms = Matrix(*(term.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous() for term in terms))
    reset = None if reset is None else reset.unflatten(1, (-1, size))[:, None]
    heads, n = terms.key.shape[1], terms.key.shape[-1]
    matrices = (s.unflatten(-1, (heads, n, n)) for s in (state, reset_state))
    outputs, matrix = _chunks(terms, reset, *matrices)
    return MatrixStates(outputs.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)[:, :length], matrix.flatten(1))


def _chunks(terms: Matrix, reset: Tensor | None, state: Tensor, reset_state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, heads, K, C, n), and the state (B, heads, n, n) after the chunks.

    reset: (B, 1, K, C), or None where there is none.
    """
    query, log_decay, key, value = terms
    within, query, key, _ = decayed_products(query, key, log_decay.exp(), reset)
    if reset is not None:
        documents, reset_state = reset.cumsum(-1)[..., None], reset_state.to(state.dtype)
        is_reset = documents[..., -1:, :] > 0
        log_decay = log_decay.masked_fill(documents != documents[..., -1:, :], 0)
    decay = log_decay.sum(-2, dtype=state.dtype).exp()[..., None]  # a product of rounded ones would drift
    added = key.mT @ value
    starts = []
    for k in range(key.shape[2]):
        starts.append(state)
        state = state if reset is None else torch.where(is_reset[:, :, k], reset_state, state)
        state = decay[:, :, k] * state + added[:, :, k]
    outputs, start = within @ value, torch.stack(starts, 2).to(query.dtype)
    if reset is None:
        return outputs + query @ start, state
    first = documents == 0
    outputs = outputs + query.where(first, 0) @ start
    return outputs + query.where(~first, 0) @ reset_state[:, None].to(query.dtype), state


def decayed_products(
    query: Tensor, key: Tensor, decay: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is left of one token at another, in a chunk of C tokens.

    Args:
        query, key, decay: (..., C, n), C a power of two. reset: (..., C) or None.

    Returns:
        (..., C, C), of token i with each j <= i the sum of query_i * key_j * decay_{j+1} * ... * decay_i, zero across a
        reset; (..., C, n) the queries as they are from the start of the chunk, or from the latest reset, and the keys
        as they are at its end; and (..., 1, n) what is left at the end of the start, or of the latest reset.
    """
    C = key.shape[-2]
    if C == 1:
        return (query * key).sum(-1, keepdim=True), query * decay, key, decay
    halves = [x.unflatten(-2, (2, C // 2)) for x in (query, key, decay)]
    reset = None if reset is None else reset.unflatten(-1, (2, C // 2))
    products, queries, keys, left = (x.unbind(-3) for x in decayed_products(*halves, reset))
    from_start, from_middle, passed, total = left[0] * queries[1], queries[1], left[1], left[0] * left[1]
    if reset is not None:
        seen = reset[..., 1, :].cumsum(-1)[..., None] > 0
        is_reset = seen[..., -1:, :]
        from_start, from_middle = torch.where(seen, from_middle, from_start), from_middle.masked_fill(seen, 0)
        passed, total = passed.masked_fill(is_reset, 0), torch.where(is_reset, passed, total)
    below = from_middle @ keys[0].mT if C > 2 else (from_middle * keys[0]).sum(-1, keepdim=True)
    return (
        torch.cat([F.pad(products[0], (0, C // 2)), torch.cat([below, products[1]], -1)], -2),
        torch.cat([queries[0], from_start], -2),
        torch.cat([passed * keys[0], keys[1]], -2),
        total,
    )
