"""The language models that the benchmarks compare: MinRNN, Llama and GPT-2 of 6 layers, width 384 and equal size."""

import functools
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

LAYERS, WIDTH, HEADS, VOCABULARY = 6, 384, 6, 256
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def minrnn(cell_type: str, scan_backend: str = "auto") -> MinRNNForCausalLM:
    """The default MinRNN at this size. The same weights for every backend."""
    torch.manual_seed(0)
    config = MinRNNConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        cell_type=cell_type,
        scan_backend=scan_backend,
    )
    return MinRNNForCausalLM(config)


def transformers_of_equal_size(model: PreTrainedModel, positions: int) -> dict[str, PreTrainedModel]:
    """Llama and GPT-2 with as many parameters as `model`, for sequences of up to `positions` tokens.

    Depth and width are those of `model`; the width of the MLP makes up the count, GPT-2's position table included.
    """
    target, layers = model.num_parameters(), model.config.num_hidden_layers
    builds = {name: functools.partial(build, layers) for name, build in (("llama", _llama), ("gpt2", _gpt2))}
    return {name: of_size(target, build, positions) for name, build in builds.items()}


def _llama(layers: int, mlp_width: int, positions: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=positions,
        **NO_TOKENS,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def _gpt2(layers: int, mlp_width: int, positions: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_inner=mlp_width,
        n_layer=layers,
        n_head=HEADS,
        n_positions=positions,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **NO_TOKENS,
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def of_size(target: int, build: Callable[[int, int], PreTrainedModel], positions: int) -> PreTrainedModel:
    with torch.device("meta"):  # the count is linear in the width of the MLP: two points give the line
        base, next_width = (build(width, positions).num_parameters() for width in (16, 32))
    steps = round((target - base) / (next_width - base))
    torch.manual_seed(0)
    model = build(16 + 16 * steps, positions)
    if abs(model.num_parameters() / target - 1) > 0.03:
        raise RuntimeError(f"{type(model).__name__} has {model.num_parameters()} parameters, not {target} +- 3 %")
    return model
