"""Model cards say what is known of a model, and nothing else, in a form that the Hub reads."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import train
from model_cards.write import CARDS, SCORES, card, newest_row, read_config
from training.data import TokenStream, load_documents
from training.report import TrainedModel, model_card, plot_loss_curve, read_metrics

ROOT = Path(__file__).parent.parent


def read(path, licence="apache-2.0"):
    """Metadata, {metric: value} and text of a card that is whole: its code is valid, its pictures are there."""
    text, data = path.read_text(), metadata_load(path)
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["minrnn"] and data["license"] == licence
    for section in ("Training", "Limits", "Licence"):
        assert f"\n## {section}\n" in text
    assert not re.search(r"{{|{%|\bNone\b", text)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / picture).read_bytes().startswith(b"\x89PNG\r\n")
    results = model_index_to_eval_results(data["model-index"])[1] if "model-index" in data else []
    return data, {result.metric_type: result.metric_value for result in results}, text


def settings_in(text):
    return OmegaConf.create(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])


@pytest.mark.parametrize("name", CARDS)
def test_a_committed_card_is_what_its_settings_and_its_row_render(name):
    path, row = ROOT / "model_cards" / name / "README.md", newest_row(name)
    assert path.read_text() == card(name).content
    _, metrics, text = read(path)
    assert settings_in(text) == OmegaConf.load(ROOT / "configs" / f"{name}.yaml")
    assert metrics == {key: round(row[key], 4) for key in SCORES if key in row}
    assert f"{row['parameters']:,} parameters" in text and f"commit {row['commit']}" in text
    assert CARDS[name].license in text


@pytest.mark.parametrize("name", CARDS)
def test_a_committed_model_is_small_and_brings_the_code_of_the_package_and_no_other(name, tmp_path):
    folder = ROOT / "model_cards" / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == newest_row(name)["parameters"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6
    model.save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert {path.name for path in folder.glob("*.py")} == code, "run: python -m model_cards.write"
    for file in code:
        assert (folder / file).is_symlink() and (folder / file).resolve() == ROOT / "modeling_minrnn" / file


def test_a_committed_model_writes_by_its_own_code_what_it_writes_by_the_package(tmp_path):
    """In a process that does not know the package, the text is that of this process, twice.

    By torch: the kernels of such code, which compile anew, run in test_hub.py.
    """
    script = """
import sys
sys.modules["numba"] = None  # importing it is an ImportError
from transformers import pipeline
assert "modeling_minrnn" not in sys.modules
generate = pipeline("text-generation", sys.argv[1], trust_remote_code=True)
sys.stdout.write(generate("def read_", max_new_tokens=40, do_sample=False)[0]["generated_text"])
"""
    folder = str(ROOT / "model_cards/python-1m")
    here = [pipeline("text-generation", folder)("def read_", max_new_tokens=40, do_sample=False) for _ in range(2)]
    assert here[0] == here[1] and here[0][0]["generated_text"].startswith("def read_")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script, folder],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == here[0][0]["generated_text"]


# By Shakespeare, but not in the text that the model was trained on.
SONNET = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
"""


def test_the_committed_models_predict_texts_like_theirs_as_well_as_the_cards_say():
    """Of the text that the card is about the beginning, where it is here; the standard library changes with Python."""
    config, _ = read_config("python-1m")
    texts = {"python-1m": "".join(load_documents(config.data)[1]["text"])[:20_000], "shakespeare-1m": SONNET}
    for name, text in texts.items():
        folder = ROOT / "model_cards" / name
        model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
        stream = TokenStream([np.array(tokenizer(text).input_ids)])
        loss, row = train.evaluate(model, stream)[0], newest_row(name)
        assert loss < row["held_out_loss"] + 0.3
        assert abs(train.evaluate(model.float(), stream)[0] - loss) < 0.005  # bfloat16 costs nothing


def test_a_card_cites_the_paper_of_each_cell_and_no_other():
    config, settings = read_config("python-1m")
    for cell_type, papers in (("mingru", ["2410.01201"]), (["lru", "rwkv4", "lru"], ["2303.06349", "2305.13048"])):
        config.model["cell_type"] = cell_type
        text = model_card("python-1m", config, settings, TrainedModel(1, command="train")).content
        assert re.findall(r"\[arXiv (.*?)\]\(https://arxiv.org/abs/\1\)", text) == papers
        assert re.findall("arxiv.org", text) == ["arxiv.org"] * len(papers)


def test_the_card_of_a_run_says_how_the_model_was_made_and_how_good_it_is(tmp_path, train_main, monkeypatch):
    (tmp_path / "corpus.txt").write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(30) for b in range(9)))
    OmegaConf.save(
        {
            "model": {"hidden_size": 12, "num_hidden_layers": 1, "cell_type": "minlstm"},
            "data": {"files": [str(tmp_path / "corpus.txt")]},
            "train": {
                "steps": 6, "batch_size": 4, "sequence_length": 16, "learning_rate": 0.01, "eval_every_steps": 3,
                "save_every_steps": 6, "output_dir": str(tmp_path / "run"),
            },
            "hub": {"repository": "someone/times", "license": "mit"},
        },
        tmp_path / "config.yaml",
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.yaml"), "train.seed=3"])
    monkeypatch.setattr(train, "plot_loss_curve", plot_loss_curve)
    assert train_main(*sys.argv[1:2], sys.argv[2:]) == 0

    folder = tmp_path / "run"
    data, metrics, text = read(folder / "README.md", "mit")
    best = min((row for row in read_metrics(folder) if "held_out_loss" in row), key=lambda row: row["held_out_loss"])
    in_windows = {"held_out_window_loss": read_metrics(folder)[-1]["held_out_window_loss"]}
    scores = ("held_out_loss", "held_out_accuracy", "bits_per_byte")
    assert metrics == {
        key: pytest.approx(value, abs=5e-5)
        for key, value in (best | in_windows).items()
        if key in (*scores, *in_windows)
    }
    assert "| In disjoint windows of 16 tokens, nats per token | " in text
    assert data["model-index"][0]["name"] == "someone/times" and "datasets" not in data
    assert "A minLSTM language model" in text and "loss_curve.png" in text
    assert f"step {best['step']}, after {best['step'] * 64:,} tokens" in text
    assert "\npython train.py config.yaml train.seed=3\n" in text
    settings = OmegaConf.load(folder / "run.yaml")
    settings.data.files, settings.train.output_dir = ["corpus.txt"], "run"  # no folders of this machine
    assert settings_in(text) == settings
    assert str(tmp_path) not in text
    assert f"torch {torch.__version__}, transformers {transformers.__version__}" in text
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:  # the tests of a source distribution run outside a checkout
        assert f"commit {head.stdout[:12]}" in text
