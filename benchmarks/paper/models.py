"""Language models of equal size that the paper's experiments compare: tokens (B, T) -> logits (B, T, vocabulary)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from benchmarks.paper.mamba_scan import fused_scan
from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM
from modeling_minrnn.cells import CELLS

CELL_TYPES = {cell.label: name for name, cell in CELLS.items()}  # contenders that are a MinRNN
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Logits(nn.Module):
    """A causal language model of transformers without its cache and output object."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def step_by_step(self, tokens: Tensor) -> Tensor:
        """The same, one token at a time from the cache."""
        cache, logits = None, []
        for token in tokens.split(1, 1):
            output = self.model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        return torch.cat(logits, 1)


class Scans(nn.Module):
    """Embedding, the MinGRUStack of mingru-scans, output layer. options: of its mixer; `layers` of its blocks."""

    def __init__(self, vocabulary: int, width: int, layers: int, mixer: str, **options: Any):
        super().__init__()
        from mingru import MinGRUStack

        self.embedding = nn.Embedding(vocabulary, width)
        self.stack = MinGRUStack(width, width, layers, mixer=mixer, mixer_kwargs=options or None)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.stack(self.embedding(tokens))[0])

    def step_by_step(self, tokens: Tensor) -> Tensor:
        """The same by the step of its layers."""
        state, logits = self.stack.init_state(), []
        for token in tokens.unbind(1):
            hidden, state = self.stack.step(self.embedding(token), state)
            logits.append(self.output(hidden))
        return torch.stack(logits, 1)


class FusedMamba(Logits):
    def forward(self, tokens: Tensor) -> Tensor:
        with fused_scan():
            return super().forward(tokens)


class Recurrent(nn.Module):
    """Embedding, nn.GRU or nn.LSTM, output layer of its own."""

    def __init__(self, kind: type[nn.RNNBase], vocabulary: int, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = kind(width, width, layers, batch_first=True)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.rnn(self.embedding(tokens))[0])


@dataclass(frozen=True)
class Family:
    """Models that differ in kind and width alone.

    positions: the longest sequence. heads: of attention. minrnn: further arguments of MinRNNConfig, max_timescale for
    the cells that have a memory to set. transformer: of GPT2Config and LlamaConfig; initializer_range may be "width",
    1 / sqrt(width).
    """

    vocabulary: int
    layers: int
    positions: int
    heads: int = 2
    tied: bool = True
    dropout: float = 0.0
    minrnn: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)

    def build(self, name: str, width: int) -> nn.Module:
        shared = {"vocab_size": self.vocabulary, "tie_word_embeddings": self.tied, **NO_TOKENS}
        depth = {"hidden_size": width, "num_hidden_layers": self.layers}
        start = {"initializer_range": width**-0.5} if self.transformer.get("initializer_range") == "width" else {}
        if name in CELL_TYPES:
            cell = CELL_TYPES[name]
            own = {name: value for name, value in self.minrnn.items()
                   if name != "max_timescale" or CELLS[cell].remembers_by}  # fmt: skip
            config = MinRNNConfig(**shared, **depth, cell_type=cell, dropout=self.dropout, **own)
            return Logits(MinRNNForCausalLM(config))
        if name in ("nn.GRU", "nn.LSTM"):
            return Recurrent(getattr(nn, name.removeprefix("nn.")), self.vocabulary, width, self.layers)
        if name == "Mamba":
            return FusedMamba(MambaForCausalLM(MambaConfig(**shared, **depth)))
        if name == "Llama":
            config = LlamaConfig(
                **shared, **depth, intermediate_size=3 * width, num_attention_heads=self.heads,
                max_position_embeddings=self.positions, **self.transformer | start,
            )  # fmt: skip
            return Logits(LlamaForCausalLM._from_config(config, attn_implementation="sdpa"))
        if name == "GPT-2":
            config = GPT2Config(
                **shared, n_embd=width, n_layer=self.layers, n_head=self.heads, n_positions=self.positions,
                embd_pdrop=self.dropout, attn_pdrop=self.dropout, resid_pdrop=self.dropout,
                **self.transformer | start,
            )  # fmt: skip
            return Logits(GPT2LMHeadModel._from_config(config, attn_implementation="sdpa"))
        raise ValueError(f"unknown contender {name!r}")

    def of_equal_size(self, name: str, width: int, target: int | None = None) -> nn.Module:
        """Of the width, a multiple of 4, with which its parameters come nearest to `target`, or those of a minGRU of
        `width`."""
        with torch.device("meta"):
            target = target or parameters(self.build("minGRU", width))
            steps = {"Llama": 2 * self.heads, "GPT-2": 2 * self.heads}  # rotary positions need an even head
            steps["LMU"] = 16  # its order at any width
            step = steps.get(name, max(4, self.minrnn.get("num_heads", 1)))
            widths = range(step, 4 * width, step)
            best = min(widths, key=lambda width: abs(parameters(self.build(name, width)) - target))
        return self.build(name, best)


def parameters(model: nn.Module) -> int:
    """Without GPT-2's table of positions, most of which a long one never trains."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("wpe.weight"))
