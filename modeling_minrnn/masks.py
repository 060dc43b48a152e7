"""Where a batch has padding, where documents begin, and what the convolution may therefore see.

B batch, T time, K convolution kernel size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import is_transformed
from .context_parallel import all_gather


class Masks(NamedTuple):
    """What each layer must know of the tokens, but their values.

    Attributes:
        padding: (B, T) True where a token is padding; None where none is.
        reset: (B, T) True at the first token of each document; None for one document a row.
        taps: of `conv_taps`; None without padding and documents.
    """

    padding: Tensor | None = None
    reset: Tensor | None = None
    taps: Tensor | None = None

    @classmethod
    def of(cls, padding: Tensor | None, reset: Tensor | None, kernel_size: int) -> "Masks":
        return cls(padding, reset, conv_taps(kernel_size, reset, padding))

    def reversed(self, kernel_size: int) -> "Masks":
        """Of the sequence read from its end: documents begin at their last tokens."""
        padding = None if self.padding is None else self.padding.flip(1)
        reset = None if self.reset is None else torch.nn.functional.pad(self.reset[:, 1:], (0, 1)).flip(1)
        return Masks.of(padding, reset, kernel_size)


NO_MASKS = Masks()


def conv_taps(kernel_size: int, reset_mask: Tensor | None, padding_mask: Tensor | None) -> Tensor | None:
    """Where each tap of each token reads: (B, T, K) positions along time in [window | x], -1 for nothing (zero).

    A token sees itself and the K - 1 real tokens before it in its document: padding is passed over, and nothing is
    read from before a reset. `taps[:, t, 1:]` is therefore the window that is left after token t, and a padding token
    sees no more than that: what it sees does not depend on whether x begins before it or with it. Without masks tap k
    of token t reads t + k, and None says so; it also stands for no taps at all.
    """
    mask = padding_mask if reset_mask is None else reset_mask
    if mask is None or kernel_size == 0:
        return None
    position = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    document = torch.zeros_like(position) if reset_mask is None else reset_mask.long().cumsum(1)
    rank, at_rank = position, position  # of each token, or the last real one before it, among the real tokens
    if padding_mask is not None:
        rank = (~padding_mask).long().cumsum(1) - 1
        at_rank = padding_mask.long().argsort(dim=1, stable=True)
    back = torch.arange(kernel_size - 1, -1, -1, device=mask.device)
    source_rank = (rank[..., None] - back).flatten(1)  # negative: in the window, which belongs to document 0
    source = at_rank.gather(1, source_rank.clamp(min=0))
    source_document = document.gather(1, source).masked_fill(source_rank < 0, 0)
    source = torch.where(source_rank < 0, source_rank, source) + kernel_size - 1
    source = source.masked_fill(source_document != document.repeat_interleave(kernel_size, 1), -1)
    taps = source.unflatten(1, (mask.shape[1], kernel_size))
    if padding_mask is not None:
        taps = taps.masked_fill(padding_mask[..., None] & (back == kernel_size - 1), -1)
    return taps


def _none_if_empty(mask: Tensor | None) -> Tensor | None:
    """None for a mask that is False everywhere, unless the question would break a graph.

    A GPU is waited for once a forward pass. A mask of nothing doubles the kernels of a step (tests/test_masks.py).
    """
    if mask is None or torch.compiler.is_compiling() or is_transformed() or mask.is_meta:
        return mask
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return mask
    return mask if mask.any() else None


def _not_risen(position_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, T) True where a real token's position is no higher than that of the real token before it."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(
        position_ids if padding_mask is None else padding_mask
    )
    if padding_mask is not None:
        index = index.masked_fill(padding_mask, -1).cummax(1).values
    before = torch.nn.functional.pad(index[:, :-1], (1, 0), value=-1)
    positions = position_ids.expand_as(index)
    not_risen = (before >= 0) & (positions <= positions.gather(1, before.clamp(min=0)))
    return not_risen if padding_mask is None else not_risen & ~padding_mask


def padding_mask_of(attention_mask: Tensor | None, B: int, T: int) -> Tensor | None:
    """(B, T) True where a token is padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(f"attention_mask must be (B, >= T) = ({B}, >= {T}), not {tuple(attention_mask.shape)}")
    return _none_if_empty(attention_mask[:, -T:] == 0)


