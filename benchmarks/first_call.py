"""How long do the first calls of a model take on a CPU, when nothing is compiled yet, and when it was before?

Timed, each in a process of its own: the first forward of a prompt, the first token after it, and the first forward and
backward with a loss, of a small model on the numba kernels; with an empty folder for what numba compiles, and again
with what is then in it. Seconds of CPU, of which other processes take nothing, are reported beside those of the clock.

Target: the first forward <= 4 s of CPU with an empty folder.

    python benchmarks/first_call.py [--only mingru] [--rounds 3]
"""

import json
import os
import subprocess
import sys
import tempfile
from statistics import median

from harness import HERE, Bound, Report, measure_cells

PROGRAM = """
import json, sys, time
import torch
from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

config = MinRNNConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, cell_type=sys.argv[1])
model = MinRNNForCausalLM(config).eval()
ids, seconds = torch.zeros(1, 16, dtype=torch.long), {}

def call(name, function):
    started = time.perf_counter(), time.process_time()
    result = function()
    seconds[name] = time.perf_counter() - started[0], time.process_time() - started[1]
    return result

with torch.no_grad():
    cache = call("forward", lambda: model(ids, use_cache=True)).past_key_values
    call("token", lambda: model(ids[:, :1], past_key_values=cache))
model.train()
call("forward and backward", lambda: model(ids, labels=ids).loss.backward())
print(json.dumps(seconds))
"""


def first_calls(cell_type: str, folder: str) -> dict[str, list[float]]:
    environment = os.environ | {"NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-c", PROGRAM, cell_type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(report: Report, cell_type: str) -> None:
    samples: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(report.options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("empty", "filled"):
                for name, seconds in first_calls(cell_type, folder).items():
                    samples.setdefault((state, name), []).append(seconds)
    for (state, name), found in samples.items():
        wall, cpu = (median(values) for values in zip(*found))
        limit = 4 if (state, name) == ("empty", "forward") else None
        report.add(cell=cell_type, folder=state, call=name, s=wall, cpu_s=Bound(cpu, at_most=limit))


if __name__ == "__main__":
    measure_cells("first_call", __doc__, 3, measure)
