"""What the benchmarks share: threads, the order of measuring, the figures, and the record of a run.

Every benchmark verifies its contenders first, then measures them with `interleave`, and hands each row to a `Report`,
which appends it to a JSON-lines file together with what is needed to repeat it and prints a table at the end.

Import this module before anything that loads numba: numba reads its number of threads once, at import.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

# One thread unless OMP_NUM_THREADS says otherwise: kernels are compared, not schedulers.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
os.environ["NUMBA_NUM_THREADS"] = str(THREADS)

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for training/, where a benchmark is started as a file

import torch  # noqa: E402

from training.allocator import keep_freed_memory  # noqa: E402
from training.precision import emulates_bf16  # noqa: E402

torch.set_num_threads(THREADS)
keep_freed_memory()  # for all contenders, as train.py does

now = time.process_time if THREADS == 1 else time.perf_counter  # for what one thread computes: not while others run
# How variables of the environment begin that change times: glibc's, and those that hold torch, oneDNN and numba to an
# older processor.
RECORDED = ("MALLOC_", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_")
PACKAGES = ("torch", "transformers", "numba", "triton")


class Samples(dict[Hashable, list[float]]):
    """Seconds by contender, one sample a round."""

    def seconds(self, name: Hashable) -> float:
        return median(self[name])

    def ratio(self, name: Hashable, base: Hashable) -> float:
        """Median over the rounds of name / base. Paired by round, so that a slow spell of the machine cancels."""
        return median(a / b for a, b in zip(self[name], self[base], strict=True))


def timed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Turn a function into one that returns how many seconds a call took."""

    def sample() -> float:
        start = clock()
        function()
        return clock() - start

    return sample


def interleave(contenders: dict[Hashable, Callable[[], float]], rounds: int) -> Samples:
    """Take one sample of every contender in each round, in an order that rotates from round to round.

    A contender returns the seconds that it measured (see `timed`). One untimed round warms up caches and compilers.
    """
    names = list(contenders)
    samples = Samples({name: [] for name in names})
    for name in names:
        contenders[name]()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever is running
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(contenders[name]())
    finally:
        gc.enable()
    return samples


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a call of `function` takes beyond what this process holds, in a forked process (Linux).

    Call it on something small before, which compiles and allocates for good, and on nothing large: what that leaves in
    the heap is taken again without being counted.
    """
    reader, writer = os.pipe()
    gc.collect()
    child = os.fork()
    if not child:  # never returns, whatever happens
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
            before = _memory("VmRSS")
            function()
            os.write(writer, str(_memory("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError("the process that was to measure the memory died")
    return int(answer)


def _memory(field: str) -> int:
    """Bytes, as /proc/self/status has them in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


@dataclass(frozen=True)
class TrainingRun:
    """The best model of a run of train.py."""

    held_out_loss: float  # the state carried through the text
    window_loss: float | None  # in disjoint windows of the training length, of a text
    step: int
    seconds: float  # of the whole process
    cpu_seconds: float
    parameters: int


def combinations(overrides: list[str]) -> list[list[str]]:
    """Of ["a.b=1,2", "c.d=3"]: [["a.b=1", "c.d=3"], ["a.b=2", "c.d=3"]]."""
    pairs = [override.split("=", 1) for override in overrides]
    tried = [[f"{key}={value}" for value in values.split(",")] for key, values in pairs]
    return [list(each) for each in itertools.product(*tried)]


