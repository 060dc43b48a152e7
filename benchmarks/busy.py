"""How much slower is a step of the demo beside processes that take every core, and what do threads have to do with it?

A step of configs/demo.yaml, its model on its batch, in processes of their own: of one thread, and of two whose
waiting threads spin (as libgomp has it) or sleep (as training/__init__.py has it). First alone, then beside so many
processes that do nothing but count.

Target: asleep, beside two busy processes on two cores, at worst 3 times slower than alone.

    python benchmarks/busy.py [--rounds 7] [--busy 2]
"""

import os
import subprocess
import sys
from collections.abc import Callable

from harness import HERE, Bound, Report, interleave, parser

SPINS = {"spins": "300000", "sleeps": "1000"}  # the first is libgomp's own
STEPS = 5  # a sample
WORKER = """
import sys, time, training, torch
from training.allocator import keep_freed_memory
from training.config import load_config
from training.tokenizers import byte_tokenizer
import train

keep_freed_memory()
torch.manual_seed(0)
tokenizer = byte_tokenizer()
config = load_config("configs/demo.yaml", [])
model = train.build_model(config.model, tokenizer).train()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(256, (config.train.batch_size, config.train.sequence_length))
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print((time.perf_counter() - start) / int(line), flush=True)
"""


def start(threads: int, waiting: str) -> Callable[[], float]:
    """A process that waits until it is asked for a sample: the seconds of a step."""
    settings = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPINS[waiting], "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=HERE.parent, env=os.environ | settings, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def sample() -> float:
        process.stdin.write(f"{STEPS}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return sample


def main() -> None:
    flags = parser("busy", __doc__, rounds=7)
    flags.add_argument("--busy", type=int, default=2, help="busy processes beside (default %(default)s)")
    options = flags.parse_args()
    report = Report(options)
    contenders = {key: start(*key) for key in ((1, "sleeps"), (2, "spins"), (2, "sleeps"))}
    alone = interleave(contenders, options.rounds)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(options.busy)]
    try:
        beside = interleave(contenders, options.rounds)
    finally:
        for other in others:
            other.kill()
    for key in contenders:
        threads, waiting = key
        slower = beside.seconds(key) / alone.seconds(key)
        report.add(
            worker_threads=threads,
            waiting=waiting,
            ms_alone=1e3 * alone.seconds(key),
            busy=options.busy,
            ms_beside=1e3 * beside.seconds(key),
            slower=Bound(slower, at_most=3 if waiting == "sleeps" else None),
        )
    report.print_table()


if __name__ == "__main__":
    main()
