"""`sequence_chunked_backward` is the backward pass of the whole sequence, in the memory of one chunk."""

import copy
import weakref

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_in_processes
from small_models import CELLS, SHAPES, assert_close, random_ids, small_model
from torch.nn.parallel import DistributedDataParallel
from transformers import DynamicCache, StaticCache

from modeling_minrnn import sequence_chunked_backward

# Relative L2 error. transformers computes the loss in float32, whatever the dtype of the model.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def backward_of_all(model, ids, labels, **kwargs):
    """Loss and gradients of one pass over the whole sequence."""
    model = copy.deepcopy(model)
    loss = model(ids, labels=labels, use_cache=False, **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def backward_by_chunks(model, ids, labels, chunk_size, **kwargs):
    model = copy.deepcopy(model)
    return sequence_chunked_backward(model, ids, labels, chunk_size, **kwargs), gradients(model)


def assert_same(actual, expected, tolerance):
    assert_close(actual[0], expected[0], tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name in expected[1]:
        assert_close(actual[1][name], expected[1][name], tolerance)


def document_starts(B, T, kind, seed):
    """A keyword of the model that says where documents begin, in the manner of `kind`."""
    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.2
    starts[:, 0] = False
    numbers = starts.long().cumsum(1)
    positions = torch.arange(T).expand(B, T)
    if kind == "reset_mask":
        return {"reset_mask": starts}
    if kind == "seq_idx":
        return {"seq_idx": numbers}
    if kind == "position_ids":
        return {"position_ids": positions - torch.where(starts, positions, 0).cummax(1).values}
    if kind == "cu_seq_lens_q":
        return {"cu_seq_lens_q": torch.tensor([0, *starts[0].nonzero().flatten().tolist(), T])}
    return {}


@st.composite
def cases(draw):
    """Lengths, chunks and masks of every kind; more often than not chunks shorter than the convolution's window."""
    T = draw(st.integers(1, 24))
    packing = draw(st.sampled_from(["none", "reset_mask", "seq_idx", "position_ids", "cu_seq_lens_q"]))
    B = 1 if packing == "cu_seq_lens_q" else draw(st.integers(1, 3))
    seed = draw(st.integers(0, 1000))
    kwargs = document_starts(B, T, packing, seed)
    ids = random_ids(B, T + 1, seed=seed)
    labels = ids[:, :-1].masked_fill(torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.2, -100)
    padding = draw(st.sampled_from(["none", "left", "right", "scattered"]))
    if padding != "none":
        real = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
        mask = torch.arange(T).expand(B, T) < torch.tensor(real)[:, None]
        if padding == "left":
            mask = mask.flip(1)
        elif padding == "scattered":
            mask = torch.rand(B, T, generator=torch.Generator().manual_seed(seed + 1)) < 0.6
        kwargs["attention_mask"] = mask.long()
        labels = labels.masked_fill(~mask, -100)
    if draw(st.booleans()):
        kwargs["shift_labels"] = ids[:, 1:].contiguous()
    # Without any label the mean is 0 / 0, by either way.
    if draw(st.booleans()) or (kwargs.get("shift_labels", labels[:, 1:]) == -100).all():
        kwargs["num_items_in_batch"] = draw(st.integers(1, 50))
    return ids[:, :-1], labels, draw(st.integers(1, T + 2)), kwargs


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("cell_type", CELLS)
@settings(max_examples=15)
@given(case=cases(), shape=st.sampled_from(SHAPES))
def test_loss_and_gradients_are_those_of_one_pass_over_everything(cell_type, dtype, case, shape):
    ids, labels, chunk_size, kwargs = case
    model = small_model(cell_type, dtype=dtype, **shape)
    expected = backward_of_all(model, ids, labels, **kwargs)
    assert_same(backward_by_chunks(model, ids, labels, chunk_size, **kwargs), expected, TOLERANCES[dtype])


def test_a_long_sequence_has_the_gradients_of_one_pass_and_they_reach_across_all_chunks():
    model = small_model("minlstm", max_timescale=3000)
    ids = random_ids(1, 2049)
    labels = ids.clone()
    labels[:, :-1] = -100  # the loss is at the last token alone
    loss, expected = backward_of_all(model, ids, labels)
    actual = backward_by_chunks(model, ids, labels, 100)
    assert_same(actual, (loss, expected), TOLERANCES[torch.float32])
    assert actual[1]["model.layers.0.rnn.initial_state"].norm() > 0


def test_gradients_are_added_to_those_that_are_there():
    model, ids = small_model(), random_ids(2, 9)
    sequence_chunked_backward(model, ids, ids, 4)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    sequence_chunked_backward(model, ids, ids, 4)
    for name, gradient in gradients(model).items():
        assert_close(gradient, 2 * once[name])


@pytest.mark.parametrize("cell_type", CELLS)
def test_gradient_checkpointing_changes_nothing_and_stays_on(cell_type):
    model, ids = small_model(cell_type), random_ids(2, 13)
    expected = backward_of_all(model, ids, ids)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    model.train()
    enable()
    assert_same(backward_by_chunks(model, ids, ids, 5), expected, TOLERANCES[torch.float32])
    assert_same(backward_of_all(model, ids, ids), expected, TOLERANCES[torch.float32])
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("cell_type", CELLS)
def test_dropout_is_drawn_again_alike_and_the_random_state_is_left_as_by_one_reading(cell_type):
    model, ids = small_model(cell_type, dtype=torch.float64, dropout=0.3).train(), random_ids(2, 13)
    shift_labels = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
    # What is differentiated: the chunks read one after the other, all of them in one graph.
    reader, cache, losses = copy.deepcopy(model), DynamicCache(config=model.config), []
    torch.manual_seed(0)
    for part, labels in zip(ids.split(5, 1), shift_labels.split(5, 1)):
        output = reader(
            part, labels=labels, shift_labels=labels.contiguous(), past_key_values=cache, num_items_in_batch=24
        )
        losses.append(output.loss)
    sum(losses).backward()
    random_state = torch.get_rng_state()

    torch.manual_seed(0)
    actual = backward_by_chunks(model, ids, ids, 5)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(actual, (sum(losses).detach(), gradients(reader)), TOLERANCES[torch.float64])
    assert abs(actual[0] - backward_of_all(model.eval(), ids, ids)[0]) > 1e-3  # there was dropout


@pytest.mark.parametrize("cell_type", CELLS)
def test_under_autocast_the_gradients_are_those_of_one_pass_under_autocast(cell_type):
    model, ids = small_model(cell_type), random_ids(2, 13)
    with torch.autocast("cpu", torch.bfloat16):
        expected = copy.deepcopy(model)
        loss = expected(ids, labels=ids, use_cache=False).loss
        actual = backward_by_chunks(model, ids, ids, 5)
    loss.backward()
    # A state between chunks is rounded less than one inside them; the worst seen is 4e-3.
    assert_same(actual, (loss.detach(), gradients(expected)), 2e-2)
    exact = backward_of_all(model, ids, ids)[1]
    assert not torch.equal(actual[1]["model.embed_tokens.weight"], exact["model.embed_tokens.weight"])


def test_one_reads_on_from_a_state_which_gets_its_gradient_and_is_carried_on():
    model, ids = small_model("minlstm", dtype=torch.float64), random_ids(2, 20)
    expected, begun = copy.deepcopy(model), copy.deepcopy(model)
    cache = expected(ids[:, :7], use_cache=True).past_key_values
    expected(ids[:, 7:], labels=ids[:, 7:], past_key_values=cache).loss.backward()

    carried = begun(ids[:, :7], use_cache=True).past_key_values
    sequence_chunked_backward(begun, ids[:, 7:], ids[:, 7:], 4, past_key_values=carried)
    for name, gradient in gradients(expected).items():
        assert_close(gradients(begun)[name], gradient, TOLERANCES[torch.float64])
    assert carried.get_seq_length() == 20
    for layer, wanted in zip(carried.layers, cache.layers):
        assert_close(layer.keys, wanted.keys, TOLERANCES[torch.float64])
        assert_close(layer.values, wanted.values, TOLERANCES[torch.float64])
        assert not layer.keys.requires_grad and not layer.values.requires_grad


def test_parameters_that_are_frozen_get_no_gradient_and_the_others_theirs():
    model, ids = small_model(), random_ids(2, 11)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("initial_state")
    expected, actual = backward_of_all(model, ids, ids), backward_by_chunks(model, ids, ids, 3)
    for name, gradient in expected[1].items():
        if name.endswith("initial_state"):
            assert_close(actual[1][name], gradient, TOLERANCES[torch.float32])
        else:
            assert actual[1][name] is None


class SavedBytes:
    """The most bytes that autograd kept for a backward pass at any one time."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        class Kept(list):
            pass

        kept, size = Kept([tensor]), tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self.free, size)
        return kept

    def free(self, size):
        self.now -= size


def test_what_is_kept_for_backward_does_not_grow_with_the_sequence():
    model = small_model("minlstm")
    peaks = {}
    for T in (64, 256, 1024):
        with SavedBytes() as saved:
            backward_by_chunks(model, random_ids(1, T), random_ids(1, T), 32)
        peaks[T] = saved.peak
        assert saved.now == 0
    assert peaks[64] > 0 and peaks[64] == peaks[256] == peaks[1024]
    with SavedBytes() as saved:
        backward_of_all(model, random_ids(1, 1024), random_ids(1, 1024))
    assert saved.peak > 20 * peaks[1024]


def data_parallel_gradients(cell_type, ids, chunk_size):
    """What two processes, each with half of the batch, make of it: loss, gradients and reductions of them."""
    model = small_model(cell_type)
    parallel = DistributedDataParallel(model)
    reductions = []

    def count(_, bucket):
        reductions.append(1)
        mean = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda future: future.value()[0])

    parallel.register_comm_hook(None, count)
    own = ids[dist.get_rank() :: 2]
    loss = sequence_chunked_backward(parallel, own, own, chunk_size)
    dist.all_reduce(loss)
    return loss / 2, gradients(model), len(reductions)


@pytest.mark.parametrize("cell_type", CELLS)
def test_two_processes_have_the_gradients_of_one_and_reduce_them_once(cell_type):
    ids = random_ids(4, 13)
    expected = backward_of_all(small_model(cell_type), ids, ids)
    for loss, actual, reductions in run_in_processes(data_parallel_gradients, 2, cell_type, ids, 4):
        assert_same((loss, actual), expected, TOLERANCES[torch.float32])
        assert reductions == 1  # the parameters fit into one bucket


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1 token, not 0"),
        ({"labels": torch.zeros(2, 4, dtype=torch.long)}, r"labels must be \(2, 5\) like input_ids, not \(2, 4\)"),
        ({"model": small_model(bidirectional=True)}, "only a model that reads forwards"),
        ({"context_parallel_group": "a group"}, "in one process"),
        ({"past_key_values": StaticCache(config=small_model().config, max_cache_len=8)}, "must be a dynamic cache"),
        ({"reset_mask": torch.zeros(2, 4, dtype=torch.bool)}, r"reset_mask must be \(2, 5\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_differentiated_in_chunks_is_refused(arguments, message):
    ids = random_ids(2, 5)
    with pytest.raises(ValueError, match=message):
        sequence_chunked_backward(
            **{"model": small_model(), "input_ids": ids, "labels": ids, "chunk_size": 2} | arguments
        )
