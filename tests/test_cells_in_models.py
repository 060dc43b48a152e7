"""Every cell does in a model what minGRU and minLSTM do: the promises of the other tests, once for each of them."""

import copy
import functools
import os
import subprocess
import sys

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import CASES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run_in_processes
from small_models import (
    MATRICES,
    OPTIONS,
    WrittenOut,
    assert_close,
    random_ids,
    small_half_precision_model,
    small_model,
)
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, set_seed
from transformers.distributed import DistributedConfig

from modeling_minrnn import MinRNNForCausalLM, load_state, save_state, sequence_chunked_backward
from modeling_minrnn.export import export_onnx, export_programs

H = 12
FIELDS = {"hidden_size": H, "num_hidden_layers": 2, "expansion_factor": 1, "intermediate_size": 8}
PLAIN = {"learned_initial_state": False, "output_gate": False}
FULL = {"learned_initial_state": True, "output_gate": True}
# Fields of each cell, and the numbers that it keeps beside a state of 12 channels.
MODELS = {
    "mingru": (PLAIN, 0),
    "minlstm": (FULL, 0),
    "mingru:linear": (FULL | {"cell_type": "mingru", "candidate": "linear"}, 0),
    "minlstm:linear": (PLAIN | {"cell_type": "minlstm", "candidate": "linear"}, 0),
    "mingru_signed": (FULL, 0),
    "aaren": (PLAIN | {"num_heads": 3}, 3),
    "rwkv4": (PLAIN | {"output_gate": True}, H),
    "lru": (FULL, 0),
    "rglru": (PLAIN, 1),
    "hgrn": (FULL, 0),
    "hgrn2": (PLAIN | {"num_heads": 2}, 60),
    "gated_delta": (FULL | {"num_heads": 4, "householder_steps": 2}, 24),
    "lmu": (PLAIN | {"memory_order": 3, "memory_window": 9}, 0),
    "mixed": (FULL | {"cell_type": ["aaren", "lmu", "rwkv4"], "num_hidden_layers": 3, "num_heads": 2}, None),
}
every_model = pytest.mark.parametrize("name", MODELS)
# For what takes a compiler or an exporter seconds: models of several cells, a layer each. Not what differs in a
# candidate, or in the keys of its matrices.
GROUPS = [
    ["mingru", "minlstm", "mingru_signed", "hgrn"],
    ["aaren", "rwkv4", "lru", "rglru"],
    ["gated_delta", "lmu"],
]
every_group = pytest.mark.parametrize("cells", GROUPS, ids="-".join)
every_backend = pytest.mark.parametrize(
    "backend, dtype", [("torch", torch.float64), ("torch", torch.float32), ("numba", torch.float32)],
    ids=["torch-float64", "torch-float32", "numba-float32"],
)  # fmt: skip
# Relative L2 error that rounding may leave. The worst seen: 7e-7 in states and logits; 3.5e-6 in gradients, of a sum
# in which nearly everything cancels.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}
OF_GRADIENTS = {torch.float64: 1e-12, torch.float32: 6e-6}
close = functools.partial(assert_close, tolerance=3e-6)

# Of torch.export, when it copies its own tree specifications.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")


def model_of(name, **fields):
    return small_model(**{"cell_type": name} | FIELDS | MODELS[name][0] | fields)


def model_of_several(cells, **fields):
    """A layer of each."""
    values = {"num_heads": 2, "householder_steps": 2, "memory_order": 3, "memory_window": 9}
    options = {option: values[option] for cell in cells for option in OPTIONS.get(cell, ())}
    return small_model(cells, **FIELDS | FULL | options | {"num_hidden_layers": len(cells)} | fields)


@functools.cache
def model_and_oracle(name, backend, dtype):
    model = model_of(name, scan_backend=backend, dtype=dtype)
    return model, WrittenOut(model)


