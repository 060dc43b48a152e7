"""Model cards say what is known of a model, and nothing else, in a form that the Hub reads."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from omegaconf import OmegaConf

from model_cards.write import CARDS, read_config
from training.report import TrainedModel, model_card, read_metrics

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


def test_every_committed_card_is_what_its_settings_and_figures_render():
    folder = ROOT / "model_cards"
    assert {path.stem for path in folder.glob("*.md")} == {"template", *CARDS}
    for name, card in CARDS.items():
        assert (folder / f"{name}.md").read_text() == card().content
        _, _, text = read(folder / f"{name}.md")
        assert settings_in(text) == OmegaConf.load(ROOT / "configs" / f"{name}.yaml")


def test_committed_cards_give_the_measured_figures_and_no_others():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/quality.jsonl").read_text().splitlines()]
    row = next(row for row in reversed(rows) if row["contender"] == "minrnn")
    _, metrics, text = read(ROOT / "model_cards/shakespeare-char-cpu.md")
    assert metrics == {"held_out_loss": round(row["held_out_loss"]["value"], 4)}
    assert f"{row['parameters']:,} parameters" in text and f"commit {row['commit']}," in text
    assert all(f"{package} {version}" in text for package, version in row["versions"].items())
    _, metrics, text = read(ROOT / "model_cards/demo.md")
    assert metrics == {} and "loss:" not in text and "![" not in text


def test_a_card_cites_the_paper_of_each_cell_and_no_other():
    config, settings = read_config("demo")
    for cell_type, papers in (("mingru", ["2410.01201"]), (["lru", "rwkv4", "lru"], ["2303.06349", "2305.13048"])):
        config.model["cell_type"] = cell_type
        text = model_card("demo", config, settings, TrainedModel(1, command="make train")).content
        assert re.findall(r"\[arXiv (.*?)\]\(https://arxiv.org/abs/\1\)", text) == papers
        assert re.findall("arxiv.org", text) == ["arxiv.org"] * len(papers)


def test_the_card_of_a_run_says_how_the_model_was_made_and_how_good_it_is(tmp_path):
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
    command = ["train.py", str(tmp_path / "config.yaml"), "train.seed=3"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

    folder = tmp_path / "run"
    data, metrics, text = read(folder / "README.md", "mit")
    best = min((row for row in read_metrics(folder) if "held_out_loss" in row), key=lambda row: row["held_out_loss"])
    scores = ("held_out_loss", "held_out_accuracy", "bits_per_byte")
    assert metrics == {key: pytest.approx(best[key], abs=5e-5) for key in scores}
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
