"""train.py on several processes: the losses of one, however they share a batch."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import TIMEOUT, start_processes
from small_models import assert_close
from small_runs import losses
from test_checkpoint import outcome, stop_at
from test_train import weights

import train
from training.config import InputError

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


@pytest.fixture
def train_in_processes(tmp_path_factory):
    """Trains in so many new processes."""

    def train_in_processes(count, config, *overrides):
        folder = tmp_path_factory.mktemp("group")
        start_processes(train_process, (count, str(folder), config, list(overrides)), count)

    return train_in_processes


def assert_same_run(folder, expected, tolerance):
    """Relative: what another order of summation may leave."""
    for key in ("loss", "grad_norm", "held_out_loss"):
        assert losses(folder, key) == pytest.approx(losses(expected, key), rel=tolerance)


WAYS = {
    "data": (2, [], 1e-6),
    "context": (2, ["train.context_parallel_size=2"], 1e-5),
    "longer context": (4, ["train.context_parallel_size=4"], 1e-5),
    "data and context": (4, ["train.context_parallel_size=2", "train.gradient_accumulation_steps=2"], 1e-5),
}


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_train_as_one_does(setting, train_main, tmp_path, train_in_processes, way):
    count, overrides, tolerance = WAYS[way]
    config = setting(**SETTINGS)
    train_in_processes(count, config, *overrides, f"train.output_dir={tmp_path / 'several'}")
    assert train_main(config) == 0
    expected = tmp_path / "run"
    assert len(losses(expected)) == 20 and losses(expected)[-1] < 0.9 * losses(expected)[0]
    assert_same_run(tmp_path / "several", expected, tolerance)


def test_processes_that_share_a_sequence_read_the_same_stream(
    setting, streaming, train_main, tmp_path, train_in_processes
):
    config = setting(**SETTINGS, **streaming)
    train_in_processes(2, config, "train.context_parallel_size=2", f"train.output_dir={tmp_path / 'several'}")
    assert train_main(config) == 0
    assert_same_run(tmp_path / "several", tmp_path / "run", 1e-5)


def test_processes_that_share_a_question_score_its_answer_once(setting, train_main, tmp_path, train_in_processes):
    task = {"data.files": [], "data.task": "parity", "data.task_lengths": [1, 14], "data.held_out_lengths": [3, 9]}
    config = setting(**SETTINGS | task)
    train_in_processes(2, config, "train.context_parallel_size=2", f"train.output_dir={tmp_path / 'several'}")
    assert train_main(config) == 0
    assert_same_run(tmp_path / "several", tmp_path / "run", 1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_a_resumed_run_over_contexts_equals_one_that_was_never_stopped(setting, tmp_path, train_in_processes, count):
    settings = {"train.steps": 4, "train.save_every_steps": 2, "model.dropout": 0.1, "train.context_parallel_size": 2}
    config, folder = setting(**SETTINGS | settings), tmp_path / "run"
    train_in_processes(count, config)
    (expected, rows), expected_weights = outcome(folder), weights(folder)
    assert sum(name.startswith("process_") for name in expected) == 2 * count
    stop_at(folder, 2)
    train_in_processes(count, config, "train.resume=true")
    resumed, resumed_rows = outcome(folder)
    assert resumed_rows == rows
    if count > 2:
        # DistributedDataParallel orders its buckets anew after the first step of a process, and gloo adds up three
        # numbers and more in an order of their place in the bucket.
        for name, weight in weights(folder).items():
            assert_close(weight, expected_weights[name], 1e-6)
        for name in ("model.safetensors", "optimizer.safetensors"):
            resumed.pop(name), expected.pop(name)
    assert resumed == expected


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
