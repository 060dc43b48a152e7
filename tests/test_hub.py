"""A saved model is complete: it loads where this package is not installed, and what is damaged is refused."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import CELLS, assert_close, random_ids, small_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import modeling_minrnn
from modeling_minrnn import (
    MinRNNConfig,
    MinRNNForCausalLM,
    MinRNNForMaskedLM,
    MinRNNForSequenceClassification,
    MinRNNModel,
)
from modeling_minrnn.modeling_minrnn import AUTO_MAP
from training.tokenizers import byte_tokenizer

both_cells = pytest.mark.parametrize("cell_type", CELLS)
PACKAGE = Path(modeling_minrnn.__file__).parent
NO_MODEL = {
    "__init__.py", "chunked_backward.py", "convert_mingru_pytorch.py", "export.py", "serve.py",
}  # fmt: skip
CODE = {path.name for path in PACKAGE.glob("*.py")} - NO_MODEL
CAUSAL_MAP = AUTO_MAP | {"AutoModelForDecision": AUTO_MAP["AutoModelForCausalLM"]}
PROMPT = "def main("


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def complete(model, folder):
    """Text from greedy search, by `pipeline` with the tokenizer of a folder."""
    generate = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder))
    return generate(PROMPT, max_new_tokens=20, do_sample=False)[0]["generated_text"]


# ---- Fresh processes

LOAD = """
import json, sys
sys.modules["modeling_minrnn"] = None  # importing it is an ImportError

import torch, transformers
from transformers import AutoTokenizer, pipeline

torch.set_num_threads(1)
settings = {"max_new_tokens": 20, "do_sample": False}
results = []
for folder, copy, absent in json.loads(sys.argv[1]):
    sys.modules.update(dict.fromkeys(absent))
    classes = [getattr(transformers, name) for name in json.load(open(folder + "/config.json"))["auto_map"]]
    models = [auto.from_pretrained(folder, trust_remote_code=True) for auto in classes[1:]]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("def main(", return_tensors="pt")
    generate = pipeline("text-generation", folder, trust_remote_code=True)
    own = type(models[0]).__module__.rpartition(".")[0]
    results.append({
        "classes": [type(model).__name__ for model in models],
        "packages": sorted({".".join(type(model).__module__.split(".")[:2]) for model in models}),
        "hidden": models[0](**ids).last_hidden_state.flatten().tolist(),
        "greedy": models[1].generate(**ids, **settings).tolist(),
        "static": models[1].generate(**ids, **settings, cache_implementation="static").tolist(),
        "text": generate("def main(", **settings)[0]["generated_text"],
    })
    results[-1]["kernels"] = own + ".scan_numba" in sys.modules
    models[1].save_pretrained(copy)
    tokenizer.save_pretrained(copy)
