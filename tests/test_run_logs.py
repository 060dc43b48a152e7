"""The logs of a run: they lose nothing, go on after a kill, and tell what was run."""

import json
import math
import re
import runpy
import shlex
import sys
from importlib import metadata

import pytest
import torch
from omegaconf import OmegaConf
from small_runs import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.report
from training import compare
from training.config import InputError, flat_settings, load_config
from training.report import MetricsLog, metrics_files, read_metrics


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(training.report, "METRICS_FILE_BYTES", 50)


def test_a_full_log_is_followed_by_another_and_none_is_lost(tmp_path, small_files):
    log = MetricsLog(tmp_path, 0)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 60)]
    for row in rows:
        log.write(row)
    files = metrics_files(tmp_path)
    assert len(files) > 10 and all(path.stat().st_size < 100 for path in files)
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize("last_step", [0, 1, 7, 30, 59])
def test_a_resumed_log_goes_on_after_the_last_step_that_was_kept(tmp_path, small_files, last_step):
    for start in (0, last_step, last_step):
        log = MetricsLog(tmp_path, start)
        for step in range(start + 1, 60):
            log.write({"step": step, "start": start})
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 60))
    assert all(row["start"] == (last_step if row["step"] > last_step else 0) for row in read_metrics(tmp_path))


def test_a_line_cut_short_by_a_kill_is_dropped_and_any_other_fault_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    MetricsLog(tmp_path, 5).write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    for fault in (b'{"st\xffp": 2}', b"[1]", b"{}", b'{"step": "two"}', b'{"step": 1} 2', b"[" * 100_000, b""):
        path.write_bytes(b'{"step": 1}\n' + fault + b'\n{"step": 3}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is not a JSON object with a step: remove it$"):
            read_metrics(tmp_path)


def test_a_run_folder_tells_settings_versions_commit_and_command_of_every_start(run, setting, train_main):
    folder = run()
    config = setting()
    assert train_main(config, ["train.resume=true", "train.steps=9"]) == 0
    lines = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    starts, cards, ends = lines[::3], lines[1::3], lines[2::3]
    assert len({card["card"] for card in cards}) == 2
    assert [start["step"] for start in starts] == [0, 8]
    assert [(end["step"], end["exit_code"]) for end in ends] == [(8, 0), (9, 0)]
    assert starts[1]["command"] == f"python train.py {config} train.resume=true train.steps=9"
    for start in starts:
        assert start["versions"]["torch"] == metadata.version("torch")
        assert start["commit"] == training.report.code_commit()
        assert (start["processes"], start["device"]) == (1, "cpu")
    assert OmegaConf.load(folder / "run.yaml").train.steps == 9


# ---- Two runs beside each other


@pytest.fixture
def two_runs(run, tmp_path):
    """Of one project, which differ in tokenizer and learning rate."""
    common = {"train.trackers": ["tensorboard", "trackio"], "data.held_out_tokens": None}
    first = run(**common, **{"train.output_dir": str(tmp_path / "runs" / "first")})
    changes = {"data.tokenizer": "bpe", "data.tokenizer_vocab_size": 280, "train.learning_rate": 0.005}
    second = run(**common, **changes, **{"train.output_dir": str(tmp_path / "runs" / "second")})
    return {"first": first, "second": second}


def test_runs_compare_in_trackers_and_by_their_folders(two_runs, tmp_path, capsys):
    import trackio  # these two are not installed beside the oldest transformers
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = {name: flat_settings(load_config(str(folder / "run.yaml"), [])) for name, folder in two_runs.items()}
    assert settings["second"]["data.tokenizer"] == "bpe" and settings["first"]["data.held_out_tokens"] == "null"
    assert len(settings["first"]) > 60 and settings["first"]["model.conv_kernel_size"] == 4

    board = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert {*board.Runs()} == {*two_runs}
    for name, folder in two_runs.items():
        assert [event.value for event in board.Scalars(name, "bits_per_byte")] == pytest.approx(
            [row["bits_per_byte"] for row in read_metrics(folder) if "bits_per_byte" in row]
        )
        kept = board.PluginRunToTagToContent("hparams")[name]["_hparams_/session_start_info"]
        kept = HParamsPluginData.FromString(kept).session_start_info.hparams
        shown = {key: getattr(value, value.WhichOneof("kind")) for key, value in kept.items()}
        assert shown == settings[name]
    of_trackio = {one.name: one.config for one in trackio.Api().runs("minrnn")}
    assert of_trackio.keys() >= {*two_runs}
    assert all(of_trackio[name].items() >= settings[name].items() for name in two_runs)

    capsys.readouterr()
    compare.main([str(folder) for folder in two_runs.values()], str(tmp_path / "both.png"))
    rows = dict(re.findall(r"^\| (.*?) \| (.* \| .*) \|$", capsys.readouterr().out, re.MULTILINE))
    best = [min(row["bits_per_byte"] for row in read_metrics(folder) if "bits_per_byte" in row)
            for folder in two_runs.values()]  # fmt: skip
    assert rows["bits per byte, held out"] == " | ".join(f"{bits:.4f}" for bits in best)
    differing = {key: value for key, value in rows.items() if "." in key}
    assert differing == {"data.tokenizer": "byte | bpe", "data.tokenizer_vocab_size": "4096 | 280",
                         "train.learning_rate": "0.01 | 0.005"}  # fmt: skip
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=r"^.*runs: no run, which has a run\.yaml$"):
        compare.main([str(tmp_path / "runs")], "")


def test_bits_per_byte_are_the_nats_of_all_predictions_over_the_bytes_of_the_text(run):
    folder = run(**{"data.tokenizer": "bpe", "data.tokenizer_vocab_size": 280, "data.held_out_tokens": None})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = TEXT[int(0.9 * len(TEXT)) :]
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    bits = nats / math.log(2) / (len(text) - len(tokenizer.decode(tokens[0, :1])))
    assert tokens.shape[1] < 0.9 * len(text)
    best = min(row["bits_per_byte"] for row in read_metrics(folder) if "bits_per_byte" in row)
    assert best == pytest.approx(bits, rel=1e-5)
    assert f"| Held-out loss, bits per byte | **{round(best, 4)}** |" in (folder / "README.md").read_text()


def test_a_finished_run_says_in_four_lines_what_to_do_next_and_they_can_be_done(run, train_main, capsys, monkeypatch):
    folder = run(**{"train.overwrite": True, "train.sample_prompts": ["3 times"], "train.sample_tokens": 2})
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[-4:])
    assert [*lines] == ["sample:", "resume:", "push:", "serve:"]
    commands = {name: shlex.split(line) for name, line in lines.items()}
    assert train_main(commands["resume:"][2], commands["resume:"][3:]) == 0
    assert read_metrics(folder)[-1]["step"] == 16
    with pytest.raises(InputError, match="hub.repository USER/NAME: .*token"):
        train_main(commands["push:"][2], commands["push:"][3:])
    monkeypatch.setattr(sys, "argv", [*commands["sample:"][2:], "--max-new-tokens", "3"])
    capsys.readouterr()
    runpy.run_module(commands["sample:"][2], run_name="__main__")
    assert capsys.readouterr().out.startswith("3 times")
    assert commands["serve:"] == ["python", "-m", "minrnn", "serve", str(folder)]
