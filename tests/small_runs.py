"""Runs of train.py that take seconds."""

import itertools
import os
import signal
import sys
from pathlib import Path

from omegaconf import OmegaConf

import train
from training import checkpoint
from training.report import read_metrics

TEXT = "".join(f"{a} times {b} is {a * b}.\n" for a in range(30) for b in range(12))


def write_config(folder: Path, **changes) -> str:
    """The path of a configuration file, changed by "section.key" arguments; the run goes to `folder`/run."""
    (folder / "corpus.txt").write_text(TEXT)
    config = OmegaConf.create(
        {
            "model": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32},
            "data": {"files": [str(folder / "corpus.txt")], "held_out_tokens": 200},
            "train": {
                "steps": 8,
                "batch_size": 4,
                "sequence_length": 16,
                "learning_rate": 0.01,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "eval_every_steps": 4,
                "save_every_steps": 4,
                "output_dir": str(folder / "run"),
            },
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    return str(folder / "config.yaml")


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder) if key in row]


def train_until_killed(
    config: str, overrides: list[str], rank: int, group: tuple[int, int], calls: int | None = None
) -> None:
    """To be called in a process of its own, which dies at the so many-th step of writing a checkpoint.

    group: the number of processes that train together, and a free port.
    """
    processes, port = group
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    saving = False
    count = itertools.count()

    def deadly(function):
        def call(*arguments, **keywords):
            if saving and next(count) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    def save_checkpoint(*arguments):
        nonlocal saving
        saving = True
        checkpoint.save_checkpoint(*arguments)
        saving = False

    for owner, name in ((os, "fsync"), (os, "replace"), (checkpoint, "save_file"), (checkpoint, "save_model")):
        setattr(owner, name, deadly(getattr(owner, name)))
    train.save_checkpoint = save_checkpoint
    sys.exit(train.main(config, overrides))
