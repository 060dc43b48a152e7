"""The cells in a configuration: what is refused, what stands for None, what models start as, and what is old."""

import json
import math

import pytest
import torch
from small_models import random_ids, small_config, small_model
from transformers import AutoConfig

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM, MinRNNModel
from modeling_minrnn.cells import CELLS

NEW_FIELDS = {"candidate", "num_heads", "householder_steps", "memory_order", "memory_window", "output_gate"}
OPTIONS = ("candidate", "num_heads", "memory_order", "memory_window", "householder_steps")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cell_type": "gru"}, "cell_type must be one of .*'aaren', .*, not 'gru'"),
        ({"cell_type": ["mingru", "gru"]}, "cell_type must be one of .*, not 'gru'"),
        ({"cell_type": "MinGRU"}, "cell_type must be one of .*, not 'MinGRU'"),
        ({"cell_type": "mingru:linear"}, "cell_type must be one of .*, not 'mingru:linear'"),
        ({"cell_type": "aaren:num_heads=2"}, "cell_type must be one of .*, not 'aaren:num_heads=2'"),
        ({"cell_type": "linear"}, "cell_type must be one of .*, not 'linear'"),
        ({"cell_type": ["mingru"]}, "cell_type must be one name, or 2 names for as many layers, not 1"),
        ({"cell_type": ["mingru"] * 3}, "cell_type must be one name, or 2 names for as many layers, not 3"),
        ({"cell_type": []}, "cell_type must be one name, or 2 names for as many layers, not 0"),
        ({"cell_type": "aaren", "num_heads": 5}, "multiple of 5 for 'aaren:num_heads=5', not 12"),
        ({"cell_type": "aaren", "num_heads": 0}, "num_heads must be at least 1, not 0"),
        ({"cell_type": "aaren", "num_heads": -2}, "num_heads must be at least 1, not -2"),
        ({"cell_type": ["lru", "aaren"], "num_heads": 5}, "multiple of 5 for 'aaren:num_heads=5', not 12"),
        ({"cell_type": "aaren", "num_heads": 2.0}, "num_heads"),
        ({"cell_type": "hgrn2", "num_heads": 5}, "multiple of 5 for 'hgrn2:num_heads=5', not 12"),
        ({"cell_type": "gated_delta", "num_heads": 5}, "multiple of 5 for 'gated_delta:num_heads=5', not 12"),
        ({"cell_type": "gated_delta", "householder_steps": 0}, "householder_steps must be at least 1, not 0"),
        (
            {"cell_type": "hgrn2", "householder_steps": 2},
            "householder_steps is an option of gated_delta, not of hgrn2",
        ),
        ({"cell_type": "mingru", "candidate": "x"}, "candidate must be 'g' or 'linear', not 'x'"),
        ({"cell_type": "lru", "candidate": "g"}, "candidate is an option of mingru and minlstm, not of lru"),
        ({"cell_type": "mingru", "num_heads": 2}, "num_heads is an option of aaren .* not of mingru"),
        ({"cell_type": ["mingru", "lru"], "num_heads": 2}, r"num_heads is an option of aaren .* not of .*'lru'"),
        ({"cell_type": "mingru", "memory_order": 2}, "memory_order is an option of lmu, not of mingru"),
        ({"cell_type": "hgrn", "memory_window": 2}, "memory_window is an option of lmu, not of hgrn"),
        ({"cell_type": "lmu", "memory_order": 5}, "multiple of 5 for 'lmu:memory_order=5', not 12"),
        ({"cell_type": "lmu", "memory_order": 0}, "memory_order must be at least 1, not 0"),
        ({"cell_type": "lmu", "memory_window": 0}, "memory_window must be .*, not 0"),
        ({"cell_type": "lmu", "memory_window": -9}, "memory_window must be .*, not -9"),
        ({"cell_type": "lmu", "memory_window": math.nan}, "memory_window must be .*, not nan"),
        ({"cell_type": "lmu", "memory_window": math.inf}, "memory_window must be .*, not inf"),
        ({"cell_type": "lmu", "memory_window": "long"}, "memory_window"),
        ({"cell_type": "lru", "hidden_size": 9}, "the state width must be a multiple of 2 for 'lru', not 9"),
        ({"cell_type": "aaren", "max_timescale": 9}, "max_timescale sets the memory of gates, which aaren does not"),
        ({"cell_type": "lmu", "max_timescale": 9}, "max_timescale sets the memory of gates, which lmu does not"),
        ({"cell_type": "aaren", "expansion_factor": math.inf}, "expansion_factor must make .* a whole number"),
        ({"cell_type": "lmu", "expansion_factor": math.nan}, "expansion_factor must make .* a whole number"),
        ({"cell_type": "aaren", "expansion_factor": -1}, "expansion_factor must make .* a whole number"),
        ({"cell_type": "aaren", "hidden_size": 0}, "hidden_size must be at least 1"),
        ({"cell_type": "aaren", "hidden_size": "12"}, "hidden_size"),
        ({"output_gate": "yes"}, "output_gate"),
        ({"output_gates": True}, "has no field 'output_gates'; did you mean 'output_gate'"),
        ({"heads": 2, "cell_type": "aaren", "num_head": 2}, "has no field 'num_head'; did you mean 'num_heads'"),
        ({"cell_types": ["mingru"] * 2}, "cell_types is not a field of MinRNNConfig: it follows from the others"),
        ({"cells": []}, "cells is not a field of MinRNNConfig: it follows from the others"),
    ],
    ids=str,
)
def test_a_bad_value_is_an_error_of_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        MinRNNConfig(**{"hidden_size": 12, "num_hidden_layers": 2} | fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, resolved",
    [
        ({"cell_type": "mingru"}, ("g", 1, None, None, None)),
        ({"cell_type": "minlstm", "candidate": "linear", "num_heads": 1}, ("linear", 1, None, None, None)),
        ({"cell_type": "aaren"}, (None, 4, None, None, None)),
        ({"cell_type": "aaren", "expansion_factor": 2}, (None, 8, None, None, None)),
        ({"cell_type": "aaren", "hidden_size": 9}, (None, 1, None, None, None)),
        ({"cell_type": "aaren", "num_heads": 3}, (None, 3, None, None, None)),
        ({"cell_type": "hgrn2"}, (None, 4, None, None, None)),
        ({"cell_type": "gated_delta", "num_heads": 2}, (None, 2, None, None, 1)),
        ({"cell_type": "gated_delta", "householder_steps": 3}, (None, 4, None, None, 3)),
        ({"cell_type": "lmu"}, (None, 1, 4, 256, None)),
        ({"cell_type": "lmu", "hidden_size": 64}, (None, 1, 16, 256, None)),
        ({"cell_type": "lmu", "memory_order": 6, "memory_window": 33.5}, (None, 1, 6, 33.5, None)),
        ({"cell_type": "rwkv4", "output_gate": True}, (None, 1, None, None, None)),
        ({"cell_type": ["aaren", "mingru"]}, ("g", 4, None, None, None)),
        ({"cell_type": ["lmu", "aaren"], "num_heads": 2, "memory_window": 9}, (None, 2, 4, 9, None)),
    ],
    ids=str,
)
def test_options_have_their_values_and_a_saved_configuration_keeps_them(fields, resolved, tmp_path):
    config = MinRNNConfig(**{"hidden_size": 12, "num_hidden_layers": 2} | fields)
    config.save_pretrained(tmp_path)
    for loaded in (config, MinRNNConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert tuple(getattr(loaded, name) for name in OPTIONS) == resolved
        assert loaded.cell_type == fields["cell_type"] and loaded.output_gate == fields.get("output_gate", False)
        assert loaded.cells == config.cells
    for cell in config.cells:
        for name, value in zip(OPTIONS, resolved):
            assert not hasattr(cell, name) or getattr(cell, name) == value


def test_a_model_of_several_cells_has_the_parameters_of_each_in_its_layers():
    widths = {  # of in_proj, of a learned initial state, and of each learned vector
        "mingru": (24, 12, {}), "minlstm": (36, 12, {}), "mingru_signed": (36, 12, {}), "aaren": (16, 16, {}),
        "rwkv4": (36, 24, {"decay": 12, "bonus": 12}), "lru": (12, 12, {"nu": 6, "theta": 6, "gamma": 6}),
        "rglru": (36, 13, {"decay": 12}), "hgrn": (24, 12, {"bound": 12}),
        "hgrn2": (36, 36, {"bound": 12}), "gated_delta": (44, 36, {"decay": 4, "step": 4}), "lmu": (3, 12, {}),
    }  # fmt: skip
    names = list(widths)
    model = small_model(names, hidden_size=12, num_hidden_layers=len(names), expansion_factor=1, output_gate=True)
    assert [layer.rnn.cell.name for layer in model.model.layers] == names
    for layer, (projected, state, vectors) in zip(model.model.layers, widths.values(), strict=True):
        expected = {"in_proj.weight": (projected, 12), "gate_proj.weight": (12, 12), "out_proj.weight": (12, 12)}
        expected |= {"initial_state": (state,)} | {name: (size,) for name, size in vectors.items()}
        assert {name: tuple(x.shape) for name, x in layer.rnn.named_parameters()} == expected


# ---- How models start


def timescales(rnn, bound=None):
    """-1 / log |a| (N,) of one token of the papers' equations where the projection sees zero."""
    bias = torch.zeros(rnn.in_proj.out_features) if rnn.in_proj.bias is None else rnn.in_proj.bias
    first, second = bias.double()[: rnn.state_size], bias.double()[rnn.state_size : 2 * rnn.state_size]
    log_decay = {
        "mingru": lambda: torch.sigmoid(-first).log(),
        "minlstm": lambda: (first.sigmoid() / (first.sigmoid() + second.sigmoid())).log(),
        "mingru_signed": lambda: first.tanh().log(),
        "rwkv4": lambda: -rnn.decay.double().exp(),
        "lru": lambda: -rnn.nu.double().exp(),
        "rglru": lambda: -8 * torch.nn.functional.softplus(rnn.decay.double()) * 0.5,
        "gated_delta": lambda: -rnn.decay.double().exp() * torch.nn.functional.softplus(rnn.step.double()),
        "hgrn": lambda: (rnn.bound.double().sigmoid() + rnn.bound.double().neg().sigmoid() * first.sigmoid()).log(),
    }[rnn.cell.name]()
    return -1 / log_decay


@pytest.mark.parametrize("cell_type", ["mingru", "minlstm", "mingru_signed", "rwkv4", "lru", "rglru", "hgrn"])
def test_chrono_initialisation_spreads_memory_log_uniformly_over_1_to_max_timescale_tokens(cell_type):
    torch.manual_seed(0)
    config = MinRNNConfig(
        vocab_size=8, hidden_size=1000, num_hidden_layers=2, cell_type=cell_type, max_timescale=500,
        intermediate_size=0, conv_kernel_size=0,
    )  # fmt: skip
    for layer in MinRNNModel(config).layers:
        with torch.no_grad():
            found = timescales(layer.rnn)
        # The lower bound of the second layer of hgrn, 1 / 2, leaves no memory below 1 / log 2 tokens.
        shortest = 1 / math.log(2) if cell_type == "hgrn" and layer.layer_idx else 1
        assert 0.999 * shortest < found.min() and found.max() < 501
        # Of 1000 uniform numbers, the sorted ones stay within 0.06 of their places except once in 700 times.
        uniform = found.log().flatten().sort().values / math.log(500)
        expected = torch.linspace(0, 1, len(uniform)).clamp(min=math.log(shortest) / math.log(500))
        assert (uniform - expected).abs().max() < (0.06 if cell_type != "lru" else 0.085)  # lru: 500 numbers
        assert layer.rnn.in_proj.bias is None or cell_type not in ("rwkv4", "lru", "rglru")


def test_a_max_timescale_leaves_alone_the_layers_whose_cell_has_no_memory_to_set():
    config = small_config(["aaren", "mingru", "rwkv4"], hidden_size=12, num_hidden_layers=3, max_timescale=9)
    biases = [layer.rnn.in_proj.bias is not None for layer in MinRNNModel(config).layers]
    assert biases == [False, True, False]


def test_without_max_timescale_cells_start_as_published():
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 1000, "intermediate_size": 0, "conv_kernel_size": 0}

    def layers(cell_type):
        return MinRNNModel(MinRNNConfig(**sizes, num_hidden_layers=4, cell_type=cell_type)).layers

    with torch.no_grad():
        for layer in layers("lru"):  # |a|^2 uniform over a ring, with inputs scaled by what is left of it
            a = torch.exp(-layer.rnn.nu.double().exp())
            share = (a.square() - 0.4**2) / (0.999**2 - 0.4**2)
            assert (share.sort().values - torch.linspace(0, 1, 500)).abs().max() < 0.085
            torch.testing.assert_close(layer.rnn.gamma.double().exp(), (1 - a**2).sqrt(), rtol=1e-3, atol=1e-6)
            assert 0 < layer.rnn.theta.exp().min() and layer.rnn.theta.exp().max() <= math.pi
        for i, layer in enumerate(layers("hgrn")):  # deeper layers keep more
            torch.testing.assert_close(layer.rnn.bound.sigmoid(), torch.full((1000,), max(i / 4, 1e-3)))
        for layer in layers("rglru"):  # |a|^2 uniform where the gate is open: a ** 8 with sigmoid(r) = 1
            a = torch.exp(-torch.nn.functional.softplus(layer.rnn.decay.double()))
            share = (a.square() - 0.9**2) / (0.999**2 - 0.9**2)
            assert (share.sort().values - torch.linspace(0, 1, 1000)).abs().max() < 0.06
        first, *_, last = (layer.rnn.decay for layer in layers("rwkv4"))
        assert (first[0], first[-1], last[0], last[-1]) == (-5, 3, -5, 3)
        assert (first.diff() > 0).all() and (last[1:-1] < first[1:-1]).all()


