"""MinRNN models for transformers: minGRU, minLSTM (arXiv 2410.01201) and their kin as language models and encoders.

B batch, T time, H hidden size, D width of h, S numbers of state, K convolution kernel size. A batch goes through
MinRNNForCausalLM -> MinRNNModel -> MinRNNDecoderLayer -> `causal_conv` and `scan_states`. Generation takes the same
way with T = 1, and with the state from the cache as the initial state.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backends import resolve_backend
from .cache_minrnn import MAX_ROLLBACK_TOKENS, LayerState, MinRNNDynamicLayer
from .causal_conv import causal_conv, windows_after
from .cells import cell_of
from .configuration_minrnn import MinRNNConfig
from .context_parallel import all_gather, conv_windows
from .diagnose import StateReport
from .layer import CellProjection, local
from .masks import NO_MASKS, Masks, padding_mask_of, reset_mask_of
from .norm import MinRNNRMSNorm
from .scan import scan_states, state_dtype

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.20

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


# Trainer (for label smoothing) and the pipelines look in these tables for the name of a model's class.
TASK_NAMES = {
    "ForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "ForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "ForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "ForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "ForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}
# Every class that a saved model can be loaded as, for transformers' Auto classes.
AUTO_MAP = {"AutoConfig": "configuration_minrnn.MinRNNConfig", "AutoModel": "modeling_minrnn.MinRNNModel"}
AUTO_MAP |= {f"AutoModel{task}": f"modeling_minrnn.MinRNN{task}" for task in TASK_NAMES}

# Arguments that libraries pass to any model, beside those of MinRNNModel.forward. They change no output of the model.
KNOWN_ARGUMENTS = {
    *TransformersKwargs.__annotations__, "labels", "shift_labels", "ignore_index", "logits_to_keep", "return_dict",
    "cache_position", "token_type_ids", "tokenizer", "assistant_tokenizer",
}  # fmt: skip
# Names that other libraries give to our arguments.
FOREIGN_ARGUMENTS = {
    "cache_params": "past_key_values", "state": "past_key_values", "prev_hiddens": "past_key_values",
    "past_key_value": "past_key_values", "cu_seqlens": "cu_seq_lens_q", "cu_seq_lens": "cu_seq_lens_q",
}  # fmt: skip

# On Shakespeare characters 0.2 learned faster than 0 and 0.02 (one seed each).
CONV_INITIALIZER_STD = 0.2

logger = logging.get_logger(__name__)

NO_LOGITS = torch.empty(0, dtype=torch.long)  # `logits_to_keep=NO_LOGITS` returns the loss alone
LOSS_CHUNK_ELEMENTS = 1 << 25  # logits at a time, 128 MiB in float32
LOSS_CHUNK_ELEMENTS_ACCELERATOR = 1 << 27  # with 50,000 words 2,700 tokens: the rows of a product that fills a GPU
DIAGNOSIS_CHUNK_TOKENS = 4096


class MinRNNCausalConv(nn.Module):
    """A causal depthwise convolution, whose output is added to the residual stream."""

    def __init__(self, config: MinRNNConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.conv_kernel_size))
        self.backend = config.scan_backend

    def forward(self, hidden_states: Tensor, window: Tensor, taps: Tensor | None) -> Tensor:
        return causal_conv(hidden_states, self.weight, window, taps, self.backend)


class MinRNNRecurrence(CellProjection):
    """in_proj -> scan -> out_proj; with config.output_gate, gated by silu(gate_proj) in between."""

    initial_state: nn.Parameter | None

    def __init__(self, config: MinRNNConfig, layer_idx: int):
        # A configuration loaded from the Hub has its own copy of cells.py: look its cell up among the classes of ours.
        cell, D = cell_of(config.cells[layer_idx].spec), config.state_size
        bias = config.max_timescale is not None and cell.remembers_by == "bias"
        super().__init__(cell, config.hidden_size, D, bias)  # under tensor parallelism state_size will be a part of D
        self.layer_idx, self.backend = layer_idx, config.scan_backend
        self.gate_proj = nn.Linear(config.hidden_size, D, bias=False) if config.output_gate else None
        self.out_proj = nn.Linear(D, config.hidden_size, bias=False)
        start = nn.Parameter(torch.empty(cell.state_numbers(D))) if config.learned_initial_state else None
        self.register_parameter("initial_state", start)

    def start(self, like: Tensor) -> Tensor:
        """The state (S,) of a sequence before its first token."""
        if self.initial_state is None:
            return self.cell.start(self.state_size, state_dtype(like.dtype), like.device)
        return local(self.initial_state).to(state_dtype(like.dtype))

    def forward(
        self,
        hidden_states: Tensor,
        masks: Masks = NO_MASKS,
        carried: LayerState | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states (B, T, H) -> output (B, T, H), states (B, T, S), final state (B, S).

        Cells with matrices return the states of the last tokens alone, as many as a rollback may need.
        """
        # Parameters are read in the forward of their own module: outside it they may be offloaded or sharded.
        start = self.start(hidden_states)
        state, latest = start.expand(hidden_states.shape[0], -1), 0
        projected = self.in_proj(hidden_states)
        dtype, parameters = projected.dtype, self.parameters_of_cell(projected)
        if carried is not None:
            state = carried.state_or(state)
            if carried.record_past:  # a recorded state must be as exact as the final one, whatever the dtype
                projected, latest = projected.to(state.dtype), MAX_ROLLBACK_TOKENS + 1
        scanned = scan_states(projected, self.cell, state, parameters, masks, start, self.backend, group, latest)
        outputs = scanned.outputs.to(dtype)
        if self.gate_proj is not None:
            outputs = outputs * F.silu(self.gate_proj(hidden_states))
        return self.out_proj(outputs), scanned.all_states(), scanned.final_state