def read(model, ids, chunks, cache=None, **masks):
    """Logits and the cache after ids (B, T), in chunks of this size or sizes."""
    logits, stop = [], 0
    for chunk in ids.split(chunks, 1):
        start, stop = stop, stop + chunk.shape[1]
        part = {name: mask[:, start:stop] for name, mask in masks.items()}
        output = model(chunk, past_key_values=cache, use_cache=True, **part)
        logits.append(output.logits)
        cache = output.past_key_values
    return torch.cat(logits, 1), cache


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


# ---- Reading


@pytest.mark.parametrize("fields", [PLAIN, FULL], ids=["plain", "full"])
@every_backend
@every_model
def test_logits_cache_and_every_gradient_are_those_of_the_model_written_out(name, backend, dtype, fields):
    tolerance = TOLERANCES[dtype]
    model = model_of(name, scan_backend=backend, dtype=dtype, **fields)
    written = WrittenOut(model)
    ids = random_ids(2, 13)
    logits, cache = read(model, ids, 13)
    rows = list(map(written, ids))
    states = [torch.stack([row[2][i][0] for row in rows]) for i in range(len(model.model.layers))]
    for layer, state, window in zip(cache.layers, states, zip(*([w for _, w in row[2]] for row in rows))):
        assert_close(layer.keys, state, tolerance)
        assert_close(layer.values, torch.stack(window), tolerance)
    expected = torch.stack([row[0] for row in rows])
    assert_close(logits, expected, tolerance)
    outputs, wanted = [logits, *(layer.keys for layer in cache.layers)], [expected, *states]
    upstream = [oracle.normal(*x.shape, seed=i, dtype=torch.float64) for i, x in enumerate(wanted)]
    torch.autograd.backward(outputs, [x.to(dtype) for x in upstream])
    gradient = torch.autograd.grad(wanted, list(written.weights.values()), [x.to(dtype).double() for x in upstream])
    gradient = dict(zip(written.weights, gradient))
    for name, actual in gradients(model).items():
        assert actual is not None and actual.any(), name
        assert_close(actual, gradient[name], OF_GRADIENTS[dtype])


