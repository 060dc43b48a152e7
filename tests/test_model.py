"""What a model computes: each document is read as the recurrence written out, however its tokens are handed over."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import random_mask
from small_models import (
    CELLS,
    SHAPES,
    VOCAB_SIZE,
    WrittenOut,
    assert_close,
    random_ids,
    small_config,
    small_half_precision_model,
    small_model,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from modeling_minrnn import (
    NO_LOGITS,
    MinRNNConfig,
    MinRNNForCausalLM,
    MinRNNForSequenceClassification,
    MinRNNForTokenClassification,
    MinRNNModel,
    modeling_minrnn,
)
from modeling_minrnn.modeling_minrnn import CONV_INITIALIZER_STD, MinRNNDecoderLayer
from modeling_minrnn.scan import minrnn_scan

both_cells = pytest.mark.parametrize("cell_type", CELLS)
every_shape = pytest.mark.parametrize("shape", range(len(SHAPES)))
every_backend = pytest.mark.parametrize(
    "backend, dtype",
    [("torch", torch.float64), ("torch", torch.float32), ("numba", torch.float32)],
    ids=["torch-float64", "torch-float32", "numba-float32"],
)
# transformers computes its losses in float32.
every_float32_backend = pytest.mark.parametrize("backend, dtype", [("torch", torch.float32), ("numba", torch.float32)])
# Of each claim for each cell and backend.
some_examples = settings(max_examples=20)
# Sizes of consecutive chunks, or of documents; a mask of a few rows.
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)
shapes = st.integers(0, len(SHAPES) - 1)


@functools.cache
def model_and_oracle(cell_type, shape, backend, dtype):
    model = small_model(cell_type, dtype=dtype, scan_backend=backend, **SHAPES[shape])
    return model, WrittenOut(model)


@st.composite
def masks(draw):
    """Two bool tensors (B, T), and a length to cut T into."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    values = draw(st.lists(st.booleans(), min_size=2 * B * T, max_size=2 * B * T))
    return *torch.tensor(values).view(2, B, T), draw(st.integers(1, T))


def read_in_chunks(model, ids, chunks, **masks):
    """Logits, hidden states of each layer and the cache, after reading ids (B, T) in chunks of this size or sizes."""
    cache, outputs, stop = None, [], 0
    for chunk in ids.split(chunks, 1):
        start, stop = stop, stop + chunk.shape[1]
        output = model(
            chunk,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
            **{name: mask[:, start:stop] for name, mask in masks.items()},
        )
        outputs.append(output)
        cache = output.past_key_values
    hidden_states = [torch.cat(chunks, 1) for chunks in zip(*(output.hidden_states for output in outputs))]
    return torch.cat([output.logits for output in outputs], 1), hidden_states, cache


def assert_row_equals_documents(row, output, oracle, documents, real):
    """Row `row` of what `read_in_chunks` returned, where `real`, equals its documents read by themselves."""
    logits, hidden_states, cache = output
    expected_logits, expected_hidden_states, expected_caches = zip(*map(oracle, documents))
    assert_close(logits[row, real], torch.cat(expected_logits))
    for layer, expected in zip(hidden_states, zip(*expected_hidden_states), strict=True):
        assert_close(layer[row, real], torch.cat(expected))
    for layer, (state, window) in zip(cache.layers, expected_caches[-1], strict=True):
        assert_close(layer.keys[row], state)
        assert_close(layer.values[row], window)


# ---- Reading


@pytest.mark.oldest
@both_cells
@every_backend
@some_examples
@given(shape=shapes, chunks=sizes, batch_size=st.integers(1, 3))
@example(shape=0, chunks=[30], batch_size=2)
@example(shape=0, chunks=[1] * 30, batch_size=2)
@torch.no_grad()
def test_a_sequence_in_any_chunks_is_read_as_the_recurrence_written_out(
    cell_type, backend, dtype, shape, chunks, batch_size
):
    model, oracle = model_and_oracle(cell_type, shape, backend, dtype)
    ids = random_ids(batch_size, sum(chunks))
    output = read_in_chunks(model, ids, chunks)
    for row in range(batch_size):
        assert_row_equals_documents(row, output, oracle, [ids[row]], slice(None))


