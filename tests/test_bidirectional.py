"""An encoder reads each document from both ends, and its padding and its neighbours from neither."""

import copy

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from small_models import CELLS, SHAPES, WrittenOut, assert_close, random_ids, small_config, small_model
from transformers import DataCollatorWithFlattening, DynamicCache

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM, MinRNNModel

both_cells = pytest.mark.parametrize("cell_type", CELLS)
both_backends = pytest.mark.parametrize("backend", ["torch", "numba"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
every_backend = pytest.mark.parametrize(
    "backend, dtype",
    [("torch", torch.float64), ("torch", torch.float32), ("numba", torch.float32)],
    ids=["torch-float64", "torch-float32", "numba-float32"],
)
IDS = random_ids(2, 9)


def encoder(cell_type="mingru", **fields):
    return small_model(cell_type, **{"bidirectional": True} | fields)


def read(model, ids, **inputs):
    """Logits and the hidden states of each layer."""
    outputs = model(ids, output_hidden_states=True, **inputs)
    return outputs.logits, *outputs.hidden_states


def assert_row_equals_documents(outputs, row, oracle, documents, real):
    """What `read` returned equals, in row `row` where `real`, its documents read by themselves."""
    logits, hidden_states, _ = zip(*map(oracle, documents))
    for output, expected in zip(outputs, (logits, *zip(*hidden_states)), strict=True):
        assert_close(output[row, real], torch.cat(expected))


# ---- Reading


@both_cells
@every_backend
@every_shape
@torch.no_grad()
def test_a_sequence_is_read_as_both_recurrences_written_out(cell_type, backend, dtype, shape):
    model = encoder(cell_type, dtype=dtype, scan_backend=backend, **shape)
    oracle = WrittenOut(model)
    for T in (1, 2, 63):
        ids = random_ids(2, T)
        outputs = read(model, ids)
        for row in range(2):
            assert_row_equals_documents(outputs, row, oracle, [ids[row]], slice(None))


@both_cells
@every_shape
@torch.no_grad()
def test_a_reversed_sequence_is_read_alike_by_the_model_with_its_directions_swapped(cell_type, shape):
    model = encoder(cell_type, **shape)
    swapped = copy.deepcopy(model)
    for layer in swapped.model.layers:
        if layer.has_conv:
            layer.conv, layer.reverse_conv = layer.reverse_conv, layer.conv
        layer.rnn, layer.reverse_rnn = layer.reverse_rnn, layer.rnn
    for output, expected in zip(read(swapped, IDS.flip(1)), read(model, IDS)):
        assert_close(output.flip(1), expected)
    assert not torch.allclose(model(IDS.flip(1)).logits.flip(1), model(IDS).logits, atol=0.01)


@both_cells
@every_backend
@examples(max_examples=20)
@given(shape=st.sampled_from(SHAPES), B=st.integers(1, 3), T=st.integers(1, 14), data=st.data())
@torch.no_grad()
def test_packed_documents_with_padding_anywhere_equal_the_documents(cell_type, backend, dtype, shape, B, T, data):
    model = encoder(cell_type, dtype=dtype, scan_backend=backend, **shape)
    masks = st.lists(st.booleans(), min_size=B * T, max_size=B * T).map(lambda mask: torch.tensor(mask).view(B, T))
    real, first = data.draw(masks), data.draw(masks)
    ids = random_ids(B, T)
    outputs = read(model, ids, attention_mask=real.long(), reset_mask=first)
    for row in range(B):
        starts = [0, *first[row].nonzero().flatten().tolist(), T]
        documents = [ids[row, a:b][real[row, a:b]] for a, b in zip(starts, starts[1:])]
        assert_row_equals_documents(outputs, row, WrittenOut(model), documents, real[row])


@pytest.mark.oldest
@both_cells
@every_backend
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_its_sequences(cell_type, backend, dtype, side):
    model = encoder(cell_type, dtype=dtype, scan_backend=backend)
    lengths = torch.tensor([5, 12, 1, 2])
    position = torch.arange(12)
    real = (position < lengths[:, None]) if side == "right" else (position >= 12 - lengths[:, None])
    ids = random_ids(4, 12)
    outputs = read(model, ids, attention_mask=real.long())
    for row in range(4):
        assert_row_equals_documents(outputs, row, WrittenOut(model), [ids[row, real[row]]], real[row])


@both_cells
@pytest.mark.parametrize("description", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@examples(max_examples=15)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@example(lengths=[1, 1, 1])
@torch.no_grad()
def test_documents_packed_by_the_collator_equal_the_documents(cell_type, description, lengths):
    model = encoder(cell_type)
    documents = random_ids(sum(lengths)).split(lengths)
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": document} for document in documents])
    outputs = read(model, batch["input_ids"], **{description: batch[description]})
    assert_row_equals_documents(outputs, 0, WrittenOut(model), documents, slice(None))


# ---- Training


def gradients(model, inputs, run=None):
    model.zero_grad()
    outputs = (model.model if run is None else run)(**inputs).last_hidden_state
    (outputs * torch.linspace(-1, 2, outputs.numel()).view_as(outputs)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


PACKED = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]),
    "reset_mask": torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]]).bool(),
}


