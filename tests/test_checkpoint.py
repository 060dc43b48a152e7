"""Checkpoints: a resumed run equals the uninterrupted one bit for bit, and damage or a failing disk loses nothing."""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import accelerate.optimizer
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from processes import start_processes
from safetensors.torch import load_file
from small_models import small_model
from small_runs import losses

import train
import training.checkpoint
from training.checkpoint import Progress, TrainingState, damage, list_checkpoints, load_checkpoint, save_checkpoint
from training.config import InputError, RunConfig, TrainConfig
from training.data import RandomWindows, StreamedWindows

ROOT = Path(__file__).parent.parent
STEPS = 6
# Dropout draws from the random state of torch, accumulation splits a step, and each step is evaluated and saved.
SETTINGS = {
    "model.dropout": 0.1,
    "train.steps": STEPS,
    "train.gradient_accumulation_steps": 2,
    "train.eval_every_steps": 1,
    "train.save_every_steps": 1,
}


@pytest.fixture
def kept(monkeypatch):
    """Every checkpoint stays, and each batch draws from all random states; returns the batches that were read."""
    monkeypatch.setattr(training.checkpoint, "KEPT_CHECKPOINTS", 10**6)
    batches = []
    for kind in (RandomWindows, StreamedWindows):

        def draw(self, original=kind.__next__):
            random.random(), np.random.random(), torch.rand(1)
            batches.append(original(self))
            return batches[-1]

        monkeypatch.setattr(kind, "__next__", draw)
    return batches


def digests(checkpoint):
    """What is in a checkpoint, but for the settings, which may differ."""
    assert damage(checkpoint) is None
    return {name: digest for name, digest in json.loads((checkpoint / "manifest.json").read_text()).items()
            if name != "run.yaml"}  # fmt: skip


def stop_at(folder, step):
    """Leave the folder as if the run had been killed right after it saved `step`."""
    for path in list_checkpoints(folder):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


def outcome(folder):
    """All that two equal runs have in common: parameters, optimizer, schedule, random states, position, losses."""
    checkpoints = list_checkpoints(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return digests(checkpoints[-1]), [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


# ---- Exact resume


@pytest.mark.parametrize(("accumulation", "stream"), [(2, False), (1, True)])
def test_a_run_resumed_at_any_step_ends_as_the_uninterrupted_one(run, streaming, kept, accumulation, stream):
    settings = SETTINGS | {"train.gradient_accumulation_steps": accumulation} | (streaming if stream else {})
    folder = run(**settings)
    expected, batches = outcome(folder), list(kept)
    assert len(batches) == STEPS
    for step in range(STEPS):
        stop_at(folder, step)
        kept.clear()
        run(**settings, **{"train.resume": True})
        assert outcome(folder) == expected
        assert all(torch.equal(*pair) for pair in zip(kept, batches[step:], strict=True))


def nothing(*arguments, **keywords):
    pass


# What sets each piece of the state.
PIECES = [
    (training.checkpoint, "load_model"),
    (accelerate.optimizer.AcceleratedOptimizer, "load_state_dict"),
    (RandomWindows, "load_state_dict"),
    (torch, "set_rng_state"),
    (random, "setstate"),
    (np.random, "set_state"),
    (training.checkpoint, "Progress"),
]


def test_a_piece_that_is_not_restored_shows(run, kept, monkeypatch, tmp_path):
    too_high = {"train.learning_rate": 3.0, "train.min_learning_rate_ratio": 1.0, "train.warmup_steps": 1}
    settings = SETTINGS | too_high
    folder = run(**settings)
    expected = outcome(folder)
    evaluations = losses(folder, "held_out_loss")
    assert min(evaluations) == evaluations[0]  # a best that only a run from the start has seen
    stop_at(folder, 3)
    shutil.copytree(folder, tmp_path / "stopped")
    for owner, name in [*PIECES, (None, None)]:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "stopped", folder)
        with monkeypatch.context() as patch:
            if owner is not None:  # of progress all but the step, which is how far the loop goes
                patch.setattr(owner, name, nothing if name != "Progress" else lambda step, **rest: Progress(step))
            run(**settings, **{"train.resume": True})
        assert (outcome(folder) == expected) == (owner is None), name


def train_anew(rank, config, overrides):
    assert train.main(config, overrides) == 0


def test_a_new_process_and_its_worker_go_on_as_the_old_ones_would_have(setting, streaming, train_main, tmp_path):
    """Two processes of one run do so in test_restart.py, two workers of one process in test_data.py."""
    config = setting(**SETTINGS, data=streaming["data"] | {"workers": 1})
    folder = tmp_path / "run"
    assert train_main(config, ["train.save_every_steps=4"]) == 0
    expected = outcome(folder)
    stop_at(folder, 4)
    start_processes(train_anew, (config, ["train.resume=true"]), 1)
    assert outcome(folder) == expected


@pytest.mark.parametrize("new_scale", [1024.0, 3.0])
def test_the_loss_scale_is_kept(tmp_path, new_scale):
    def state():
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters())
        return TrainingState(
            model, optimizer, RandomWindows([0] * 9, 2, 1, 0, slice(None)), progress=Progress(1)
        )  # fmt: skip

    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=new_scale)
    save_checkpoint(accelerator, tmp_path, RunConfig(train=TrainConfig(output_dir="")), state())
    accelerator.scaler = torch.amp.GradScaler("cpu")
    load_checkpoint(accelerator, tmp_path / "checkpoints" / "step-00000001", state())
    assert accelerator.scaler.get_scale() == new_scale