@both_cells
@every_backend
@some_examples
@given(shape=shapes, masks=masks(), numbered=st.booleans())
@torch.no_grad()
def test_padding_anywhere_changes_nothing_in_any_chunks(cell_type, backend, dtype, shape, masks, numbered):
    model, oracle = model_and_oracle(cell_type, shape, backend, dtype)
    real, _, chunk = masks
    ids = random_ids(*real.shape)
    # Positions as they are usually made from a mask, where a zero is no start of a document.
    positions = {"position_ids": (real.cumsum(1) - 1).masked_fill(~real, 0)} if numbered else {}
    output = read_in_chunks(model, ids, chunk, attention_mask=real.long(), **positions)
    for row in range(len(ids)):
        assert_row_equals_documents(row, output, oracle, [ids[row, real[row]]], real[row])


@pytest.mark.oldest
@both_cells
@every_backend
@every_shape
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_its_sequences(cell_type, backend, dtype, shape, side):
    model, oracle = model_and_oracle(cell_type, shape, backend, dtype)
    lengths = torch.tensor([5, 12, 1, 2])
    position = torch.arange(12)
    real = (position < lengths[:, None]) if side == "right" else (position >= 12 - lengths[:, None])
    ids = random_ids(4, 12)
    output = read_in_chunks(model, ids, 12, attention_mask=real.long())
    for row in range(4):
        assert_row_equals_documents(row, output, oracle, [ids[row, real[row]]], real[row])


@both_cells
@every_backend
@some_examples
@given(shape=shapes, masks=masks())
@torch.no_grad()
def test_packed_documents_with_padding_in_any_chunks_equal_the_documents(cell_type, backend, dtype, shape, masks):
    model, oracle = model_and_oracle(cell_type, shape, backend, dtype)
    real, first, chunk = masks
    ids = random_ids(*real.shape)
    output = read_in_chunks(model, ids, chunk, attention_mask=real.long(), reset_mask=first)
    for row in range(len(ids)):
        starts = [0, *first[row].nonzero().flatten().tolist(), ids.shape[1]]
        documents = [ids[row, a:b][real[row, a:b]] for a, b in zip(starts, starts[1:])]
        assert_row_equals_documents(row, output, oracle, documents, real[row])


DESCRIPTIONS = ["position_ids", "seq_idx", "cu_seq_lens_q", "everything"]


def pack(documents, description):
    """What transformers' collator makes of the documents, described to the model in one way or in all of them."""
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": document} for document in documents])
    assert batch.keys() == {"input_ids", "labels", *DESCRIPTIONS[:3], "cu_seq_lens_k", "max_length_q", "max_length_k"}
    if description == "everything":
        return batch
    return {name: batch[name] for name in ("input_ids", "labels", description)}


@pytest.mark.oldest
@both_cells
@every_backend
@settings(max_examples=40)
@given(description=st.sampled_from(DESCRIPTIONS), shape=shapes, lengths=sizes)
@torch.no_grad()
def test_documents_packed_by_the_collator_equal_the_documents(cell_type, backend, dtype, description, shape, lengths):
    model, oracle = model_and_oracle(cell_type, shape, backend, dtype)
    documents = random_ids(sum(lengths)).split(lengths)
    output = model(**pack(documents, description), use_cache=True, output_hidden_states=True)
    output = output.logits, output.hidden_states, output.past_key_values
    assert_row_equals_documents(0, output, oracle, documents, slice(None))


@both_cells
@every_backend
@some_examples
@given(shape=shapes, lengths=sizes, chunk=st.integers(1, 20))
@torch.no_grad()
def test_packed_documents_go_on_in_the_next_chunk(cell_type, backend, dtype, shape, lengths, chunk):
    model, oracle = model_and_oracle(cell_type, shape, backend, dtype)
    documents = random_ids(sum(lengths)).split(lengths)
    batch = pack(documents, "position_ids")
    output = read_in_chunks(model, batch["input_ids"], chunk, position_ids=batch["position_ids"])
    assert_row_equals_documents(0, output, oracle, documents, slice(None))


