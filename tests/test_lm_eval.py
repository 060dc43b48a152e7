"""The model under lm-evaluation-harness, against log probabilities computed here."""

import json
import math

import pytest
import torch
from small_models import CELLS, small_model

from training.tokenizers import byte_tokenizer

lm_eval = pytest.importorskip("lm_eval")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

TEXTS = [f"{a} and {b} make {a + b}.\n" * (1 + a * b) for a in range(3) for b in range(4)]
QUESTIONS = [
    {"question": f"{a} and {b} make", "choices": [str(a + b), "nothing at all", "ten"], "answer": a % 3}
    for a in range(4)
    for b in range(5)
]


def byte_model(cell_type):
    return small_model(cell_type, vocab_size=258)


@pytest.fixture
def evaluate(tmp_path):
    def evaluate(model, rows, task, **settings):
        """Results of the harness's hf backend for a task over `rows`, kept in a local file."""
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
        }
        harness = HFLM(model, tokenizer=byte_tokenizer(), device="cpu", **settings)
        no_others = TaskManager(include_defaults=False)  # reading all that it ships takes seconds
        results = lm_eval.simple_evaluate(harness, tasks=[config | task], task_manager=no_others, bootstrap_iters=0)
        return {name.split(",")[0]: value for name, value in results["results"]["local"].items()}

    return evaluate


def log_probabilities(model, ids):
    """Of each token after the first, the whole row at once."""
    with torch.no_grad():
        return model(ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def encoded(text):
    return torch.tensor(byte_tokenizer()(text)["input_ids"])


@pytest.mark.parametrize("cell_type", CELLS)
def test_multiple_choice_is_scored_as_each_answer_read_alone(cell_type, evaluate):
    model = byte_model(cell_type)
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    results = evaluate(model, QUESTIONS, task, batch_size=7)
    right = {"acc": 0, "acc_norm": 0}
    for row in QUESTIONS:
        context = len(encoded(row["question"]))
        scores = [
            log_probabilities(model, encoded(f"{row['question']} {choice}"))[context - 1 :].sum().item()
            for choice in row["choices"]
        ]
        per_byte = [score / len(choice) for score, choice in zip(scores, row["choices"])]
        right["acc"] += max(range(3), key=scores.__getitem__) == row["answer"]
        right["acc_norm"] += max(range(3), key=per_byte.__getitem__) == row["answer"]
    assert {name: results[name] for name in right} == {name: n / len(QUESTIONS) for name, n in right.items()}


@pytest.mark.parametrize("cell_type", CELLS)
def test_rolling_perplexity_is_that_of_the_documents_read_alone(cell_type, evaluate):
    model = byte_model(cell_type)
    task = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task["metric_list"] = [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}]
    results = evaluate(model, [{"text": text} for text in TEXTS], task, batch_size=5)
    start = torch.tensor([byte_tokenizer().eos_token_id])
    total = sum(log_probabilities(model, torch.cat([start, encoded(text)])).sum().item() for text in TEXTS)
    loss = -total / sum(len(text) for text in TEXTS)
    assert results["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert results["byte_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize("chunk", [63, 1000, 2049])
@pytest.mark.parametrize("cell_type", CELLS)
def test_perplexity_of_a_long_text_is_the_same_with_the_state_carried(cell_type, chunk, evaluate):
    model = byte_model(cell_type)
    text = "".join(TEXTS) * 20
    task = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task["metric_list"] = [{"metric": "byte_perplexity"}]
    one_shot = evaluate(model, [{"text": text}], task, max_length=len(text))["byte_perplexity"]

    ids = torch.cat([torch.tensor([byte_tokenizer().eos_token_id]), encoded(text)])
    past, loss = None, 0.0
    for start in range(0, len(text), chunk):
        with torch.no_grad():
            outputs = model(
                ids[None, start : start + chunk][:, : len(text) - start], past_key_values=past, use_cache=True
            )
        past = outputs.past_key_values
        targets = ids[start + 1 : start + 1 + chunk]
        loss += torch.nn.functional.cross_entropy(outputs.logits[0].double(), targets, reduction="sum").item()
    assert math.exp(loss / len(text)) == pytest.approx(one_shot, rel=1e-6)


def test_generation_answers_as_the_model_does(evaluate):
    model = byte_model("mingru")
    rows = [{"question": row["question"], "answer": greedy(model, row["question"])} for row in QUESTIONS]
    rows[0]["answer"] += "?"
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    results = evaluate(model, rows, task, batch_size=6)
    assert results["exact_match"] == (len(rows) - 1) / len(rows)


def greedy(model, prompt):
    ids = encoded(prompt)
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
    return byte_tokenizer().decode(ids[len(encoded(prompt)) :], skip_special_tokens=True)
