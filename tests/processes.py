"""Functions in several processes of one gloo group, on the CPU."""

import gc
import os
import runpy
import socket
import sys
import tempfile
import unittest.mock
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

TIMEOUT = timedelta(minutes=1)  # of a collective: a test that waits for ever says nothing
# The ranks are forked from a process that has imported this once and runs no threads.
PRELOAD = ["preloaded"]


def start_processes(function: Callable, arguments: tuple, count: int) -> None:
    """Run function(rank, *arguments) in each of `count` processes; raises what one of them raised."""
    torch.multiprocessing.set_forkserver_preload(PRELOAD)
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # it would not find the modules
        forkserver.ensure_running()
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")


def run_in_processes(function: Callable, count: int, *arguments: Any) -> list[Any]:
    """What function(*arguments) returns in each of `count` processes of one group, by rank: tensors and plain data."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_join_group, (count, folder, function, arguments), count)
        return [torch.load(f"{folder}/result-{rank}.pt") for rank in range(count)]


def run_script_in_processes(script: str, count: int, *arguments: Any) -> str:
    """Run a program as torchrun does, in `count` processes that find each other; returns what they write to stderr."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        place["MASTER_PORT"] = free.getsockname()[1]
        free.close()
        Path(folder, "script.py").write_text(script)
        start_processes(_run_script, (folder, list(map(str, arguments)), place), count)
        return "".join(Path(folder, f"stderr-{rank}").read_text() for rank in range(count))


def _run_script(rank: int, folder: str, arguments: list[str], place: dict[str, Any]) -> None:
    os.environ |= {name: str(value) for name, value in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()}
    torch.set_num_threads(1)
    with Path(folder, f"stderr-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    sys.argv = [f"{folder}/script.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _join_group(rank: int, count: int, folder: str, function: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=TIMEOUT
    )
    try:
        torch.save(function(*arguments), f"{folder}/result-{rank}.pt")
    finally:
        gc.collect()  # DistributedDataParallel must not be the last owner of the process group, see train.py
        torch.distributed.destroy_process_group()
