"""The recurrent state as a cache layer: what DynamicCache and StaticCache keep for each MinRNN layer.

`keys` is the recurrent state (B, D), in float32 (float64 for a float64 model); `values` is the convolution window
(B, K - 1, H). Neither grows with the sequence. Importing this module registers both layers with transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

# `crop` goes back no further. An assistant drafts 20 tokens at a time unless told otherwise.
MAX_ROLLBACK_TOKENS = 128


@dataclass(frozen=True)
class LayerState:
    """The state that a layer continues from. Gradient checkpointing reads it again in backward, when the cache has
    moved on.

    Not a pytree: FSDP would round its tensors to the dtype of the weights.

    Attributes:
        state: (B, S), or None before the first token.
        window: (B, K - 1, H) or None.
        seen: tokens so far; a tensor in a static cache, so that no compiled graph depends on its value.
        record_past: whether to keep the states after single tokens, for `crop`.
    """

    state: Tensor | None
    window: Tensor | None
    seen: int | Tensor
    record_past: bool

    def state_or(self, start: Tensor) -> Tensor:
        """The state, or `start` (B, S) if no token has been seen.

        Raises ValueError if the cache was filled with another batch size or by a model of another shape.
        """
        return self._kept_or("state", self.state, start)

    def window_or(self, start: Tensor) -> Tensor:
        """The convolution window, or `start` (B, K - 1, H); as `state_or`."""
        return self._kept_or("window", self.window, start)

    def _kept_or(self, name: str, kept: Tensor | None, start: Tensor) -> Tensor:
        if kept is None:
            return start
        if kept.shape != start.shape:
            raise ValueError(
                f"past_key_values holds a {name} of shape {tuple(kept.shape)} where this model and batch need "
                f"{tuple(start.shape)}; pass the cache of the same model and batch, or a new one"
            )
        if isinstance(self.seen, Tensor):
            return torch.where(self.seen > 0, kept, start)
        return kept if self.seen else start


class MinRNNDynamicLayer(CacheLayerMixin):
    """The state after the tokens seen so far; after `activate_past_recording`, also after each of the latest ones."""

    _layer_type: str | None = "minrnn"
    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    past: list[tuple[Tensor, Tensor]]  # (keys, values) after each of the latest tokens, oldest first
    first_positions: Tensor | None = None  # of `masks.reset_mask_of`, which asks the first layer alone

    def __init__(self, **kwargs):
        super().__init__()
        self.cumulative_length = 0
        self.record_past = False
        self.past = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = torch.zeros_like(key_states), torch.zeros_like(value_states)
        self.is_initialized = True

    def read(self) -> LayerState:
        """The state to continue from."""
        return LayerState(self.keys, self.values, self.cumulative_length, self.record_past)

    def update(
        self, key_states: Tensor, value_states: Tensor, past: Sequence[tuple[Tensor, Tensor]] = (), num_tokens: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Replace the state and window by those after `num_tokens` more tokens.

        past: (state, window) after each of the last of these tokens, for `crop`; needed if `record_past` is set.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.record_past:
            before = self.past or [(self.keys, self.values)] if self.cumulative_length else []
            self.past = [*before, *past][-MAX_ROLLBACK_TOKENS - 1 :]
        self._store(key_states, value_states, num_tokens)
        return self.keys, self.values

    def _store(self, key_states: Tensor, value_states: Tensor, num_tokens: int) -> None:
        self.keys, self.values = key_states, value_states
        self.cumulative_length += num_tokens

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by -tokens_to_remove tokens, to one of the recorded states or to the start.

        Raises:
            ValueError: for a positive count, or a step back past what was recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"a recurrent state is cropped by a negative number of tokens, not {tokens_to_remove}")
        if tokens_to_remove == -self.cumulative_length:
            self.reset()  # the model knows the state at the start
        elif tokens_to_remove < 0:
            if -tokens_to_remove >= len(self.past):
                raise ValueError(
                    f"cannot go back {-tokens_to_remove} tokens: {max(len(self.past) - 1, 0)} are recorded (at most "
                    f"{MAX_ROLLBACK_TOKENS}, from activate_past_recording() on)"
                )
            self.past = self.past[:tokens_to_remove]
            self._store(*self.past[-1], tokens_to_remove)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def offload(self) -> None:
        """Nothing: a state is too small to be worth moving. It stays on the device of its layer, as transformers'
        linear-attention states do."""

    prefetch = offload

    def reset(self) -> None:
        super().reset()
        self.past, self.first_positions = [], None

    def _map(self, function) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
            self.past = [(function(state), function(window)) for state, window in self.past]
        if self.first_positions is not None:
            self.first_positions = function(self.first_positions)

    def detach(self) -> None:
        """Stop gradients here: truncated backpropagation through time."""
        self._map(Tensor.detach)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def append_rows(self, others: Sequence["MinRNNDynamicLayer"]) -> None:
        """Append the rows of other layers. All have seen tokens; the number is that of this layer."""
        self.keys = torch.cat([self.keys, *(other.keys for other in others)])
        self.values = torch.cat([self.values, *(other.values for other in others)])

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1


class MinRNNStaticLayer(MinRNNDynamicLayer):
    """The same in tensors whose addresses never change, so that a decode step is compiled once."""

    _layer_type = None  # the base class would register it as a dynamic layer
    is_compileable = True
    is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=key_states.device)
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def read(self) -> LayerState:
        if not self.is_initialized or not torch.is_grad_enabled():
            return super().read()
        # Backward may read it again after `_store` has overwritten it.
        return LayerState(self.keys.clone(), self.values.clone(), self.cumulative_length.clone(), self.record_past)

    def _store(self, key_states: Tensor, value_states: Tensor, num_tokens: int) -> None:
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.cumulative_length.add_(num_tokens)

    def activate_past_recording(self) -> None:
        """Nothing: `is_croppable` is False."""


STATIC_LAYER_TYPE_MAPPING["minrnn"] = MinRNNStaticLayer
