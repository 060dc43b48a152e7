"""Cases measured one after the other in a process of their own, which may fail, die, hang or lose its device: the next
case goes on without it."""

import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

CONTEXT: multiprocessing.context.BaseContext = multiprocessing.get_context("fork")  # nothing is imported again
PATIENCE, LEAST_LIMIT = 4, 120.0  # a case may take so many times its estimate, or so many seconds


@dataclass(frozen=True)
class Case:
    section: str
    name: str
    seconds: float  # about how long it takes
    measure: Callable[[], dict[str, object]]
    alone: bool = False  # in a process that has done nothing before


def measured(
    cases: Sequence[Case], until: float = math.inf, is_sound: Callable[[], bool] = lambda: True
) -> Iterator[tuple[Case, dict[str, object]]]:
    """Each case with its row and its "seconds"; "failed" says why there is no row, "skipped" that it was not begun.

    Args:
        until: by time.monotonic(). What would not be ready by then is skipped, what is not is stopped.
        is_sound: asked in the process after each case; False: the next case needs a new one.
    """
    worker: tuple[multiprocessing.process.BaseProcess, Connection] | None = None
    try:
        for index, case in enumerate(cases):
            left = until - time.monotonic()
            if case.seconds > left:
                yield case, {"skipped": f"takes about {case.seconds:.0f} s, {max(left, 0):.0f} s are left"}
                continue
            if case.alone:
                worker = _stop(worker)
            worker = worker or _start(cases, is_sound)
            started = time.monotonic()
            row, sound = _ask(*worker, index, min(left, max(LEAST_LIMIT, PATIENCE * case.seconds)))
            if case.alone or not sound:
                worker = _stop(worker)
            yield case, {**row, "seconds": time.monotonic() - started}
    finally:
        _stop(worker)


def _start(cases, is_sound):
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(cases, is_sound, there))
    process.start()
    there.close()  # so that `here` ends with the process
    return process, here


def _stop(worker) -> None:
    """With all that it has started."""
    if worker is not None:
        process, pipe = worker
        pipe.close()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()


def _ask(process, pipe: Connection, index: int, limit: float) -> tuple[dict[str, object], bool]:
    pipe.send(index)
    try:
        if pipe.poll(limit):
            return pipe.recv()
    except EOFError:
        process.join()
        return {"failed": f"its process ended with exit code {process.exitcode}"}, False
    return {"failed": f"stopped after {limit:.0f} s"}, False


def _serve(cases, is_sound, pipe: Connection) -> None:
    os.setsid()  # a group, to be stopped as one
    while True:
        try:
            index = pipe.recv()
        except EOFError:
            return
        try:
            row = cases[index].measure()
        except Exception as error:
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        pipe.send((row, is_sound()))
