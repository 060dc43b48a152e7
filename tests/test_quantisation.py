"""The model with its weights in eight and four bits, as transformers loads it."""

import copy

import pytest
import torch
from small_models import CELLS, assert_close, random_ids, small_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

# Relative L2 error of the logits, twice the worst seen; and of a text in two parts against the same text in one.
INT8_ERRORS = {
    "Int8WeightOnlyConfig": (0.03, 1e-5),
    # Activations are rounded token by token: their own rounding in float32 tips some over to the next of 256 steps.
    "Int8DynamicActivationInt8WeightConfig": (0.04, 2e-3),
}
# Wide enough that most of the bytes are in the weights of the layers.
FIELDS = {"hidden_size": 128, "num_hidden_layers": 2, "expansion_factor": 1}
PROJECTIONS = ("in_proj", "out_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=CELLS)
def model(request):
    return small_model(request.param, **FIELDS)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def weight_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def linears(model):
    return {name: module for name, module in model.named_modules() if name.endswith(PROJECTIONS)}


@pytest.mark.parametrize("scheme", INT8_ERRORS)
def test_int8_keeps_the_logits_and_saves_the_bytes(model, folder, tmp_path, scheme):
    torchao = pytest.importorskip("torchao.quantization")
    error, error_of_parts = INT8_ERRORS[scheme]
    config = TorchAoConfig(getattr(torchao, scheme)())
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    ids = random_ids(2, 63)
    with torch.no_grad():
        logits = quantised(ids).logits
        assert_close(logits, model(ids).logits, error)
        outputs = quantised(ids[:, :40], use_cache=True)
        rest = quantised(ids[:, 40:], past_key_values=outputs.past_key_values)
        assert_close(torch.cat([outputs.logits, rest.logits], dim=1), logits, error_of_parts)

    quantised.save_pretrained(tmp_path / "int8")
    # One byte for four in the layers, and a float32 for each row; embedding and norms stay.
    parameters = sum(module.weight.numel() for module in linears(model).values())
    assert weight_bytes(tmp_path / "int8") < weight_bytes(folder) - 2.8 * parameters
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "int8")(ids).logits, logits)


def test_int8_weights_are_the_nearest_of_256_steps_and_nothing_else_changes(model, folder):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    rounded = copy.deepcopy(model)
    for name, linear in linears(quantised).items():
        assert isinstance(linear.weight, torchao.Int8Tensor), name
        weight, nearest = model.get_submodule(name).weight, linear.weight.dequantize()
        half_a_step = weight.abs().amax(dim=1, keepdim=True) / 127 / 2
        assert ((weight - nearest).abs() <= 1.001 * half_a_step).all(), name
        assert not torch.equal(weight, nearest), name
        rounded.get_submodule(name).weight = nn.Parameter(nearest)
    ids = random_ids(2, 63)
    with torch.no_grad():
        assert_close(quantised(ids).logits, rounded(ids).logits, 1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_loads_the_layers_in_four_bits(model, folder, quant_type):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not among the project's requirements")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for name, linear in linears(quantised).items():
        assert isinstance(linear, bitsandbytes.nn.Linear4bit), name
    ids = random_ids(2, 63)
    with torch.no_grad():
        assert_close(quantised(ids).logits, model(ids).logits, 0.4)  # the worst seen: 0.22