@both_cells
@both_backends
@every_shape
def test_every_gradient_is_that_of_the_recurrences_written_out(cell_type, backend, shape):
    model = encoder(cell_type, scan_backend=backend, **shape).train()
    oracle = WrittenOut(model)
    actual = gradients(model, {"input_ids": IDS})
    hidden_states = torch.stack([oracle(row)[1][-1] for row in IDS])
    loss = (hidden_states * torch.linspace(-1, 2, hidden_states.numel()).view_as(hidden_states)).sum()
    expected = torch.autograd.grad(loss, [oracle.weights[name] for name in actual])
    assert {name for name, _ in model.model.named_parameters(prefix="model")} == actual.keys()
    for (name, gradient), wanted in zip(actual.items(), expected):
        assert gradient.any(), name
        assert_close(gradient, wanted)


@both_cells
@both_backends
def test_gradient_checkpointing_changes_no_bit_of_the_gradients(cell_type, backend):
    model = encoder(cell_type, scan_backend=backend).train()
    expected = gradients(model, PACKED)
    # The name before transformers 5.2x is deprecated; the new one is not in 5.17.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    for use_reentrant in (False, True):
        enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        actual = gradients(model, PACKED)
        assert actual.keys() == expected.keys()
        for name, gradient in actual.items():
            assert torch.equal(gradient, expected[name]), name


@pytest.fixture
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_training_step_compiles_into_one_graph():
    """A layer of each cell; a compiler sees the same operator whatever backend computes it."""
    model = encoder(list(CELLS)).train()
    expected = gradients(model, PACKED)
    actual = gradients(model, PACKED, torch.compile(model.model, fullgraph=True, backend="aot_eager"))
    for name, gradient in actual.items():
        assert_close(gradient, expected[name])


# ---- Weights


@both_cells
@every_shape
def test_a_second_direction_adds_one_convolution_and_one_recurrence_a_layer(cell_type, shape):
    one, both = (MinRNNModel(small_config(cell_type, bidirectional=b, **shape)) for b in (False, True))
    added = {name: weight for name, weight in both.state_dict().items() if name not in one.state_dict()}
    mirrored = {name: name.replace(".rnn.", ".reverse_rnn.").replace(".conv.", ".reverse_conv.") for name in
                one.state_dict() if ".rnn." in name or ".conv." in name}  # fmt: skip
    assert (
        added.keys() == set(mirrored.values()) and one.state_dict().keys() | added.keys() == both.state_dict().keys()
    )
    assert both.num_parameters() - one.num_parameters() == sum(weight.numel() for weight in added.values())
    for name, mirror in mirrored.items():
        assert added[mirror].shape == one.state_dict()[name].shape


def test_a_causal_checkpoint_is_the_forward_half_of_an_encoder(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path, bidirectional=True, use_cache=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    with torch.no_grad():
        for name, weight in loaded.named_parameters():
            weight *= "reverse" not in name  # what reads from the end adds nothing
    assert_close(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "encoder")
    again = MinRNNForCausalLM.from_pretrained(tmp_path / "encoder")
    assert again.config.bidirectional and torch.equal(again(IDS).logits, loaded(IDS).logits)


# ---- What an encoder cannot do


@pytest.mark.parametrize(
    "inputs", [{"use_cache": True}, {"past_key_values": DynamicCache()}, {"use_cache": True, "return_dict": False}]
)
def test_a_cache_is_refused_in_one_line(inputs):
    for model in (encoder(), encoder().model):
        with pytest.raises(ValueError, match="bidirectional model .* pass use_cache=False") as error:
            model(IDS, **inputs)
        assert "\n" not in str(error.value)


def test_generation_is_refused_in_one_line():
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        with pytest.raises(ValueError, match="a bidirectional model cannot generate: .*") as error:
            encoder().generate(IDS, max_new_tokens=2, **settings)
        assert "\n" not in str(error.value)


@pytest.mark.oldest
def test_no_cache_is_the_default_of_an_encoder_alone():
    assert MinRNNConfig().use_cache and not MinRNNConfig(bidirectional=True).use_cache
    assert not MinRNNConfig(use_cache=False).use_cache
    with pytest.raises(ValueError, match="use_cache must be False where bidirectional is True"):
        MinRNNConfig(bidirectional=True, use_cache=True)
    assert encoder()(IDS).past_key_values is None
