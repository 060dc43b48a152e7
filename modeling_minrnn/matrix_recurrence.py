"""The recurrence of matrices S = diag(a) S + key value^T, y = S^T query: chunks of time by products of matrices.

B batch, T time, C tokens of a chunk, K chunks, heads of n x n numbers, D = heads * n, S = heads * n * n.

What of a token j is left at a later one, i, is exp(sum of log a over j + 1 .. i). No such sum is a difference of two
running ones, which would lose the digits of the shorter, and whose gradient would be a difference, too; and none is
positive, so that nothing overflows. For that a chunk is halved, and halved again: what its first half leaves for the
second is a product of keys that decay to the middle, and queries that decay from there.
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
    if reset is None:
        kept = log_decay.cumsum(-2)
    else:
        documents = reset.cumsum(-1)
        # Sums over the tokens of a document up to each, without those before it.
        same = (documents[..., None] == documents[..., None, :]).tril()
        kept = same.to(log_decay.dtype) @ log_decay
        log_decay = log_decay.masked_fill(reset[..., None], -torch.inf)
        is_reset = documents[..., -1, None, None] > 0
        reset_state = reset_state.to(state.dtype)
    decay = kept[..., -1, :, None].to(state.dtype).exp()
    added = (key * _after(log_decay).exp()).mT @ value
    starts = []
    for k in range(key.shape[2]):
        starts.append(state)
        state = state if reset is None else torch.where(is_reset[:, :, k], reset_state, state)
        state = decay[:, :, k] * state + added[:, :, k]
    query, within = query * kept.exp(), decayed_products(query, key, log_decay) @ value
    start = torch.stack(starts, 2).to(query.dtype)
    if reset is None:
        return within + query @ start, state
    first = documents[..., None] == 0
    of_start, of_reset = query.where(first, 0) @ start, query.where(~first, 0) @ reset_state[:, None].to(query.dtype)
    return within + of_start + of_reset, state


def _after(log_decay: Tensor) -> Tensor:
    """The sum over all tokens after each."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def decayed_products(query: Tensor, key: Tensor, log_decay: Tensor) -> Tensor:
    """(..., C, C), of token i with each j <= i: query_i . (exp(sum of log_decay over j + 1 .. i) * key_j)."""
    C = key.shape[-2]
    if C == 1:
        return (query * key).sum(-1, keepdim=True)
    query, key, log_decay = (x.unflatten(-2, (2, C // 2)) for x in (query, key, log_decay))
    first, second = decayed_products(query, key, log_decay).unbind(-3)
    to_middle = key[..., 0, :, :] * _after(log_decay[..., 0, :, :]).exp()
    from_middle = query[..., 1, :, :] * log_decay[..., 1, :, :].cumsum(-2).exp()
    below = from_middle @ to_middle.mT
    return torch.cat([F.pad(first, (0, C // 2)), torch.cat([below, second], -1)], -2)