@torch.no_grad()
def test_the_most_explicit_description_of_documents_wins():
    model = small_model()
    batch = pack(random_ids(12).split([3, 4, 5]), "everything")
    ids, none = batch["input_ids"], torch.zeros(1, 12, dtype=torch.bool)
    packed, one_document = model(**batch).logits, model(ids).logits
    assert not torch.allclose(packed, one_document, atol=0.1)
    # Each of them says "one document" where those behind it say "three".
    assert torch.equal(model(**batch | {"reset_mask": none}).logits, one_document)
    assert torch.equal(model(**batch | {"seq_idx": none.int()}).logits, one_document)
    batch.pop("seq_idx")
    assert torch.equal(model(**batch | {"cu_seq_lens_q": torch.tensor([0, 12])}).logits, one_document)


# ---- Gradients and losses


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients_are_those_of(loss, model, oracle):
    """The gradients in `model` are those of `loss` in the weights of `oracle`, and none of them is zero."""
    names, weights = zip(*oracle.weights.items())
    expected = dict(zip(names, torch.autograd.grad(loss, weights)))
    for name, gradient in gradients(model).items():
        assert gradient is not None and gradient.any(), name
        assert_close(gradient, expected[name])


def causal_loss(oracle, documents):
    """Mean of -log p over all tokens but the first of each document."""
    losses = [F.cross_entropy(oracle(d)[0][:-1], d[1:], reduction="sum") for d in documents if len(d) > 1]
    return sum(losses) / sum(len(d) - 1 for d in documents)


@pytest.fixture
def trained_model_and_oracle(cell_type, shape, backend, dtype):
    model = small_model(cell_type, dtype=dtype, scan_backend=backend, **SHAPES[shape])
    return model.train(), WrittenOut(model)


@pytest.mark.oldest
@both_cells
@every_float32_backend
@every_shape
def test_packed_documents_give_the_loss_and_gradients_of_the_documents(trained_model_and_oracle):
    model, oracle = trained_model_and_oracle
    documents = random_ids(40).split([9, 1, 14, 2, 14])
    loss = model(**pack(documents, "position_ids")).loss
    loss.backward()
    expected = causal_loss(oracle, documents)
    assert_close(loss, expected)
    assert_gradients_are_those_of(expected, model, oracle)


@both_cells
@every_float32_backend
@every_shape
def test_a_padded_batch_gives_the_loss_and_gradients_of_its_sequences(trained_model_and_oracle):
    model, oracle = trained_model_and_oracle
    real = torch.arange(14) < torch.tensor([9, 14, 2])[:, None]
    real[1:] = real[1:].flip(1)  # one row padded on the right, one full, one on the left
    ids = random_ids(3, 14)
    # The loss at the last padding token on the left predicts the first real one, which no document does by itself.
    documents = [row[mask] for row, mask in zip(ids, real)]
    labels = ids.masked_fill(~real, -100)
    labels[2, -2] = -100
    loss = model(ids, attention_mask=real, labels=labels).loss
    loss.backward()
    expected = causal_loss(oracle, documents)
    assert_close(loss, expected)
    assert_gradients_are_those_of(expected, model, oracle)


@both_cells
@every_backend
@every_shape
def test_gradients_flow_through_the_cache_to_earlier_chunks(trained_model_and_oracle):
    model, oracle = trained_model_and_oracle
    ids = random_ids(1, 12)
    logits, _, _ = read_in_chunks(model, ids, [5, 1, 6])
    loss = F.cross_entropy(logits[0, -2:-1], ids[0, -1:])  # of the last token alone
    loss.backward()
    expected = F.cross_entropy(oracle(ids[0])[0][-2:-1], ids[0, -1:])
    assert_gradients_are_those_of(expected, model, oracle)


@both_cells
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gradient_checkpointing_changes_no_bit_of_the_gradients(cell_type, backend):
    model = small_model(cell_type, scan_backend=backend).train()
    batch = pack(random_ids(40).split([17, 23]), "everything")
    model(**batch, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    # The name before transformers 5.2x is deprecated; the new one is not in 5.17.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model(**batch, use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_each_head_divides_the_loss_by_num_items_in_batch():
    ids = random_ids(3, 7)
    classes = torch.tensor([1, 0, 2])
    heads = [
        (MinRNNForCausalLM, ids, lambda logits: (logits[:, :-1], ids[:, 1:])),
        (MinRNNForSequenceClassification, classes, lambda logits: (logits, classes)),
        (MinRNNForTokenClassification, ids % 3, lambda logits: (logits, ids % 3)),
    ]
    for model_class, labels, pair in heads:
        model = small_model(model_class=model_class, num_labels=3)
        logits, targets = pair(model(ids).logits)
        total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
        assert_close(model(ids, labels=labels, num_items_in_batch=100).loss, total / 100)
        assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss, total / 7)
        assert_close(model(ids, labels=labels).loss, total / targets.numel())


