"""train.py on several processes: the losses of one, whatever they share, and others that go on from a checkpoint."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import TIMEOUT, start_processes
from safetensors.torch import load_file
from small_models import assert_close
from small_runs import losses, write_config
from test_checkpoint import outcome, stop_at
from test_train import MUON, ROOT, weights
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import train
from training.checkpoint import list_checkpoints, write_manifest
from training.config import InputError

FSDP2 = ROOT / "configs" / "accelerate" / "fsdp2.yaml"

# T = 15 divides by neither 2 nor 4: chunks of 8 and 7, of 4, 4, 4 and 3.
SETTINGS = {
    "model.learned_initial_state": True,
    "train.steps": 20,
    "train.sequence_length": 15,
    "train.eval_every_steps": 10,
    "train.save_every_steps": 10,
}


def train_process(rank, count, folder, config, overrides):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"  # no port to agree on
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=TIMEOUT)
    assert train.main(config, overrides) == 0


def train_alone(rank, count, folder, config, overrides):
    assert train.main(config, overrides) == 0


def train_fsdp_process(*arguments):
    """With what configs/accelerate/fsdp2.yaml says, on CPUs, where accelerate itself would not shard."""
    options = launch.launch_command_parser().parse_args(["--config_file", str(FSDP2), "train.py"])
    environment = prepare_multi_gpu_env(launch._validate_launch_command(options)[0])
    os.environ |= {name: value for name, value in environment.items() if "FSDP" in name}
    original, gradient_norm = AcceleratorState.__init__, train.gradient_norm

    def initialise(self, *positional, fsdp_plugin=None, **named):
        original(self, *positional, **named)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def sharded_gradient_norm(model):
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // dist.get_world_size())
        return gradient_norm(model)

    AcceleratorState.__init__, train.gradient_norm = initialise, sharded_gradient_norm
    train_process(*arguments)


def train_in_processes(count, config, *overrides, process=train_process):
    """Trains in so many new processes."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(process, (count, folder, config, list(overrides)), count)


def assert_same_run(folder, expected, tolerance):
    """Relative: what another order of summation may leave."""
    for key in ("loss", "grad_norm", "held_out_loss"):
        assert losses(folder, key) == pytest.approx(losses(expected, key), rel=tolerance)


def assert_same_bits(folder, expected):
    """As `outcome` has it, but for the order of what safetensors notes in its files."""
    (digests, rows), (expected_digests, expected_rows) = outcome(folder), outcome(expected)
    assert rows == expected_rows and digests.keys() == expected_digests.keys()
    for name in digests:
        if name.startswith("shard-"):
            first, second = (load_file(list_checkpoints(run)[-1] / name) for run in (folder, expected))
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        else:
            assert digests[name] == expected_digests[name], name


WAYS = {
    "data": (2, [], 1e-6),
    "context": (2, ["train.context_parallel_size=2"], 1e-5),
    "longer context": (4, ["train.context_parallel_size=4"], 1e-5),
    "data and context": (4, ["train.context_parallel_size=2", "train.gradient_accumulation_steps=2"], 1e-5),
}


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_train_as_one_does(setting, train_main, tmp_path, way):
    count, overrides, tolerance = WAYS[way]
    config = setting(**SETTINGS)
    train_in_processes(count, config, *overrides, f"train.output_dir={tmp_path / 'several'}")
    assert train_main(config) == 0
    expected = tmp_path / "run"
    assert len(losses(expected)) == 20 and losses(expected)[-1] < 0.9 * losses(expected)[0]
    assert_same_run(tmp_path / "several", expected, tolerance)


def test_processes_that_share_a_sequence_read_the_same_stream(setting, streaming, train_main, tmp_path):
    config = setting(**SETTINGS, **streaming)
    train_in_processes(2, config, "train.context_parallel_size=2", f"train.output_dir={tmp_path / 'several'}")
    assert train_main(config) == 0
    assert_same_run(tmp_path / "several", tmp_path / "run", 1e-5)


