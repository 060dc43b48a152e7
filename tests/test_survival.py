"""Runs that are killed, and files that are damaged, at random: a short form here, the long one in `make soak`."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from small_runs import train_until_killed
from test_checkpoint import ROOT, digests, outcome

import train
from training.checkpoint import check_output_dir, damage, list_checkpoints
from training.config import InputError, load_config


def soak(*values):
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.fixture
def processes(monkeypatch):
    """New processes that start with everything imported."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_runs"])
    return context


@pytest.mark.parametrize("kills", [5, soak(50)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(run, setting, processes, tmp_path, kills):
    settings = {"train.steps": 60, "train.eval_every_steps": 10, "train.save_every_steps": 3, "model.dropout": 0.1}
    expected = outcome(run(**settings, **{"train.output_dir": str(tmp_path / "uninterrupted")}))
    config, folder = setting(**settings), tmp_path / "run"
    chance = random.Random(0)
    killed = finished = newest = 0
    while killed < kills or not finished:
        if killed == kills:
            calls, seconds = None, None  # to the end
        elif killed % 2:
            calls, seconds = None, chance.uniform(0, 3)
        else:
            calls, seconds = chance.randrange(60), None  # within the first four saves
        process = processes.Process(target=train_until_killed, args=(config, ["train.resume=auto"], calls))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        checkpoints = list_checkpoints(folder)
        assert [damage(path) for path in checkpoints] == [None] * len(checkpoints)
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints]
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        if (folder / "model.safetensors").exists():
            load_file(folder / "model.safetensors")
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:
            assert process.exitcode == 0
            assert outcome(folder) == expected
            finished += 1
        if process.exitcode == 0:
            shutil.rmtree(folder)
            newest = 0


def mutated(data: bytes, chance: random.Random) -> bytes | None:
    """Cut short, with bits flipped, with a stretch of garbage, or (None) gone."""
    how = chance.randrange(4)
    if how == 0:
        return data[: chance.randrange(len(data))]
    if how == 3:
        return None if chance.random() < 0.3 else chance.randbytes(chance.randrange(2 * len(data)))
    damaged = bytearray(data)
    if how == 1:
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else:
        start = chance.randrange(len(data))
        damaged[start : start + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))
    return bytes(damaged)


@pytest.mark.parametrize("mutations", [60, soak(500)])
def test_a_damaged_checkpoint_is_named_and_never_used(run, setting, mutations):
    folder = run()
    earlier, newest = list_checkpoints(folder)
    config = load_config(setting(**{"train.resume": True}), [])
    files = sorted(newest.iterdir())
    chance = random.Random(0)
    for number in range(mutations):
        path = files[number % len(files)]
        data = path.read_bytes()
        damaged = mutated(data, chance)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        warnings = []
        used = check_output_dir(config, warnings.append)
        if used == newest:  # nothing was changed, or but the blanks between the digests
            assert damaged == data or json.loads(damaged) == json.loads(data)
        else:
            assert used == earlier and len(warnings) == 1 and "\n" not in warnings[0]
            assert path.name in warnings[0] or path.name == "manifest.json"  # whose digest may have been hit
        path.write_bytes(data)
    assert digests(newest)


@pytest.mark.parametrize("mutations", [60, soak(500)])
def test_a_damaged_configuration_is_one_line_or_a_configuration(setting, mutations):
    path = setting(**{"train.sample_prompts": ["a: b", "${c}"[1:]]})
    with open(path, "rb") as file:
        data = file.read()
    forms = [data, json.dumps(yaml.safe_load(data), indent=1).encode()]  # YAML, and JSON, which is YAML
    chance = random.Random(1)
    refused = 0
    for number in range(mutations):
        with open(path, "wb") as file:
            file.write(mutated(forms[number % 2], chance) or b"")
        try:
            train.build_model(load_config(path, []).model, train.load_tokenizer("byte", ()))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(error)
    assert refused > mutations / 2


def test_a_configuration_runs_no_code(setting, tmp_path):
    for text in (
        f"train: !!python/object/apply:os.mkdir ['{tmp_path}/made']",
        f"train: {{output_dir: !!python/object/new:os.mkdir ['{tmp_path}/made']}}",
    ):
        (tmp_path / "evil.yaml").write_text(text)
        with pytest.raises(InputError, match="could not determine a constructor for the tag"):
            load_config(str(tmp_path / "evil.yaml"), [])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("steps", "bytes_a_step"), [(600, 3000), soak(10_000, 100)])
def test_the_memory_of_a_run_does_not_grow(run, monkeypatch, steps, bytes_a_step):
    sizes = []
    page = resource.getpagesize()
    evaluate = train.evaluate

    def measured(*arguments):
        loss = evaluate(*arguments)
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * page)
        return loss

    monkeypatch.setattr(train, "evaluate", measured)
    run(
        **{
            "train.steps": steps,
            "train.eval_every_steps": steps // 50,
            "train.save_every_steps": steps // 5,
            "train.log_every_steps": 10,
        }
    )
    settled = sizes[10:]  # what is allocated once has been
    slope = np.polyfit(np.arange(len(settled)) * (steps // 50), settled, 1)[0]
    assert slope < bytes_a_step