@both_cells
@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_without_logits_is_the_loss_and_holds_few_logits_at_a_time(cell_type, items, shifted, monkeypatch):
    monkeypatch.setattr(modeling_minrnn, "LOSS_CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    ids = random_ids(3, 17)
    labels = ids.masked_fill(random_mask(3, 17, seed=0, share=0.3), -100)
    arguments = {"labels": labels, "num_items_in_batch": items} | ({"shift_labels": labels} if shifted else {})
    model = small_model(cell_type)
    expected = model(ids, **arguments)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else [result]
            with_logits = [x.numel() for x in outputs if isinstance(x, torch.Tensor) and x.shape[-1:] == (VOCAB_SIZE,)]
            largest = max(largest, *with_logits, 0)
            return result

    with Sizes():
        actual = model(ids, **arguments, logits_to_keep=NO_LOGITS)
        actual.loss.backward()
    assert actual.logits.shape == (3, 0, VOCAB_SIZE)
    assert largest == model.lm_head.weight.numel() < ids.numel() * VOCAB_SIZE / 3  # 5 logits at a time are less
    assert_close(actual.loss, expected.loss)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected_gradients[name])
    assert_close(model(ids, **arguments, logits_to_keep=2).logits, expected.logits[:, -2:])
    assert_close(model(ids, **arguments, logits_to_keep=2).loss, expected.loss)


def test_dropout_in_the_head_is_the_same_where_the_loss_is_computed_again(monkeypatch):
    monkeypatch.setattr(modeling_minrnn, "LOSS_CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    model, ids = small_model(dtype=torch.float64), random_ids(2, 17)
    model.lm_head.register_forward_pre_hook(lambda head, arguments: F.dropout(arguments[0]))

    def with_head_dropout():
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids, logits_to_keep=NO_LOGITS).loss.backward()
        return gradients(model)

    recomputed = with_head_dropout()
    monkeypatch.setattr(modeling_minrnn, "checkpoint", lambda function, *args, **_: function(*args))
    for name, gradient in with_head_dropout().items():
        assert_close(recomputed[name], gradient)


