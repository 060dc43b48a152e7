"""Does memory stay flat, and speed, as a sequence grows to a million tokens: in training, and in reading a prompt?

One CPU thread, fp32, batch 1, causal language models of 6 layers, width 128, vocabulary 256. Training is forward, loss
and backward, after a first one on 64 tokens. Contenders:
    chunked  MinRNNForCausalLM by `sequence_chunked_backward`, CHUNK tokens at a time
    plain    the same model, one backward pass over everything
    gpt2     from transformers, sdpa attention; parameters as the model's, and a position table of T rows besides
    read     MinRNNForCausalLM reading a prompt, PREFILL_CHUNK tokens at a time, and the file of its state
Each row is measured in a process of its own. Memory is what the process held at most (ru_maxrss) beyond its peak after
the first step; time is that of the CPU, as the machine may be shared. plain and gpt2 go on to longer sequences until
one took more than 2 GB or TIME_LIMIT_S. Before that the gradients of chunked are compared with those of plain.

Targets: at T = 1,048,576 chunked in less than 2 GB; read at no less than 0.9 of its speed at T = 65,536, its state
file below 100 kB. All lengths take about 15 minutes.

    python benchmarks/long_context.py [--only "chunked 1048576"]
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import Bound, Report, parser, relative_error, verify
from matplotlib.figure import Figure
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from modeling_minrnn import (
    NO_LOGITS,
    MinRNNConfig,
    MinRNNForCausalLM,
    save_state,
    sequence_chunked_backward,
)

LENGTHS = [4**n * 1024 for n in range(6)]  # 1024 to 1,048,576
CHUNK, PREFILL_CHUNK = 1024, 4096
WARM_UP = 64
GB = 1e9
MEMORY_LIMIT_GB, TIME_LIMIT_S = 2.0, 60.0
STATE_LIMIT_BYTES = 100_000
STEADY = 65_536  # the length to whose speed that at the longest is held
TOLERANCE = 1e-5


def minrnn() -> MinRNNForCausalLM:
    torch.manual_seed(0)
    return MinRNNForCausalLM(MinRNNConfig(vocab_size=256, hidden_size=128, num_hidden_layers=6))


def gpt2(length: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # Attention has 4 H^2 parameters where minGRU has 3 H^2.
    mlp_width = 4 * 128 - 128 // 2
    config = GPT2Config(
        vocab_size=256, n_embd=128, n_inner=mlp_width, n_layer=6, n_head=4, n_positions=length, embd_pdrop=0.0,
        attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))


def plain(model: PreTrainedModel, ids: torch.Tensor) -> None:
    # All logits of a million tokens are a GB: no model here is charged for them.
    keep = {"logits_to_keep": NO_LOGITS} if isinstance(model, MinRNNForCausalLM) else {}
    model(input_ids=ids, labels=ids, use_cache=False, **keep).loss.backward()


def chunked(model: PreTrainedModel, ids: torch.Tensor) -> None:
    sequence_chunked_backward(model, ids, ids, CHUNK)


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for chunk in ids.split(PREFILL_CHUNK, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return cache


STEPS = {"chunked": chunked, "plain": plain, "gpt2": plain, "read": read}


def measure(contender: str, length: int) -> dict[str, float]:
    """Called in a process of its own."""
    model = gpt2(length) if contender == "gpt2" else minrnn()
    step, ids = STEPS[contender], token_ids(length)
    step(model, ids[:, :WARM_UP])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    result = step(model, ids)
    seconds = time.process_time() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    row = {
        "parameters": model.num_parameters(),
        "cpu_seconds": seconds,
        "tokens_per_cpu_s": length / seconds,
        "peak_gb": kilobytes * 1024 / GB,
    }
    if contender == "read":
        with tempfile.TemporaryDirectory() as folder:
            row["state_bytes"] = save_state(result, Path(folder) / "state", model)
    return row


def error_of_chunked() -> float:
    gradients = []
    for step in (chunked, plain):
        model = minrnn()
        step(model, token_ids(2 * CHUNK + 100))
        gradients.append([parameter.grad for parameter in model.parameters()])
    return relative_error(*gradients)


def in_own_process(function: Callable, *arguments: object) -> Any:
    """This process stays small: at its start a process counts what the one that starts it held at most."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def plot(rows: Path, picture: Path) -> None:
    """Peak memory and speed against T, from the latest rows of each contender and length."""
    latest: dict[tuple[str, int], dict] = {}
    for row in map(json.loads, rows.read_text().splitlines()):
        values = {key: value.get("value") if isinstance(value, dict) else value for key, value in row.items()}
        latest.setdefault((row["contender"], row["T"]), {}).update(values)
    figure = Figure(figsize=(10, 4), layout="constrained")
    labels = {"peak_gb": "peak memory beyond the model's, GB", "tokens_per_cpu_s": "tokens per CPU second"}
    for place, (key, label) in enumerate(labels.items(), 1):
        axes = figure.add_subplot(1, 2, place, xscale="log", yscale="log", xlabel="T, tokens", ylabel=label)
        for contender in STEPS:
            points = sorted((T, row[key]) for (name, T), row in latest.items() if name == contender and key in row)
            if points:
                axes.plot(*zip(*points), "o-", label=contender, linewidth=1, markersize=4)
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> None:
    options = parser("long_context", __doc__, rounds=1).parse_args()
    report = Report(options)
    verify("chunked", in_own_process(error_of_chunked), TOLERANCE)
    for contender in STEPS:
        steady = None
        for length in LENGTHS:
            if not report.wants(f"{contender} {length}"):
                continue
            row = in_own_process(measure, contender, length)
            spent = row["peak_gb"] > MEMORY_LIMIT_GB or row["cpu_seconds"] > TIME_LIMIT_S
            if length == STEADY:
                steady = row["tokens_per_cpu_s"]
            if length == LENGTHS[-1] and contender == "chunked":
                row["peak_gb"] = Bound(row["peak_gb"], at_most=MEMORY_LIMIT_GB)
            if contender == "read":
                row["state_bytes"] = Bound(row["state_bytes"], at_most=STATE_LIMIT_BYTES)
                if length == LENGTHS[-1] and steady:
                    row["speed_ratio"] = Bound(row["tokens_per_cpu_s"] / steady, at_least=0.9)
            report.add(T=length, contender=contender, **row)
            if spent and contender in ("plain", "gpt2"):
                break
    report.print_table()
    plot(options.output, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
