"""The variants of benchmarks/paper/ablations.py compute what they say, in one pass and token by token."""

import json
import sys

import pytest
import torch
from oracle import relative_error
from small_models import CELLS, WrittenOut, random_ids, small_model
from transformers import DynamicCache

from benchmarks.paper import ablations
from benchmarks.paper.ablations import SETTING, VARIANTS
from training.config import load_config
from training.tokenizers import character_tokenizer


class RecurrenceWrittenOut(WrittenOut):
    """h[t] = keep * h[t-1] + added, from the gates and candidates of a variant."""

    def recurrence(self, x, name):
        w, D = self.weights, self.config.state_size
        projected = self.linear(x, name + "in_proj.")
        keep, added = self.kept_and_added(*projected.split(D, -1))
        state, states = w.get(name + "initial_state", x.new_zeros(D)), []
        for t in range(len(x)):
            state = keep[t] * state + added[t]
            states.append(state)
        return torch.stack(states) @ w[name + "out_proj.weight"].T, state


class SignedWrittenOut(RecurrenceWrittenOut):
    def kept_and_added(self, gate, v):
        return 1 - torch.sigmoid(gate), torch.sigmoid(gate) * v


class UnnormalisedWrittenOut(RecurrenceWrittenOut):
    def kept_and_added(self, forget, input_, v):
        return torch.sigmoid(forget), torch.sigmoid(input_) * torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


class ConvInBranchWrittenOut(WrittenOut):
    def layer(self, x, name):
        normed = self.norm(x, name + "rnn.norm.weight")
        convolved, window = self.add(self.conv, normed, normed, name, "rnn.conv.")
        x, state = self.add(self.recurrence, x, convolved, name, "rnn.rnn.")
        return self.mlp(x, name + "mlp_norm.weight", name + "mlp."), state, window

    def mlp(self, x, norm, name):
        inner = self.linear(self.norm(x, norm), name + "up_proj.")
        return x + self.linear(torch.nn.functional.gelu(inner), name + "down_proj.")


class MLPFirstWrittenOut(ConvInBranchWrittenOut):
    def layer(self, x, name):
        x, window = self.add(self.conv, x, x, name, "conv.conv.")
        x = self.mlp(x, name + "conv.norm.weight", name + "conv.mlp.")
        x, state = self.add(self.recurrence, x, self.norm(x, name + "rnn_norm.weight"), name, "rnn.")
        return x, state, window


WRITTEN_OUT = {
    "conv in the RNN's branch, after its norm": ConvInBranchWrittenOut,
    "MLP before RNN": MLPFirstWrittenOut,
    "candidate v for g(v), signed state": SignedWrittenOut,
    "minLSTM, f and i not normalised": UnnormalisedWrittenOut,
}


def changed_model(name):
    """Small, in float64, with weights so large that every part matters, and a learned initial state."""
    variant = VARIANTS[name]
    model = small_model(dtype=torch.float64, **variant.model)
    for layer in model.model.layers if variant.change else ():
        variant.change(layer)
    return model


def test_every_variant_with_modules_or_a_recurrence_of_its_own_is_written_out():
    def kind(variant):
        return variant.change, variant.model.get("cell_type", "mingru"), variant.model.get("candidate", "g")

    written_out = {kind(VARIANTS[name]) for name in WRITTEN_OUT}
    papers = {(None, cell_type, "g") for cell_type in CELLS}
    assert {kind(variant) for variant in VARIANTS.values()} == papers | written_out


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_variant_and_its_gradients_are_those_of_a_loop(name):
    model = changed_model(name)
    written_out = WRITTEN_OUT[name](model)
    ids = random_ids(1, 23)
    logits, expected = model(ids).logits[0], written_out(ids[0])[0]
    # Float64 after 23 tokens and two layers; the worst seen: 5e-16, and 6e-15 in gradients.
    assert relative_error(logits, expected) < 1e-13
    weigh = torch.randn_like(expected)
    (logits * weigh).sum().backward()
    (expected * weigh).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, written_out.weights[parameter_name].grad) < 1e-12, parameter_name


@pytest.mark.parametrize("name", WRITTEN_OUT)
@torch.no_grad()
def test_a_variant_goes_on_from_its_state_after_any_token(name):
    model, ids = changed_model(name), random_ids(2, 19)
    whole, cache = model(ids).logits, DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([1, 1, 7, 1, 9], dim=1)]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-13


@pytest.fixture(scope="module")
def setting():
    return load_config(str(SETTING), ["data.files=[input.txt]"])


def test_variants_of_another_shape_have_as_many_parameters(setting):
    tokenizer = character_tokenizer(["".join(map(chr, range(32, 94)))])  # 62 characters and 3 special tokens
    with torch.device("meta"):
        sizes = {name: variant.build(setting.model, tokenizer).num_parameters() for name, variant in VARIANTS.items()}
    default = sizes["minGRU: conv, RNN, MLP"]
    assert sizes["no MLP"] < 0.3 * default
    for name in ("no MLP, state 822 wide", "no MLP, 7 layers", "6 layers of 128"):
        assert abs(sizes[name] / default - 1) < 0.05
    for name in ("conv in the RNN's branch, after its norm", "MLP before RNN", "candidate v for g(v), signed state"):
        assert sizes[name] == default


def test_one_variant_alone_decays_the_gates(setting):
    tokenizer = character_tokenizer(["ab"])
    decayed = {}
    for name, variant in VARIANTS.items():
        if name in ("minGRU: conv, RNN, MLP", "weight decay on the gates"):
            model = variant.build(setting.model, tokenizer)
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            groups = variant.parameter_groups(model, 0.1)
            assert sum(len(group["params"]) for group in groups) == len(names)
            decayed[name] = {names[id(p)] for p in groups[0]["params"] if groups[0]["weight_decay"]}
    default, gates = decayed.values()
    assert gates - default == {f"model.layers.{layer}.rnn.in_proj.weight" for layer in range(2)} and default < gates


def test_a_run_is_repeated_by_its_seed(tmp_path, monkeypatch):
    text, output = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(30) for b in range(12)))
    flags = ["--only", "signed state", "--steps", "8", "--seeds", "1", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["ablations", str(text), *flags])
    ablations.main()
    first, again = map(json.loads, output.read_text().splitlines())
    assert first["variant"] == "candidate v for g(v), signed state" and first["steps"] == 8
    assert first["held_out_loss"] == again["held_out_loss"] < 3.2  # ln 24 characters
