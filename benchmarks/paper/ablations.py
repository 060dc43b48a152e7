"""What each part of the model is worth on Shakespeare's characters: one line a variant, one row a run.

    python -m benchmarks.paper.ablations PATH_TO/input.txt [--seeds 0 1 2] [--only conv] [--steps 600]

The setting is configs/shakespeare-char-cpu.yaml, with its schedule scaled to --steps; its learning rate is that of all
variants. A row is one training run of a variant. Runs with one seed read the same windows; the seeds are gone through
one after the other, so that all variants have had the first before the second begins.

held_out_loss: nats per character over the whole held-out text, read once with the state carried (train.evaluate).
state_norm, largest_state: of the layer where it is largest, over the same text (MinRNNForCausalLM.diagnose_states).

Where a variant is no option of the product, it is a cell or a module below that replaces the product's own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from benchmarks.harness import HERE, Report, parser
from benchmarks.paper.models import Logits
from benchmarks.paper.training import train
from modeling_minrnn import MinRNNForCausalLM
from modeling_minrnn.cells import CELLS, Cell, Linear, g
from modeling_minrnn.masks import NO_MASKS
from modeling_minrnn.modeling_minrnn import MinRNNDecoderLayer
from train import build_model, evaluate
from training.config import load_config
from training.data import RandomWindows, load_documents, token_stream
from training.optimizers import parameter_groups
from training.tokenizers import load_tokenizer

SETTING = HERE.parent / "configs" / "shakespeare-char-cpu.yaml"
STEPS = 600


@dataclass(frozen=True)
class UnnormalisedMinLSTM(Cell):
    """minLSTM with its gates as they are: h[t] = f h[t-1] + i g(v), f = sigmoid(forget), i = sigmoid(input)."""

    name, label, source = "minlstm_unnormalised", "minLSTM, f and i not normalised", "arXiv 2410.01201"
    num_blocks = 3

    def gates(self, projected: Tensor, parameters: Tensor, log_sums: Tensor) -> Linear:
        forget, input_, v = projected.chunk(3, -1)
        return Linear(logsigmoid(forget), torch.sigmoid(input_) * g(v))


CELLS[UnnormalisedMinLSTM.name] = UnnormalisedMinLSTM


class ConvThenRNN(nn.Module):
    """rnn(n + conv(n)) of n = norm(x): a convolution in the branch of the RNN, not on the residual stream.

    The cache keeps the window of x, as it does for a convolution of the layer's own.
    """

    def __init__(self, layer: MinRNNDecoderLayer):
        super().__init__()
        self.norm, self.conv, self.rnn = layer.rnn_norm, layer.conv, layer.rnn

    def forward(self, hidden_states, masks=NO_MASKS, carried=None, group=None):
        H, K = self.conv.weight.shape
        window = hidden_states.new_zeros(len(hidden_states), K - 1, H)
        if carried is not None:
            window = carried.window_or(window)
        normed = self.norm(hidden_states)
        convolved = normed + self.conv(normed, self.norm(window), masks.taps)
        return self.rnn(convolved, masks, carried, group)


class ConvThenMLP(nn.Module):
    """What x + conv(x), then x + mlp(norm(x)), adds to x."""

    def __init__(self, layer: MinRNNDecoderLayer):
        super().__init__()
        self.conv, self.norm, self.mlp = layer.conv, layer.mlp_norm, layer.mlp

    def forward(self, hidden_states: Tensor, window: Tensor, taps: Tensor | None) -> Tensor:
        added = self.conv(hidden_states, window, taps)
        return added + self.mlp(self.norm(hidden_states + added))


Change = Callable[[MinRNNDecoderLayer], None]


def conv_in_the_branch(layer: MinRNNDecoderLayer) -> None:
    layer.rnn, layer.rnn_norm = ConvThenRNN(layer), nn.Identity()
    del layer.conv
    layer.has_conv = False


def mlp_before_rnn(layer: MinRNNDecoderLayer) -> None:
    layer.conv = ConvThenMLP(layer)
    del layer.mlp_norm, layer.mlp
    layer.has_mlp = False


@dataclass(frozen=True)
class Variant:
    """model: arguments of MinRNNConfig beside those of the setting."""

    model: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    decayed_gates: bool = False

    def build(self, setting: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> MinRNNForCausalLM:
        model = build_model(setting | self.model, tokenizer)
        if self.change:
            for layer in model.model.layers:
                self.change(layer)
        return model

    def parameter_groups(self, model: MinRNNForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
        decayed, others = parameter_groups(model, weight_decay)
        if self.decayed_gates:
            gates = {layer.rnn.in_proj.weight for layer in model.model.layers}
            decayed["params"] += gates
            others["params"] = [p for p in others["params"] if p not in gates]
        return [decayed, others]


MINLSTM = {"cell_type": "minlstm"}
NO_MLP = {"intermediate_size": 0}
DEEPER = {"hidden_size": 128, "num_hidden_layers": 6}
VARIANTS = {
    "minGRU: conv, RNN, MLP": Variant(),
    "no conv": Variant({"conv_kernel_size": 0}),
    "conv in the RNN's branch, after its norm": Variant(change=conv_in_the_branch),
    "MLP before RNN": Variant(change=mlp_before_rnn),
    "no MLP": Variant(NO_MLP),
    "no MLP, state 822 wide": Variant(NO_MLP | {"expansion_factor": 822 / 224}),
    "no MLP, 7 layers": Variant(NO_MLP | {"num_hidden_layers": 7}),
    "candidate v for g(v), signed state": Variant({"candidate": "linear"}),
    "max_timescale 64": Variant({"max_timescale": 64}),
    "max_timescale 256": Variant({"max_timescale": 256}),
    "initializer_range 0.02": Variant({"initializer_range": 0.02}),
    "initializer_range 0.1": Variant({"initializer_range": 0.1}),
    "learned initial state": Variant({"learned_initial_state": True}),
    "weight decay on the gates": Variant(decayed_gates=True),
    "6 layers of 128": Variant(DEEPER),
    "6 layers of 128, MLP before RNN": Variant(DEEPER, change=mlp_before_rnn),
    "minLSTM": Variant(MINLSTM),
    "minLSTM, initializer_range 0.02": Variant(MINLSTM | {"initializer_range": 0.02}),
    "minLSTM, max_timescale 256": Variant(MINLSTM | {"max_timescale": 256}),
    "minLSTM, f and i not normalised": Variant({"cell_type": UnnormalisedMinLSTM.name}),
}


def main() -> None:
    flags = parser("paper_ablations", __doc__, rounds=1)
    flags.add_argument("text", type=Path, help="tiny Shakespeare, as one file")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, default=STEPS)
    options = flags.parse_args()
    report = Report(options)
    setting = load_config(str(SETTING), [f"data.files=[{options.text}]"])
    settings = setting.train
    documents, held_out_documents = load_documents(setting.data)
    tokenizer = load_tokenizer(setting.data.tokenizer, (document["text"] for document in documents))
    stream, held_out = token_stream(documents, tokenizer), token_stream(held_out_documents, tokenizer)
    for seed in options.seeds:
        for name, variant in VARIANTS.items():
            if not report.wants(name):
                continue
            torch.manual_seed(seed)
            model = variant.build(setting.model, tokenizer)
            started = time.perf_counter()
            steps = train(
                Logits(model),
                RandomWindows(stream, settings.sequence_length, settings.batch_size, seed, slice(None)),
                options.steps,
                settings.learning_rate,
                groups=variant.parameter_groups(model, settings.weight_decay),
                betas=settings.betas,
                warmup=settings.warmup_steps / settings.steps,
                final_rate=settings.min_learning_rate_ratio,
            )
            for _ in steps:
                pass
            minutes = (time.perf_counter() - started) / 60
            loss, _ = evaluate(model, held_out)
            states = model.diagnose_states(held_out.read(0, len(held_out))[None])
            report.add(
                variant=name,
                seed=seed,
                parameters=model.num_parameters(),
                steps=options.steps,
                learning_rate=settings.learning_rate,
                held_out_loss=loss,
                state_norm=max(layer.mean_norm for layer in states),
                largest_state=max(layer.largest_state for layer in states),
                minutes=minutes,
            )
    report.print_table()


if __name__ == "__main__":
    main()