def test_processes_that_share_a_question_score_its_answer_once(setting, train_main, tmp_path):
    task = {"data.files": [], "data.task": "parity", "data.task_lengths": [1, 14], "data.held_out_lengths": [3, 9]}
    config = setting(**SETTINGS | task)
    train_in_processes(2, config, "train.context_parallel_size=2", f"train.output_dir={tmp_path / 'several'}")
    assert train_main(config) == 0
    assert_same_run(tmp_path / "several", tmp_path / "run", 1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_a_resumed_run_over_contexts_equals_one_that_was_never_stopped(setting, tmp_path, count):
    settings = {"train.steps": 4, "train.save_every_steps": 2, "model.dropout": 0.1, "train.context_parallel_size": 2}
    config, folder = setting(**SETTINGS | settings), tmp_path / "run"
    train_in_processes(count, config)
    (expected, rows), expected_weights, expected_state = outcome(folder), weights(folder), shared_state(folder)
    assert sum(name.startswith("process_") for name in expected) == 2 * count
    stop_at(folder, 2)
    train_in_processes(count, config, "train.resume=true")
    resumed, resumed_rows = outcome(folder)
    if count == 2:
        assert resumed_rows == rows
    else:
        # DistributedDataParallel orders its buckets anew after the first step of a process, and gloo adds up three
        # numbers and more in an order of their place in the bucket.
        assert resumed_rows == [pytest.approx(row, rel=1e-6) for row in rows]
        for name, weight in weights(folder).items():
            assert_close(weight, expected_weights[name], 1e-6)
        assert shared_state(folder) == expected_state
        for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
            resumed.pop(name), expected.pop(name)
    assert resumed == expected


def shared_state(folder):
    """state.json of the last checkpoint, but for the best loss, which is among the rows too."""
    state = json.loads((list_checkpoints(folder)[-1] / "state.json").read_text())
    del state["progress"]["best_loss"]
    return state


@pytest.fixture(scope="module")
def alone_and_shared(tmp_path_factory):
    """A configuration, its run in one process, and that in two that share the parameters."""
    folder = tmp_path_factory.mktemp("runs")
    settings = SETTINGS | {"train.steps": 6, "train.eval_every_steps": 3, "train.save_every_steps": 3}
    config, alone, shared = write_config(folder, **settings), folder / "alone", folder / "shared"
    train_in_processes(1, config, f"train.output_dir={alone}", process=train_alone)
    train_in_processes(2, config, f"train.output_dir={shared}", process=train_fsdp_process)
    return config, alone, shared


def test_processes_that_share_the_parameters_train_as_one_does(alone_and_shared):
    _, alone, shared = alone_and_shared
    assert len(losses(alone)) == 6
    assert_same_run(shared, alone, 1e-5)


def test_what_they_leave_is_a_whole_model_and_a_checkpoint_with_a_part_of_each(alone_and_shared):
    _, alone, shared = alone_and_shared
    model, expected = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (shared, alone))
    for name in expected:
        assert_close(model[name], expected[name], 1e-4)  # Adam divides by gradients however small
    assert (shared / "config.json").read_text() == (alone / "config.json").read_text()
    assert {path.name for path in shared.glob("*.py")} == {path.name for path in alone.glob("*.py")}
    files = {path.name: path.stat().st_size for path in list_checkpoints(shared)[-1].iterdir()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".yaml"}  # no pickle
    shards = [files[f"shard-0000{rank}-model-00001-of-00001.safetensors"] for rank in (1, 2)]
    assert abs(shards[0] - shards[1]) < 0.1 * shards[0] and "model.safetensors" not in files


# How many go on, whether they share the parameters, and from what.
OTHERS = {
    "two that share": (2, train_fsdp_process, "shared", []),
    "four that share, two to a sequence": (4, train_fsdp_process, "shared", ["train.context_parallel_size=2"]),
    "two that do not share": (2, train_process, "shared", []),
    "one": (1, train_alone, "shared", []),
    "two that share, after one": (2, train_fsdp_process, "alone", []),
}


@pytest.mark.parametrize("others", OTHERS)
def test_any_number_of_processes_goes_on(alone_and_shared, tmp_path, others):
    config, alone, shared = alone_and_shared
    count, process, before, overrides = OTHERS[others]
    folder = tmp_path / "run"
    shutil.copytree(shared if before == "shared" else alone, folder)
    stop_at(folder, 3)
    train_in_processes(count, config, *overrides, "train.resume=true", f"train.output_dir={folder}", process=process)
    assert_same_run(folder, alone, 1e-5)
    if others == "two that share":
        assert_same_bits(folder, shared)


def test_muon_takes_each_matrix_as_a_whole_however_it_is_shared(setting, train_main, tmp_path):
    settings = {"train.steps": 6, "train.eval_every_steps": 3, "train.save_every_steps": 3}
    config = setting(**SETTINGS | MUON | settings)
    assert train_main(config) == 0
    alone, shared, stopped = (tmp_path / name for name in ("run", "shared", "stopped"))
    train_in_processes(2, config, f"train.output_dir={tmp_path / 'data'}")
    train_in_processes(2, config, f"train.output_dir={shared}", process=train_fsdp_process)
    for folder in (tmp_path / "data", shared):
        assert_same_run(folder, alone, 1e-3)  # torch's Muon computes in bfloat16
    shutil.copytree(shared, stopped)
    stop_at(stopped, 3)
    resume = ["train.resume=true", f"train.output_dir={stopped}"]
    train_in_processes(2, config, *resume, process=train_fsdp_process)
    assert_same_bits(stopped, shared)


def test_what_another_number_of_processes_cannot_go_on_with_is_refused(run, setting, train_main):
    folder = run(**{"model.dropout": 0.1})
    for path in list_checkpoints(folder):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"processes": [1, 2]}))
        (path / "manifest.json").unlink()
        write_manifest(path)
    with pytest.raises(InputError, match="by 1 processes, 2 to a sequence, resumed by 1, 1 to a sequence: with"):
        train_main(setting(**{"model.dropout": 0.1, "train.resume": True}))


def test_a_launch_file_that_shards_is_refused_where_accelerate_would_not(setting, train_main, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"^accelerate shards parameters \(FSDP\) on GPUs only"):
        train_main(setting())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.context_parallel_size": 2}, "^train.context_parallel_size is 2: must divide 1, the processes$"),
        (
            {"train.context_parallel_size": 17},
            "train.context_parallel_size is 17: must be at most train.sequence_length, 16$",
        ),
        ({"train.context_parallel_size": 0}, "train.context_parallel_size is 0: must be at least 1$"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(setting, train_main, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_main(setting(**changes))
    assert not (tmp_path / "run").exists()
