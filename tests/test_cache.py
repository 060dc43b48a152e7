"""The state between calls: it does not grow, it can be put back, and it fits one model and one batch."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import CELLS, SHAPES, assert_close, random_ids, small_config, small_half_precision_model, small_model
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache

from modeling_minrnn.cache_minrnn import MAX_ROLLBACK_TOKENS

pytestmark = pytest.mark.usefixtures("no_grad")
both_cells = pytest.mark.parametrize("cell_type", CELLS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
both_backends = pytest.mark.parametrize("backend", ["torch", "numba"])
both_kinds = pytest.mark.parametrize("kind", [DynamicCache, StaticCache])


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def new_cache(kind, config):
    return kind(config=config) if kind is DynamicCache else kind(config=config, max_cache_len=2000)


def read(model, ids, cache, **masks):
    return model(ids, past_key_values=cache, use_cache=True, **masks).logits


def state(cache):
    """Copies of all that a cache carries from token to token."""
    return [(layer.keys.clone(), layer.values.clone(), int(layer.get_seq_length())) for layer in cache.layers]


def assert_same_state(cache, expected):
    for (keys, values, length), (expected_keys, expected_values, expected_length) in zip(
        state(cache), expected, strict=True
    ):
        assert_close(keys, expected_keys)
        assert_close(values, expected_values)
        assert (keys.dtype, values.dtype, length) == (expected_keys.dtype, expected_values.dtype, expected_length)


def bytes_kept_alive(cache):
    """Bytes of all storages that can be reached from a cache, whatever part of them its tensors are views of."""
    storages, seen, queue = {}, set(), [cache]
    while queue:
        thing = queue.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            assert thing.grad_fn is None
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (list, tuple)):
            queue += thing
        else:
            queue += vars(thing).values() if hasattr(thing, "__dict__") else []
    return sum(storages.values())


def state_bytes(config, batch_size):
    """A float32 state of D and K - 1 float32 rows of H, for each layer and sequence."""
    window = max(config.conv_kernel_size - 1, 0) * config.hidden_size
    return 4 * batch_size * config.num_hidden_layers * (config.state_size + window)


# ---- Size


@both_cells
@both_backends
@every_shape
@both_kinds
@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_holds_one_state_and_one_window_however_many_tokens_it_has_seen(
    cell_type, backend, shape, kind, masked
):
    model = small_model(cell_type, scan_backend=backend, **shape)
    cache = new_cache(kind, model.config)
    expected = state_bytes(model.config, batch_size=2)
    if kind is StaticCache:
        expected += 8 * model.config.num_hidden_layers  # the counter of tokens
    for length in (10, 1000, 1, 1):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, : int(masked)] = 0
        read(model, random_ids(2, length), cache, attention_mask=mask)
        assert bytes_kept_alive(cache) == expected
    assert cache.get_seq_length() == 1012


@both_cells
@both_backends
@pytest.mark.parametrize("masked", [False, True])
def test_a_recorded_past_is_bounded(cell_type, backend, masked):
    model = small_model(cell_type, scan_backend=backend)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    # Twice what can be gone back: of the oldest chunk, all recorded states may stay for the sake of one.
    limit = 2 * (MAX_ROLLBACK_TOKENS + 1) * state_bytes(model.config, batch_size=1)
    for length in (1000, *[1] * MAX_ROLLBACK_TOKENS, 50, 1):
        mask = torch.ones(1, length, dtype=torch.long)
        mask[0, : int(masked)] = 0
        read(model, random_ids(1, length), cache, attention_mask=mask)
        assert bytes_kept_alive(cache) <= limit


@both_kinds
def test_a_cache_counts_tokens_and_has_no_limit(kind):
    model = small_model()
    cache = new_cache(kind, model.config)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1
    read(model, random_ids(3, 7), cache)
    read(model, random_ids(3, 1), cache)
    assert cache.get_seq_length() == 8 and cache.batch_size == 3
    assert cache.get_mask_sizes(5, 0) == (13, 0)
    assert all(layer.get_max_length() == -1 for layer in cache.layers)


# ---- Going back


@both_cells
@both_backends
@given(
    shape=st.sampled_from(SHAPES),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    removed=st.integers(1, 20),
    masked=st.booleans(),
)
def test_tokens_taken_back_were_never_read(cell_type, backend, shape, lengths, removed, masked):
    model = small_model(cell_type, scan_backend=backend, **shape)
    removed = min(removed, sum(lengths) - 1)
    ids = random_ids(1, sum(lengths))
    masks = {"attention_mask": random_ids(1, sum(lengths), seed=1) % 4, "reset_mask": random_ids(*ids.shape) % 5 == 0}
    masks = {name: mask.split(lengths, 1) for name, mask in masks.items()} if masked else {}

    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    expected = []  # after each token
    for i, chunk in enumerate(ids.split(lengths, 1)):
        chunk_masks = {name: mask[i] for name, mask in masks.items()}
        before = copy.deepcopy(cache)
        read(model, chunk, cache, **chunk_masks)
        for stop in range(1, chunk.shape[1] + 1):
            one_by_one = copy.deepcopy(before)
            read(model, chunk[:, :stop], one_by_one, **{name: mask[:, :stop] for name, mask in chunk_masks.items()})
            expected.append(state(one_by_one))
    cache.crop(-removed)
    assert_same_state(cache, expected[-1 - removed])


@both_cells
@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_of_a_half_precision_model_goes_back_in_float32(cell_type, backend, dtype):
    model = small_half_precision_model(cell_type, dtype, scan_backend=backend)
    ids = random_ids(1, 60)
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, ids, cache)
    cache.crop(-20)
    read(model, ids[:, :40], expected)
    assert_same_state(cache, state(expected))


def test_the_latest_tokens_can_be_taken_back_and_no_more():
    model = small_model()
    ids = random_ids(1, 400)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, ids[:, :300], cache)
    read(model, ids[:, 300:], cache)
    with pytest.raises(ValueError, match=f"cannot go back {MAX_ROLLBACK_TOKENS + 1} tokens: {MAX_ROLLBACK_TOKENS} "):
        cache.crop(-MAX_ROLLBACK_TOKENS - 1)
    cache.crop(-MAX_ROLLBACK_TOKENS)
    expected = DynamicCache(config=model.config)
    read(model, ids[:, :-MAX_ROLLBACK_TOKENS], expected)
    assert_same_state(cache, state(expected))


def test_a_cache_goes_back_again_and_to_the_start():
    model, ids = small_model(), random_ids(1, 10)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    read(model, ids, cache)
    for left in (10, 7, 6, 2, 0):
        cache.crop(left - cache.get_seq_length())
        expected = model(ids).logits[:, left:]
        assert_close(read(model, ids[:, left:], copy.deepcopy(cache)), expected) if left < 10 else None
    without_record = filled(model, batch_size=1)
    without_record.crop(-3)
    assert_close(read(model, ids, without_record), model(ids).logits)


def test_going_back_is_refused_where_it_cannot_be_done():
    model = small_model()
    cache = DynamicCache(config=model.config)
    read(model, random_ids(1, 9), cache)
    before = state(cache)
    with pytest.raises(ValueError, match="cannot go back 1 tokens: 0 are recorded"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative number of tokens, not 4"):
        cache.crop(4)
    cache.activate_past_recording()
    read(model, random_ids(1, 2), cache)
    with pytest.raises(ValueError, match="cannot go back 3 tokens: 2 are recorded"):
        cache.crop(-3)  # past where the recording began
    cache.crop(-2)
    assert_same_state(cache, before)
    static = StaticCache(config=model.config, max_cache_len=20)
    static.activate_past_recording()
    read(model, random_ids(1, 9), static)
    assert not any(layer.is_croppable for layer in static.layers)
    with pytest.raises(ValueError, match="cannot go back"):
        static.crop(-1)


# ---- Rows of the batch


@both_cells
@every_shape
@pytest.mark.parametrize(
    "operation, rows",
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ],
    ids=["reorder_cache", "batch_repeat_interleave", "batch_select_indices"],
)
def test_rows_of_a_cache_move_with_their_past(cell_type, shape, operation, rows):
    model = small_model(cell_type, **shape)
    ids, following = random_ids(3, 9), random_ids(len(rows), 4, seed=1)
    cache = DynamicCache(config=model.config)
    operation(cache)  # nothing to move yet
    cache.activate_past_recording()
    read(model, ids, cache)
    operation(cache)
    logits = read(model, following, cache)
    assert_close(logits, model(torch.cat([ids[rows], following], 1)).logits[:, 9:])
    cache.crop(-6)
    logits = read(model, following, cache)
    assert_close(logits, model(torch.cat([ids[rows, :7], following], 1)).logits[:, 7:])


# ---- Starting again, moving, iterating


@both_cells
@every_shape
@both_kinds
def test_after_a_reset_a_cache_is_as_new(cell_type, shape, kind):
    model = small_model(cell_type, **shape)
    parameters = copy.deepcopy(model.state_dict())
    ids = random_ids(2, 9)
    cache = new_cache(kind, model.config)
    for mask in (torch.zeros(2, 9), torch.ones(2, 9)):  # the first: nothing but padding
        read(model, random_ids(2, 9, seed=1), cache, attention_mask=mask)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(torch.cat([read(model, t, cache) for t in ids.split([1, 3, 5], 1)], 1), model(ids).logits)
        cache.reset()
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, parameters[name]), name


@both_kinds
def test_padding_alone_leaves_the_state_as_it_is(kind):
    model = small_model()
    cache = new_cache(kind, model.config)
    ids = random_ids(2, 9)
    read(model, ids, cache)
    read(model, random_ids(2, 4), cache, attention_mask=torch.zeros(2, 4))
    assert_close(read(model, ids, cache), model(torch.cat([ids, ids], 1)).logits[:, 9:])


@both_kinds
def test_a_copy_of_a_cache_goes_its_own_way(kind):
    model = small_model()
    prompt, ids = random_ids(1, 9), random_ids(2, 5, seed=1)
    cache = new_cache(kind, model.config)
    read(model, prompt, cache)
    for row in ids[:, None]:
        logits = read(model, row, copy.deepcopy(cache))
        assert_close(logits, model(torch.cat([prompt, row], 1)).logits[:, 9:])


@both_kinds
def test_an_offloaded_cache_keeps_its_state_where_it_is(kind):
    """It is read before transformers waits for what it prefetches, so nothing may be under way."""
    model = small_model()
    cache = new_cache(kind, model.config)
    read(model, random_ids(2, 5), cache)
    for layer in cache.layers:
        kept = layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        layer.offload()
        assert layer.keys is kept[0] and layer.values is kept[1]
        layer.prefetch()
        assert layer.keys is kept[0] and layer.values is kept[1]


def test_iterating_over_a_cache_gives_what_another_can_be_built_from():
    model = small_model()
    ids = random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    read(model, ids[:, :5], cache)
    rebuilt = DynamicCache([(keys, values) for keys, values, *_ in cache], config=model.config)
    assert_close(read(model, ids[:, 5:], rebuilt), model(ids).logits[:, 5:])


# ---- A cache of something else


def filled(model, batch_size=2, kind=DynamicCache):
    cache = new_cache(kind, model.config)
    read(model, random_ids(batch_size, 3), cache)
    return cache


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: filled(small_model(), batch_size=3), r"window of shape \(3, 3, 14\) .* need \(2, 3, 14\)"),
        (
            lambda: filled(small_model(), batch_size=3, kind=StaticCache),
            r"window of shape \(3, 3, 14\) .* need \(2, 3, 14\)",
        ),
        (lambda: filled(small_model(expansion_factor=2)), r"state of shape \(2, 28\) .* need \(2, 21\)"),
        (lambda: filled(small_model(conv_kernel_size=3)), r"window of shape \(2, 2, 14\) .* need \(2, 3, 14\)"),
        (lambda: DynamicCache(config=small_config(num_hidden_layers=3)), "not made for this model"),
        (lambda: DynamicCache(config=LlamaConfig(num_hidden_layers=2)), "not made for this model"),
        (lambda: DynamicCache(), "not made for this model"),
        (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "not made for this model"),
        (lambda: ((torch.zeros(2, 21), torch.zeros(2, 3, 14)),) * 2, "not made for this model"),
    ],
)
def test_a_cache_of_another_batch_or_model_is_refused(make, message):
    model, cache = small_model(), make()
    with pytest.raises(ValueError, match=message) as error:
        read(model, random_ids(2, 4), cache)
    assert "\n" not in str(error.value)


@both_kinds
def test_refused_tokens_leave_the_cache_as_it_was(kind):
    model = small_model()
    cache = filled(model, kind=kind)
    before = state(cache)
    for ids, error in ((torch.full((2, 3), 99), "token id 99"), (random_ids(1, 3), "window of shape")):
        with pytest.raises(ValueError, match=error):
            read(model, ids, cache)
    assert_same_state(cache, before)
