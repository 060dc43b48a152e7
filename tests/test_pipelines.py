"""transformers' pipelines, on models saved with a tokenizer of their own, give what the models compute.

transformers 5 has no "question-answering" pipeline any more; a question is answered here by model and tokenizer.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from small_models import CELLS, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from modeling_minrnn import (
    MinRNNForCausalLM,
    MinRNNForMaskedLM,
    MinRNNForQuestionAnswering,
    MinRNNForSequenceClassification,
    MinRNNForTokenClassification,
    MinRNNModel,
)
from modeling_minrnn.modeling_minrnn import AUTO_MAP

both_cells = pytest.mark.parametrize("cell_type", CELLS)
both_directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])

WORDS = "who sat on the mat ? a small cat , dog and old horse".split()
TEXTS = ["the cat sat on the mat", "who ?", "the old dog and the small horse sat , and a cat"]  # batches need padding
LABELS = {"id2label": {0: "animal", 1: "thing", 2: "neither"}}


def word_tokenizer():
    """One id for each word, with the special tokens that encoders use."""
    special = ["[PAD]", "[UNK]", "[MASK]", "[SEP]"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]"
    )


@pytest.fixture
def save(tmp_path):
    def save(model_class, cell_type="mingru", **fields):
        """A model in a folder with its tokenizer, and that tokenizer."""
        tokenizer = word_tokenizer()
        fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | fields
        model = small_model(cell_type, model_class, **fields)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model, str(tmp_path), tokenizer

    return save


def alone(tokenizer, text):
    return tokenizer(text, return_tensors="pt")["input_ids"]


@both_cells
def test_text_generation_continues_each_text_as_greedy_search_does(save, cell_type):
    model, folder, tokenizer = save(MinRNNForCausalLM, cell_type)
    generate = pipeline("text-generation", folder, batch_size=3)
    generate.tokenizer.padding_side = "left"
    outputs = generate(TEXTS, max_new_tokens=8, do_sample=False, return_tensors=True)
    for text, [output] in zip(TEXTS, outputs, strict=True):
        expected = model.generate(alone(tokenizer, text), max_new_tokens=8, do_sample=False)[0].tolist()
        assert output["generated_token_ids"][-len(expected) :] == expected


@pytest.mark.oldest
@both_cells
def test_fill_mask_gives_the_probabilities_of_the_words_behind_the_mask(save, cell_type):
    model, folder, tokenizer = save(MinRNNForMaskedLM, cell_type, bidirectional=True)
    texts = ["the [MASK] sat on the mat", "who [MASK] on a horse and the old , old cat ?"]
    outputs = pipeline("fill-mask", folder, batch_size=2)(texts, top_k=4)
    for text, output in zip(texts, outputs, strict=True):
        ids = alone(tokenizer, text)
        probabilities = model(ids).logits[0, (ids[0] == tokenizer.mask_token_id).nonzero().item()].softmax(-1)
        top = probabilities.topk(4)
        assert [row["token"] for row in output] == top.indices.tolist()
        assert [row["score"] for row in output] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert [row["token_str"] for row in output] == tokenizer.convert_ids_to_tokens(top.indices)


@both_cells
@both_directions
def test_text_classification_gives_the_probabilities_of_each_text_alone(save, cell_type, bidirectional):
    model, folder, tokenizer = save(MinRNNForSequenceClassification, cell_type, bidirectional=bidirectional, **LABELS)
    outputs = pipeline("text-classification", folder, batch_size=3)(TEXTS, top_k=None)
    for text, output in zip(TEXTS, outputs, strict=True):
        probabilities = model(alone(tokenizer, text)).logits[0].softmax(-1).tolist()
        expected = dict(zip(LABELS["id2label"].values(), probabilities))
        assert {row["label"]: row["score"] for row in output} == pytest.approx(expected, rel=1e-4)


@both_cells
@both_directions
def test_token_classification_names_each_word_of_each_text(save, cell_type, bidirectional):
    model, folder, tokenizer = save(MinRNNForTokenClassification, cell_type, bidirectional=bidirectional, **LABELS)
    outputs = pipeline("token-classification", folder, batch_size=3)(TEXTS)
    for text, output in zip(TEXTS, outputs, strict=True):
        best = model(alone(tokenizer, text)).logits[0].softmax(-1).max(-1)
        assert [text[row["start"] : row["end"]] for row in output] == text.split()
        assert [row["entity"] for row in output] == [LABELS["id2label"][i] for i in best.indices.tolist()]
        assert [row["score"] for row in output] == pytest.approx(best.values.tolist(), rel=1e-4)


@both_cells
@both_directions
def test_feature_extraction_gives_the_hidden_states_of_each_text(save, cell_type, bidirectional):
    model, folder, tokenizer = save(MinRNNModel, cell_type, bidirectional=bidirectional)
    outputs = pipeline("feature-extraction", folder)(TEXTS, return_tensors=True)
    for text, output in zip(TEXTS, outputs, strict=True):
        expected = model(alone(tokenizer, text)).last_hidden_state
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_question_is_answered_by_a_span_of_its_context(save):
    model, folder, tokenizer = save(MinRNNForQuestionAnswering, bidirectional=True)
    answer = AutoModelForQuestionAnswering.from_pretrained(folder)
    question, contexts = "who sat on the mat ?", ["the old cat", "a dog and a small cat sat on the mat ,"]
    optimizer = torch.optim.Adam(answer.parameters(), 0.01)
    batch = AutoTokenizer.from_pretrained(folder)(
        [f"{question} [SEP] {context}" for context in contexts],
        padding=True, return_tensors="pt", return_offsets_mapping=True,
    )  # fmt: skip
    offsets = batch.pop("offset_mapping")
    spans = {"start_positions": torch.tensor([8, 10]), "end_positions": torch.tensor([9, 12])}
    for _ in range(60):
        optimizer.zero_grad()
        answer(**batch, **spans).loss.backward()
        optimizer.step()
    output = answer(**batch)
    found = []
    for row, context in enumerate(contexts):
        start, end = output.start_logits[row].argmax(), output.end_logits[row].argmax()
        text = f"{question} [SEP] {context}"
        found.append(text[offsets[row, start, 0] : offsets[row, end, 1]])
    assert found == ["old cat", "a small cat"]


# ---- Without the package

TASKS = {
    "fill-mask": (AutoModelForMaskedLM, "the [MASK] sat"),
    "text-classification": (AutoModelForSequenceClassification, TEXTS[0]),
    "token-classification": (AutoModelForTokenClassification, TEXTS[0]),
    "feature-extraction": (AutoModel, TEXTS[0]),
}

RUN = """
import json, sys
sys.modules["modeling_minrnn"] = None  # importing it is an ImportError

