"""Exact gradients of a sequence of any length in the memory of one chunk.

B batch, T time, D state width, H hidden size, K convolution kernel size. A chunk depends on those before it by the
state alone: (B, D) and the convolution window (B, K - 1, H) of each layer. So the forward pass keeps only the states
s[n] before each chunk n, and the backward pass recomputes one chunk at a time, from the last one to the first:

    dL/ds[n] = dL_n/ds[n] + (ds[n+1]/ds[n])^T dL/ds[n+1],    L = sum over n of L_n, the loss of the tokens of chunk n.

This is backpropagation through time without truncation.
"""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .backends import is_transformed
from .masks import padding_mask_of, reset_mask_of
from .modeling_minrnn import NO_LOGITS


def sequence_chunked_backward(
    model: nn.Module, input_ids: Tensor, labels: Tensor, chunk_size: int, **kwargs
) -> Tensor:
    """Add the gradients of `model(input_ids, labels=labels, **kwargs).loss` to the parameters; return that loss.

    It takes two forward passes and one backward pass, and the memory of the activations of one chunk and of the states
    before each. Gradient checkpointing applies within a chunk; smaller chunks save more. Dropout is drawn as if the
    chunks were read one after the other, and the same again when they are recomputed.

    Args:
        model: MinRNNForCausalLM, or DistributedDataParallel around it, which then reduces the gradients once.
        input_ids, labels: (B, T), as for the model: -100 where there is no loss, token t predicted from those before.
        chunk_size: tokens at a time, >= 1.
        kwargs: as for the model. attention_mask, whatever says where documents begin, and shift_labels are those of
            the whole sequence; num_items_in_batch divides the summed loss, by default by the number of labels.
            past_key_values, a dynamic cache to go on from, has afterwards the state after the last token, detached.

    Raises:
        ValueError: a chunk_size below 1, labels of another shape, a static cache, a bidirectional model, or a
            context_parallel_group, which spreads a sequence over processes instead.
    """
    config: PreTrainedConfig = getattr(model, "module", model).config
    if (cache := kwargs.pop("past_key_values", None)) is None:
        cache = DynamicCache(config=config)
    if (shift_labels := kwargs.pop("shift_labels", None)) is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    _check(config, input_ids, {"labels": labels, "shift_labels": shift_labels}, chunk_size, cache, kwargs)
    chunks = _chunks(input_ids, shift_labels, chunk_size, cache, kwargs)
    kwargs |= {"use_cache": False, "logits_to_keep": NO_LOGITS}  # given a cache, the model updates it all the same
    if kwargs.get("num_items_in_batch") is None:
        kwargs["num_items_in_batch"] = (shift_labels != -100).sum()
    start = _snapshot(cache)
    states, random_states = PerChunk(len(chunks)), PerChunk(len(chunks))
    device_type, devices = input_ids.device.type, get_device_states(input_ids)[0]
    with torch.no_grad():
        for n, chunk in enumerate(chunks):
            if n > 0:
                states[n] = _tensors(cache)
            random_states[n] = [torch.get_rng_state(), *get_device_states(input_ids)[1]]
            model(**chunk | {"labels": None}, past_key_values=cache, **kwargs)

    losses = []
    d_ends: list[Tensor | None] = []  # of the loss after a chunk, by the state that the chunk ends with
    for n, chunk in reversed(list(enumerate(chunks))):
        state = start if n == 0 else _snapshot(cache, states[n])
        leaves = _tensors(state)
        # Several processes reduce gradients once, after those of the first chunk, which come last.
        with nullcontext() if n == 0 else getattr(model, "no_sync", nullcontext)():
            with torch.random.fork_rng(devices, device_type=device_type):
                cpu_random_state, *device_random_states = random_states[n]
                torch.set_rng_state(cpu_random_state)
                set_device_states(devices, device_random_states, device_type=device_type)
                loss = model(**chunk, past_key_values=state, **kwargs).loss
            ends = [(x, d_x) for x, d_x in zip(_tensors(state), d_ends) if x.requires_grad and d_x is not None]
            tensors, gradients = zip((loss, None), *ends)
            with torch.autocast(device_type, enabled=False):
                torch.autograd.backward(tensors, gradients)
        d_ends = [leaf.grad for leaf in leaves] if n > 0 else []
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _check(config, input_ids: Tensor, labels: dict[str, Tensor], chunk_size: int, cache: Cache, kwargs) -> None:
    if is_transformed():
        raise RuntimeError("for torch.func and forward mode differentiate the loss of the model, which is one graph")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, not {chunk_size}")
    for name, tensor in labels.items():
        if tensor.shape != input_ids.shape:
            raise ValueError(f"{name} must be {tuple(input_ids.shape)} like input_ids, not {tuple(tensor.shape)}")
    if any(layer.is_compileable for layer in cache.layers):
        raise ValueError("past_key_values must be a dynamic cache: a static one is overwritten, and has no gradient")
    if config.bidirectional or kwargs.get("context_parallel_group") is not None:
        raise ValueError("only a model that reads forwards, in one process, can be differentiated chunk by chunk")


def _chunks(
    input_ids: Tensor, shift_labels: Tensor, size: int, cache: Cache, kwargs: dict[str, Any]
) -> list[dict[str, Tensor]]:
    """What the model is given for each chunk; takes the masks out of kwargs."""
    B, T = input_ids.shape
    padding_mask = padding_mask_of(kwargs.pop("attention_mask", None), B, T)
    # Not chunk by chunk: the number of a document does not tell whether the first token of a chunk begins a new one.
    marks = {name: kwargs.pop(name, None) for name in ("reset_mask", "seq_idx", "cu_seq_lens_q", "position_ids")}
    reset_mask = reset_mask_of(**marks, padding_mask=padding_mask, B=B, T=T, past_key_values=cache)
    tensors = {"input_ids": input_ids, "labels": shift_labels, "shift_labels": shift_labels}
    if padding_mask is not None:
        tensors["attention_mask"] = ~padding_mask
    if reset_mask is not None:
        tensors["reset_mask"] = reset_mask
    return [dict(zip(tensors, parts)) for parts in zip(*(x.split(size, 1) for x in tensors.values()))]


class PerChunk:
    """Small tensors for each chunk, all chunks in one allocation.

    Allocated one by one they would fragment the heap between the large tensors of each chunk: memory would grow with
    the number of chunks.
    """

    def __init__(self, chunks: int):
        self.chunks = chunks
        self.tensors: list[Tensor] = []

    def __setitem__(self, n: int, tensors: list[Tensor]) -> None:
        if not self.tensors:
            self.tensors = [tensor.new_empty(self.chunks, *tensor.shape) for tensor in tensors]
        for kept, tensor in zip(self.tensors, tensors):
            kept[n] = tensor

    def __getitem__(self, n: int) -> list[Tensor]:
        return [kept[n].clone() for kept in self.tensors]  # torch accepts no view as a random state


def _snapshot(cache: Cache, states: list[Tensor] | None = None) -> Cache:
    """A copy of the cache, with its states or with the given ones as leaves that get a gradient."""
    snapshot = copy.copy(cache)
    snapshot.layers = [copy.copy(layer) for layer in cache.layers]
    if states is not None:
        leaves = iter(states)
        for layer in snapshot.layers:
            layer.keys, layer.values = next(leaves).requires_grad_(), next(leaves).requires_grad_()
    return snapshot


def _tensors(cache: Cache) -> list[Tensor]:
    return [tensor for layer in cache.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]


__all__ = ["sequence_chunked_backward"]