json.dump(results, open("results.json", "w"))
"""


def in_a_fresh_process(*loads):
    """What LOAD finds of each folder, of which it writes a copy, in a process that does not find this package.

    From one load on it may not find others by their names either.
    """
    place = Path(loads[0][0]).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, json.dumps(loads)],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads((place / "results.json").read_text())


def test_a_saved_model_loads_without_the_package_and_saves_itself_again(tmp_path):
    model = small_model("minlstm", vocab_size=258, tie_word_embeddings=False, seed=4)
    folder = save(model, tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0).tolist()
    assert len(set(expected[0][len(PROMPT) :])) > 2

    again, third = tmp_path / "again", tmp_path / "third"
    loads = (str(folder), str(again), []), (str(again), str(third), ["numba", "triton"])
    for (source, target, absent), result in zip(loads, in_a_fresh_process(*loads)):
        target = Path(target)
        assert result["classes"] == [path.split(".")[1] for _, path in sorted(CAUSAL_MAP.items())][1:]
        assert result["packages"] == [f"transformers_modules.{Path(source).name}"]
        assert result["kernels"] == (not absent)
        assert_close(torch.tensor(result["hidden"]), model.model(**ids).last_hidden_state.flatten())
        assert result["greedy"] == result["static"] == expected
        assert result["text"] == complete(model, folder)
        assert {path.name for path in target.glob("*.py")} == CODE
        for name in CODE:
            assert (target / name).read_text() == (PACKAGE / name).read_text()
        assert json.loads((target / "config.json").read_text())["auto_map"] == CAUSAL_MAP


def test_a_saved_model_of_any_class_holds_its_code_and_names_every_class(tmp_path):
    for model_class in (MinRNNModel, MinRNNForCausalLM, MinRNNForMaskedLM, MinRNNForSequenceClassification):
        folder = tmp_path / model_class.__name__
        small_model(model_class=model_class).save_pretrained(folder)
        assert {path.name for path in folder.glob("*.py")} == CODE
        config = json.loads((folder / "config.json").read_text())
        auto_map = CAUSAL_MAP if model_class is MinRNNForCausalLM else AUTO_MAP
        assert config["auto_map"] == auto_map and config["architectures"] == [model_class.__name__]


def test_the_code_of_a_saved_model_runs_beside_the_package(tmp_path):
    folder = save(small_model(vocab_size=258, scan_backend="torch"), tmp_path / "model")
    own = get_class_from_dynamic_module("modeling_minrnn.MinRNNForCausalLM", folder).from_pretrained(folder)
    installed = MinRNNForCausalLM.from_pretrained(folder)
    assert type(own) is not MinRNNForCausalLM and type(own).__name__ == "MinRNNForCausalLM"
    ids = random_ids(2, 9)
    for first, second in ((own, installed), (installed, own)):
        assert torch.equal(first(ids, labels=ids).loss, second(ids, labels=ids).loss)
        assert complete(first, folder) == complete(second, folder)
        # Even the cache of one serves the other.
        cache = first(ids, use_cache=True).past_key_values
        assert_close(second(ids, past_key_values=cache).logits, second(torch.cat([ids, ids], 1)).logits[:, 9:])


# ---- With the package


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask for others")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_weights_can_be_read_by_whom_the_umask_allows(umask, tmp_path):
    before = os.umask(umask)
    try:
        small_model().save_pretrained(tmp_path, max_shard_size="4KB")
    finally:
        os.umask(before)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.oldest
def test_an_attention_implementation_is_ignored_with_a_warning(tmp_path, caplog, monkeypatch):
    small_model().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name in ("sdpa", "flash_attention_2"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert torch.equal(model(random_ids(1, 4)).logits, small_model()(random_ids(1, 4)).logits)
        assert caplog.text.count(f"attn_implementation={name!r} is ignored") == 1


@pytest.mark.oldest
@both_cells
def test_a_saved_model_loads_as_it_was_without_trust_in_its_code(cell_type, tmp_path):
    model = small_model(cell_type)
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MinRNNForCausalLM and type(AutoConfig.from_pretrained(tmp_path)) is MinRNNConfig
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids)[0], model.model(ids)[0])


@pytest.mark.oldest
def test_a_language_model_lends_its_weights_to_a_classifier(tmp_path):
    model = small_model(max_timescale=50)
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        loaded = auto_class.from_pretrained(tmp_path, num_labels=3)
        for name, parameter in model.model.named_parameters():
            assert torch.equal(loaded.model.get_parameter(name), parameter), name
        assert loaded.score.weight.shape == (3, 14)
        assert loaded.score.weight.std().item() == pytest.approx(1 / 14**0.5, rel=0.3)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_saved_once_and_loaded_tied(tied, tmp_path):
    model = small_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_in_half_precision(dtype, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = MinRNNForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    ids = random_ids(2, 9)
    assert_close(loaded(ids).logits, model(ids).logits, tolerance=0.03)


def test_a_resized_vocabulary_keeps_the_old_rows():
    model = small_model()
    ids = random_ids(2, 9)
    expected = model(ids).logits
    model.resize_token_embeddings(50)
    assert model.config.vocab_size == 50 and model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(model(ids).logits[..., :37], expected)
    model(torch.tensor([[49]]), labels=torch.tensor([[49]]))


# ---- Damage


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def saved(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_a_truncated_file_of_weights_is_refused(saved, kept):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    for auto in (MinRNNForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))} is truncated or damaged: .+") as error:
            auto.from_pretrained(saved)
        assert "\n" not in str(error.value)


def test_weights_of_another_shape_are_refused(saved):
    for fields in ({"hidden_size": 16}, {"cell_type": "minlstm"}, {"vocab_size": 38}):
        shutil.copytree(saved, saved.parent / "changed", dirs_exist_ok=True)
        change_config(saved.parent / "changed", **fields)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            MinRNNForCausalLM.from_pretrained(saved.parent / "changed")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        MinRNNForCausalLM.from_pretrained(tmp_path)


def test_a_configuration_with_a_value_out_of_range_is_refused_on_loading(saved):
    change_config(saved, cell_type="gru")
    with pytest.raises(ValueError, match="cell_type must be one of .* not 'gru'"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_field_out_of_range_that_is_given_on_loading_is_refused(saved):
    with pytest.raises(ValueError, match="hidden_size must be at least 1 and finite, not -1"):
        MinRNNForCausalLM.from_pretrained(saved, hidden_size=-1)