@pytest.mark.parametrize("device, chunks", [("cpu", 4), ("meta", 2)])
def test_an_accelerator_has_its_own_number_of_logits_at_a_time(device, chunks, monkeypatch):
    monkeypatch.setattr(modeling_minrnn, "LOSS_CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    monkeypatch.setattr(modeling_minrnn, "LOSS_CHUNK_ELEMENTS_ACCELERATOR", 10 * VOCAB_SIZE)
    model, ids = small_model().to(device), random_ids(2, 10).to(device)
    rows = []
    model.lm_head.register_forward_hook(lambda head, arguments, logits: rows.append(len(logits)))
    model(ids, labels=ids, logits_to_keep=NO_LOGITS.to(device))
    assert rows == [20 // chunks] * chunks


def test_labels_of_another_batch_are_refused(monkeypatch):
    monkeypatch.setattr(modeling_minrnn, "LOSS_CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"labels must be \(2, 10\), not \(1, 10\)"):
        small_model()(random_ids(2, 10), labels=random_ids(1, 10), logits_to_keep=NO_LOGITS)


# ---- Parameters that are not there all the time


@every_shape
@pytest.mark.parametrize(
    "model_class, bidirectional", [(MinRNNForCausalLM, False), (MinRNNForTokenClassification, True)]
)
def test_each_parameter_is_needed_in_the_forward_pass_of_its_own_module_alone(shape, model_class, bidirectional):
    """As where accelerate offloads them, or DeepSpeed shards them."""
    model = small_model(model_class=model_class, bidirectional=bidirectional, **SHAPES[shape])
    ids, mask = random_ids(2, 9), random_mask(2, 9, seed=0, share=0.3)
    expected = model(ids, attention_mask=mask).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_close(model(ids, attention_mask=mask).logits, expected)
    if not bidirectional:
        cache = DynamicCache(config=model.config)
        parts = [
            model(ids[:, t], attention_mask=mask[:, t], past_key_values=cache).logits for t in (slice(4), slice(4, 9))
        ]
        assert_close(torch.cat(parts, 1), expected)


# ---- Heads


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_sequence_is_classified_by_its_last_real_token(backend):
    fields = {"num_labels": 3, "pad_token_id": 0, "scan_backend": backend}
    model = small_model(model_class=MinRNNForSequenceClassification, **fields)
    ids = random_ids(4, 9).clamp(min=1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 5:] = 0  # right
    mask[1, :5] = 0  # left
    mask[2, [0, 3, 8]] = 0  # anywhere
    logits = model(ids, attention_mask=mask).logits
    for row in range(4):
        alone = ids[row : row + 1, mask[row].bool()]
        assert_close(logits[row : row + 1], model.score(model.model(alone).last_hidden_state[:, -1]))
    # Without a mask, it is read from the padding tokens; with embeddings, from the mask alone.
    assert_close(model(ids.masked_fill(mask == 0, 0)).logits, logits)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits, logits)


def test_sequence_classification_has_losses_for_classes_several_labels_and_numbers():
    ids = random_ids(3, 7)
    cases = [
        (3, torch.tensor([1, 0, 2]), F.cross_entropy),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), F.binary_cross_entropy_with_logits),
        (1, torch.tensor([0.5, -1, 2]), lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
    ]
    for num_labels, labels, loss in cases:
        model = small_model(model_class=MinRNNForSequenceClassification, num_labels=num_labels)
        output = model(ids, labels=labels)
        assert_close(output.loss, loss(output.logits, labels))


def test_token_classification_ignores_tokens_labelled_minus_100():
    model = small_model(model_class=MinRNNForTokenClassification, num_labels=3)
    ids = random_ids(2, 6)
    labels = ids % 3
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    kept = labels != -100
    assert_close(output.loss, F.cross_entropy(output.logits[kept], labels[kept]))
    output.loss.backward()
    assert model.score.bias.grad.any()


@both_cells
def test_logits_to_keep_selects_logits(cell_type):
    model = small_model(cell_type)
    ids = random_ids(2, 9)
    logits = model(ids).logits
    assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]])
    assert model(ids, logits_to_keep=2, output_hidden_states=True).hidden_states[-1].shape[1] == 9
    read = []  # tokens, by the last MLP
    model.model.layers[-1].mlp.register_forward_hook(lambda mlp, inputs, output: read.append(output.shape[1]))
    cache = model(ids[:, :8], logits_to_keep=NO_LOGITS, use_cache=True).past_key_values
    assert_close(model(ids[:, 8:], logits_to_keep=1, past_key_values=cache).logits, logits[:, -1:])
    assert read == [0, 1]


def test_outputs_come_as_a_tuple_where_asked_for():
    model = small_model()
    ids = random_ids(2, 5)
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (2, 5, model.config.vocab_size) and cache.get_seq_length() == 5
    assert model(ids, use_cache=False).past_key_values is None


# ---- Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_cells
@pytest.mark.parametrize("backend", ["torch", "numba"])
@torch.no_grad()
def test_the_state_of_a_half_precision_model_keeps_float32(cell_type, backend, dtype):
    model = small_half_precision_model(cell_type, dtype, scan_backend=backend)
    ids = random_ids(2, 600)
    *_, expected = read_in_chunks(model, ids, 600)
    *_, exact = read_in_chunks(copy.deepcopy(model).float(), ids, 600)
    for chunk in (1, 7, 256):
        *_, cache = read_in_chunks(model, ids, chunk)
        assert cache.layers[0].keys.dtype == torch.float32
        assert_close(cache.layers[0].keys, expected.layers[0].keys)
    # Gates in half precision are all that differs from a model in float32.
    assert_close(expected.layers[0].keys, exact.layers[0].keys, tolerance=torch.finfo(dtype).eps)


@both_cells
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_autocast_trains_and_keeps_the_state_in_float32(cell_type, backend):
    model = small_model(cell_type, scan_backend=backend).train()
    ids = random_ids(2, 20)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert all(layer.keys.dtype == torch.float32 for layer in output.past_key_values.layers)
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model).values())


# ---- Initial weights