class MinRNNMLP(nn.Module):
    def __init__(self, config: MinRNNConfig):
        super().__init__()
        assert config.intermediate_size is not None  # resolved by the configuration
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MinRNNDecoderLayer(GradientCheckpointingLayer):
    """x + conv(x), then x + rnn(norm(x)), then x + mlp(norm(x)).

    With config.bidirectional, `reverse_conv` and `reverse_rnn` read the same x from its end and add to the same sums.
    """

    def __init__(self, config: MinRNNConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.has_conv, self.has_mlp = config.conv_kernel_size != 0, config.intermediate_size != 0
        self.window_size = max(config.conv_kernel_size - 1, 0)
        if self.has_conv:
            self.conv = MinRNNCausalConv(config)
        self.rnn_norm = MinRNNRMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
        self.rnn = MinRNNRecurrence(config, layer_idx)
        if config.bidirectional:
            if self.has_conv:
                self.reverse_conv = MinRNNCausalConv(config)
            self.reverse_rnn = MinRNNRecurrence(config, layer_idx)
        if self.has_mlp:
            self.mlp_norm = MinRNNRMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
            self.mlp = MinRNNMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        masks: Masks = NO_MASKS,
        carried: LayerState | None = None,
        reverse_masks: Masks | None = None,
        context_parallel_group: "torch.distributed.ProcessGroup | None" = None,
        tokens_to_keep: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        """
        Args:
            carried: the cached state to continue from; None without a cache.
            reverse_masks: the masks of the reversed sequence, for a bidirectional model.
            tokens_to_keep: as in MinRNNModel, for the hidden_states; the MLP is not computed for other tokens.

        Returns:
            hidden_states (B, T, H), and the arguments of `MinRNNDynamicLayer.update`: the final state, the final
            window and, with carried.record_past, both after each of the last tokens. The caller reads the cache before
            this call and writes it afterwards, as gradient checkpointing calls twice.
        """
        B, T, H = hidden_states.shape
        window = hidden_states.new_zeros(B, self.window_size, H)
        if carried is not None:
            window = carried.window_or(window)

        conv_input = hidden_states
        final_window = None
        if context_parallel_group is not None and self.window_size:
            window, final_window = conv_windows(conv_input, window, masks.taps, context_parallel_group)
        if self.has_conv:
            hidden_states = hidden_states + self.conv(conv_input, window, masks.taps)
            if reverse_masks is not None:
                from_end = self.reverse_conv(conv_input.flip(1), window, reverse_masks.taps)
                hidden_states = hidden_states + from_end.flip(1)
        rnn_input = self.rnn_norm(hidden_states)
        output, states, final_state = self.rnn(rnn_input, masks, carried, context_parallel_group)
        if reverse_masks is not None:
            from_end, *_ = self.reverse_rnn(rnn_input.flip(1), reverse_masks)
            output = output + from_end.flip(1)
        hidden_states = slice_logits_to_keep(hidden_states + self.dropout(output), tokens_to_keep)
        if self.has_mlp:
            hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))

        past: list[tuple[Tensor, Tensor]] = []
        if carried is not None and final_window is None:
            first = max(T - 1 - MAX_ROLLBACK_TOKENS, 0) if carried.record_past else T - 1
            windows = windows_after(conv_input, window, masks.taps, first)
            final_window = windows[-1]
            if carried.record_past:
                past = [(states[:, t - T].clone(), kept) for t, kept in enumerate(windows, first)]
        return hidden_states, final_state, final_window, past


