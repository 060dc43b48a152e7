"""The recurrence of matrices, `cells.Matrix`: chunks of time by products of matrices.

T time, B batch, C tokens of a chunk, K chunks, heads of n x n numbers, D = heads * n, S = heads * n * n.

What of a token j is left at a later one, i, is the product of a over j + 1 .. i. As a quotient of two running products
it would overflow, and as a difference of their logarithms lose its digits, and its gradient with it. Hence a chunk is
halved, and halved again: what its first half leaves for the second is a product of keys that decay to the middle and
queries that decay from there. With the delta rule a chunk also solves a triangular system (the WY form of a product of
Householder matrices, arXiv 2406.06484).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import Cell, Matrix

CHUNK = 32  # tokens at a time: with 64 no faster, and with the delta rule less exact
BLOCK_ELEMENTS = 1 << 20  # of outputs that are differentiated at a time


def block_length(B: int, D: int) -> int:
    """Tokens that are computed, and differentiated, at a time."""
    return max(1, BLOCK_ELEMENTS // max(1, B * D * CHUNK)) * CHUNK


def matrix_block(
    cell: Cell,
    x: Tensor,
    parameters: Tensor,
    state: Tensor,
    reset_state: Tensor,
    reset: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(outputs (T, B, D), rest, final_state) of the tokens x (T, B, width) after `state` (B, S), in the dtype of
    `state`; of states the last alone, and of `rest` nothing. reset, padding: (T, B, 1)."""
    x = x.transpose(0, 1)
    reset, padding = (None if mask is None else mask[..., 0].T for mask in (reset, padding))
    terms: Matrix = cell.gates(x, parameters, x[..., :0])
    if padding is not None:
        of_key = padding.view(*padding.shape, *[1] * (terms.key.dim() - 2))
        log_decay = terms.log_decay.masked_fill(padding[..., None, None], 0)
        terms = terms._replace(log_decay=log_decay, key=terms.key.masked_fill(of_key, 0))
    steps = 1
    if terms.rate is not None:
        steps = terms.rate.shape[2]
        terms, reset = _token_a_step(terms, reset, steps)
    length = terms.key.shape[1]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    extra = -length % size  # tokens of zeros, which change nothing

    def chunks(term: Tensor) -> Tensor:
        term = F.pad(term, (0, 0, 0, 0, 0, extra)) if extra else term
        return term.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).contiguous()  # (B, heads, K, C, n)

    reset = None if reset is None else F.pad(reset, (0, extra)).unflatten(1, (-1, size))[:, None]
    rate = None if terms.rate is None else chunks(terms.rate)
    terms = Matrix(*(chunks(term) for term in terms[:4]))._replace(rate=rate)
    heads, n = terms.key.shape[1], terms.key.shape[-1]
    outputs, matrix = _chunks(terms, reset, *(s.unflatten(-1, (heads, n, n)) for s in (state, reset_state)))
    outputs = outputs.permute(2, 3, 0, 1, 4).flatten(3).flatten(0, 1)[steps - 1 : length : steps]
    return outputs, state.new_empty(0, *state.shape), matrix.flatten(1)


def _token_a_step(terms: Matrix, reset: Tensor | None, steps: int) -> tuple[Matrix, Tensor | None]:
    """Each step as a token of its own: the first of a token decays and is reset, the last reads."""
    query, log_decay, key, value, rate = terms
    query = F.pad(query[:, :, None], (0, 0, 0, 0, steps - 1, 0))
    log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, 0, 0, steps - 1))
    assert rate is not None
    terms = Matrix(*(term.flatten(1, 2) for term in (query, log_decay, key, value, rate)))
    return terms, None if reset is None else F.pad(reset[..., None], (0, steps - 1)).flatten(1)


def _chunks(terms: Matrix, reset: Tensor | None, state: Tensor, reset_state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, heads, K, C, n), and the state (B, heads, n, n) after the chunks.

    reset: (B, 1, K, C), or None where there is none.
    """
    query, log_decay, key, value, rate = terms
    readers = query if rate is None else torch.stack([query, key])
    within, query, key, _ = decayed_products(readers, key, log_decay.exp(), reset)
    replaced = None
    if rate is not None:
        # What a key finds in the chunk is of the keys before it: a triangular system for what each token writes. Its
        # solution is value - replaced @ (the state before the chunk).
        (within, found), (query, finder) = within.unbind(0), query.unbind(0)
        written = torch.cat([rate * value, rate * finder], -1)
        written = torch.linalg.solve_triangular(rate * found, written, upper=False, unitriangular=True)
        value, replaced = written.tensor_split([value.shape[-1]], -1)
        query, replaced = query - within @ replaced, key.mT @ replaced
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
        kept = decay[:, :, k] * state
        state = (kept if replaced is None else kept - replaced[:, :, k].to(state.dtype) @ state) + added[:, :, k]
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
        (..., C, C), of token i with each j <= i the sum of query_i * key_j * decay_{j+1} * ... * decay_i, zero across
        a reset; (..., C, n) the queries, decayed from the start of the chunk or the latest reset, and the keys,
        decayed to its end; and (..., 1, n) what is left at the end of the start, or of the latest reset.
    """
    C = key.shape[-2]
    if C == 1:
        return (query * key).sum(-1, keepdim=True), query * decay, key, decay
    query, key, decay = (x.unflatten(-2, (2, C // 2)) for x in (query, key, decay))
    reset = None if reset is None else reset.unflatten(-1, (2, C // 2))
    products, queries, keys, left = (x.unbind(-3) for x in decayed_products(query, key, decay, reset))
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
