"""benchmarks/gpu.py runs from end to end without a GPU, and its committed summary holds no figure without a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SECTIONS = ["checks", "bandwidth", "peers", "layers", "training step", "a million tokens", "machine code"]


def run(*flags, folder):
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, "benchmarks/gpu.py", *flags]
    result = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_dry_run_measures_every_case_and_renders_it(tmp_path):
    text = run("--dry-run", folder=tmp_path)
    (folder,) = tmp_path.glob("minrnn-gpu-dry-run-*")
    rows = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["section"] for row in rows)) == SECTIONS
    summary = (folder / "gpu.md").read_text()
    assert summary in text and "not yet measured" not in summary
    assert all(f"| {row['case']} |" in summary for row in rows)
    checks = [row for row in rows if "error" in row or "unequal_tensors" in row]
    assert len(checks) == 6 and all(row.get("error", row.get("unequal_tensors"))["met"] for row in checks)


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
