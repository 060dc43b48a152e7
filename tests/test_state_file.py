"""A text is read once and gone on from in another process; what is not that state is refused."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import CELLS, SHAPES, random_ids, small_half_precision_model, small_model
from transformers import DynamicCache, StaticCache

from modeling_minrnn import MinRNNForSequenceClassification, load_state, save_state

both_cells = pytest.mark.parametrize("cell_type", CELLS)
both_kinds = pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def read(model, ids, cache=None, chunk=500):
    """The cache after ids (B, T), read in chunks."""
    for part in ids.split(chunk, 1):
        cache = model(part, past_key_values=cache, use_cache=True).past_key_values
    return cache


def state(cache):
    return [(layer.keys, layer.values, int(layer.get_seq_length())) for layer in cache.layers]


def assert_same_state(cache, expected):
    for (keys, values, length), (*tensors, expected_length) in zip(state(cache), state(expected), strict=True):
        for actual, tensor in zip((keys, values), tensors):
            assert torch.equal(actual, tensor) and actual.dtype == tensor.dtype
        assert length == expected_length


# ---- What is kept

CONTINUE = """
import sys, torch
from modeling_minrnn import MinRNNForCausalLM, load_state

folder = sys.argv[1]
torch.set_num_threads(1)
model = MinRNNForCausalLM.from_pretrained(folder)
cache = load_state(folder + "/state", model)
new = torch.load(folder + "/new.pt")
mask = torch.ones(len(new), cache.get_seq_length() + new.shape[1])
output = model.generate(
    new, past_key_values=cache, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0,
    output_logits=True, return_dict_in_generate=True,
)
torch.save((output.sequences, torch.stack(output.logits)), folder + "/output.pt")
"""


@both_cells
def test_a_prompt_read_here_is_continued_in_another_process_bit_for_bit(cell_type, tmp_path, pytestconfig):
    model = small_model(cell_type, hidden_size=30)
    model.save_pretrained(tmp_path)
    prompt, new = random_ids(2, 5003), random_ids(2, 7, seed=1)
    cache = read(model, prompt)
    size = save_state(cache, tmp_path / "state", model)
    assert size == (tmp_path / "state").stat().st_size < 3000  # two rows of two layers, 45 and 3 * 30 numbers each
    torch.save(new, tmp_path / "new.pt")
    process = subprocess.run(
        [sys.executable, "-c", CONTINUE, tmp_path],
        env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    tokens, logits = torch.load(tmp_path / "output.pt")
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(  # which goes on from the cache that was never written
        torch.cat([prompt, new], 1),
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    assert torch.equal(tokens[:, 7:], expected.sequences[:, 5010:]) and torch.equal(tokens[:, :7], new)
    assert torch.equal(logits, torch.stack(expected.logits))


@pytest.mark.oldest
@both_cells
@every_shape
@both_kinds
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_state_comes_back_as_it_was(cell_type, shape, kind, batch_size, tmp_path):
    model = small_model(cell_type, **shape)
    cache = kind(config=model.config, **({"max_cache_len": 40} if kind is StaticCache else {}))
    read(model, random_ids(batch_size, 33), cache)
    save_state(cache, tmp_path / "state", model)
    loaded = load_state(str(tmp_path / "state"), model)
    assert_same_state(loaded, cache)
    new = random_ids(batch_size, 4, seed=1)
    expected = model(new, past_key_values=cache, use_cache=True).logits
    assert torch.equal(model(new, past_key_values=loaded).logits, expected)


@both_cells
def test_a_state_of_a_half_precision_model_keeps_float32(cell_type, tmp_path):
    model = small_half_precision_model(cell_type, torch.bfloat16, conv_kernel_size=4)
    cache = read(model, random_ids(2, 200))
    save_state(cache, tmp_path / "state", model)
    loaded = load_state(tmp_path / "state", model)
    assert_same_state(loaded, cache)
    assert loaded.layers[0].keys.dtype == torch.float32 and loaded.layers[0].values.dtype == torch.bfloat16
    assert (loaded.layers[0].keys.bfloat16() != loaded.layers[0].keys).any()


def test_a_state_is_gone_on_from_with_training_and_with_another_head(tmp_path):
    model = small_model()
    with torch.enable_grad():
        cache = read(model, random_ids(2, 9))
    save_state(cache, tmp_path / "state", model)
    other = MinRNNForSequenceClassification(model.config)
    other.model.load_state_dict(model.model.state_dict())
    loaded = load_state(tmp_path / "state", other)
    assert_same_state(loaded, cache)
    assert not any(layer.keys.requires_grad for layer in loaded.layers)


def test_the_size_does_not_depend_on_the_length(tmp_path):
    model = small_model()
    sizes = [save_state(read(model, random_ids(1, T)), tmp_path / str(T), model) for T in (100, 999)]
    assert sizes[0] == sizes[1]


# ---- What is refused


@pytest.fixture
def saved(tmp_path):
    """A model, the file of a state, and the cache it was made from."""
    model = small_model()
    cache = read(model, random_ids(2, 9))
    save_state(cache, tmp_path / "talk.safetensors", model)
    return model, tmp_path / "talk.safetensors", cache


def refusal(path, model):
    """The message that a file is refused with: one line, with the path."""
    with pytest.raises(ValueError) as caught:
        load_state(path, model)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_every_flipped_bit_is_refused_or_changes_nothing(saved):
    model, path, cache = saved
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    harmless = 0
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << torch.randint(8, (), generator=generator).item()
        path.write_bytes(damaged)
        try:
            loaded = load_state(path, model)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # blanks that pad the header
            assert_same_state(loaded, cache)
            assert data[position] == ord(" ") and position < header_end
            harmless += 1
    assert harmless < 8


def test_a_file_cut_short_or_added_to_is_refused(saved):
    model, path, _ = saved
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert "damaged" in refusal(path, model)
    for added in (b"\0", data):
        path.write_bytes(data + added)
        assert "damaged" in refusal(path, model)


def test_a_state_with_changed_numbers_or_metadata_is_refused(saved):
    model, path, _ = saved
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    changes = [
        (metadata, tensors | {"layers.0.state": tensors["layers.1.state"].clone()}),
        (metadata, {name: tensor for name, tensor in tensors.items() if name != "layers.1.window"}),
        (metadata | {"num_tokens": "10"}, tensors),
        ({name: value for name, value in metadata.items() if name != "checksum"}, tensors),
    ]
    for changed in changes:
        save_file(changed[1], path, changed[0])
        assert "checksum" in refusal(path, model)


def test_a_state_of_another_model_is_refused(saved):
    model, path, _ = saved
    others = [
        small_model(seed=1),
        small_model("minlstm"),
        small_model(hidden_act="silu"),
        small_model(rms_norm_eps=1e-5),
        small_model(num_hidden_layers=3),
        small_model().to(torch.bfloat16),
    ]
    changed = small_model()
    changed.model.layers[1].rnn.initial_state[0] += 1e-6
    for other in (*others, changed):
        assert "another model" in refusal(path, other)
    load_state(path, small_model(dropout=0.5, scan_backend="torch"))  # which compute the same


def test_files_that_are_no_states_are_refused(saved):
    model, path, _ = saved
    model.save_pretrained(path.parent / "model")
    assert "its format is 'pt'" in refusal(path.parent / "model" / "model.safetensors", model)
    path.write_text("once upon a time")
    assert "no state of a conversation" in refusal(path, model)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_state(path.parent / "absent", model)


def test_a_cache_that_does_not_fit_the_model_is_refused(tmp_path):
    model = small_model()
    caches = [
        DynamicCache(config=model.config),
        DynamicCache(),
        read(small_model(num_hidden_layers=1), random_ids(1, 3)),
    ]
    for cache in (*caches, read(small_model(expansion_factor=2), random_ids(1, 3))):
        with pytest.raises(ValueError, match="cache must be one that this model|holds a state of shape"):
            save_state(cache, tmp_path / "state", model)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unless_asked(saved):
    model, path, _ = saved
    before = path.read_bytes()
    later = read(model, random_ids(2, 5, seed=1))
    with pytest.raises(FileExistsError, match="talk.safetensors exists; pass overwrite=True to replace it"):
        save_state(later, path, model)
    assert path.read_bytes() == before
    save_state(later, path, model, overwrite=True)
    assert_same_state(load_state(path, model), later)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    model, path, cache = saved
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    for target, overwrite in ((path, True), (path.with_name("new"), False)):
        with pytest.raises(OSError, match="No space left"):
            save_state(cache, target, model, overwrite=overwrite)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_appears_while_a_state_is_written_is_not_overwritten(saved, monkeypatch):
    model, path, cache = saved
    target = path.with_name("new")
    monkeypatch.setattr(os, "fsync", lambda descriptor: target.write_text("mine"))
    with pytest.raises(FileExistsError):
        save_state(cache, target, model)
    assert target.read_text() == "mine"
