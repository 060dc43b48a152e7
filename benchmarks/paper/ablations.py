"""What each part of the model is worth on Shakespeare's characters: one line a variant, one row a run.

    python -m benchmarks.paper.ablations PATH_TO/input.txt [--seeds 0 1 2] [--only conv] [--steps 600]

The setting is configs/shakespeare-char-cpu.yaml, with its schedule scaled to --steps; its learning rate is that of all
variants. A row is one training run of a variant. Runs with one seed read the same windows; the seeds are gone through
one after the other, so that all variants have had the first before the second begins.

held_out_loss: nats per character over the whole held-out text, read once with the state carried (train.evaluate).
state_norm, largest_state: of the layer where it is largest, over the same text (MinRNNForCausalLM.diagnose_states).

The variants are no options of the product: below are the modules that replace its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from transformers import PreTrainedTokenizerBase

from benchmarks.harness import HERE, Report, parser
from benchmarks.paper.models import Logits
from benchmarks.paper.training import train
from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM
from modeling_minrnn.causal_conv import conv_taps, windows_after
from modeling_minrnn.modeling_minrnn import MinRNNCausalConv, MinRNNDecoderLayer, MinRNNRecurrence
from modeling_minrnn.scan import minrnn_scan
from train import build_model, evaluate, parameter_groups
from training.config import load_config
from training.data import RandomWindows, load_documents, token_stream
from training.tokenizers import load_tokenizer

SETTING = HERE.parent / "configs" / "shakespeare-char-cpu.yaml"
STEPS = 600


class SignedRecurrence(MinRNNRecurrence):
    """minGRU with candidates v instead of g(v): h[t] = (1 - z) h[t-1] + z v, so that a state may be negative.

    The recurrence is linear in its candidates, and v = g(relu(v)) - g(relu(-v)), as g(x) = x + 0.5 for x >= 0: it is
    the difference of two that start at the state and at zero.
    """

    def go_on(self, hidden_states, state, reset_mask=None, padding_mask=None, exact_states=False, group=None):
        gate, v = self.in_proj(hidden_states).to(state.dtype).chunk(2, -1)  # bf16 would lose digits in the difference
        masks = {"reset_mask": reset_mask, "padding_mask": padding_mask, "backend": self.backend, "group": group}
        above, final_above = minrnn_scan(
            torch.cat([gate, relu(v)], -1), "mingru", state, reset_state=self.own_initial_state(), **masks
        )
        below, final_below = minrnn_scan(torch.cat([gate, relu(-v)], -1), "mingru", **masks)
        states = above - below
        return self.out_proj(states.to(hidden_states.dtype)), states, final_above - final_below


class UnnormalisedGates(nn.Linear):
    """minLSTM with its gates as they are: h[t] = f h[t-1] + i g(v), f = sigmoid(forget), i = sigmoid(input).

    It is the minGRU's recurrence with z = 1 - f and the candidate x for which z g(x) = i g(v): g has an inverse on
    (0, inf), y - 0.5 from 0.5 on and logit(y) below. So its projection is made one for a minGRU.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        forget, input_, v = super().forward(hidden_states).to(self.weight.dtype).chunk(3, -1)
        candidate = torch.where(v >= 0, relu(v) + 0.5, torch.sigmoid(v))
        y = torch.sigmoid(input_) * candidate / torch.sigmoid(-forget)
        smallest = torch.finfo(y.dtype).tiny  # its logit is finite
        x = torch.where(y >= 0.5, y - 0.5, torch.logit(y.clamp(smallest, 0.5)))
        return torch.cat([-forget, x], -1)


class ConvolvedRecurrence(MinRNNRecurrence):
    """rnn(n + conv(n)) of the normed input n: a convolution in the branch of the RNN, not on the residual stream.

    Its state (B, D + (K - 1) H) is that of the recurrence, then the window of the convolution.
    """

    def __init__(self, config: MinRNNConfig):
        super().__init__(config)
        self.conv = MinRNNCausalConv(config)

    def start(self, batch_size: int, like: Tensor) -> Tensor:
        H, K = self.conv.weight.shape
        state = super().start(batch_size, like)
        return torch.cat([state, state.new_zeros(batch_size, (K - 1) * H)], -1)

    def go_on(self, hidden_states, state, reset_mask=None, padding_mask=None, exact_states=False, group=None):
        H, K = self.conv.weight.shape
        state, window = state.split([self.state_size, (K - 1) * H], -1)
        window = window.unflatten(-1, (K - 1, H)).to(hidden_states.dtype)
        taps = conv_taps(K, reset_mask, padding_mask)
        convolved = hidden_states + self.conv(hidden_states, window, taps)
        output, states, final_state = super().go_on(convolved, state, reset_mask, padding_mask, exact_states, group)
        [window] = windows_after(hidden_states, window, taps, hidden_states.shape[1] - 1)
        return output, states, torch.cat([final_state, window.flatten(1).to(final_state.dtype)], -1)


class ConvThenMLP(nn.Module):
    """What x + conv(x), then x + mlp(norm(x)), adds to x."""

    def __init__(self, layer: MinRNNDecoderLayer):
        super().__init__()
        self.conv, self.norm, self.mlp = layer.conv, layer.mlp_norm, layer.mlp

    def forward(self, hidden_states: Tensor, window: Tensor, taps: Tensor | None) -> Tensor:
        added = self.conv(hidden_states, window, taps)
        return added + self.mlp(self.norm(hidden_states + added))


Change = Callable[[MinRNNDecoderLayer, MinRNNConfig], None]


def signed_state(layer: MinRNNDecoderLayer, config: MinRNNConfig) -> None:
    put(SignedRecurrence, layer, config)


def gates_as_they_are(layer: MinRNNDecoderLayer, config: MinRNNConfig) -> None:
    linear = layer.rnn.in_proj
    gates = UnnormalisedGates(linear.in_features, linear.out_features, linear.bias is not None)
    gates.weight, gates.bias = linear.weight, linear.bias
    layer.rnn.in_proj, layer.rnn.cell_type = gates, "mingru"


def conv_in_the_branch(layer: MinRNNDecoderLayer, config: MinRNNConfig) -> None:
    layer.rnn.conv = layer.conv
    put(ConvolvedRecurrence, layer, config)
    del layer.conv
    layer.has_conv, layer.window_size = False, 0


def put(kind: type[MinRNNRecurrence], layer: MinRNNDecoderLayer, config: MinRNNConfig) -> None:
    """In the place of the recurrence, with its weights."""
    rnn = kind(config).to(layer.rnn.in_proj.weight.dtype)
    rnn.load_state_dict(layer.rnn.state_dict())
    layer.rnn = rnn


def mlp_before_rnn(layer: MinRNNDecoderLayer, config: MinRNNConfig) -> None:
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
                self.change(layer, model.config)
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
    "candidate v for g(v), signed state": Variant(change=signed_state),
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
    "minLSTM, f and i not normalised": Variant(MINLSTM, change=gates_as_they_are),
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
