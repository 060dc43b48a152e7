"""Pages show what the rows say; the paper's benchmarks run from end to end, on contenders of equal size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.mamba import modeling_mamba

from benchmarks.paper import long_context, mamba_scan, shakespeare, tasks
from benchmarks.paper.long_context import PAIRS
from benchmarks.paper.models import Family, parameters
from benchmarks.paper.render import DOCS, TABLES, render
from benchmarks.paper.shakespeare import held_out_loss
from training.data import IGNORED, TokenStream
from training.tasks import TASKS, load_task

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_of_a_page_are_those_of_the_committed_rows(page):
    text = (DOCS / page).read_text()
    assert render(text, TABLES[page]) == text
    if page == "results.md":
        assert "| minGRU / nn.GRU | 33.3 | 22.2 | 16.7 | 13.3 |" in text  # the paper's 33, 22, 17 and 13


@pytest.mark.parametrize("name", ["minLSTM", "nn.GRU", "nn.LSTM", "Mamba", "Llama", "GPT-2"])
def test_contenders_are_of_equal_size_and_causal(name):
    family = Family(19, 2, 12, tied=False, minrnn={"conv_kernel_size": 4, "intermediate_size": 0})
    model, size = family.of_equal_size(name, 32).eval(), parameters(family.build("minGRU", 32))
    assert abs(parameters(model) / size - 1) < 0.12
    tokens = torch.randint(19, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 7:] += 1
    with torch.no_grad():
        before, after = model(tokens), model(changed % 19)
    assert before.shape == (2, 12, 19)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("T", [1, 2, 37, 300])
@torch.no_grad()
def test_the_fused_scan_of_mamba_is_that_of_transformers(T):
    torch.manual_seed(T)
    B, D, N = 3, 5, mamba_scan.N
    inputs = {
        "hidden_states": torch.randn(B, D, T), "dt": 3 * torch.randn(B, D, T) - 2, "A": -4 * torch.rand(D, N),
        "B": torch.randn(B, N, T), "C": torch.randn(B, N, T), "D": torch.randn(D), "z": torch.randn(B, D, T),
        "delta_bias": torch.randn(D),
    }  # fmt: skip
    seen_from_above = torch.randn(B, D, T)

    def results(scan, dtype):
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
        with torch.enable_grad():
            y = scan(**leaves, delta_softplus=True)
            y.backward(seen_from_above.to(dtype))
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    expected = results(modeling_mamba.mamba_selective_scan, torch.float64)
    for name, result in results(mamba_scan.selective_scan, torch.float32).items():
        assert (result - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(module, *flags):
        """The rows of a benchmark that is given these flags."""
        output = tmp_path / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", [module.__name__, *flags, "--output", str(output)])
        module.main()
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_a_task_is_trained_and_a_second_run_gives_the_same(run):
    flags = ["bucket_sort", "--only", "minLSTM", "--steps", "30", "--seeds", "0", "1", "0"]
    first, other, again = run(tasks, *flags)
    assert first["accuracy"] == again["accuracy"] != other["accuracy"] and first["accuracy"] > 0.22  # one of five


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_setting_to_train_it(run, task):
    rows = run(tasks, task, "--only", f"{task} minGRU 1", f"{task} signed", "--steps", "1", "--layers", "1")
    assert [row["contender"] for row in rows] == ["minGRU", "signed minGRU"]
    assert all(row["task"] == task and 0 <= row["accuracy"] <= 1 for row in rows)


def test_accuracy_counts_the_tokens_of_the_answers_alone():
    class Knowing(nn.Module):  # right but for the first letter of each answer; wrong wherever nothing is asked
        def forward(self, tokens):
            targets = known[tokens.numpy().tobytes()]
            right = torch.where(targets == IGNORED, 0, targets)
            asked = targets != IGNORED
            first = asked & (asked.cumsum(1) == 1)
            return nn.functional.one_hot(torch.where(first, right + 1, right) % 300, 300)

    _, _, held_out = load_task(tasks.load_setting("selective_copying"), slice(None))
    known = {inputs.numpy().tobytes(): targets for inputs, targets in held_out.batches(tasks.EVALUATION_TOKENS)}
    assert tasks.accuracy(Knowing(), held_out) == 15 / 16


def test_recall_is_measured_by_the_number_of_pairs_and_its_rate_swept(run):
    flags = ["recall", "--only", "recall minGRU, state x2", "--steps", "2", "--learning-rates", "1e-3", "1e-2"]
    found = run(long_context, *flags)
    rates = [1e-3] * len(PAIRS) + [1e-2] * len(PAIRS)
    assert [(row["learning_rate"], row["pairs"]) for row in found] == list(zip(rates, 2 * PAIRS))
    assert all(0 <= row["accuracy"] < 0.5 for row in found)  # a tenth of the digits by chance


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_speed_and_memory_are_measured(tmp_path):
    flags = ["--only", "loop of nn.GRUCell", "--lengths", "16", "1024", "2048", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.paper.speed", *flags, "--output", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["command"].startswith("python -m benchmarks.paper.speed ") for row in rows)
    assert [row["T"] for row in rows] == [16, 1024, 2048]
    # The loop keeps at least gates and state of every step; what it keeps and takes is linear in T.
    assert rows[2]["peak_mb"] > 4 * 2048 * 64 * 4 * 4 / 1e6 and 1.5 < rows[2]["peak_mb"] / rows[1]["peak_mb"] < 2.6


def test_a_held_out_text_is_read_in_windows_in_which_every_target_counts_once():
    class Reader(nn.Module):
        model = None

        def forward(self, tokens):  # as if each token read so far, modulo 7, were what comes next
            self.longest = max(getattr(self, "longest", 0), tokens.shape[1])
            return nn.functional.one_hot((tokens.cumsum(1) + tokens.shape[1]) % 7, 7).float()

    tokens = torch.randint(7, (53,), generator=torch.Generator().manual_seed(0))
    reader, total = Reader(), 0.0
    for target in range(1, 53):  # the window of each, from its definition
        start = max((target - 1) // 4 * 4 - 4, 0)
        window = tokens[start : (target - 1) // 4 * 4 + 4]
        window = window[: 52 - start]
        logits = reader(window[None])[0, target - 1 - start]
        total -= logits.log_softmax(-1)[tokens[target]].item()
    loss = held_out_loss(reader, TokenStream([tokens.numpy()]), context=8)
    assert loss == pytest.approx(total / 52, abs=1e-5) and reader.longest == 8


def test_models_of_a_text_are_compared_on_the_same_batches(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 23) for i in range(20_000)))
    flags = [str(text), "equal", "--steps", "2", "--rounds", "1", "--only", "min"]
    rows = run(shakespeare, *flags)
    assert [row["contender"] for row in rows] == ["minGRU", "minGRU, linear, output gate, Muon", "minLSTM"]
    assert all(
        row["steps"] == 2 and max(row["held_out_loss"], row["window_loss"]) < 4 for row in rows
    )  # log(23) = 3.1
    assert rows[1]["held_out_loss"] < 1 < 2 < rows[0]["held_out_loss"]  # so soon by Muon, whose windows are longer
