"""Language models of equal size that the paper's experiments compare: tokens (B, T) -> logits (B, T, vocabulary)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
HEADS = 2


class Logits(nn.Module):
    """A causal language model of transformers without its cache and output object."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


class Recurrent(nn.Module):
    """Embedding, nn.GRU or nn.LSTM, output layer."""

    def __init__(self, kind: type[nn.RNNBase], vocabulary: int, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = kind(width, width, layers, batch_first=True)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.rnn(self.embedding(tokens))[0])


def minrnn(cell_type: str, vocabulary: int, width: int, layers: int, settings: dict[str, Any]) -> nn.Module:
    config = MinRNNConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        cell_type=cell_type,
        **settings,
        **NO_TOKENS,
    )
    return Logits(MinRNNForCausalLM(config))


def mamba(vocabulary: int, width: int, layers: int) -> nn.Module:
    config = MambaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, use_mambapy=True,
        tie_word_embeddings=False, **NO_TOKENS,
    )  # fmt: skip
    return Logits(MambaForCausalLM(config))


def transformer(vocabulary: int, width: int, layers: int, positions: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=HEADS, max_position_embeddings=positions, **NO_TOKENS,
    )  # fmt: skip
    return Logits(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def contenders(
    vocabulary: int, width: int, layers: int, positions: int, settings: dict[str, Any]
) -> dict[str, Callable[[], nn.Module]]:
    """By name. A minGRU of this width, and others as deep, with the width whose parameters come nearest to it.

    positions: the longest sequence. settings: further arguments of MinRNNConfig.
    """
    builders = {
        "minGRU": lambda width: minrnn("mingru", vocabulary, width, layers, settings),
        "minLSTM": lambda width: minrnn("minlstm", vocabulary, width, layers, settings),
        "nn.GRU": lambda width: Recurrent(nn.GRU, vocabulary, width, layers),
        "nn.LSTM": lambda width: Recurrent(nn.LSTM, vocabulary, width, layers),
        "Mamba": lambda width: mamba(vocabulary, width, layers),
        "Transformer": lambda width: transformer(vocabulary, width, layers, positions),
    }
    with torch.device("meta"):
        target = parameters(builders["minGRU"](width))
    return {name: (lambda build=build: build(nearest_width(build, target))) for name, build in builders.items()}


def nearest_width(build: Callable[[int], nn.Module], target: int) -> int:
    """The multiple of 4 with which a model has the number of parameters nearest to `target`."""
    best, best_distance = 0, float("inf")
    for width in range(4, 4096, 4):
        with torch.device("meta"):
            distance = abs(parameters(build(width)) - target)
        if distance >= best_distance:
            break
        best, best_distance = width, distance
    return best