def _first_positions(position_ids, padding_mask, B: int, past_key_values, goes_on: bool, group) -> Tensor | int:
    """(B, 1) the position of the first token of each row, kept in past_key_values; -1 where all was padding so far."""
    cache_layer = next(iter(getattr(past_key_values, "layers", ())), None)
    kept = getattr(cache_layer, "first_positions", None)
    if torch.compiler.is_compiling() or (kept is None and goes_on):
        return 0 if kept is None else kept
    first = position_ids[:, :1].expand(B, 1).clone()  # the caller may count on in the tensor that it passed
    if padding_mask is not None:
        at = padding_mask.long().argmin(1, keepdim=True)
        first = position_ids.expand(B, -1).gather(1, at).masked_fill(padding_mask.all(1, keepdim=True), -1)
    if group is not None:
        for earlier in all_gather(first, group).flip(0):
            first = torch.where(earlier < 0, first, earlier)
    if kept is not None:
        first = torch.where(kept < 0, first, kept)
    if cache_layer is not None:
        cache_layer.first_positions = first
    return first


def reset_mask_of(
    reset_mask, seq_idx, cu_seq_lens_q, position_ids, padding_mask, B: int, T: int, past_key_values=None, group=None
) -> Tensor | None:
    """(B, T) True at the first token of each document.

    past_key_values, group: from a state, or from other processes, it matters whether a document begins with the first
        token. Its position tells, where it is that of the first token of all. What cannot tell is refused: numbers of
        documents without positions, and positions of which other documents begin elsewhere.
    """
    if reset_mask is None and seq_idx is None and cu_seq_lens_q is None and position_ids is None:
        return None
    for name, tensor in (("reset_mask", reset_mask), ("seq_idx", seq_idx), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape not in ((B, T), (1, T)):
            raise ValueError(f"{name} must be ({B}, {T}), or (1, {T}) for all rows alike, not {tuple(tensor.shape)}")
    numbered = reset_mask is None and (seq_idx is not None or cu_seq_lens_q is not None)
    goes_on = (numbered or position_ids is not None) and _has_seen_tokens(past_key_values)
    begins = None  # where a position says so
    if position_ids is not None and (past_key_values is not None or group is not None):
        first = _first_positions(position_ids, padding_mask, B, past_key_values, goes_on, group)
        if goes_on or group is not None:
            begins = position_ids == first
            if padding_mask is not None:  # the positions of padding are arbitrary
                begins = begins & ~padding_mask
    if reset_mask is not None:
        if reset_mask.dtype != torch.bool:
            raise ValueError(f"reset_mask must be bool, not {reset_mask.dtype}")
    elif seq_idx is not None:
        reset_mask = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    elif cu_seq_lens_q is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q describes a batch of one packed row, not {B} rows")
        positions = torch.arange(1, T, device=cu_seq_lens_q.device)
        reset_mask = torch.nn.functional.pad(torch.isin(positions, cu_seq_lens_q), (1, 0))[None]
    elif position_ids is not None:
        reset_mask = begins
        if T > 1:
            fallen = _not_risen(position_ids, padding_mask)
            if begins is not None and not torch.compiler.is_compiling() and (elsewhere := fallen & ~begins).any():
                position = position_ids.expand(B, T)[elsewhere.expand(B, T)][0]
                raise ValueError(
                    f"documents whose position_ids start at {position}, not where those of the first tokens did, do "
                    "not tell whether one begins with the first token: beside a state to go on from pass reset_mask"
                )
            reset_mask = fallen if begins is None else begins | fallen
    if numbered and begins is not None:
        reset_mask = reset_mask | begins
    elif numbered and (goes_on or group is not None):
        raise ValueError(
            "seq_idx and cu_seq_lens_q do not tell whether a document begins with the first token: beside a state to "
            "go on from pass reset_mask or position_ids"
        )
    return _none_if_empty(None if reset_mask is None else reset_mask.expand(B, T))


def _has_seen_tokens(past_key_values) -> bool:
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    return True if isinstance(seen, Tensor) and torch.compiler.is_compiling() else bool(seen > 0)