@pytest.mark.parametrize("initializer_range, std", [(0.05, 0.05), (None, 1 / 128**0.5)])
def test_weights_start_scaled_by_the_width_and_what_layers_add_to_the_residual_stream_by_the_depth(
    initializer_range, std
):
    torch.manual_seed(0)
    config = MinRNNConfig(hidden_size=128, num_hidden_layers=8, initializer_range=initializer_range)
    model = MinRNNForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif "conv" in name:
            assert parameter.std().item() == pytest.approx(CONV_INITIALIZER_STD, rel=0.1), name
        else:
            expected = std / 4 if name.endswith(("out_proj.weight", "down_proj.weight")) else std
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@both_cells
def test_chrono_initialisation_spreads_memory_log_uniformly_over_1_to_max_timescale_tokens(cell_type):
    torch.manual_seed(0)
    config = MinRNNConfig(hidden_size=1000, num_hidden_layers=2, cell_type=cell_type, max_timescale=500)
    for layer in MinRNNModel(config).layers:
        # What an input of zero keeps of a state of 1 in one step, less what it adds.
        nothing = torch.zeros(1, 1, 1000)
        projected = layer.rnn.in_proj(nothing)
        kept = [minrnn_scan(projected, cell_type, torch.full((1, 1000), start))[1] for start in (0.0, 1.0)]
        timescale = -1 / (kept[1] - kept[0]).double().log()
        assert 0.999 < timescale.min() and timescale.max() < 501
        # Of 1000 uniform numbers, the sorted ones stay within 0.06 of their places except once in 700 times.
        uniform = timescale.log().flatten().sort().values / torch.tensor(500.0).log()
        assert (uniform - torch.linspace(0, 1, 1000)).abs().max() < 0.06


def test_a_learned_initial_state_starts_at_zero():
    model = MinRNNForCausalLM(small_config(learned_initial_state=True))
    assert not any(layer.rnn.initial_state.any() for layer in model.model.layers)
    assert model.model.layers[0].rnn.initial_state.requires_grad


# ---- Compilation


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


# A layer of each cell. The training step of the kernels is in test_cells_in_models.py: a compiler sees one operator,
# whatever computes it.
BOTH = list(CELLS)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@torch.no_grad()
def test_the_forward_pass_compiles_into_one_graph(backend):
    model = small_model(BOTH, scan_backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 12)
    mask = torch.arange(12) >= torch.tensor([[3], [0]])
    packed = pack(random_ids(12).split([3, 4, 5]), "position_ids")
    for inputs in ({"input_ids": ids, "use_cache": False}, {"input_ids": ids, "attention_mask": mask.long()}, packed):
        assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_training_step_compiles_into_one_graph():
    model = small_model(BOTH, scan_backend="torch").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("backend", ["torch", "numba"])
@torch.no_grad()
def test_a_decode_step_with_a_static_cache_compiles_once(backend):
    model = small_model(BOTH, scan_backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=20)
    logits = [model(ids[:, :8], past_key_values=cache).logits]
    for t in range(8, 20):
        position = torch.full((2, 1), t)
        mask = torch.ones(2, 1, dtype=torch.long)
        inputs = {"attention_mask": mask, "position_ids": position, "past_key_values": cache}
        with torch._dynamo.config.patch(error_on_recompile=t > 8):
            logits.append(compiled(ids[:, t : t + 1], **inputs).logits)
    assert_close(torch.cat(logits, 1), model(ids).logits)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_compiles_a_training_step():
    model = small_model(BOTH).train()
    ids = random_ids(2, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.compile(model, fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name])


# ---- Bad input