@pytest.mark.parametrize("cell_type", CELLS)
def test_a_fresh_model_has_finite_logits_and_gradients(cell_type):
    torch.manual_seed(0)
    learned = {"learned_initial_state": True, "output_gate": True}
    model = MinRNNForCausalLM(small_config(cell_type, hidden_size=12, expansion_factor=1, **learned))
    ids = random_ids(2, 200)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() < 2 * math.log(37)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- Checkpoints of before there were other cells


@pytest.mark.parametrize("cell_type, gates", [("mingru", 2), ("minlstm", 3)])
def test_weights_and_fields_of_the_first_two_cells_are_those_of_before(cell_type, gates, tmp_path):
    model = small_model(cell_type, hidden_size=12, expansion_factor=1, max_timescale=9)
    layer = {
        "conv.weight": (12, 4), "rnn_norm.weight": (12,), "rnn.initial_state": (12,),
        "rnn.in_proj.weight": (gates * 12, 12), "rnn.in_proj.bias": (gates * 12,), "rnn.out_proj.weight": (12, 12),
        "mlp_norm.weight": (12,), "mlp.up_proj.weight": (48, 12), "mlp.down_proj.weight": (12, 48),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (37, 12), "model.norm.weight": (12,), "lm_head.weight": (37, 12)}
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == expected

    ids = random_ids(2, 9)
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    old = {name: value for name, value in saved.items() if name not in NEW_FIELDS}
    assert old.keys() == {
        "architectures", "auto_map", "bidirectional", "bos_token_id", "cell_type", "conv_kernel_size", "dropout",
        "dtype", "eos_token_id", "expansion_factor", "hidden_act", "hidden_size", "initializer_range",
        "intermediate_size", "learned_initial_state", "max_timescale", "mlp_bias", "model_type", "num_hidden_layers",
        "pad_token_id", "rms_norm_eps", "scan_backend", "tie_word_embeddings", "transformers_version", "use_cache",
        "vocab_size",
    }  # fmt: skip
    file.write_text(json.dumps(old))  # as it was written then
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, logits)
    assert (loaded.config.cells, loaded.config.output_gate) == (model.config.cells, False)
    assert [cell.spec for cell in loaded.config.cells] == [cell_type] * 2