def test_no_checkpoint_holds_a_pickle(run):
    for checkpoint in list_checkpoints(run()):
        assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json", ".yaml"}


# ---- Damage


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "process_0.json", "process_0.safetensors",
         "run.yaml", "manifest.json")  # fmt: skip


def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(run, setting, train_main, capsys):
    """Each file in one way, the manifest in all; any file in any way: `make soak`."""
    folder = run()
    expected = outcome(folder)
    config = setting(**{"train.resume": True})
    ways = ("cut", "flipped", "deleted")
    for name, how in [*zip(FILES[:-1], 2 * ways), *zip(3 * FILES[-1:], ways)]:
        # In the checkpoint that the start before has written anew.
        file = folder / "checkpoints" / "step-00000008" / name
        data = file.read_bytes()
        if how == "deleted":
            file.unlink()
        else:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            file.write_bytes(data[:middle] if how == "cut" else flipped)
        capsys.readouterr()
        assert train_main(config) == 0
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
        assert len(warnings) == 1 and "step-00000008/" in warnings[0]
        assert name in warnings[0] or name == "manifest.json"  # a flipped digest says that its file is another
        assert outcome(folder) == expected


def test_a_run_with_damaged_checkpoints_only_is_refused_and_left_as_it_is(run, setting, train_main, capsys):
    folder = run()
    for checkpoint in list_checkpoints(folder):
        (checkpoint / "state.json").write_text("{}")
    capsys.readouterr()
    with pytest.raises(InputError, match="run holds no whole checkpoint$"):
        train_main(setting(**{"train.resume": True}))
    assert capsys.readouterr().out.count("state.json: its SHA-256 is not that of manifest.json") == 2
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004", "step-00000008"]


def test_a_save_removes_older_checkpoints_but_not_because_of_newer_damaged_ones(run, setting, train_main):
    folder = run(**{"train.save_every_steps": 2})  # leaves 6 and 8
    for step in (20, 30):
        shutil.copytree(folder / "checkpoints" / "step-00000008", folder / "checkpoints" / f"step-{step:08d}")
        (folder / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")
    assert train_main(setting(**{"train.resume": True, "train.steps": 10})) == 0
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]
    assert steps == [8, 10, 20, 30]
    assert [damage(path) is None for path in list_checkpoints(folder)] == [True, True, False, False]


def test_a_manifest_leads_to_no_other_file(run):
    checkpoint = list_checkpoints(run())[-1]
    os.mkfifo(checkpoint / "pipe")  # to open one is to wait for a writer
    for name in ("../../run.yaml", "/dev/zero", "pipe", "absent"):
        (checkpoint / "manifest.json").write_text(json.dumps({name: "0" * 64}))
        assert "no such file, but manifest.json lists it" in damage(checkpoint)


# ---- Saves that fail


@pytest.fixture
def small_disk():
    """Writes beyond so many bytes a file fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [1000, 20_000, 50_000])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(run, setting, train_main, small_disk, size):
    folder = run()
    expected = digests(list_checkpoints(folder)[-1])
    config = setting(**{"train.resume": True, "train.steps": 10, "train.eval_every_steps": 100})
    small_disk(size)
    with pytest.raises((InputError, OSError)) as error:
        train_main(config)
    small_disk(resource.RLIM_INFINITY)
    assert "\n" not in str(error.value) and "File too large" in str(error.value)
    checkpoints = list_checkpoints(folder)
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000008"]
    assert digests(checkpoints[-1]) == expected
    assert not list(folder.rglob("*.partial/*"))


def test_a_failure_at_any_call_to_the_disk_loses_no_checkpoint_and_no_model(run, setting, train_main, monkeypatch):
    """Read-only from the n-th call on, for each n: whatever was there is still whole."""
    folder = run()
    original = os.fsync
    refused = 0
    for allowed in range(1000):
        calls = iter(range(10**6))

        def fsync(descriptor, calls=calls, allowed=allowed):
            if next(calls) >= allowed:
                raise OSError(30, "Read-only file system")
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        before = list_checkpoints(folder)[-1]
        try:
            done = train_main(setting(**{"train.resume": True, "train.steps": 9, "train.eval_every_steps": 100}))
        except (InputError, OSError) as error:
            refused += 1
            assert "Read-only file system" in str(error) and "\n" not in str(error)
            done = None
        assert damage(before) is None and all(damage(path) is None for path in list_checkpoints(folder))
        load_file(folder / "model.safetensors")
        if done == 0:
            break
    assert refused > 10
    assert losses(folder)
