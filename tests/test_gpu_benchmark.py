"""benchmarks/gpu.py runs from end to end without a GPU, and its committed summary holds no figure without a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import carry
import pytest
from isolated import Case, measured

pytest.importorskip("triton", reason="triton has no build for this platform")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SECTIONS = ["checks", "bandwidth", "training step", "convolution", "decoding", "layers", "a million tokens", "peers"]


def run(*flags, folder):
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, "benchmarks/gpu.py", *flags]
    result = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.soak  # half a minute: among the oldest versions, which are those of the machine with a GPU
@pytest.mark.oldest
def test_a_dry_run_measures_every_kind_of_case_and_renders_it(tmp_path):
    text = run("--dry-run", folder=tmp_path)
    (folder,) = tmp_path.glob("minrnn-gpu-dry-run-*")
    rows = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["section"] for row in rows)) == [*SECTIONS, "machine code"]
    summary = (folder / "gpu.md").read_text()
    assert summary in text and "not yet measured" not in summary
    assert all(f"| {row['case']} |" in summary for row in rows)
    assert all(row["seconds"] > 0 and "failed" not in row and "checks_failed" not in row for row in rows)
    checks = [row for row in rows if "error" in row or "unequal_tensors" in row]
    assert all(row.get("error", row.get("unequal_tensors"))["met"] for row in checks)
    assert {row["section"] for row in rows if row.get("captured") != "none"} == {"checks", "peers", "machine code"}


def test_what_does_not_fit_into_the_seconds_is_skipped_and_named_and_the_summary_is_there(tmp_path):
    text = run("--dry-run", "--seconds", "0", "--only", "million", "decoding", folder=tmp_path)
    (summary,) = tmp_path.glob("*/gpu.md")
    assert "| recurrence of width 768 mingru | not yet measured |" in summary.read_text()
    assert "recurrence of width 768 minlstm: skipped takes about 6 s, 0 s are left" in text
    assert text.count("skipped") == 4 and not list(tmp_path.glob("*/gpu.jsonl"))


def test_a_case_that_fails_dies_hangs_or_spoils_its_device_costs_no_other(monkeypatch):
    monkeypatch.setattr("isolated.LEAST_LIMIT", 0.5)
    spoilt = []
    measures = {
        "fails": lambda: {}["x"],
        "first": lambda: {"pid": os.getpid()},
        "second": lambda: {"pid": os.getpid()},
        "dies": lambda: os._exit(3),
        "hangs": lambda: time.sleep(60),
        "spoils": lambda: spoilt.append(1) or {"pid": os.getpid()},
        "alone": lambda: {"pid": os.getpid()},
        "last": lambda: {"pid": os.getpid()},
    }
    cases = [Case("", name, 0.1, measure, name == "alone") for name, measure in measures.items()]
    cases.insert(4, Case("", "too long", 1e6, measures["last"]))
    rows = {case.name: row for case, row in measured(cases, time.monotonic() + 60, lambda: not spoilt)}
    assert rows["fails"]["failed"] == "KeyError: 'x'"
    assert rows["dies"]["failed"] == "its process ended with exit code 3"
    assert rows["hangs"]["failed"].startswith("stopped after")
    assert rows["too long"]["skipped"].startswith("takes about 1000000 s")
    assert rows["first"]["pid"] == rows["second"]["pid"]
    assert len({rows[name]["pid"] for name in ("first", "spoils", "alone", "last")} | {os.getpid()}) == 5


def test_a_wheel_that_python_there_would_not_take_and_one_that_is_there_twice_are_named():
    names = [
        "a-1.0-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64",
        "b-1.0-py3-none-any",
        "c-2-cp310-abi3-linux_x86_64",
    ]
    assert carry.problems([Path(f"{name}.whl") for name in names]) == []
    names = [
        "a-1.0-cp311-cp311-manylinux_2_17_x86_64",
        "b-1.0-py3-none-any",
        "b-1.1-py312-none-any",
        "c-1-py3-none-win_amd64",
    ]
    assert [problem.split(" is ")[0] for problem in carry.problems([Path(f"{name}.whl") for name in names])] == [
        "a-1.0-cp311-cp311-manylinux_2_17_x86_64.whl", "c-1-py3-none-win_amd64.whl", "b",
    ]  # fmt: skip


def test_the_committed_summary_is_that_of_the_committed_rows(tmp_path):
    committed = (BENCHMARKS / "results" / "gpu.md").read_text()
    rows = BENCHMARKS / "results" / "gpu.jsonl"
    copy = tmp_path / "gpu.jsonl"
    copy.write_text(rows.read_text())
    script = f"""if True:
        import pathlib, gpu
        print(gpu.render(gpu.read_rows(pathlib.Path({str(copy)!r}))), end="")
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == committed, result.stderr
