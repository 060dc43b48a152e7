"""Exported programs compute what the model does, for any batch and time, and write the same text."""

import itertools
import json
import re
import sys

import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from small_models import CELLS, SHAPES, WrittenOut, assert_close, random_ids, small_model
from transformers import LlamaConfig, LlamaForCausalLM

import modeling_minrnn
from examples.onnx_stream import generate
from modeling_minrnn.export import export_onnx, export_programs, main
from training.tokenizers import byte_tokenizer

# torch.export says so of its own tree specifications when it copies them.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")

# A learned initial state or none, biases or none; seeds whose greedy text does not soon repeat itself.
MODELS = {
    "mingru": {**SHAPES[3], "seed": 57},
    "minlstm": {**SHAPES[2], "conv_kernel_size": 4, "tie_word_embeddings": False, "seed": 17},
}


def model_of(cell_type):
    return small_model(cell_type, **MODELS[cell_type])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and the folder that holds it in ONNX; other cells are in test_cells_in_models.py."""
    model = model_of("mingru")
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export_onnx(model, folder)
    return model, folder


def padded_on_the_left(ids, *padding):
    """ids and an attention mask without the first `padding` tokens of each row."""
    return ids, (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long()


def expected(model, ids, mask):
    """The logits after each row and the state that it leaves, written out in float64 from its real tokens alone."""
    rows = [WrittenOut(model)(row[real.bool()]) for row, real in zip(ids, mask)]
    logits = torch.stack([logits[-1] for logits, _, _ in rows])
    state = [torch.stack(tensors) for layer in zip(*(cache for *_, cache in rows)) for tensors in zip(*layer)]
    return [logits, *state]


PROMPTS = [padded_on_the_left(random_ids(3, 7), 0, 3, 6), padded_on_the_left(random_ids(1, 2), 0)]


@pytest.mark.parametrize("cell_type", CELLS)
def test_exported_programs_compute_what_the_model_does_for_any_batch_and_time(cell_type):
    model = model_of(cell_type)
    programs = {name: program.module() for name, program in export_programs(model).items()}
    for ids, mask in PROMPTS:
        outputs = programs["prefill"](ids, mask)
        next_ids = random_ids(len(ids), 1, seed=1)
        next_outputs = programs["decode"](next_ids, None, *outputs[1:])
        longer = torch.cat([ids, next_ids], 1), torch.cat([mask, torch.ones_like(next_ids)], 1)
        for actual, wanted in zip((*outputs, *next_outputs), expected(model, ids, mask) + expected(model, *longer)):
            assert_close(actual, wanted)


def test_onnx_files_compute_what_the_model_does_for_any_batch_and_time(exported):
    model, folder = exported
    prefill, decode = (InferenceSession(folder / f"{name}.onnx") for name in ("prefill", "decode"))
    for ids, mask in [*PROMPTS, padded_on_the_left(random_ids(2, 1), 0, 0)]:
        outputs = prefill.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        next_ids = random_ids(len(ids), 1, seed=1)
        names = [value.name for value in decode.get_inputs()]
        next_outputs = decode.run(None, dict(zip(names, [next_ids.numpy(), *outputs[1:]])))
        longer = torch.cat([ids, next_ids], 1), torch.cat([mask, torch.ones_like(next_ids)], 1)
        for actual, wanted in zip((*outputs, *next_outputs), expected(model, ids, mask) + expected(model, *longer)):
            assert_close(torch.tensor(actual), wanted)


def test_onnx_files_write_the_same_200_tokens_as_generate(exported):
    model, folder = exported
    prompt = random_ids(1, 9)
    wanted = model.generate(prompt, max_new_tokens=200, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    assert len(set(wanted)) > 10
    assert list(itertools.islice(generate(folder, prompt[0].tolist(), 0.0, 0), 200)) == wanted
    sampled = [list(itertools.islice(generate(folder, prompt[0].tolist(), 1.0, seed), 50)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_onnx_files_in_eight_bits_are_small_and_near(tmp_path):
    model = small_model(hidden_size=128, num_hidden_layers=1, expansion_factor=1)
    export_onnx(model, tmp_path / "int8", int8=True)
    ids = random_ids(2, 63)
    with torch.no_grad():
        wanted = model(ids).logits[:, -2:]
    prefill, decode = (InferenceSession(tmp_path / "int8" / f"{name}.onnx") for name in ("prefill", "decode"))
    start, last = ids[:, :-1].numpy(), ids[:, -1:].numpy()
    logits, *state = prefill.run(None, {"input_ids": start, "attention_mask": torch.ones(2, 62).long().numpy()})
    assert_close(torch.tensor(logits), wanted[:, 0], 0.04)  # twice what was seen
    names = [value.name for value in decode.get_inputs()]
    logits, *_ = decode.run(None, dict(zip(names, [last, *state])))
    assert_close(torch.tensor(logits), wanted[:, 1], 0.04)
    for path in (tmp_path / "int8").glob("*.onnx"):
        assert path.stat().st_size < 2.5 * model.num_parameters()  # the graph of so small a model has its share
        onnx.checker.check_model(path, full_check=True)
        assert {imported.domain for imported in onnx.load(path).opset_import} == {""}


def test_onnx_files_need_no_operators_but_those_of_onnx(exported):
    for path in exported[1].glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
        assert {imported.domain for imported in onnx.load(path).opset_import} == {""}


HEADS = {
    "Model": {},
    "ForMaskedLM": {"bidirectional": True},
    "ForSequenceClassification": {"bidirectional": True, "conv_kernel_size": 3},
    "ForTokenClassification": {},
    "ForQuestionAnswering": {},
    "ForMultipleChoice": {},  # reads the last real token, as a causal sequence classifier does
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_a_padded_batch_through_the_onnx_file_of_a_head_is_its_rows_alone_through_torch(name, tmp_path, monkeypatch):
    fields = {
        "num_labels": 3,
        "vocab_size": 258,
        "num_hidden_layers": 1,
        "conv_kernel_size": 0,
        "intermediate_size": 0,
    }
    model = small_model("minlstm", getattr(modeling_minrnn, f"MinRNN{name}"), **fields | HEADS[name])
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "model"), str(tmp_path / "onnx")])
    main()
    session = InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert {imported.domain for imported in onnx.load(tmp_path / "onnx" / "model.onnx").opset_import} == {""}
    assert "id2label" in json.loads((tmp_path / "onnx" / "config.json").read_text())

    of_choices = name == "ForMultipleChoice"
    for ids, mask in (
        padded_on_the_left(random_ids(6, 7), 0, 3, 6, 1, 1, 2),
        padded_on_the_left(random_ids(2, 2), 0, 1),
    ):
        ids[1], mask[1] = ids[1].flip(0), mask[1].flip(0)  # padding on the right
        shape = (2, -1, ids.shape[1]) if of_choices else ids.shape
        outputs = session.run(None, {"input_ids": ids.view(shape).numpy(), "attention_mask": mask.view(shape).numpy()})
        alone = [
            model(row[None, None] if of_choices else row[None], use_cache=False)
            for row in (row[real.bool()] for row, real in zip(ids, mask))
        ]
        assert [value.name for value in session.get_outputs()] == list(alone[0])
        for key, actual in zip(alone[0], map(torch.tensor, outputs)):
            actual = actual if name in ("ForSequenceClassification", "ForMultipleChoice") else actual[mask.bool()]
            assert_close(actual.flatten(), torch.cat([output[key].flatten() for output in alone]))


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    model_of("mingru").save_pretrained(tmp_path / "model")
    LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    ).save_pretrained(tmp_path / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("irreplaceable")
    for model, folder, message in (
        ("model", "full", "full is not empty: choose another folder"),
        ("llama", "new", "only a model of this package can be exported, not .*LlamaForCausalLM"),
        ("absent", "new", "absent"),
    ):
        monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / model), str(tmp_path / folder)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert re.search(f"error: .*{message}", capsys.readouterr().err.splitlines()[-1])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"] and not (tmp_path / "new").exists()
