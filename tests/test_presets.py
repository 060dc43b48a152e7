"""configs/presets: models of the size in their names, in settings that train.py takes; and the sweep behind them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import TEXT

from benchmarks.harness import combinations
from benchmarks.paper import sweep
from train import build_model
from training.config import STDLIB, load_config
from training.tokenizers import byte_tokenizer

FOLDER = Path(__file__).parent.parent / "configs" / "presets"
PRESETS = sorted(FOLDER.glob("*.yaml"))
UNITS = {"m": 1e6, "b": 1e9}
GPT2_VOCABULARY = 50257  # not fetched here


@pytest.mark.parametrize("cell_type", ["mingru", "minlstm"])
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_as_many_parameters_as_its_name_says_with_both_cells(path, cell_type):
    config = load_config(str(path), [f"model.cell_type={cell_type}"])
    assert config.train.output_dir == f"runs/{path.stem}"
    if config.data.tokenizer == "openai-community/gpt2":
        config.model["vocab_size"] = GPT2_VOCABULARY
    with torch.device("meta"):
        model = build_model(config.model, byte_tokenizer())
    assert model.config.cell_type == cell_type
    size = float(path.stem[:-1]) * UNITS[path.stem[-1]]
    assert abs(model.num_parameters() / size - 1) < 0.05
    unit = "billion" if path.stem.endswith("b") else "million"
    counts = re.search(rf"{unit} parameters \(minGRU (?P<mingru>\S+), minLSTM (?P<minlstm>\S+)\)", path.read_text())
    assert float(counts[cell_type]) == pytest.approx(model.num_parameters() / UNITS[path.stem[-1]], rel=0.005)


def test_the_readme_of_the_presets_has_a_line_for_each_with_its_shape_and_its_tokens():
    lines = (FOLDER / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert sorted(line[0] for line in cells) == [f"`{path.name}`" for path in PRESETS]
    for name, shape, tokens, *_ in cells:
        config = load_config(str(FOLDER / name.strip("`")), [])
        model, train = config.model, config.train
        assert shape == f"{model['hidden_size']} x {model['num_hidden_layers']}"
        number, unit = tokens.split()[:2]
        read = train.steps * train.batch_size * train.sequence_length
        assert read == pytest.approx(float(number) * {"M": 1e6, "G": 1e9}[unit.strip(",")], rel=0.02)


def test_the_run_without_a_network_reads_local_text_by_a_tokenizer_that_is_there():
    [command] = re.findall(r"```\n(accelerate launch .*?)```", (FOLDER / "README.md").read_text(), re.S)
    path, overrides = re.search(r"train\.py (\S+)(.*)", command.replace("\\\n", " ")).groups()
    config = load_config(path, overrides.split())
    data = config.data
    assert (data.dataset, data.dataset_config, data.streaming, data.tokenizer) == (STDLIB, None, False, "byte")
    with torch.device("meta"):
        model = build_model(config.model, byte_tokenizer())
    assert f"{model.num_parameters() / 1e6:.0f} million parameters" in (FOLDER / "README.md").read_text()


def test_a_sweep_is_a_run_of_train_py_for_each_combination(tmp_path, monkeypatch, train_main):
    def run(command, original=subprocess.run, **settings):
        if command[:2] != [sys.executable, "train.py"]:
            return original(command, **settings)
        return train_main(str(settings["cwd"] / command[2]), command[3:])

    monkeypatch.setattr("benchmarks.harness.subprocess.run", run)
    text, output = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT)
    overrides = ["train.learning_rate=0.01,0.02", "model.cell_type=minlstm", "train.steps=4", "train.warmup_steps=2"]
    overrides += ["train.batch_size=2", "train.sequence_length=32"]
    data = ["data.dataset=null", f"data.files=[{text}]", "data.held_out_tokens=200"]
    monkeypatch.setattr("sys.argv", ["sweep", "1m", *overrides, *data, "--output", str(output)])
    sweep.main()
    first, second = map(json.loads, output.read_text().splitlines())
    for row, rate in ((first, 0.01), (second, 0.02)):
        assert (row["learning_rate"], row["cell_type"], row["steps"], row["warmup_steps"]) == (rate, "minlstm", 4, 2)
        assert row["parameters"] == 1036080
    assert first["held_out_loss"] != second["held_out_loss"]


def test_a_sweep_tries_all_combinations():
    tried = combinations(["a.b=1,2", "c.d=x", "e.f=3,4"])
    assert tried == [[f"a.b={b}", "c.d=x", f"e.f={f}"] for b in (1, 2) for f in (3, 4)]