@st.composite
def masks(draw):
    """Real tokens and starts of documents (B, T), and a length to cut T into."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    values = draw(st.lists(st.booleans(), min_size=2 * B * T, max_size=2 * B * T))
    return *torch.tensor(values).view(2, B, T), draw(st.integers(1, T))


ONE_DOCUMENT = torch.zeros(4, 12, dtype=torch.bool)
FULL_ROWS = torch.ones(4, 12, dtype=torch.bool)
RIGHT = torch.arange(12) < torch.tensor([5, 12, 1, 2])[:, None]
MIDDLE = FULL_ROWS.clone().index_fill_(1, torch.tensor([0, 4, 5, 9]), False)


# In float32 "torch" computes as in float64, which shows more.
@pytest.mark.parametrize(
    "backend, dtype", [("torch", torch.float64), ("numba", torch.float32)], ids=["torch-float64", "numba-float32"]
)
@every_model
@settings(max_examples=8)
@given(masks())
@example((FULL_ROWS, ONE_DOCUMENT, 12))
@example((FULL_ROWS, ONE_DOCUMENT, 1))
@example((FULL_ROWS[:1], ONE_DOCUMENT[:1], 5))
@example((RIGHT, ONE_DOCUMENT, 12))
@example((RIGHT.flip(1), ONE_DOCUMENT, 12))
@example((MIDDLE, ONE_DOCUMENT, 5))
@torch.no_grad()
def test_documents_in_any_chunks_between_any_padding_are_read_as_each_by_itself(name, backend, dtype, masks):
    model, written = model_and_oracle(name, backend, dtype)
    real, first, chunk = masks
    ids = random_ids(*real.shape)
    logits, cache = read(model, ids, chunk, attention_mask=real.long(), reset_mask=first)
    for row in range(len(ids)):
        starts = [0, *first[row].nonzero().flatten().tolist(), ids.shape[1]]
        documents = [written(ids[row, a:b][real[row, a:b]]) for a, b in zip(starts, starts[1:])]
        assert_close(logits[row, real[row]], torch.cat([expected for expected, *_ in documents]), TOLERANCES[dtype])
        for layer, (state, window) in zip(cache.layers, documents[-1][2], strict=True):
            assert_close(layer.keys[row], state, TOLERANCES[dtype])
            assert_close(layer.values[row], window, TOLERANCES[dtype])


@every_model
@torch.no_grad()
def test_documents_packed_by_their_positions_are_read_as_each_by_itself(name):
    model, written = model_and_oracle(name, "auto", torch.float32)
    lengths = [1, 6, 2, 9]
    ids, positions = random_ids(1, 18), torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([written(document)[0] for document in ids[0].split(lengths)])
    for chunk in (18, 7):
        close(read(model, ids, chunk, position_ids=positions)[0][0], expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@every_model
@torch.no_grad()
def test_a_cache_holds_the_numbers_of_one_state_and_window_however_many_tokens_it_has_seen(name, kind):
    model = model_of(name)
    cache = kind(config=model.config, **({"max_cache_len": 100} if kind is StaticCache else {}))
    log_sums = [2, 0, H] if name == "mixed" else [MODELS[name][1]] * 2
    for length in (1, 50, 3):
        read(model, random_ids(2, length), length, cache)
        assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, H + E) for E in log_sums]
        assert all(layer.values.shape == (2, 3, H) for layer in cache.layers)
        assert all(x.untyped_storage().nbytes() == 4 * x.numel() for layer in cache.layers for x in
                   (layer.keys, layer.values))  # fmt: skip


@every_model
@torch.no_grad()
def test_tokens_taken_back_were_never_read(name, monkeypatch):
    monkeypatch.setattr("modeling_minrnn.modeling_minrnn.MAX_ROLLBACK_TOKENS", 8)
    model, ids = model_of(name), random_ids(2, 20)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for chunks, removed in (([14], 5), ([5, 1, 1, 4], 6)):
        read(model, ids[:, : sum(chunks)], chunks, cache)
        cache.crop(-removed)
        kept = sum(chunks) - removed
        _, expected = read(model, ids[:, :kept], kept)
        if removed == 6:
            break
        for layer, wanted in zip(cache.layers, expected.layers):
            close(layer.keys, wanted.keys)
            close(layer.values, wanted.values)
        cache.crop(-kept)  # to the start
    close(read(model, ids[:, kept:], 20, cache)[0], read(model, ids, 20)[0][:, kept:])


@pytest.mark.parametrize("backend", ["torch", "numba"])
@every_model
@torch.no_grad()
def test_an_encoder_reads_both_ways_as_written_out(name, backend):
    model = model_of(name, bidirectional=True, scan_backend=backend)
    written = WrittenOut(model)
    ids, first = random_ids(4, 12), torch.arange(12)[None] == torch.tensor([12, 7, 0, 1])[:, None]
    logits = model(ids, attention_mask=RIGHT.flip(1).long(), reset_mask=first).logits
    for row, (real, starts) in enumerate(zip(RIGHT.flip(1), first)):
        cut = [0, *starts.nonzero().flatten().tolist(), 12]
        documents = [ids[row, a:b][real[a:b]] for a, b in zip(cut, cut[1:])]
        close(logits[row, real], torch.cat([written(document)[0] for document in documents if len(document)]))


@every_model
def test_the_gradients_of_an_encoder_are_those_of_both_directions_written_out(name):
    model = model_of(name, bidirectional=True)
    written = WrittenOut(model)
    ids = random_ids(1, 9)
    upstream = oracle.normal(9, 37, seed=0)
    model(ids).logits[0].backward(upstream)
    expected = torch.autograd.grad(written(ids[0])[0], list(written.weights.values()), upstream.double())
    expected = dict(zip(written.weights, expected))
    for name, actual in gradients(model).items():
        assert actual.any(), name
        assert_close(actual, expected[name], OF_GRADIENTS[torch.float32])


# The kernels of generation, which take seconds to compile for each cell, take a state from there in the same way.
@pytest.mark.parametrize(
    "name, backend", [*((name, "torch") for name in MODELS), ("rwkv4", "numba"), ("lru", "numba")]
)
@torch.no_grad()
def test_the_state_of_a_bfloat16_model_keeps_float32(name, backend):
    fields = {"cell_type": name, "max_timescale": None} | FIELDS | MODELS[name][0]
    if name == "mixed":
        fields["cell_type"] = fields["cell_type"][:1]
    model = small_half_precision_model(dtype=torch.bfloat16, **fields | {"num_hidden_layers": 1}, scan_backend=backend)
    ids = random_ids(2, 100)
    _, expected = read(model, ids, 100)
    for chunk in (1, 7):
        _, cache = read(model, ids, chunk)
        assert cache.layers[0].keys.dtype == torch.float32
        close(cache.layers[0].keys, expected.layers[0].keys)
    assert (expected.layers[0].keys.bfloat16() != expected.layers[0].keys).any()


@every_model
def test_autocast_trains_and_keeps_the_state_in_float32(name):
    model, ids = model_of(name), random_ids(2, 20)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    assert all(layer.keys.dtype == torch.float32 for layer in output.past_key_values.layers)
    assert output.loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model).values())


# ---- Generating

NEW_TOKENS = 16
SEEDS = {
    "mingru": 2,
    "aaren": 35,
    "rglru": 4,
    "lmu": 1,
}  # of models whose greedy text does not soon repeat itself; else 0


def talking_model(name, **fields):
    model = model_of(name, tie_word_embeddings=False, seed=SEEDS.get(name, 0), **fields)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in parameter_name:
                parameter *= 3
    return model


def generate(model, ids, **kwargs):
    """Generated tokens, the same random ones each time."""
    set_seed(0)
    return model.generate(ids, **{"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "do_sample": False} | kwargs)


def left_padded_batch():
    """ids and mask of three prompts of different lengths."""
    mask = torch.arange(9) >= torch.tensor([[4], [0], [7]])
    return random_ids(3, 9).masked_fill(~mask, 0), mask.long()


SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 20}


@every_model
@torch.no_grad()
def test_greedy_search_takes_the_likeliest_token_after_all_before_it(name):
    model = talking_model(name)
    written, ids = WrittenOut(model), random_ids(1, 5)
    tokens = generate(model, ids)[0]
    logits = written(tokens)[0]
    assert torch.equal(tokens[5:], logits[4:-1].argmax(-1))
    assert len(tokens[5:].unique()) > 2  # no repetition of one token, which would show nothing


# Other modes, which see no more of a cell than these, are in test_generation.py.
@pytest.mark.parametrize("mode", [{}, SAMPLING | {"num_beams": 2}], ids=str)
@every_model
def test_generation_from_the_state_gives_the_tokens_of_reading_all_again(name, mode):
    model = talking_model(name)
    ids, mask = left_padded_batch()
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **mode)
    for variant in ({}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids, attention_mask=mask, **mode, **variant), expected)


@every_model
def test_drafts_of_the_prompt_and_of_another_cell_change_no_token(name):
    model, ids = talking_model(name), random_ids(1, 4).repeat(1, 3)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=5, max_matching_ngram_size=1), expected)
    other = talking_model("lru" if name == "rwkv4" else "rwkv4")
    alike = copy.deepcopy(model)  # some of whose drafts are taken
    for parameter in alike.parameters():
        parameter.data += 0.1 * oracle.normal(*parameter.shape, seed=1)
    for assistant in (other, alike, model):
        assistant = copy.deepcopy(assistant)
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(generate(model, ids, assistant_model=assistant), expected)


# ---- Compiling and exporting


@pytest.fixture
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@every_group
def test_a_training_step_compiles_into_one_graph(cells):
    """A compiler sees the same operator whatever backend computes it: test_model.py has them all."""
    model = model_of_several(cells, scan_backend="numba").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 12)
    inputs = {
        "input_ids": ids, "attention_mask": MIDDLE[:2].long(), "labels": ids, "use_cache": False,
        "reset_mask": torch.arange(12).expand(2, 12) == 7,
    }  # fmt: skip
    expected = model(**inputs)
    expected.loss.backward()
    expected_gradients = gradients(model)
    actual = compiled(**inputs)
    actual.loss.backward()
    close(actual.logits, expected.logits)
    for name, gradient in gradients(model).items():
        close(gradient, expected_gradients[name])


@pytest.mark.usefixtures("fresh_compiler")
@every_group
@torch.no_grad()
def test_a_decode_step_with_a_static_cache_compiles_once(cells):
    model = model_of_several(cells)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 14)
    cache = StaticCache(config=model.config, max_cache_len=14)
    logits = [model(ids[:, :8], past_key_values=cache).logits]
    for t in range(8, 14):
        with torch._dynamo.config.patch(error_on_recompile=t > 8):
            logits.append(compiled(ids[:, t : t + 1], past_key_values=cache).logits)
    close(torch.cat(logits, 1), model(ids).logits)


def assert_programs_compute_what_the_model_does(model, prefill, decode):
    """Of rows padded on the left, for two batch sizes and lengths: the logits and states, then those one token on."""
    written = WrittenOut(model)
    for lengths in ([7, 4, 1], [2]):
        B, T = len(lengths), max(lengths)
        ids, next_ids = random_ids(B, T), random_ids(B, 1, seed=1)
        mask = (torch.arange(T) >= T - torch.tensor(lengths)[:, None]).long()
        outputs = prefill(ids, mask)
        for actual, following in ((outputs, 0), (decode(next_ids, *outputs[1:]), 1)):
            rows = [torch.cat([row[T - n :], token[:following]]) for row, token, n in zip(ids, next_ids, lengths)]
            rows = list(map(written, rows))
            expected = [torch.stack([logits[-1] for logits, _, _ in rows])]
            expected += [torch.stack(x) for layer in zip(*(cache for *_, cache in rows)) for x in zip(*layer)]
            for x, wanted in zip(actual, expected, strict=True):
                close(torch.as_tensor(x), wanted)


# The other cells are in the test below, minGRU and minLSTM in test_export.py.
@torch.no_grad()
def test_exported_programs_compute_what_the_model_does():
    model = model_of_several(["aaren", "rglru"], **PLAIN, intermediate_size=0)
    programs = {name: program.module() for name, program in export_programs(model).items()}
    assert_programs_compute_what_the_model_does(
        model, programs["prefill"], lambda ids, *state: programs["decode"](ids, None, *state)
    )


# A sign, log-sums with a read-out, complex numbers, vectors of its own, matrices for a state, and for a: a layer each.
@torch.no_grad()
def test_onnx_files_compute_what_the_model_does(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    cells = ["mingru_signed", "rwkv4", "lru", "hgrn", "gated_delta", "lmu"]
    model = model_of("lmu", **FULL, cell_type=cells, num_hidden_layers=len(cells), intermediate_size=0)
    export_onnx(model, tmp_path / "onnx")
    prefill, decode = (onnxruntime.InferenceSession(tmp_path / f"onnx/{n}.onnx") for n in ("prefill", "decode"))
    names = [value.name for value in decode.get_inputs()]
    assert_programs_compute_what_the_model_does(
        model,
        lambda ids, mask: prefill.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}),
        lambda ids, *state: decode.run(None, dict(zip(names, [ids.numpy(), *state]))),
    )


# ---- Saving

LOAD = """
import sys, torch
folder = sys.argv[1]
sys.modules["modeling_minrnn"] = None  # importing it is an ImportError
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.load(folder + "/ids.pt")
model = AutoModelForCausalLM.from_pretrained(folder + "/model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
tokens = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
torch.save((model(ids).logits, tokens), folder + "/results.pt")
"""


def test_a_saved_model_of_all_cells_loads_with_its_code_where_the_package_is_not(tmp_path):
    ids = random_ids(2, 9)
    torch.save(ids, tmp_path / "ids.pt")
    cells = sorted({cell.name for cell in CASES.values()})
    options = {"num_heads": 3, "memory_order": 3, "memory_window": 9}
    # The kernels of such code, which compile anew, run in test_hub.py.
    model = model_of("mingru", cell_type=cells, num_hidden_layers=len(cells), scan_backend="torch", **options)
    model.save_pretrained(tmp_path / "model")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    process = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, tmp_path],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    logits, tokens = torch.load(tmp_path / "results.pt")
    close(logits, model(ids).logits)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


@every_model
@torch.no_grad()
def test_a_model_loads_as_it_was_and_goes_on_from_a_saved_state(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MinRNNForCausalLM and loaded.config.cells == model.config.cells
    assert loaded.state_dict().keys() == model.state_dict().keys()
    ids, new = random_ids(2, 33), random_ids(2, 4, seed=1)
    logits, cache = read(model, ids, 33)
    assert torch.equal(loaded(ids).logits, logits)
    save_state(cache, tmp_path / "state", model)
    expected = read(model, new, 4, cache)[0]
    assert torch.equal(read(loaded, new, 4, load_state(tmp_path / "state", loaded))[0], expected)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("mingru", {"candidate": "linear"}),
        ("minlstm:linear", {"candidate": "g"}),
        ("lmu", {"memory_window": 10}),
        ("hgrn", {"cell_type": "mingru"}),
        ("mingru", {"output_gate": True}),
    ],
)
@torch.no_grad()
def test_a_state_of_another_cell_or_option_is_refused(name, fields, tmp_path):
    model = model_of(name)
    _, cache = read(model, random_ids(1, 9), 9)
    save_state(cache, tmp_path / "state", model)
    other = model_of(name, **fields)
    weights = {key: x for key, x in model.state_dict().items() if key in other.state_dict()}
    other.load_state_dict(weights, strict=False)
    with pytest.raises(ValueError, match="is the state of another model: the configuration or the weights differ"):
        load_state(tmp_path / "state", other)


# ---- Training


@every_model
def test_the_gradients_of_chunks_and_of_checkpointed_layers_are_those_of_one_pass(name):
    model, ids = model_of(name).train(), random_ids(2, 13)
    masks = {"attention_mask": MIDDLE[:2].long(), "reset_mask": torch.arange(12).expand(2, 12) == 7}
    masks = {key: F.pad(x, (1, 0), value=key == "attention_mask") for key, x in masks.items()}
    labels = ids.masked_fill(masks["attention_mask"] == 0, -100)
    model(ids, labels=labels, use_cache=False, **masks).loss.backward()
    expected = gradients(model)
    sequence_chunked_backward(model, ids, labels, 5, **masks)
    for key, gradient in gradients(model).items():
        assert_close(gradient, expected[key], 1e-5)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    model(ids, labels=labels, use_cache=False, **masks).loss.backward()
    for key, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[key]), key


# ---- Diagnosing


def log_decays(cell, projected, w, before, config):
    """log |a| (T, N) of each token of the papers' equations, from the log-sums (T, E) before it; float64."""
    D = config.state_size
    if cell in ("mingru", "minlstm"):
        return oracle.gates_and_candidate(projected, cell)[0].log()
    if cell == "mingru_signed":
        return projected[:, :D].tanh().abs().log()
    if cell == "aaren":  # a is what the tokens before weigh, of what they weigh with this one
        return (before - torch.logaddexp(before, projected[:, : config.num_heads])).repeat_interleave(
            D // config.num_heads, -1
        )
    if cell == "rwkv4":
        kept = before - w["decay"].exp()
        return kept - torch.logaddexp(kept, projected[:, :D])
    if cell == "lru":
        return -w["nu"].exp().expand(len(projected), -1)
    if cell == "rglru":
        return -8 * F.softplus(w["decay"]) * torch.sigmoid(projected[:, :D])
    if cell == "gated_delta":
        return -w["decay"].exp() * F.softplus(projected[:, : config.num_heads] + w["step"])
    if cell in ("hgrn", "hgrn2"):
        bound = torch.sigmoid(w["bound"])
        return (bound + (1 - bound) * torch.sigmoid(projected[:, :D])).log()
    return projected.new_full((len(projected), 1), -1 / config.memory_window)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixed"])
@torch.no_grad()
def test_a_timescale_is_minus_one_over_the_mean_of_the_logarithm_of_a_written_out(name, chunk, monkeypatch):
    monkeypatch.setattr("modeling_minrnn.modeling_minrnn.DIAGNOSIS_CHUNK_TOKENS", chunk)
    model = model_of(name)
    written, cell = WrittenOut(model), model.config.cell_type
    rows, padding = random_ids(2, 11), torch.zeros(2, 11, dtype=torch.bool)
    padding[0, :3] = padding[1, 4:6] = True
    reports = model.diagnose_states(rows, attention_mask=(~padding).long())
    for i, report in enumerate(reports):
        prefix, decays, states = f"model.layers.{i}.", [], []
        for ids in (row[~hidden] for row, hidden in zip(rows, padding)):
            x = written(ids)[1][i]
            x, _ = written.add(written.conv, x, x, prefix, "conv.")
            x = written.norm(x, prefix + "rnn_norm.weight")
            kept = torch.stack([written.recurrence(x[:t], prefix + "rnn.")[1] for t in range(len(x) + 1)])
            w = {key.removeprefix(prefix + "rnn."): weight for key, weight in written.weights.items()}
            projected = written.linear(x, prefix + "rnn.in_proj.")
            decays.append(log_decays(cell, projected, w, kept[:-1, H:], model.config).clamp(min=-104))
            states.append(kept[1:, : H + MODELS[name][1] if cell in MATRICES else H])
        decays, states = torch.cat(decays), torch.cat(states)
        torch.testing.assert_close(report.timescales.double(), -1 / decays.mean(0), rtol=1e-5, atol=0.0)
        assert report.tokens == 17
        assert report.remembering == pytest.approx((decays.exp() > 0.99).double().mean().item(), rel=1e-5)
        assert report.forgetting == pytest.approx((decays.exp() < 0.01).double().mean().item(), rel=1e-5)
        assert report.mean_norm == pytest.approx(states.square().mean(-1).sqrt().mean().item(), rel=1e-5)
        assert report.largest_state == pytest.approx(states.abs().max().item(), rel=1e-5)
        if name == "lmu":
            assert report.timescales.tolist() == pytest.approx([9])


# ---- Several processes

PARTS = (9, 4)  # tokens of each


def chunk(x):
    return x.split(PARTS, 1)[dist.get_rank()].contiguous()


def gathered(x):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.detach())
    return torch.cat(parts, 1)