class MinRNNPreTrainedModel(PreTrainedModel):
    config: MinRNNConfig
    config_class = MinRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MinRNNDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MinRNNDecoderLayer}
    task: str | None = None  # a key of TASK_NAMES

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.task is not None:  # subclasses of any name, as FSDP makes them, are for the same task
            TASK_NAMES[cls.task][f"minrnn {cls.__name__}"] = cls.__name__

    def __init__(self, config: MinRNNConfig, *args, **kwargs):
        config.validate_architecture()  # its fields may have been changed since it was built
        config.validate_token_ids()
        super().__init__(config, *args, **kwargs)
        if self.task is not None:
            self.loss_type = self.task  # transformers takes it from the name of the class

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs) -> str:
        if attn_implementation not in (None, "eager"):
            logger.warning_once(f"attn_implementation={attn_implementation!r} is ignored: MinRNN has no attention")
        return "eager"

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers. Raises ValueError if a special token would fall out of the vocabulary."""
        if new_num_tokens is not None:
            self.config.check_token_ids(new_num_tokens)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers. Raises ValueError that names a truncated or damaged file of weights."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            files = sorted(Path(pretrained_model_name_or_path).glob("*.safetensors"))
            name = next(filter(_is_damaged, files), pretrained_model_name_or_path)
            raise ValueError(f"{name} is truncated or damaged: {error}") from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        assert config.initializer_range is not None  # resolved by the configuration
        # GPT-2: what each layer adds to the residual stream is scaled by the depth.
        residual_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        if isinstance(module, MinRNNCausalConv):
            init.normal_(module.weight, std=CONV_INITIALIZER_STD)
        elif isinstance(module, MinRNNMLP):
            init.normal_(module.down_proj.weight, std=residual_std)
        elif isinstance(module, MinRNNRecurrence):
            init.normal_(module.out_proj.weight, std=residual_std)
            if module.initial_state is not None:
                init.zeros_(module.initial_state)
            module.initialize(init.copy_, module.layer_idx, config.num_hidden_layers, config.max_timescale)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh):
        """As in transformers. Raises ValueError for sizes that the processes cannot share."""
        if distributed_config is not None:
            from .tensor_parallel import prepare

            prepare(model.config, distributed_config.fsdp_size or 1, distributed_config.tp_size or 1)
        return super().maybe_distribute_model(model, distributed_config, mesh)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code transformers skips modules without parameters of their own. Ours initialise those of their
        # children, through `init`, which leaves loaded tensors alone.
        super()._initialize_weights(module)

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers, with the custom code beside the weights for every Auto class of the model."""
        self.config.auto_map = dict(AUTO_MAP)
        if isinstance(self, MinRNNForCausalLM):  # `transformers serve` asks for this class before it looks at its own
            self.config.auto_map["AutoModelForDecision"] = AUTO_MAP["AutoModelForCausalLM"]
        super().save_pretrained(save_directory, **kwargs)
        # safetensors writes files that only the owner can read; config.json follows the umask.
        for file in Path(save_directory).glob("*.safetensors"):
            file.chmod(Path(save_directory, "config.json").stat().st_mode & 0o777)

    @torch.no_grad()
    def diagnose_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[StateReport]:
        """Timescales, saturation and size of each recurrent state while the model reads, in evaluation mode.

        Args:
            input_ids: (B, T); a long text is read in parts of DIAGNOSIS_CHUNK_TOKENS, in the memory of one.
            attention_mask: (B, T), 0 for padding, which is not counted.
        """
        if attention_mask is not None and not attention_mask.any():
            raise ValueError("attention_mask is 0 everywhere: there is no token to report on")
        reports = []
        with ExitStack() as hooks:
            hooks.callback(self.train, self.training)
            self.eval()
            for name, module in self.base_model.named_modules():
                if isinstance(module, MinRNNRecurrence):
                    reports.append(StateReport(name))
                    hooks.enter_context(module.register_forward_hook(reports[-1].listen))
            if self.config.bidirectional:
                self.base_model(input_ids, attention_mask=attention_mask)
                return reports
            cache = DynamicCache(config=self.config)
            for start in range(0, input_ids.shape[1], DIAGNOSIS_CHUNK_TOKENS):
                part = slice(start, start + DIAGNOSIS_CHUNK_TOKENS)
                mask = None if attention_mask is None else attention_mask[:, part]
                self.base_model(input_ids[:, part], attention_mask=mask, past_key_values=cache)
        return reports


