"""Runs that are killed, and files that are damaged, at random: a short form here, the long one in `make soak`."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
from multiprocessing import connection

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_models import random_ids, small_model
from small_runs import train_until_killed
from test_checkpoint import ROOT, digests, outcome
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from modeling_minrnn import load_state, save_state
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
    context.set_forkserver_preload(["preloaded"])
    return context


@pytest.mark.parametrize(("count", "kills"), [(1, 5), (2, 4), soak(1, 50), soak(2, 50)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(setting, processes, tmp_path, count, kills):
    """All of its processes at a random moment, or one of them inside a save: the others then end by themselves."""
    config = setting(
        **{"train.steps": 60, "train.eval_every_steps": 10, "train.save_every_steps": 3, "model.dropout": 0.1}
    )

    def exit_codes(folder, seconds=None, victim=None, calls=None):
        overrides = ["train.resume=auto", f"train.output_dir={folder}"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = (count, free.getsockname()[1])
        ranks = [
            processes.Process(target=train_until_killed, args=(config, overrides, rank, group, calls))
            if rank == victim
            else processes.Process(target=train_until_killed, args=(config, overrides, rank, group))
            for rank in range(count)
        ]
        for rank in ranks:
            rank.start()
        if connection.wait([rank.sentinel for rank in ranks], seconds):
            for rank in ranks:
                rank.join(60)
                assert not rank.is_alive()
        for rank in ranks:
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in ranks]

    assert set(exit_codes(tmp_path / "uninterrupted")) == {0}
    expected = outcome(tmp_path / "uninterrupted")
    folder = tmp_path / "run"
    chance = random.Random(0)
    killed = finished = newest = 0
    while killed < kills or not finished:
        if killed == kills:
            codes = exit_codes(folder)  # to the end
        elif killed % 2:
            codes = exit_codes(folder, seconds=chance.uniform(0, 3))
        else:
            victim = killed // 2 % count
            # Within the first four saves: a save is some 15 calls in the first process and one in any other.
            codes = exit_codes(folder, victim=victim, calls=chance.randrange(4 if victim else 60))
        checkpoints = list_checkpoints(folder)
        assert [damage(path) for path in checkpoints] == [None] * len(checkpoints)
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints]
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
        if (folder / "model.safetensors").exists():
            load_file(folder / "model.safetensors")
        if -signal.SIGKILL in codes:
            killed += 1
        else:
            assert set(codes) == {0}
            assert outcome(folder) == expected
            finished += 1
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
def test_a_damaged_model_is_named_and_loads_or_is_refused_with_a_reason(run, mutations):
    folder = run()
    names = sorted(json.loads((folder / "manifest.json").read_text()))
    names = ["manifest.json", *(name for name in names if not name.endswith(".py"))]  # code is not even read
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} < set(names)
    chance = random.Random(2)
    refused = 0
    for number in range(mutations):
        path = folder / names[number % len(names)]
        data = path.read_bytes()
        damaged = mutated(data, chance)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        reason = damage(folder)
        if path.name == "manifest.json":
            assert reason or json.loads(damaged) == json.loads(data)
        else:
            assert damaged == data or f"{path}: " in reason
        try:
            AutoModelForCausalLM.from_pretrained(folder)
            AutoTokenizer.from_pretrained(folder)
        except Exception as error:
            refused += 1
            assert isinstance(error, (OSError, ValueError, RuntimeError)) or type(error) is Exception  # by tokenizers
            assert str(error)
        path.write_bytes(data)
    assert refused > mutations / 4  # a flipped bit in a weight gives another number
    assert damage(folder) is None


def test_a_model_of_pickles_runs_no_code(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    folder = run()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    with pytest.raises((OSError, pickle.UnpicklingError), match="."):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("mutations", [60, soak(500)])
def test_a_damaged_state_of_a_conversation_is_named_and_refused(tmp_path, mutations):
    model, path = small_model(), tmp_path / "talk.safetensors"
    cache = model(random_ids(2, 9), use_cache=True).past_key_values
    save_state(cache, path, model)
    data = path.read_bytes()
    chance = random.Random(3)
    refused = 0
    for _ in range(mutations):
        damaged = mutated(data, chance)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        try:
            loaded = load_state(path, model)
        except (OSError, ValueError) as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # blanks that pad the header
            assert all(torch.equal(*pair) for pair in zip(loaded[0], cache[0]))
        path.write_bytes(data)
    assert refused > 0.9 * mutations


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

    def measured(*arguments, **settings):
        loss = evaluate(*arguments, **settings)
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
