"""`model.diagnose_states` says of each recurrence what its gates and states are."""

import math
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from printable_model import printable_model, save
from small_models import CELLS, SHAPES, WrittenOut, random_ids, small_model

from modeling_minrnn import MinRNNForMaskedLM, modeling_minrnn
from modeling_minrnn.cells import MinGRU
from modeling_minrnn.diagnose import StateReport
from training.tokenizers import byte_tokenizer

TOLERANCE = 1e-5  # sums in float32


def expected_report(model, ids, layer):
    """a (T, D) and states (T, D) of a layer, in float64, one token at a time."""
    written = WrittenOut(model)
    name = f"model.layers.{layer}."
    with torch.no_grad():
        x = written(ids)[1][layer]
        x, _ = written.add(written.conv, x, x, name, "conv.")
        projected = written.linear(written.norm(x, name + "rnn_norm.weight"), name + "rnn.in_proj.")
        start = written.weights.get(name + "rnn.initial_state", torch.zeros(model.config.state_size).double())
        states, _ = oracle.scan(projected[None], model.config.cell_type, start[None])
        return oracle.gates_and_candidate(projected, model.config.cell_type)[0], states[0]


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("cell_type", CELLS)
@pytest.mark.parametrize("chunk", [4, 100])
def test_a_report_is_that_of_the_gates_and_states_written_out(cell_type, shape, chunk, monkeypatch):
    monkeypatch.setattr(modeling_minrnn, "DIAGNOSIS_CHUNK_TOKENS", chunk)
    model = small_model(cell_type, **shape)
    for layer in model.model.layers:  # wide open gates, and closed ones
        layer.rnn.in_proj.weight.data *= 4
    rows, padding = random_ids(2, 11), torch.zeros(2, 11, dtype=torch.bool)
    padding[0, :3] = padding[1, 4:6] = True
    reports = model.diagnose_states(rows, attention_mask=(~padding).long())
    assert [report.name for report in reports] == [f"layers.{i}.rnn" for i in range(len(reports))]
    for i, report in enumerate(reports):
        pairs = [expected_report(model, row[~hidden], i) for row, hidden in zip(rows, padding)]
        a, states = (torch.cat(parts) for parts in zip(*pairs))
        torch.testing.assert_close(report.timescales.double(), -1 / a.log().mean(0), rtol=TOLERANCE, atol=0.0)
        assert report.tokens == len(a) == 17
        assert report.remembering == pytest.approx((a > 0.99).double().mean().item(), rel=TOLERANCE)
        assert report.forgetting == pytest.approx((a < 0.01).double().mean().item(), rel=TOLERANCE)
        assert report.mean_norm == pytest.approx(states.square().mean(-1).sqrt().mean().item(), rel=TOLERANCE)
        assert report.largest_state == pytest.approx(states.abs().max().item(), rel=TOLERANCE)
    assert any(report.remembering for report in reports) and any(report.forgetting for report in reports)


def test_a_timescale_is_the_number_of_tokens_after_which_1_over_e_of_a_state_is_left():
    a = torch.tensor([0.5, 0.9, 0.999])
    projected = torch.cat([torch.log((1 - a) / a), torch.full((3,), -1e4)]).expand(1, 1000, 6)
    report = StateReport("by hand")
    report.add(MinGRU(), projected, projected.new_empty(0), torch.zeros(1, 3), torch.ones(1, 1000, 3), None)
    for gate, timescale in zip(a.tolist(), report.timescales.tolist()):
        assert gate**timescale == pytest.approx(1 / math.e, rel=1e-4)


def test_both_directions_of_an_encoder_are_reported():
    model = small_model("minlstm", MinRNNForMaskedLM, bidirectional=True)
    reports = model.diagnose_states(random_ids(2, 9))
    assert [report.name for report in reports] == [
        f"layers.{i}.{name}" for i in range(2) for name in ("rnn", "reverse_rnn")
    ]
    assert all(report.tokens == 18 and report.largest_state > 0 for report in reports)


def test_a_diagnosis_leaves_nothing_behind():
    model, ids = small_model(), random_ids(1, 9)
    before = model(ids).logits
    model.diagnose_states(ids)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, before)


def test_a_model_in_training_is_diagnosed_as_in_evaluation(monkeypatch):
    monkeypatch.setattr(modeling_minrnn, "DIAGNOSIS_CHUNK_TOKENS", 4)
    model, ids = small_model(dropout=0.5), random_ids(1, 9)
    expected = [str(report) for report in model.diagnose_states(ids)]
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model.train()
    assert [str(report) for report in model.diagnose_states(ids)] == expected
    assert model.training and model.model.layers[0].training


def test_nothing_but_padding_is_refused():
    with pytest.raises(ValueError, match="attention_mask is 0 everywhere"):
        small_model().diagnose_states(random_ids(1, 9), attention_mask=torch.zeros(1, 9))


def test_the_example_prints_the_report_of_a_text_and_plots_it(tmp_path):
    model, text = printable_model(), "def read(path):\n" * 20
    save(model, tmp_path / "model")
    (tmp_path / "text.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "examples.diagnose_states", "text.py", "--model", "model"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = model.diagnose_states(byte_tokenizer()(text, return_tensors="pt").input_ids)
    assert done.stdout.splitlines() == [*map(str, reports), "states.png shows it"]
    assert (tmp_path / "states.png").read_bytes().startswith(b"\x89PNG")
