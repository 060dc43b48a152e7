"""Time and memory of one layer against the length of the sequence (arXiv 2410.01201, section 4.1), on one CPU thread.

Timed: forward and backward, with the gradients of the input and of every weight, of B sequences of T vectors of width
64. Recurrent layers of state 64: minGRU and minLSTM (in_proj -> scan), torch's GRU and LSTM, and the same two as loops
over nn.GRUCell and nn.LSTMCell, which are what the paper compares with. Blocks: one layer each of MinRNN, Mamba (the
scan of transformers, and mambapy's), GPT-2 and Llama, at the sizes that their configurations have by default for this
width.

peak_mb: the most memory that one forward and backward took beyond what the process held before, in a forked process.
A contender that takes more than LIMIT_S is given no longer sequence.
slope: of log(seconds) against log(T) over T >= 1024, by least squares; 1 is linear, 2 quadratic.
slowdown: seconds over those of the minGRU (or, among the blocks, of the MinRNN block with minGRU) at the same T.

    python -m benchmarks.paper.speed [--only minGRU] [--lengths 64 256] [--rounds 3]
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, MambaConfig, MambaModel, PreTrainedModel

from benchmarks.harness import Report, interleave, parser, peak_bytes, timed
from modeling_minrnn import MinRNNConfig, MinRNNModel, minrnn_scan
from modeling_minrnn.cells import cell_of

BATCH, WIDTH = 4, 64
LENGTHS = [64, 256, 1024, 4096, 16384]
LIMIT_S = 5
MINIMAL, BLOCK = "minGRU", "MinRNN block, minGRU"  # what the others are compared with


class Minimal(nn.Module):
    def __init__(self, cell_type: str):
        super().__init__()
        self.cell_type, self.in_proj = cell_type, nn.Linear(WIDTH, sum(cell_of(cell_type).blocks(WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return minrnn_scan(self.in_proj(x), self.cell_type)[0]


class Loop(nn.Module):
    """nn.GRUCell or nn.LSTMCell, one token after the other."""

    def __init__(self, cell: type[nn.RNNCellBase]):
        super().__init__()
        self.cell = cell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for token in x.unbind(1):
            state = self.cell(token, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


class Block(nn.Module):
    """One layer of a transformers model, on vectors."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


class First(nn.Sequential):
    """The states of nn.GRU and nn.LSTM without the last one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def contenders(longest: int) -> dict[str, Callable[[], nn.Module]]:
    few = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

    def minrnn(cell_type: str) -> nn.Module:
        return Block(MinRNNModel(MinRNNConfig(hidden_size=WIDTH, num_hidden_layers=1, cell_type=cell_type, **few)))

    def mamba(use_mambapy: bool) -> nn.Module:
        config = MambaConfig(hidden_size=WIDTH, num_hidden_layers=1, use_mambapy=use_mambapy, **few)
        return Block(MambaModel(config))

    def gpt2() -> nn.Module:
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_embd=WIDTH, n_layer=1, n_head=1, n_positions=longest, **dropout, **few)
        return Block(GPT2Model._from_config(config, attn_implementation="sdpa"))

    def llama() -> nn.Module:
        config = LlamaConfig(
            hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=longest, **few,
        )  # fmt: skip
        return Block(LlamaModel._from_config(config, attn_implementation="sdpa"))

    return {
        MINIMAL: lambda: Minimal("mingru"),
        "minLSTM": lambda: Minimal("minlstm"),
        "nn.GRU": lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True)),
        "nn.LSTM": lambda: First(nn.LSTM(WIDTH, WIDTH, batch_first=True)),
        "loop of nn.GRUCell": lambda: Loop(nn.GRUCell),
        "loop of nn.LSTMCell": lambda: Loop(nn.LSTMCell),
        BLOCK: lambda: minrnn("mingru"),
        "MinRNN block, minLSTM": lambda: minrnn("minlstm"),
        "Mamba block, transformers' scan": lambda: mamba(False),
        "Mamba block, mambapy's scan": lambda: mamba(True),
        "GPT-2 block": gpt2,
        "Llama block": llama,
    }


def forward_backward(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(
        layer(x), [x, *(p for p in layer.parameters() if p.requires_grad)], gradient, allow_unused=True
    )


def main() -> None:
    flags = parser("paper_speed", __doc__, rounds=3)
    flags.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = flags.parse_args()
    report = Report(options)
    chosen = {name: make for name, make in contenders(max(options.lengths)).items() if report.wants(name)}

    def runs(T: int) -> dict[str, Callable[[], None]]:
        torch.manual_seed(0)
        x, gradient = torch.randn(BATCH, T, WIDTH, requires_grad=True), torch.randn(BATCH, T, WIDTH)
        return {name: functools.partial(forward_backward, make(), x, gradient) for name, make in chosen.items()}

    for run in runs(min(LENGTHS)).values():
        run()
    # Before anything else: what larger runs leave in the heap would be taken again without being counted.
    peaks: dict[tuple[str, int], int] = {}
    slow = set()
    for T in options.lengths:
        for name, run in runs(T).items():
            if name not in slow:
                started = time.perf_counter()
                peaks[name, T] = peak_bytes(run)
                if time.perf_counter() - started > LIMIT_S:
                    slow.add(name)
    samples = {
        T: interleave({name: timed(run) for name, run in runs(T).items() if (name, T) in peaks}, options.rounds)
        for T in options.lengths
    }
    for name in chosen:
        lengths = [T for T in options.lengths if (name, T) in peaks]
        long = [T for T in lengths if T >= 1024]
        seconds = [samples[T].seconds(name) for T in long]
        slope = float(np.polyfit(np.log(long), np.log(seconds), 1)[0]) if len(long) > 1 else None
        base = BLOCK if "block" in name else MINIMAL
        for T in lengths:
            report.add(
                contender=name,
                B=BATCH,
                T=T,
                width=WIDTH,
                ms=1e3 * samples[T].seconds(name),
                slowdown=samples[T].ratio(name, base) if (base, T) in peaks else None,
                peak_mb=peaks[name, T] / 1e6,
                slope=slope,
            )
    report.print_table()


if __name__ == "__main__":
    main()