def _is_damaged(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return False
    except SafetensorError:
        return True


class MinRNNModel(MinRNNPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([MinRNNDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MinRNNRMSNorm(config.hidden_size, config.rms_norm_eps, config.scan_backend)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        reset_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        context_parallel_group: "torch.distributed.ProcessGroup | None" = None,
        tokens_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T) token ids; or inputs_embeds: (B, T, H), exactly one of them.
            attention_mask: (B, >= T), 0 for padding, anywhere in the sequence; its last T columns belong to input_ids.
                The outputs and the state are those of the sequence without its padding.
            past_key_values: the state to go on from, as returned by an earlier call; updated in place.
            use_cache: return the state; like past_key_values, not for a bidirectional model.
            reset_mask, seq_idx, cu_seq_lens_q, position_ids: where documents begin in a packed row, in this order of
                precedence: (B, T) True at their first tokens; (B, T) number of the document; (documents + 1,)
                boundaries in a batch of one row; (B, T), not risen at their first tokens. Nothing is carried from one
                to the next. Whether one begins with the first token of a call that goes on from a state is told by
                reset_mask, or by position_ids, alone or beside the numbers, which must start each document where they
                started the first: at 0, unless the call that began the cache had others.
            context_parallel_group: the processes that the sequence is spread over, in the order of their ranks. Each
                passes its chunk, (B, T) with a T of its own, and the masks of this chunk. past_key_values are those of
                the whole sequence, alike on all ranks. On gradients see `scan.minrnn_scan`.
            tokens_to_keep: return the last_hidden_state of the last so many tokens, or at these positions; 0 for all.
        """
        _refuse_unknown_arguments(kwargs)
        given = _given(input_ids, inputs_embeds)
        B, T = given.shape[:2]
        if use_cache and past_key_values is None and not self.config.bidirectional:
            past_key_values = DynamicCache(config=self.config)
        # An early exit, as an assistant that drafts tokens, uses the first layers alone.
        layers = list(self.layers)[: self.config.num_hidden_layers]
        if use_cache or past_key_values is not None or context_parallel_group is not None:
            self._check_state(use_cache, past_key_values, context_parallel_group, len(layers))

        padding = padding_mask_of(attention_mask, B, T)
        reset = reset_mask_of(
            reset_mask, seq_idx, cu_seq_lens_q, position_ids, padding, B, T, past_key_values, context_parallel_group
        )
        masks = Masks.of(padding, reset, self.config.conv_kernel_size)

        hidden_states = self.dropout(given if input_ids is None else self._embed(given))
        hidden_states = self._run(
            layers, hidden_states, masks, past_key_values, context_parallel_group, tokens_to_keep
        )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _run(
        self, layers, hidden_states: Tensor, masks: Masks, past_key_values: Cache | None, group, tokens_to_keep
    ) -> Tensor:
        """All layers; each reads its state from the cache before, and writes it back afterwards."""
        T = num_tokens = hidden_states.shape[1]
        if group is not None and past_key_values is not None:  # of all ranks
            num_tokens = int(all_gather(torch.tensor([T], device=hidden_states.device), group).sum())
        reverse_masks = masks.reversed(self.config.conv_kernel_size) if self.config.bidirectional else None
        if T == 1 and past_key_values is not None and masks.padding is None and masks.reset is None and group is None:
            decode_layers = self._decoder(hidden_states)
            decoded = decode_layers and decode_layers(self, len(layers), hidden_states, past_key_values.layers)
            if decoded is not None:
                return slice_logits_to_keep(decoded, tokens_to_keep)
        for i, layer in enumerate(layers):
            cache_layer = None if past_key_values is None else past_key_values.layers[i]
            carried = None if cache_layer is None else cache_layer.read()
            kept = tokens_to_keep if i == len(layers) - 1 else 0
            hidden_states, *left = layer(hidden_states, masks, carried, reverse_masks, group, kept)
            if cache_layer is not None:
                cache_layer.update(*left, num_tokens=num_tokens)
        return hidden_states

    def decode(
        self, input_ids: Tensor, attention_mask: Tensor | None, past_key_values: DynamicCache, head: nn.Module
    ) -> Tensor | None:
        """What a head makes of one more token a row, without looking for what only other calls come with.

        None, and nothing has changed, where `forward` has to compute it.
        """
        if torch.compiler.is_compiling():
            return None
        own, config, cache_layers = vars(self), vars(self.config), past_key_values.layers
        layers = own["_modules"]["layers"]
        if (
            type(self) is not MinRNNModel
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "forward" in own
            or not len(layers) == len(cache_layers) == config["num_hidden_layers"]
            or {*map(type, cache_layers)} != {MinRNNDynamicLayer}
            or config["output_hidden_states"]
            or config["bidirectional"]
            or (attention_mask is not None and not _ends_in_ones(attention_mask, len(input_ids)))
        ):
            return None
        decode_tokens = self._decoder(input_ids)
        return decode_tokens and decode_tokens(self, len(layers), input_ids, cache_layers, head)

    def _decoder(self, given: Tensor) -> Callable | None:
        """`decode_layers` for hidden states, `decode_tokens` for ids, where a kernel may stand for the layers: no
        compiling, tracing or differentiating."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or self.training
            or type(given) is not Tensor
            or not given.is_cpu
            or torch.is_autocast_enabled("cpu")
            or torch._C._get_tracing_state() is not None
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._len_torch_function_stack() > 0
            or torch.nn.modules.module._has_any_global_hook()
        ):
            return None
        return _decoder_of(vars(self.config)["scan_backend"], given.is_floating_point())

    def _check_state(self, use_cache, past_key_values, context_parallel_group, num_layers) -> None:
        """Raise ValueError for a state, or processes, that this model cannot continue with."""
        if self.config.bidirectional and (use_cache or past_key_values is not None):
            raise ValueError(
                "a bidirectional model reads whole sequences and has no state to go on from: pass use_cache=False and "
                "no past_key_values"
            )
        cache_layers = getattr(past_key_values, "layers", ())
        if past_key_values is not None and (
            len(cache_layers) != num_layers or not all(hasattr(layer, "read") for layer in cache_layers)
        ):
            raise ValueError(
                "past_key_values was not made for this model; pass DynamicCache(config=model.config), "
                "StaticCache(config=model.config, max_cache_len=...) or what an earlier call returned. In place of a "
                "prefix (prefix tuning) train the initial state: see state tuning in docs/fine-tuning.md"
            )
        checkpointing = getattr(self.layers[0], "_gradient_checkpointing_func", None)
        if (
            self.training
            and getattr(checkpointing, "keywords", {}).get("use_reentrant")
            and any(layer.keys is not None and layer.keys.requires_grad for layer in cache_layers)
        ):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True loses the gradient through past_key_values: detach "
                'their layers, or pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if context_parallel_group is not None and self.config.bidirectional:
            raise ValueError("a bidirectional model reads a sequence in one process: no context_parallel_group")
        if context_parallel_group is not None and any(layer.record_past for layer in cache_layers):
            raise ValueError("with a context_parallel_group past_key_values cannot record the states to go back to")

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            smallest, largest = input_ids.min().item(), input_ids.max().item()
            if 0 <= smallest and largest < self.config.vocab_size:
                raise  # raised by a hook or an adapter, not by our ids
            wrong = smallest if smallest < 0 else largest
            vocabulary = f"0..{self.config.vocab_size - 1}"
            raise ValueError(f"token id {wrong} is not in the vocabulary: ids must be in {vocabulary}") from None


@functools.cache
def _decoder_of(backend: str, of_hidden_states: bool) -> Callable | None:
    if backend not in ("auto", "numba") or resolve_backend(backend, "cpu", torch.float32) != "numba":
        return None
    from .decode_numba import decode_layers, decode_tokens

    return decode_layers if of_hidden_states else decode_tokens


def _ends_in_ones(attention_mask: Tensor, B: int) -> bool:
    return attention_mask.dim() == 2 and len(attention_mask) == B and 0 not in attention_mask.select(1, -1).tolist()


def _refuse_unknown_arguments(arguments: dict) -> None:
    for name, value in arguments.items():
        if value is not None and name not in KNOWN_ARGUMENTS:
            known = [*inspect.signature(MinRNNModel.forward).parameters, *KNOWN_ARGUMENTS]
            nearest = [FOREIGN_ARGUMENTS.get(name), *difflib.get_close_matches(name, known)]
            meant = next(filter(None, nearest), None)
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise TypeError(f"MinRNN models have no argument {name!r}{hint}")


def _given(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of the two that is there. Raises ValueError where it is not one, or has no tokens."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (given is input_ids and inputs_embeds is not None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if given.dim() != (3 if input_ids is None else 2):
        raise ValueError(f"input_ids must be (B, T) and inputs_embeds (B, T, H), not {tuple(given.shape)}")
    if given.shape[1] == 0:
        raise ValueError("the sequence is empty: input_ids must hold at least one token")
    return given


class MinRNNWithHead(MinRNNPreTrainedModel):
    """MinRNNModel with a linear head. A subclass says in `logits_of` what the head makes of the sequence."""

    output_class: type[ModelOutput]

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.model = MinRNNModel(config)

    def logits_of(self, *args, **kwargs) -> tuple[Tensor, BaseModelOutputWithPast]:
        """The logits, and what MinRNNModel returned, whose arguments these are."""
        raise NotImplementedError

    def loss_of(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        """The loss of transformers for this task; each takes from these arguments what it needs."""
        sizes = {"vocab_size": self.config.vocab_size, "config": self.config}
        return self.loss_function(logits=logits, pooled_logits=logits, labels=labels, **sizes, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """
        Args:
            labels: see the class; without them there is no loss.

        The other arguments are those of MinRNNModel.
        """
        logits, outputs = self.logits_of(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        loss = None if labels is None else self.loss_of(logits, labels, attention_mask, **kwargs)
        # Not every class of outputs has a place for the state.
        others = {"past_key_values", "hidden_states"} & self.output_class.__annotations__.keys()
        return self.output_class(loss=loss, logits=logits, **{name: getattr(outputs, name) for name in others})


class MinRNNLanguageModel(MinRNNWithHead):
    """MinRNNModel with a linear head over the vocabulary: what predicting the next and a masked token share."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MinRNNForCausalLM(MinRNNLanguageModel, GenerationMixin):
    """A language model: each token is predicted from those before it."""

    task = "ForCausalLM"

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs):
        """The mask of the new tokens alone, None where it is all ones. With a static cache its shape and strides stay
        the same from step to step, and a compiled step does not look at its values."""
        if attention_mask is None:
            return None
        new = attention_mask[:, -inputs_embeds.shape[1] :]
        if not torch.compiler.is_compiling() and (new != 0).all():
            return None
        # `contiguous` would keep the strides of the longer mask in a batch of one, for which any strides will do.
        return new.clone(memory_format=torch.contiguous_format)

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """As in transformers; token_type_ids are ignored.

        Raises ValueError for a bidirectional model, padding on the right, and a cache whose tokens are not given.
        """
        if self.config.bidirectional:
            raise ValueError(
                "a bidirectional model cannot generate: each of its outputs depends on the tokens after it"
            )
        kwargs.pop("token_type_ids", None)
        if kwargs.get("attention_mask") is not None:
            self._refuse_padding_on_the_right(kwargs["attention_mask"])
        self._refuse_missing_tokens(kwargs.get("input_ids") if inputs is None else inputs, **kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, *args) -> None:
        """None: a prompt is one document, and the mask tells where padding is."""

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, *args, **kwargs) -> Tensor:
        """As in transformers, which derives the mask from the padding token where none is given."""
        attention_mask = super()._prepare_attention_mask_for_generation(
            inputs_tensor, generation_config, *args, **kwargs
        )
        if not generation_config.is_assistant:  # an assistant continues generated tokens, whatever they end in
            self._refuse_padding_on_the_right(attention_mask)
        return attention_mask

    def _refuse_padding_on_the_right(self, attention_mask: Tensor) -> None:
        ends_in_padding = attention_mask[:, -1] == 0
        if ends_in_padding.any():
            raise ValueError(
                f"row {int(ends_in_padding.nonzero()[0])} of the prompts ends in padding: generate needs it on the "
                'left, padding_side="left" of the tokenizer'
            )

    def _refuse_missing_tokens(self, ids: Tensor | None, attention_mask=None, past_key_values=None, **kwargs) -> None:
        T = 0 if ids is None else ids.shape[1]
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if 0 < T <= seen and (attention_mask is None or attention_mask.shape[1] == T):
            raise ValueError(
                f"past_key_values holds {seen} tokens and input_ids {T}: pass the tokens of both as input_ids, or the "
                f"new ones alone with an attention_mask of {seen + T} columns"
            )

    @torch.no_grad()
    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        """As in transformers, whose `generate_batch`, `continuous_batching_context_manager` and server call it; see
        `continuous_batching.MinRNNBatchingConfig`. Needs transformers 5.23."""
        from .continuous_batching import MinRNNBatchingConfig, RowBatchingManager

        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None:
            return kept
        return RowBatchingManager(
            self,
            self.generation_config if generation_config is None else generation_config,
            MinRNNBatchingConfig() if continuous_batching_config is None else continuous_batching_config,
            workload_hints,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs) -> dict:
        """As in transformers, in a quarter of the time for the next token of plain decoding; without a mask, whose
        column of this token `generate` has added itself, ones."""
        is_next = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        cache: Any = kwargs.get("past_key_values")
        if is_next and type(cache) is DynamicCache and cache.layers[0].keys is not None:
            left_out = {"next_sequence_length", "is_first_iteration", "attention_mask"}
            inputs = {name: value for name, value in kwargs.items() if value is not None and name not in left_out}
            plain = inputs.keys() <= {"past_key_values", "use_cache", "logits_to_keep"}
            if plain and cache.layers[0].keys.is_cpu and input_ids.is_cpu:  # the state is on the device of the model
                return inputs | {"input_ids": input_ids[:, -1:].clone(memory_format=torch.contiguous_format)}
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        """None, for chunked prefill: the state has no attention heads."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (B, T) token ids, -100 where there is no loss; token t is predicted from those before it. With a
                context_parallel_group pass shift_labels as well, which hold the token after each, and to weigh the
                tokens of all ranks alike num_items_in_batch: the loss is the sum over this rank's tokens, over that.
            logits_to_keep: return the logits of the last so many tokens, or at these positions; 0 for all. The loss
                is that of all labels whatever is kept. If not all are, it is computed in chunks, and the logits of
                the whole batch are never in memory: `logits_to_keep=NO_LOGITS` for training.

        The other arguments are those of MinRNNModel.
        """
        if (
            use_cache
            and type(past_key_values) is DynamicCache
            and input_ids is not None
            and input_ids.shape[1:] == (1,)
        ):
            others = (position_ids, inputs_embeds, labels, *kwargs.values())
            if type(logits_to_keep) is int and all(value is None for value in others):
                logits = self.model.decode(input_ids, attention_mask, past_key_values, self.lm_head)
                if logits is not None:
                    return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        # The loss and the hidden states are those of all tokens, and so is what dropout draws in training.
        of_all = self.training or labels is not None
        of_all = of_all or kwargs.get("output_hidden_states") or self.config.output_hidden_states
        options = kwargs | {"use_cache": use_cache, "tokens_to_keep": 0 if of_all else logits_to_keep}
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **options)
        kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep if of_all else 0)
        # Skip the empty matmul: fully_shard would reshard lm_head after it, before the loss has used it.
        logits = self.lm_head(kept) if kept.shape[1] else kept.new_empty(*kept.shape[:2], self.vocab_size)
        loss = None
        if labels is not None:
            if kwargs.get("context_parallel_group") and kwargs.get("shift_labels") is None:
                raise ValueError("with a context_parallel_group pass shift_labels: the next chunk is on another rank")
            if isinstance(logits_to_keep, int) and logits_to_keep == 0:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            else:
                loss = self._loss_in_chunks(outputs.last_hidden_state, labels, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss_in_chunks(
        self, hidden_states: Tensor, labels: Tensor, shift_labels=None, num_items_in_batch=None, **kwargs
    ) -> Tensor:
        """The loss of all tokens, with the logits of at most LOSS_CHUNK_ELEMENTS / vocab_size tokens at a time."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        if shift_labels.shape != hidden_states.shape[:2]:
            raise ValueError(f"labels must be {tuple(hidden_states.shape[:2])}, not {tuple(shift_labels.shape)}")
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != -100).sum()

        kwargs |= {"labels": None, "vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}

        def loss_of(hidden_states: Tensor, shift_labels: Tensor) -> Tensor:
            return self.loss_function(logits=self.lm_head(hidden_states), shift_labels=shift_labels, **kwargs)

        hidden_states, shift_labels = hidden_states.flatten(0, 1), shift_labels.flatten()
        elements = LOSS_CHUNK_ELEMENTS if hidden_states.is_cpu else LOSS_CHUNK_ELEMENTS_ACCELERATOR
        size = max(1, elements // self.config.vocab_size)
        if len(shift_labels) <= size:
            return loss_of(hidden_states, shift_labels)
        # Backward computes the logits of a chunk again: one more matmul, instead of all logits in memory.
        losses = [
            checkpoint(loss_of, *chunk, use_reentrant=False)
            for chunk in zip(hidden_states.split(size), shift_labels.split(size))
        ]
        return torch.stack(losses).sum()


class MinRNNForMaskedLM(MinRNNLanguageModel):
    """A masked language model: each token is predicted from all that are given, with `config.bidirectional` on both
    sides of it.

    labels: (B, T) the token ids behind the masks, -100 where there is no loss.
    """

    task = "ForMaskedLM"
    output_class = MaskedLMOutput

    def logits_of(self, *args, **kwargs) -> tuple[Tensor, BaseModelOutputWithPast]:
        outputs = self.model(*args, **kwargs)
        return self.lm_head(outputs.last_hidden_state), outputs


class MinRNNSequenceScorer(MinRNNWithHead):
    """MinRNNModel with a linear head on the last real token, which has seen all; of a bidirectional model, on the mean
    of all real tokens, since its last one has seen the others from one side only.

    Without an attention_mask tokens equal to config.pad_token_id are padding.
    """

    def __init__(self, config: MinRNNConfig, num_scores: int):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, num_scores, bias=False)
        self.post_init()

    def logits_of(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, BaseModelOutputWithPast]:
        """(B, num_scores) of sequences (B, T), and what the model returned."""
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        outputs = self.model(input_ids, attention_mask, **kwargs)
        hidden_states = outputs.last_hidden_state
        B, T = hidden_states.shape[:2]
        real = hidden_states.new_ones(B, T, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -T:].to(hidden_states.device) != 0
        if self.config.bidirectional:
            pooled = (hidden_states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        else:
            last = (real * torch.arange(T, device=hidden_states.device)).argmax(-1)
            pooled = hidden_states[torch.arange(B, device=hidden_states.device), last]
        return self.score(pooled), outputs


class MinRNNForSequenceClassification(MinRNNSequenceScorer):
    """A class, several, or numbers for each sequence.

    labels: (B,) classes, or (B, num_labels) for several labels or regression (config.problem_type).
    """

    task = "ForSequenceClassification"
    output_class = SequenceClassifierOutputWithPast

    def __init__(self, config: MinRNNConfig):
        super().__init__(config, config.num_labels)
        self.num_labels = config.num_labels


class MinRNNForMultipleChoice(MinRNNSequenceScorer):
    """Which of C sequences is right: a score for each, read alone, and a softmax over the C.

    All tensors are (B, C, T), inputs_embeds (B, C, T, H); the hidden states that are returned have B * C rows.
    labels: (B,) the number of the right choice, 0..C - 1, or -100 for no loss.
    """

    task = "ForMultipleChoice"
    output_class = MultipleChoiceModelOutput

    def __init__(self, config: MinRNNConfig):
        super().__init__(config, 1)
        self.loss_function = fixed_cross_entropy  # transformers has none for this task

    def logits_of(self, input_ids=None, attention_mask=None, *, inputs_embeds=None, **kwargs):
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.dim() != (4 if input_ids is None else 3):
            shape = None if given is None else tuple(given.shape)
            raise ValueError(f"input_ids must be (B, C, T) or inputs_embeds (B, C, T, H), not {shape}")

        def rows(value):
            return value.flatten(0, 1) if isinstance(value, Tensor) and value.dim() > 2 else value

        others = {name: rows(value) for name, value in kwargs.items()}
        scores, outputs = super().logits_of(
            rows(input_ids), rows(attention_mask), inputs_embeds=rows(inputs_embeds), **others
        )
        return scores.view(given.shape[:2]), outputs

    def loss_of(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        return self.loss_function(logits.float(), labels.to(logits.device), **kwargs)


class MinRNNForTokenClassification(MinRNNWithHead):
    """MinRNNModel with a linear head on every token: a class or, with problem_type="regression", numbers for each.

    labels: (B, T) classes, -100 where there is no loss. For regression numbers, (B, T, num_labels) or with one label
    (B, T); the loss is the mean squared error, and there is none at padding either.
    """

    task = "ForTokenClassification"
    output_class = TokenClassifierOutput

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def logits_of(self, *args, **kwargs) -> tuple[Tensor, BaseModelOutputWithPast]:
        outputs = self.model(*args, **kwargs)
        return self.score(self.dropout(outputs.last_hidden_state)), outputs

    def loss_of(
        self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None, num_items_in_batch=None, **kwargs
    ) -> Tensor:
        """Of a regression the mean of (logits - labels)^2 over the numbers that are neither padding nor -100, the mark
        that Trainer leaves out when it counts them; a sum over num_items_in_batch where that is given.

        Raises ValueError for integer labels, to which DataCollatorForTokenClassification rounds, and for other shapes.
        """
        if self.config.problem_type != "regression":
            return super().loss_of(logits, labels, attention_mask, num_items_in_batch=num_items_in_batch, **kwargs)
        if not labels.is_floating_point():
            raise ValueError(f"labels of a regression must be floating-point numbers, not {labels.dtype}")
        if labels.shape != logits.shape and (*labels.shape, 1) != logits.shape:
            raise ValueError(f"labels must be {tuple(logits.shape)}, not {tuple(labels.shape)}")
        logits = logits.float()
        labels = labels.to(logits).view_as(logits)
        counted = labels != -100
        if attention_mask is not None:
            counted &= (attention_mask[:, -labels.shape[1] :, None] != 0).to(labels.device)
        # What is not counted may be anything, NaN too, and has no gradient.
        squares = (logits - labels.where(counted, logits.detach())).square()
        return squares.sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class MinRNNForQuestionAnswering(MinRNNWithHead):
    """MinRNNModel with two linear heads on every token: whether the answer starts, and whether it ends there.

    Logits of padding are the lowest number there is: no share of the probability goes there, and the loss is that of
    the sequence without its padding.
    """

    task = "ForQuestionAnswering"

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: (B,) the first and the last token of the answer; T or more for none. There
                is a loss where both are given, the mean of those of the two.

        The other arguments are those of MinRNNModel.
        """
        outputs = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        if attention_mask is not None:
            padding = attention_mask[:, -logits.shape[1] :].to(logits.device) == 0
            logits = logits.masked_fill(padding[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )


# `generate` inspects the signature of custom code at each token: have it ready.
MinRNNForCausalLM.forward.__signature__ = inspect.signature(MinRNNForCausalLM.forward)

# save_pretrained copies this code beside the weights.
for _auto_class, _path in AUTO_MAP.items():
    globals()[_path.split(".")[1]].register_for_auto_class(_auto_class)

__all__ = ["MinRNNPreTrainedModel", "MinRNNModel", *(f"MinRNN{task}" for task in TASK_NAMES)]