IDS = random_ids(2, 3)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"input_ids": torch.tensor([[3, 37]])}, r"token id 37 is not in the vocabulary: ids must be in 0\.\.36"),
        ({"input_ids": torch.tensor([[-1, 3]])}, r"token id -1 is not in the vocabulary: ids must be in 0\.\.36"),
        ({"input_ids": IDS[:, :0]}, "sequence is empty"),
        ({"inputs_embeds": torch.ones(2, 0, 14)}, "sequence is empty"),
        ({"input_ids": IDS[0]}, r"input_ids must be \(B, T\) .* not \(3,\)"),
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 3, 14)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 2)}, r"attention_mask must be .* not \(2, 2\)"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
            r"attention_mask must be .* not \(2, 1, 3, 3\)",
        ),
        ({"input_ids": IDS, "reset_mask": torch.ones(2, 3)}, "reset_mask must be bool, not torch.float32"),
        ({"input_ids": IDS, "reset_mask": torch.ones(2, 4) > 0}, r"reset_mask must be \(2, 3\), .* not \(2, 4\)"),
        ({"input_ids": IDS, "seq_idx": torch.tensor([[0, 0, 1, 1]])}, r"seq_idx must be \(2, 3\), .* not \(1, 4\)"),
        ({"input_ids": IDS, "position_ids": torch.arange(3)}, r"position_ids must be \(2, 3\), .* not \(3,\)"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 3])}, "batch of one packed row, not 2 rows"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        small_model()(**inputs)
    assert "\n" not in str(error.value)


def test_an_index_error_of_other_code_is_not_blamed_on_the_tokens():
    model = small_model()
    model.model.embed_tokens.register_forward_hook(lambda *_: [][0])
    with pytest.raises(IndexError, match="list index"):
        model(IDS)


def test_one_row_of_a_mask_describes_all_rows():
    model = small_model()
    ids, mask = random_ids(3, 6), torch.tensor([[0, 0, 1, 1, 1, 2]])
    expected = model(ids, seq_idx=mask.expand(3, 6)).logits
    assert torch.equal(model(ids, seq_idx=mask).logits, expected)
    assert torch.equal(model(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 0]])).logits, expected)


def losses_chunk_by_chunk(model, ids, cache):
    """The losses, logits, gradients and last states of a row read in three calls, with the gradient through all."""
    logits = []
    losses = []
    for chunk in ids.split([9, 1, 13], dim=1):
        outputs = model(chunk, labels=chunk, past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
        if chunk.shape[1] > 1:
            losses.append(outputs.loss)
    torch.stack(losses).sum().backward()
    found = {"losses": torch.stack(losses), "logits": torch.cat(logits, 1)} | gradients(model)
    found |= {f"state {i}": layer.keys for i, layer in enumerate(cache.layers)}
    model.zero_grad()
    return found


@pytest.mark.parametrize("cell_type", ["mingru", "rwkv4"])
@pytest.mark.parametrize("way", ["model", "wrapper", "reentrant"])
@pytest.mark.parametrize("static", [False, True])
def test_gradient_checkpointing_reads_the_state_it_is_given_and_leaves_the_same_one(cell_type, way, static):
    """To the bit, where other layers of transformers drop the cache. The wrapper is what accelerate uses."""
    model = small_model(cell_type).train()
    ids = random_ids(2, 23)
    kind = functools.partial(StaticCache, max_cache_len=40) if static else DynamicCache
    expected = losses_chunk_by_chunk(model, ids, kind(config=model.config))
    if way == "wrapper":
        apply_activation_checkpointing(
            model, checkpoint_wrapper, check_fn=lambda module: isinstance(module, MinRNNDecoderLayer)
        )
    else:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": way == "reentrant"})
    if way == "reentrant":
        with pytest.raises(ValueError, match="use_reentrant=True loses the gradient through past_key_values"):
            losses_chunk_by_chunk(model, ids, kind(config=model.config))
        return
    found = losses_chunk_by_chunk(model, ids, kind(config=model.config))
    for name, value in found.items():
        assert torch.equal(value, expected[name.replace("_checkpoint_wrapped_module.", "")]), name


def test_reentrant_gradient_checkpointing_goes_on_from_a_detached_state():
    model, ids = small_model(), random_ids(2, 20)

    def second_chunk():
        with torch.no_grad():
            cache = model.eval()(ids[:, :9], use_cache=True).past_key_values
        model.train()
        loss = model(ids[:, 9:], labels=ids[:, 9:], past_key_values=cache).loss
        loss.backward()
        found = {"loss": loss} | gradients(model)
        model.zero_grad()
        return found

    expected = second_chunk()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": True})
    for name, value in second_chunk().items():
        assert torch.equal(value, expected[name]), name


def test_training_mode_and_gradient_checkpointing_change_no_generated_token():
    model = small_model()
    expected = model.generate(random_ids(2, 9), max_new_tokens=8, do_sample=False)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert torch.equal(model.generate(random_ids(2, 9), max_new_tokens=8, do_sample=False), expected)
