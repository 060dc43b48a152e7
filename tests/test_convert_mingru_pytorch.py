"""A language model of the package minGRU-pytorch, converted, has its logits. That package is the oracle."""

import pytest
import torch
from minGRU_pytorch.hybridLM import hybridLM
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLM import minLM
from minGRU_pytorch.minLSTM import minLSTM
from small_models import assert_close, random_ids

from modeling_minrnn import MinRNNForCausalLM
from modeling_minrnn.convert_mingru_pytorch import convert_layer, convert_mingru_pytorch

both_cells = pytest.mark.parametrize("use_lstm", [False, True], ids=["mingru", "minlstm"])
SHAPES = (
    {"dim": 14, "depth": 2},
    {"dim": 9, "depth": 3, "expansion": 1.0, "ff_mult": 2},  # no projection of the output
    {"dim": 10, "depth": 1, "expansion": 1.3, "ff_mult": 1.5, "dropout": 0.1},
)


def their_model(shape=0, **fields):
    """Every weight large, none of them zero or one."""
    torch.manual_seed(0)
    model = minLM(num_tokens=37, **SHAPES[shape] | fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@both_cells
@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_a_converted_model_has_the_logits_of_the_original(use_lstm, shape, dtype):
    original = their_model(shape, use_lstm=use_lstm).to(dtype)
    model = convert_mingru_pytorch(original.state_dict())
    assert model.dtype == dtype and not model.training
    added = model.num_parameters() - sum(parameter.numel() for parameter in original.parameters())
    assert added == (3 * 9 * 9 if shape == 1 else 0)  # the identities
    for T in (2, 33):
        ids = random_ids(3, T)
        assert_close(model(ids).logits, original(ids))
    assert model(ids).logits.std() > 0.5


@both_cells
@torch.no_grad()
def test_a_converted_model_goes_on_from_its_state_as_the_original_does(use_lstm):
    original = their_model(use_lstm=use_lstm).double()
    model = convert_mingru_pytorch(original.state_dict())
    ids, states, cache = random_ids(2, 12), None, None
    for t in range(12):
        expected, states = original(ids[:, : t + 1], return_prev_hiddens=True, prev_hiddens=states)
        output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert_close(output.logits, expected[:, -1:])


@both_cells
def test_a_converted_model_has_the_loss_and_gradients_of_the_original(use_lstm):
    original = their_model(use_lstm=use_lstm)
    model = convert_mingru_pytorch(original.state_dict())
    ids = random_ids(3, 20)
    loss, expected = model(ids, labels=ids).loss, original(ids, return_loss=True)
    loss.backward()
    expected.backward()
    assert_close(loss, expected)
    # Theirs go through sums of logarithms over the sequence. The worst seen: 4e-6.
    assert_close(model.model.embed_tokens.weight.grad, original.token_emb.weight.grad, 1e-5)
    assert_close(model.model.layers[0].mlp.up_proj.bias.grad, original.layers[0][4][0].bias.grad, 1e-5)


def test_a_converted_model_is_a_copy_that_can_be_saved_and_trained_further(tmp_path):
    original = their_model()
    model = convert_mingru_pytorch(original.state_dict())
    model.save_pretrained(tmp_path)
    loaded, ids = MinRNNForCausalLM.from_pretrained(tmp_path), random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    before = original.token_emb.weight.clone()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert torch.equal(original.token_emb.weight, before)


@both_cells
@torch.no_grad()
def test_a_converted_layer_has_the_outputs_of_the_original_and_goes_on_as_it_does(use_lstm):
    torch.manual_seed(0)
    original = (minLSTM if use_lstm else minGRU)(7).double()
    layer = convert_layer(original.state_dict(), batch_first=True)
    x = torch.randn(2, 11, 7, dtype=torch.float64)
    output, h_n = layer(x)
    assert_close(output, original(x))
    assert_close(layer.step(x[:, 0], h_n)[0], original(x[:, :1], h_n[0][:, None])[:, 0])


@both_cells
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_of_the_papers_listing_is_converted(use_lstm, bias):
    names = ["linear_f", "linear_i", "linear_h"] if use_lstm else ["linear_z", "linear_h"]
    linear = torch.nn.ModuleDict({name: torch.nn.Linear(5, 4, bias, dtype=torch.float64) for name in names})
    x, h, outputs = torch.randn(3, 9, 5, dtype=torch.float64), 0.0, []
    for t in range(9):
        x_h = linear["linear_h"](x[:, t])
        candidate = torch.where(x_h >= 0, x_h + 0.5, x_h.sigmoid())
        first, second = (linear[name](x[:, t]).sigmoid() for name in (names[0], names[-2]))
        share = second / (first + second) if use_lstm else first
        h = (1 - share) * h + share * candidate
        outputs.append(h)
    layer = convert_layer(linear.state_dict(), batch_first=True)
    assert_close(layer(x)[0], torch.stack(outputs, 1))


@pytest.mark.parametrize("module", [minGRU(4, expansion_factor=2), torch.nn.GRU(3, 4), torch.nn.ReLU()], ids=type)
def test_what_is_no_layer_is_refused_in_one_line(module):
    with pytest.raises(ValueError, match="not the weights of one layer: expected one of") as error:
        convert_layer(module.state_dict())
    assert "\n" not in str(error.value)


def changed(**changes):
    state_dict = their_model().state_dict() | changes
    return {name: tensor for name, tensor in state_dict.items() if tensor is not None}


@pytest.mark.parametrize(
    "state_dict, message",
    [
        (their_model(enable_conv=True).state_dict(), r"layers\.0\.0\.net\.0\.weight: .* enable_conv=True cannot"),
        (hybridLM(num_tokens=37, dim=16, depth=1, heads=2).state_dict(), "not the state dict of a minLM .* has no"),
        (changed(**{"layers.1.4.2.bias": None}), r"it has no layers\.1\.4\.2\.bias"),
        (changed(**{"layers.0.2.to_out.weight": None}), r"it has no layers\.0\.2\.to_out\.weight"),
        (changed(**{"layers.1.6.gamma": torch.ones(3)}), r"0\.2\.1: layers\.1\.6\.gamma"),
        ({name: tensor for name, tensor in their_model().state_dict().items() if "layers" not in name}, "no layers"),
        ({}, r"it has no token_emb\.weight"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(state_dict, message):
    with pytest.raises(ValueError, match=message) as error:
        convert_mingru_pytorch(state_dict)
    assert "\n" not in str(error.value)
