"""The logs of a run: they lose nothing, go on after a kill, and tell what was run."""

import json
from importlib import metadata

import pytest
from omegaconf import OmegaConf

import training.report
from training.config import InputError
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
