"""configs/presets: models of the size in their names, in settings that train.py takes; and the sweep behind them."""

import json
from pathlib import Path

import pytest
import torch
from small_runs import TEXT

from benchmarks.paper import sweep
from train import build_model
from training.config import load_config
from training.tokenizers import byte_tokenizer

PRESETS = sorted((Path(__file__).parent.parent / "configs" / "presets").glob("*.yaml"))
UNITS = {"m": 1e6, "b": 1e9}
GPT2_VOCABULARY = 50257  # not fetched here


@pytest.mark.parametrize("cell_type", ["mingru", "minlstm"])
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_as_many_parameters_as_its_name_says_with_both_cells(path, cell_type):
    config = load_config(str(path), [f"model.cell_type={cell_type}"])
    assert config.train.output_dir == f"runs/{path.stem}"
    if config.data.tokenizer == "gpt2":
        config.model["vocab_size"] = GPT2_VOCABULARY
    with torch.device("meta"):
        model = build_model(config.model, byte_tokenizer())
    assert model.config.cell_type == cell_type
    size = float(path.stem[:-1]) * UNITS[path.stem[-1]]
    assert abs(model.num_parameters() / size - 1) < 0.05


def test_a_sweep_is_a_run_of_train_py_for_each_combination(tmp_path, monkeypatch):
    text, output = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT)
    overrides = ["train.learning_rate=0.01,0.02", "model.cell_type=minlstm", "train.steps=4", "train.warmup_steps=2"]
    data = ["data.dataset=null", f"data.files=[{text}]", "data.held_out_tokens=200"]
    monkeypatch.setattr("sys.argv", ["sweep", "1m", *overrides, *data, "--output", str(output)])
    sweep.main()
    first, second = map(json.loads, output.read_text().splitlines())
    for row, rate in ((first, 0.01), (second, 0.02)):
        assert (row["learning_rate"], row["cell_type"], row["steps"], row["warmup_steps"]) == (rate, "minlstm", 4, 2)
        assert row["parameters"] == 1036080
    assert first["held_out_loss"] != second["held_out_loss"]


def test_a_sweep_tries_all_combinations():
    tried = sweep.combinations(["a.b=1,2", "c.d=x", "e.f=3,4"])
    assert tried == [[f"a.b={b}", "c.d=x", f"e.f={f}"] for b in (1, 2) for f in (3, 4)]
