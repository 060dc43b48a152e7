"""MinRNNConfig: what it refuses and what the error says, what a saved one keeps, and the sizes that follow from it."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from modeling_minrnn import MinRNNConfig, MinRNNModel

FIELDS = sorted(
    {field.name for field in dataclasses.fields(MinRNNConfig)}
    - {field.name for field in dataclasses.fields(MinRNNConfig.__base__)}
)


def error(**fields):
    """The message of the ValueError that a configuration is refused with."""
    with pytest.raises(ValueError) as caught:
        MinRNNConfig(**fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 38.5),
        ("hidden_size", 384.0),
        ("hidden_size", "384"),
        ("hidden_size", True),
        ("hidden_size", -384),
        ("hidden_size", 0),
        ("vocab_size", -1),
        ("vocab_size", 0),
        ("num_hidden_layers", 1.5),
        ("num_hidden_layers", 0),
        ("expansion_factor", "2"),
        ("expansion_factor", True),
        ("expansion_factor", -1),
        ("expansion_factor", 0),
        ("expansion_factor", float("nan")),
        ("expansion_factor", float("inf")),
        ("conv_kernel_size", -1),
        ("conv_kernel_size", 3.5),
        ("conv_kernel_size", True),
        ("intermediate_size", -1),
        ("intermediate_size", 1.5),
        ("intermediate_size", False),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
        ("initializer_range", -0.02),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("max_timescale", 0.5),
        ("max_timescale", -1),
        ("max_timescale", float("inf")),
        ("learned_initial_state", 1),
        ("tie_word_embeddings", "no"),
        ("use_cache", "no"),
        ("bidirectional", None),
        ("mlp_bias", "yes"),
        ("cell_type", "gru"),
        ("cell_type", "MinGRU"),
        ("cell_type", None),
        ("scan_backend", "cuda"),
        ("hidden_act", "glue"),
        ("eos_token_id", "end"),
    ],
)
def test_a_bad_value_is_an_error_of_one_line_with_field_and_value(field, value):
    message = error(**{field: value})
    assert field in message
    assert str(value) in message


@pytest.mark.parametrize("field, known", [("cell_type", "minlstm"), ("scan_backend", "torch"), ("hidden_act", "gelu")])
def test_an_unknown_name_is_answered_with_the_known_ones(field, known):
    assert repr(known) in error(**{field: "nonesuch"})


@pytest.mark.oldest
@given(st.sampled_from(FIELDS), st.sampled_from(["left out", "doubled", "swapped", "replaced"]), st.data())
def test_a_misspelled_field_is_an_error_that_names_it_and_the_right_one(field, slip, data):
    i = data.draw(st.integers(1, len(field) - 2))
    name = {
        "left out": field[:i] + field[i + 1 :],
        "doubled": field[: i + 1] + field[i:],
        "swapped": field[:i] + field[i + 1] + field[i] + field[i + 2 :],
        "replaced": field[:i] + "x" + field[i + 1 :],
    }[slip]
    if name not in FIELDS:
        message = error(**{name: 1})
        assert repr(name) in message
        assert repr(field) in message


@pytest.mark.parametrize(
    "name, field",
    [
        ("num_layers", "num_hidden_layers"),
        ("conv_kernel", "conv_kernel_size"),
        ("tie_embeddings", "tie_word_embeddings"),
    ],
)
def test_words_of_a_field_are_an_error_that_names_it(name, field):
    assert field in error(**{name: 3})


@pytest.mark.parametrize("name", ["state_size", "layer_types"])
def test_what_follows_from_other_fields_cannot_be_given(name):
    assert error(**{name: 3}) == f"{name} is not a field of MinRNNConfig: it follows from the others"


@pytest.mark.parametrize(
    "name", ["quantization_config", "transformers_weights", "transformers.js_config", "sep_token_id", "mask_token_id"]
)
def test_what_libraries_add_to_a_saved_configuration_is_kept(name):
    assert getattr(MinRNNConfig(**{name: "added"}), name) == "added"


@pytest.mark.oldest
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cell_type": "minlstm", "expansion_factor": 1.5, "conv_kernel_size": 0, "intermediate_size": 0},
        {"hidden_size": 48, "max_timescale": 1000, "learned_initial_state": True, "tie_word_embeddings": False},
        {"vocab_size": 300, "bos_token_id": 256, "eos_token_id": [257, 258], "pad_token_id": 259, "dropout": 0.1},
    ],
)
def test_a_saved_configuration_comes_back_the_same(tmp_path, fields):
    config = MinRNNConfig(**fields)
    config.save_pretrained(tmp_path)
    for loaded in (MinRNNConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MinRNNConfig
        assert {name: getattr(loaded, name) for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}
        assert loaded.state_size == config.state_size


@pytest.mark.oldest
@pytest.mark.parametrize("field, value", [("hidden_size", -1), ("conv_kernel_size", 2.5), ("cell_type", "gru")])
def test_a_bad_value_given_beside_a_saved_configuration_is_refused_like_one_of_its_own(tmp_path, field, value):
    MinRNNConfig().save_pretrained(tmp_path)
    for config_class in (MinRNNConfig, AutoConfig):
        with pytest.raises(ValueError) as caught:
            config_class.from_pretrained(tmp_path, **{field: value})
        assert str(caught.value) == error(**{field: value})


@pytest.mark.oldest
def test_a_misspelled_field_beside_a_saved_configuration_is_refused(tmp_path):
    MinRNNConfig().save_pretrained(tmp_path)
    for config_class in (MinRNNConfig, AutoConfig):
        with pytest.raises(ValueError, match="has no field 'hiden_size'; did you mean 'hidden_size'"):
            config_class.from_pretrained(tmp_path, hiden_size=24)


@pytest.mark.oldest
def test_a_value_given_beside_a_saved_configuration_wins_and_others_are_handed_back(tmp_path):
    MinRNNConfig(hidden_size=24, expansion_factor=2).save_pretrained(tmp_path)
    config, unused = AutoConfig.from_pretrained(tmp_path, hidden_size=48, other=1, return_unused_kwargs=True)
    assert (config.hidden_size, config.expansion_factor, unused["other"]) == (48, 2, 1)
    assert "hidden_size" not in unused


@pytest.mark.oldest
def test_the_mlp_is_four_times_as_wide_as_the_model_unless_it_is_given_or_zero():
    assert MinRNNConfig(hidden_size=24).intermediate_size == 96
    assert MinRNNConfig(hidden_size=24, intermediate_size=32).intermediate_size == 32
    config = MinRNNConfig(vocab_size=8, hidden_size=24, num_hidden_layers=1, intermediate_size=0)
    assert config.intermediate_size == 0
    assert not any("mlp" in name for name, _ in MinRNNModel(config).named_parameters())


@pytest.mark.parametrize("H, expansion_factor, D", [(384, 1, 384), (384, 2, 768), (64, 1.5, 96), (100, 1.15, 115)])
def test_the_state_is_as_wide_as_the_model_times_the_expansion_factor(H, expansion_factor, D):
    assert MinRNNConfig(hidden_size=H, expansion_factor=expansion_factor).state_size == D


def cell_weights(cell_type, H, alpha):
    """Parameters of the recurrence of one layer, without bias and output projection."""
    config = MinRNNConfig(
        vocab_size=8, hidden_size=H, num_hidden_layers=1, cell_type=cell_type, expansion_factor=alpha
    )
    rnn = MinRNNModel(config).layers[0].rnn
    return sum(parameter.numel() for name, parameter in rnn.named_parameters() if not name.startswith("out_proj"))


@pytest.mark.parametrize(
    "alpha, percent_of_gru, percent_of_lstm", [(1, 33, 38), (2, 22, 25), (3, 17, 19), (4, 13, 15)]
)
def test_the_cells_have_the_share_of_parameters_that_the_paper_states(alpha, percent_of_gru, percent_of_lstm):
    """2 / (3 (1 + alpha)) and 3 / (4 (1 + alpha)), in per cent rounded as in the paper; D = alpha H."""
    H = 24
    gru = sum(p.numel() for p in torch.nn.GRU(H, alpha * H, bias=False).parameters())
    lstm = sum(p.numel() for p in torch.nn.LSTM(H, alpha * H, bias=False).parameters())
    mingru_share, minlstm_share = cell_weights("mingru", H, alpha) / gru, cell_weights("minlstm", H, alpha) / lstm
    assert mingru_share == pytest.approx(2 / (3 * (1 + alpha)), rel=1e-12)
    assert minlstm_share == pytest.approx(3 / (4 * (1 + alpha)), rel=1e-12)
    assert abs(100 * mingru_share - percent_of_gru) <= 0.5
    assert abs(100 * minlstm_share - percent_of_lstm) <= 0.5