def run_train(config: str, *overrides: str) -> TrainingRun:
    """`python train.py configs/CONFIG OVERRIDES` in a folder that is gone afterwards."""
    from modeling_minrnn import MinRNNForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "train.py", f"configs/{config}", *overrides, f"train.output_dir={run}"]
        started, used = time.perf_counter(), _cpu_seconds_of_children()
        subprocess.run(command, cwd=HERE.parent, check=True)
        seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds_of_children() - used
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        parameters = MinRNNForCausalLM.from_pretrained(run).num_parameters()
    best = min((row for row in rows if "held_out_loss" in row), key=lambda row: row["held_out_loss"])
    window_loss = next((row["held_out_window_loss"] for row in rows if "held_out_window_loss" in row), None)
    return TrainingRun(best["held_out_loss"], window_loss, best["step"], seconds, cpu_seconds, parameters)


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def relative_error(tensors: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> float:
    """The largest relative L2 error over pairs of tensors. NaN counts as infinite."""
    pairs = [(t.double(), r.double()) for t, r in zip(tensors, reference, strict=True)]
    errors = [float((t - r).norm() / r.norm()) for t, r in pairs]
    return max(math.inf if math.isnan(error) else error for error in errors)


def verify(name: str, error: float, tolerance: float) -> float:
    """Return the error, or refuse to time a contender that computes something else."""
    if not error <= tolerance:
        raise RuntimeError(f"{name}: relative error {error:.2g} is above {tolerance:.2g}; not timed")
    return error


@dataclass(frozen=True)
class Bound:
    """A measured figure with the target set for it."""

    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        if self.at_least is None and self.at_most is None:
            return _text(self.value)
        target = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return f"{_text(self.value)} {target} {'pass' if self.met else 'MISS'}"

    def to_json(self) -> dict[str, object]:
        return {"value": self.value, "at_least": self.at_least, "at_most": self.at_most, "met": self.met}


def parser(name: str, doc: str, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark takes."""
    flags = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=rounds, help=f"samples of each contender (default {rounds})")
    flags.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="only cases whose name contains a TEXT")
    output = HERE / "results" / f"{name}.jsonl"
    flags.add_argument("--output", type=Path, default=output, help="JSON lines to append to (default %(default)s)")
    flags.set_defaults(benchmark=name)
    return flags


class Report:
    """Collects rows; writes each at once, so that an interrupted run keeps what it measured."""

    def __init__(self, options: argparse.Namespace, device: str | None = None):
        """device: what is measured, if not the CPU."""
        self.options = options
        self.rows: list[dict[str, object]] = []
        self.run = {"benchmark": options.benchmark, "rounds": options.rounds, **_environment()}
        self.run["device"] = device or _cpu_name()
        options.output.parent.mkdir(parents=True, exist_ok=True)

    def wants(self, case: str) -> bool:
        """Whether --only selects this case; announces it if so."""
        selected = any(text in case for text in self.options.only)
        if selected:
            print(f"{self.options.benchmark}: {case} ...", file=sys.stderr, flush=True)
        return selected

    def add(self, **row: object) -> None:
        self.rows.append(row)
        plain = {key: value.to_json() if isinstance(value, Bound) else value for key, value in row.items()}
        with self.options.output.open("a") as file:
            file.write(json.dumps({**plain, **self.run}) + "\n")

    def print_table(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        cells = [columns] + [[_text(row.get(column)) for column in columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        bounds = [value for row in self.rows for value in row.values() if isinstance(value, Bound)]
        targets = [bound for bound in bounds if bound.at_least is not None or bound.at_most is not None]
        print(f"{sum(bound.met for bound in targets)} of {len(targets)} targets met; rows in {self.options.output}")


def measure_cells(name: str, doc: str, rounds: int, measure: Callable[[Report, str], None]) -> None:
    """A benchmark of the paper's two cells: `measure` is given the report and each of them that --only wants."""
    report = Report(parser(name, doc, rounds).parse_args())
    for cell_type in ("mingru", "minlstm"):
        if report.wants(cell_type):
            measure(report, cell_type)
    report.print_table()


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _environment() -> dict[str, object]:
    """What a reader needs to repeat the run."""
    spec = sys.modules["__main__"].__spec__  # of a module that was started by its name
    program = ["-m", spec.name] if spec else sys.argv[:1]
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(RECORDED)]
    return {
        # Of a copy without its repository, whoever made the copy says it (carry.py).
        "commit": os.environ.get("MINRNN_COMMIT") or _git("rev-parse", "--short=12", "HEAD"),
        # The results that earlier runs appended do not make the code another one.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "command": shlex.join([*variables, "python", *program, *sys.argv[1:]]),
        "threads": THREADS,
        "bf16": not emulates_bf16(),  # of the CPU
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*arguments: str) -> str:
    """What git answers; nothing where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    held_to = os.environ.get("ATEN_CPU_CAPABILITY", "").upper()
    return (names[0] if names else platform.processor()) + (held_to and f", restricted to {held_to}")
