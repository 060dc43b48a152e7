"""A loss or gradient that is not finite changes no parameter and is reported; a batch is one however split."""

import json

import pytest
import torch
from small_models import CELLS
from small_runs import losses

import train
from modeling_minrnn import minrnn_scan
from training.checkpoint import list_checkpoints
from training.config import InputError
from training.data import RandomWindows

BAD_STEP = 6


@pytest.fixture
def spoil(monkeypatch):
    """The gradient, or else the loss, of the sixth step of a run is not finite."""

    def spoil(what):
        backward = torch.Tensor.backward
        model_forward = train.MinRNNForCausalLM.forward
        steps = iter(range(1, 100))

        def spoiled_backward(self, *arguments, **keywords):
            backward(self, *arguments, **keywords)
            if next(steps) == BAD_STEP:
                spoiled.grad[0] = float("inf")

        def spoiled_forward(self, *arguments, **keywords):
            nonlocal spoiled
            spoiled = self.model.layers[1].rnn.in_proj.weight
            output = model_forward(self, *arguments, **keywords)
            if what == "loss" and output.loss is not None and next(steps) == BAD_STEP:
                output.loss = output.loss + float("nan")  # whose gradients are finite
            return output

        spoiled = None
        if what == "gradient":
            monkeypatch.setattr(torch.Tensor, "backward", spoiled_backward)
        monkeypatch.setattr(train.MinRNNForCausalLM, "forward", spoiled_forward)

    return spoil


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_run_stops_before_a_bad_step_and_says_which_windows_and_which_layer(run, spoil, tmp_path, monkeypatch, what):
    starts = []
    read = RandomWindows.__next__

    def note(self):
        batch = read(self)
        starts.append(self.window_starts)
        for start, inputs in zip(self.window_starts, batch[0]):
            assert torch.equal(self.stream.read(start, start + len(inputs)), inputs)
        return batch

    monkeypatch.setattr(RandomWindows, "__next__", note)
    spoil(what)
    with pytest.raises(InputError, match=f"^the loss or a gradient is not finite at step {BAD_STEP}, "):
        run()
    report = json.loads((tmp_path / "run" / f"nonfinite-{BAD_STEP:08d}.json").read_text())
    assert report["step"] == len(starts) == BAD_STEP
    (process,) = report["processes"]
    assert process["windows"] == starts[-1]
    assert (process["losses"][0] == process["losses"][0]) == (what == "gradient")
    infinite = {name for name, norms in report["norms"].items() if norms["gradient"] == float("inf")}
    assert infinite == ({"model.layers.1.rnn.in_proj.weight"} if what == "gradient" else set())
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000000", "step-00000004"]


def test_a_skipped_step_changes_no_parameter_and_the_run_goes_on(run, spoil, monkeypatch):
    before = []  # each step
    gradient_norm = train.gradient_norm

    def note(model):
        before.append([parameter.detach().clone() for parameter in model.parameters()])
        return gradient_norm(model)

    monkeypatch.setattr(train, "gradient_norm", note)
    spoil("gradient")
    folder = run(**{"train.on_nonfinite": "skip", "train.save_every_steps": 2})
    for step, (first, second) in enumerate(zip(before[1:], before[2:]), 2):
        assert all(map(torch.equal, first, second)) == (step == BAD_STEP)
    # Not in the midst of skipped steps: the parameters may be what is wrong.
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004", "step-00000008"]
    assert len(losses(folder)) == 7 and losses(folder, "skipped_steps") == [1]
    state = json.loads((list_checkpoints(folder)[-1] / "state.json").read_text())
    assert state["progress"]["skipped_steps"] == 1 and state["progress"]["step"] == 8


TOO_HIGH = {"train.learning_rate": 1e18, "train.grad_clip_norm": 1e30, "train.steps": 30}


def test_steps_skipped_in_a_row_end_the_run_and_a_lower_learning_rate_goes_on(setting, train_main, tmp_path):
    path = setting(**TOO_HIGH, **{"train.on_nonfinite": "skip"})
    with pytest.raises(
        InputError, match="^the loss or a gradient was not finite in 11 steps in a row, see .*: go on "
    ):
        train_main(path)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert train_main(path, ["train.resume=true", "train.learning_rate=0.001"]) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_a_stopped_run_goes_on_with_a_lower_learning_rate_from_where_that_helps(setting, train_main, tmp_path, capsys):
    """The last checkpoint has the parameters that the high rate made: no step from there is finite."""
    path = setting(**TOO_HIGH, **{"train.save_every_steps": 1, "train.warmup_steps": 0})
    with pytest.raises(InputError, match="not finite at step 2, .* with train.resume=true and a lower"):
        train_main(path)
    assert train_main(path, ["train.resume=true", "train.learning_rate=0.001"]) == 0
    assert "step-00000001 was not finite: step-00000000 is used" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 30 and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_a_run_without_a_finite_evaluation_fails_and_publishes_nothing(setting, train_main, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *arguments, **keywords: (float("nan"), 0.0))
    monkeypatch.setattr(train, "check_repository", lambda hub: None)
    monkeypatch.setattr(train, "push_folder", lambda *arguments: pytest.fail("published"))
    with pytest.raises(InputError, match="^no evaluation had a finite loss, so .*run holds no model"):
        train_main(setting(), ["hub.push=true", "hub.repository=someone/nothing"])
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_loss_is_the_same_to_1e_6_however_a_batch_is_split(run, tmp_path):
    runs = {}
    for parts in (1, 2, 4, 8):
        folder = run(
            **{
                "train.batch_size": 8,
                "train.learning_rate": 1e-3,
                "train.gradient_accumulation_steps": parts,
                "train.output_dir": str(tmp_path / str(parts)),
            }
        )
        runs[parts] = losses(folder)
    for parts in (2, 4, 8):
        assert runs[parts] == pytest.approx(runs[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell_type", CELLS)
@pytest.mark.parametrize("logit", [-6e4, -30.0, 30.0, 6e4])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gradients_are_finite_at_65536_steps_with_saturated_gates(dtype, cell_type, logit, backend):
    T, D, parts = 65_536, 2, {"mingru": 2, "minlstm": 3}[cell_type]
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(1, T, parts * D, generator=generator).to(dtype)
    projected[..., : (parts - 1) * D] = logit  # all gates
    projected.requires_grad_()
    start = torch.ones(1, D, requires_grad=True)
    states, final_state = minrnn_scan(projected, cell_type, initial_state=start, backend=backend)
    (states.float().mean() + final_state.sum()).backward()
    for tensor in (states, final_state, projected.grad, start.grad):
        assert tensor.isfinite().all()
