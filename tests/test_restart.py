"""A launcher that repeats one command: whatever ended a start, the next goes on, and nothing is overwritten."""

import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import ROOT, outcome
from test_train_parallel import train_in_processes

import train
from training.checkpoint import list_checkpoints, save_checkpoint
from training.config import InputError
from training.report import read_metrics, read_rows


def starts(folder):
    """The step of each."""
    return [row["step"] for row in read_rows(folder / "starts.jsonl") if "command" in row]


def ends(folder):
    """The step and the exit code of each."""
    return [(row["step"], row["exit_code"]) for row in read_rows(folder / "starts.jsonl") if "exit_code" in row]


# ---- train.resume=auto


@pytest.fixture
def auto(setting):
    """The path of a configuration that is continued where there is a checkpoint and begun where there is none."""
    return lambda **changes: setting(**{"train.resume": "auto"}, **changes)


def test_the_same_command_begins_a_run_continues_it_and_leaves_a_finished_one(auto, tmp_path, train_main, monkeypatch):
    uninterrupted = tmp_path / "uninterrupted"
    assert train_main(auto(**{"train.output_dir": str(uninterrupted)})) == 0
    for last_step in (0, 4, 8):

        def save_and_fail(accelerator, folder, config, state, last_step=last_step):
            save_checkpoint(accelerator, folder, config, state)
            if state.progress.step == last_step:
                raise RuntimeError("power cut")

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(train, "save_checkpoint", save_and_fail)
            train_main(auto())
    for _ in range(2):
        assert train_main(auto()) == 0
        assert outcome(tmp_path / "run") == outcome(uninterrupted)
    assert starts(tmp_path / "run") == [0, 0, 4, 8, 8]
    assert ends(tmp_path / "run") == [(8, 0), (8, 0)]


@pytest.mark.parametrize("calls", range(5))
def test_a_run_killed_before_its_first_checkpoint_is_begun_again(auto, tmp_path, train_main, monkeypatch, calls):
    """It stops at each of the first writes in turn."""

    class Killed(BaseException):
        pass

    def fsync(descriptor, count=iter(range(100)), original=os.fsync):  # noqa: B008
        if next(count) == calls:
            raise Killed
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(Killed):
        train_main(auto())
    monkeypatch.undo()
    assert any((tmp_path / "run").iterdir()) and not list_checkpoints(tmp_path / "run")
    assert train_main(auto()) == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 8


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("thesis.txt", "is not empty and holds no run: choose another folder$"),
        ("model.safetensors", "holds no checkpoint$"),
        ("checkpoints/step-00000004/state.json", "holds no whole checkpoint$"),
    ],
)
def test_what_cannot_be_continued_is_not_begun_again(auto, tmp_path, train_main, path, message):
    (tmp_path / "run" / path).parent.mkdir(parents=True)
    (tmp_path / "run" / path).write_text("irreplaceable")
    if path != "thesis.txt":
        (tmp_path / "run" / "run.yaml").write_text("")
    before = {*(tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match=message):
        train_main(auto())
    assert (tmp_path / "run" / path).read_text() == "irreplaceable"
    assert {*(tmp_path / "run").rglob("*")} - {tmp_path / "run" / "run.lock"} == before


# ---- Two processes of torchrun

# Or torchrun hands the store of one start on to the next, and a process that reads the address of one that is gone
# before the new one has written its own waits for it: https://github.com/pytorch/pytorch/issues/135712
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

FAILING = """
import os, time

def say(what):  # line and end in one write: another process writes to the same pipe
    os.write(1, f"{what} {time.time()}{os.linesep}".encode())

say("began")
import runpy, signal
from accelerate import Accelerator

start = os.environ["START"] + os.environ["TORCHELASTIC_RESTART_COUNT"]
calls, backward = 0, Accelerator.backward

def failing(self, *arguments):
    global calls
    calls += 1
    if calls == 8 and self.process_index == 1:
        say("failed")
        if start == "first0":
            os.kill(os.getpid(), signal.SIGKILL)
        if start == "first1":
            raise RuntimeError("this device is gone")
        if start == "second0":
            os.kill(os.getppid(), signal.SIGTERM)
            while not self.flag_tensor:  # until torchrun has passed it on
                time.sleep(0.01)
    backward(self, *arguments)

Accelerator.backward = failing
runpy.run_path("train.py", run_name="__main__")
"""


def test_what_ends_one_process_ends_all_and_the_next_start_goes_on_to_the_same_bits(setting, tmp_path):
    config = setting(**{"train.steps": 30, "train.save_every_steps": 5, "model.dropout": 0.1})
    (tmp_path / "failing.py").write_text(FAILING)

    def torchrun(start):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        done = subprocess.run(
            [sys.executable, *launcher, tmp_path / "failing.py", config, "train.resume=auto"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "START": start, **NEW_STORE},
            capture_output=True,
            text=True,
            timeout=500,  # under load one start takes half a minute
        )
        assert done.returncode == 1, done.stderr
        return done.stdout, done.stderr

    train_in_processes(2, config, f"train.output_dir={tmp_path / 'uninterrupted'}")

    output, errors = torchrun("first")  # killed, started again, and failed
    ended = time.time()
    assert "RuntimeError: this device is gone" in errors[errors.index("failing.py FAILED") :]  # said by torchrun
    times = [line.split() for line in output.splitlines() if line.startswith(("began", "failed"))]
    assert [what for what, _ in times] == ["began", "began", "failed", "began", "began", "failed"]
    began, failed = float(times[3][1]), (float(times[2][1]), float(times[5][1]))
    assert began - failed[0] < 60 and ended - failed[1] < 60  # seconds until the other process has ended too

    output, _ = torchrun("second")  # terminated
    assert "stopped at step 18: the same command with train.resume=true continues it" in output

    train_in_processes(2, config, "train.resume=auto")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "uninterrupted")
    (checkpoint,) = list_checkpoints(tmp_path / "run")[-1:]
    states = [load_file(checkpoint / f"process_{rank}.safetensors")["cpu"] for rank in range(2)]
    assert not torch.equal(*states)  # of each process its own, for its dropout
    assert starts(tmp_path / "run") == [0, 5, 10, 18]
    assert ends(tmp_path / "run") == [(18, 75), (30, 0)]