def summed(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def context_parallel_errors(name, masked):
    """Of loss, logits and all gradients of one sequence over the processes, and of what is read after it."""
    model, ids = model_of(name, scan_backend="torch"), random_ids(2, 14)  # none waits while another compiles
    targets = ids[:, 1:].contiguous()
    whole = {"input_ids": ids[:, :-1], "labels": targets, "shift_labels": targets}
    real = torch.ones(2, 13, dtype=torch.bool)
    if masked:
        real[1, 7:11] = real[0, -2:] = False
        reset_mask = torch.zeros(2, 13, dtype=torch.bool)
        reset_mask[0, 9] = reset_mask[1, [3, 12]] = True
        labels = targets.masked_fill(~real, -100)
        whole |= {"attention_mask": real, "reset_mask": reset_mask, "labels": labels, "shift_labels": labels}
    outputs = []
    for inputs, group in ((whole, None), ({key: chunk(x) for key, x in whole.items()}, dist.group.WORLD)):
        items = (whole["labels"] != -100).sum()
        with torch.no_grad():
            cache = model(random_ids(2, 3, seed=1), use_cache=True).past_key_values
        output = model(**inputs, past_key_values=cache, context_parallel_group=group, num_items_in_batch=items)
        output.loss.backward()
        with torch.no_grad():
            after = model(random_ids(2, 2, seed=2), past_key_values=cache).logits
        outputs.append((output, gradients(model), after))
    (expected, expected_gradients, expected_after), (actual, found, after) = outputs
    pairs = [
        (summed(actual.loss), expected.loss),
        (gathered(actual.logits) * real[..., None], expected.logits * real[..., None]),
        (after, expected_after),
        *((summed(found[key]), expected_gradients[key]) for key in found),
    ]
    return max(oracle.relative_error(actual.detach(), wanted.detach()) for actual, wanted in pairs)


def spread_over_processes():
    """The worst errors of each model by whether there are masks, or why it cannot be."""
    found = {}
    for name in MODELS:
        for masked in (False, True):
            try:
                found[name, masked] = context_parallel_errors(name, masked)
            except ValueError as error:
                found[name, masked] = str(error)
    return found


def test_one_sequence_over_two_processes_is_read_and_differentiated_as_in_one():
    for found in run_in_processes(spread_over_processes, 2):
        for (name, masked), error in found.items():
            if name in ("lmu", "mixed"):
                assert error == "'lmu' reads a sequence in one process: its matrix has no decay to send on"
            else:
                assert error <= 1e-5, (name, masked, error)


# What two processes can share the channels of, and their fields.
SPLIT = {name: {"learned_initial_state": name in ("mingru", "minlstm:linear", "mingru_signed", "hgrn")}
         for name in MODELS if name not in ("aaren", "lru", *MATRICES, "lmu", "mixed")}  # fmt: skip
UNSPLIT = {name: {} for name in ("aaren", "lru", *MATRICES, "lmu", "mixed")} | {"rwkv4": FULL, "rglru": FULL}


def split_over_processes(folder):
    """Losses of each model in training, then greedy tokens; why others cannot be split."""
    found = {}
    for path in sorted(folder.iterdir()):
        try:
            model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))
        except ValueError as error:
            found[path.name] = str(error)
            continue
        first = model.model.layers[0].rnn
        found[path.name] = trained(model)
        assert (first.state_size, first.out_proj.weight.to_local().shape[1]) == (H // 2, H // 2)
    return found


def trained(model):
    tokens = model.generate(random_ids(2, 5), max_new_tokens=5, do_sample=False, pad_token_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=False)
    losses = []
    for step in range(3):
        ids = random_ids(4, 9, seed=step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, tokens


def test_channels_split_over_two_processes_train_and_generate_as_in_one(tmp_path):
    cases = [*SPLIT.items(), *UNSPLIT.items()]
    models = {
        f"{i}": model_of(name, vocab_size=40, scan_backend="torch", **fields) for i, (name, fields) in enumerate(cases)
    }
    for key, model in models.items():
        model.save_pretrained(tmp_path / key)
    expected = {key: trained(model) for key, model in models.items() if int(key) < len(SPLIT)}
    for found in run_in_processes(split_over_processes, 2, tmp_path):
        assert found.keys() == models.keys()
        for key, result in found.items():
            if key in expected:
                losses, tokens = expected[key]
                assert result[0] == pytest.approx(losses, rel=1e-5), cases[int(key)]
                assert torch.equal(result[1], tokens), cases[int(key)]
            else:
                assert "cannot be split by channels" in result and "\n" not in result, cases[int(key)]