import torch
from transformers import AutoModelForQuestionAnswering, pipeline

torch.set_num_threads(1)
folder, tasks = sys.argv[1], json.loads(sys.argv[2])
results, modules = {}, []
for task, text in tasks.items():
    run = pipeline(task, folder + "/" + task, trust_remote_code=True)
    results[task] = run(text)
    modules.append(type(run.model).__module__)
model = AutoModelForQuestionAnswering.from_pretrained(folder + "/question-answering", trust_remote_code=True)
modules.append(type(model).__module__)
results["question-answering"] = model(torch.arange(9)[None]).start_logits.tolist()
json.dump([results, sorted({name.split(".")[0] for name in modules})], open("result.json", "w"), default=float)
"""


def test_pipelines_run_encoders_without_the_package(tmp_path):
    # "torch": the kernels of numba would be compiled anew for the code in each folder.
    fields = {"vocab_size": len(word_tokenizer()), "bidirectional": True, "scan_backend": "torch"}
    encoder = small_model("minlstm", MinRNNForMaskedLM, **fields)
    classes = {task: auto_class for task, (auto_class, _) in TASKS.items()}
    expected = {}
    for task, auto_class in (classes | {"question-answering": AutoModelForQuestionAnswering}).items():
        folder = tmp_path / "models" / task
        encoder.save_pretrained(folder)
        torch.manual_seed(0)
        model = auto_class.from_pretrained(folder)  # each head new, on one and the same encoder
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        if task in TASKS:
            expected[task] = pipeline(task, str(folder))(TASKS[task][1])
        else:
            expected[task] = model(torch.arange(9)[None]).start_logits.tolist()

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    process = subprocess.run(
        [sys.executable, "-I", "-c", RUN, tmp_path / "models", json.dumps({task: TASKS[task][1] for task in TASKS})],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    results, packages = json.loads((tmp_path / "result.json").read_text())
    assert packages == ["transformers_modules"]
    assert results == json.loads(json.dumps(expected, default=float))
