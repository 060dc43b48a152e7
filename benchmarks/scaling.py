"""What training on several devices keeps and sends, counted, and how far it would scale, predicted.

Counted, in processes that share each sequence (gloo, fp32), for 6 layers of width 384 and vocabulary 256:
    activation_bytes  what autograd keeps for the backward pass, on the process that keeps most
    scan_bytes        what a process sends of the recurrence in a forward pass, a layer: 2 B D numbers, whatever T is
    scan_bytes_back   the same in the backward pass: as many for each process
    conv_bytes        what it sends of the convolution windows in a forward pass, a layer
    conv_bytes_back   the same in the backward pass: the gradients of the windows of all
    gradient_bytes    what DistributedDataParallel reduces, a step
The collectives are wrapped: bytes are those of the tensors that a process hands to them. The loss over all processes
is compared with that of one.

Predicted, from these bytes and the measured seconds of a training step of one process, for N devices of T tokens each:
    efficiency = step / (step' + sent)
    step, step'   measured, alone and with the scans that sharing a sequence costs beside
    sent          over the collectives of a step, the sum of
        all-gather of b bytes from each    latency ceil(log2 N) + (N - 1) b / link         (recursive doubling)
        all-reduce of b bytes              2 latency ceil(log2 N) + 2 (N - 1) / N b / link (reduce-scatter, all-gather)
with LATENCY_S, and link the bytes a second of the slowest link of a device. "data": each device has sequences of its
own, step' = step, and only gradients are sent. "context": all share a sequence of N T tokens, and send states as well.
Nothing is sent while something is computed, though DistributedDataParallel does: what it hides is not counted on. The
step is measured where this runs; a CPU is far slower than devices with such links, which flatters them by as much.

Measured, on the cores of this machine ("cores"): a step of 16 sequences of 256 by one process with two threads, and by
two processes with a thread each and half of the sequences, which reduce their gradients (DistributedDataParallel). The
two take turns, in processes of their own.

    python benchmarks/scaling.py [--links 450 50 12.5 1.25] [--only context cores] [--rounds 3]
"""

import contextlib
import gc
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import Bound, Report, Samples, interleave, parser, timed, verify
from models import LAYERS, VOCABULARY, minrnn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from modeling_minrnn import NO_LOGITS, MinRNNForCausalLM

BATCH = 2
LENGTHS = [512, 2048]  # of the whole sequence
RANKS = [1, 2, 4]
DEVICES = [8, 64, 1024]
LINKS_GB_PER_S = [450, 50, 12.5, 1.25]  # NVLink 4, InfiniBand NDR, 100 and 10 Gbit/s Ethernet
LATENCY_S = 1e-5
TOLERANCE = 1e-5  # of the loss, fp32


def tokens(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, length + 1), generator=torch.Generator().manual_seed(0))


def loss_of(model: Callable, windows: torch.Tensor, rank: int, ranks: int, group: dist.ProcessGroup | None):
    inputs, targets = (part.tensor_split(ranks, 1)[rank] for part in (windows[:, :-1], windows[:, 1:]))
    return model(
        inputs,
        labels=targets,
        shift_labels=targets,
        num_items_in_batch=windows[:, 1:].numel() / ranks,
        context_parallel_group=group,
        use_cache=False,
        logits_to_keep=NO_LOGITS,
    ).loss


@contextlib.contextmanager
def counted_bytes(model: MinRNNForCausalLM, parallel: DistributedDataParallel) -> Iterator[Counter[str]]:
    """Bytes that this process hands to collectives: "scan", "scan_back", "conv", "conv_back" and "gradient"."""
    sent: Counter[str] = Counter()
    D = model.config.state_size

    def counted(collective: Callable) -> Callable:
        def call(*arguments: Any, **keywords: Any) -> Any:
            x = arguments[-1]  # all_gather(list, x), all_reduce(x)
            if x.dim() == 1:
                name = "gradient"
            elif x.shape[-1] == D:
                name = "scan" if x.dim() == 3 else "scan_back"  # (2, B, D), and that of all ranks
            else:
                name = "conv" if x.dim() == 3 else "conv_back"  # (B, K - 1, H + K - 1), and that of all ranks
            sent[name] += x.nbytes
            return collective(*arguments, **keywords)

        return call

    parallel.register_comm_hook(None, allreduce_hook)  # as without it, but by dist.all_reduce
    collectives = {name: counted(getattr(dist, name)) for name in ("all_gather", "all_reduce")}
    with mock.patch.multiple(dist, **collectives):
        yield sent


def count(cell_type: str, length: int) -> dict[str, float]:
    """In one of the processes: the loss over all, what this one keeps and what it sends."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    model = minrnn(cell_type)
    parallel = DistributedDataParallel(model)
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    with counted_bytes(model, parallel) as sent:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = loss_of(parallel, tokens(length), group.rank(), group.size(), group)
        loss.backward()
    total = loss.detach() / group.size()
    dist.all_reduce(total)
    del parallel
    gc.collect()  # DistributedDataParallel must not be the last owner of the process group, see train.py
    dist.destroy_process_group()
    return {"loss": total.item(), "activation_bytes": sum(kept.values()), **sent}


def in_processes(ranks: int, function: Callable, *arguments: object) -> list:
    """What the function returns in each process, by rank."""
    config = LaunchConfig(1, 1, ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    results = elastic_launch(config, function)(*arguments)
    return [results[rank] for rank in range(ranks)]


def step_seconds(cell_type: str, length: int, rounds: int) -> tuple[float, float]:
    """Of a training step of one process, alone and as one of those that share a sequence."""
    dist.init_process_group("gloo")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    windows = tokens(length).to(device)
    model = minrnn(cell_type).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(group: dist.ProcessGroup | None) -> None:
        loss_of(model, windows, 0, 1, group).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    ways = {"alone": timed(lambda: step(None)), "shared": timed(lambda: step(dist.group.WORLD))}
    samples = interleave(ways, rounds)
    dist.destroy_process_group()
    return samples.seconds("alone"), samples.seconds("shared")


def seconds_of_a_step(model: torch.nn.Module, windows: torch.Tensor) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(windows, labels=windows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return interleave({"step": timed(step)}, 5).seconds("step")


def data_parallel_seconds(cell_type: str) -> float:
    """Of a step of this process on its share of the sequences."""
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    model = minrnn(cell_type)
    parallel = DistributedDataParallel(model) if ranks > 1 else model
    seconds = seconds_of_a_step(parallel, torch.randint(VOCABULARY, (16 // ranks, 256)))
    del parallel
    gc.collect()  # as in `count`
    dist.destroy_process_group()
    return seconds


def on_two_cores(cell_type: str, rounds: int) -> dict[str, object]:
    samples = Samples({"threads": [], "processes": []})
    for _ in range(rounds):
        for way, ranks, threads in (("threads", 1, "2"), ("processes", 2, "1")):
            with mock.patch.dict(os.environ, OMP_NUM_THREADS=threads, NUMBA_NUM_THREADS=threads):
                samples[way].append(max(in_processes(ranks, data_parallel_seconds, cell_type)))
    return {
        "section": "cores", "cell": cell_type, "T": 256, "threads_ms": 1e3 * samples.seconds("threads"),
        "processes_ms": 1e3 * samples.seconds("processes"),
        "threads_over_processes": samples.ratio("threads", "processes"),
    }  # fmt: skip


def gather_seconds(nbytes: float, devices: int, link: float) -> float:
    return LATENCY_S * math.ceil(math.log2(devices)) + (devices - 1) * nbytes / link


def reduce_seconds(nbytes: float, devices: int, link: float) -> float:
    return 2 * (LATENCY_S * math.ceil(math.log2(devices)) + (devices - 1) / devices * nbytes / link)


def efficiencies(alone: float, shared: float, sent: dict[str, float], devices: int, link: float) -> dict[str, float]:
    """ "data" and "context", by the formula above. sent: bytes of a step of one rank; link: bytes a second."""
    gradients = reduce_seconds(sent["gradient"], devices, link)
    layer = {name: nbytes / LAYERS for name, nbytes in sent.items()}
    states = sum(gather_seconds(layer[name], devices, link) for name in ("scan", "scan_back", "conv"))
    states += reduce_seconds(devices * layer["conv"], devices, link)  # conv_back, of so many devices
    return {
        "data": alone / (alone + gradients),
        "context": alone / (shared + gradients + LAYERS * states),
    }


def main() -> None:
    flags = parser("scaling", __doc__, rounds=3)
    flags.add_argument("--links", type=float, nargs="+", default=LINKS_GB_PER_S, help="GB/s (default %(default)s)")
    options = flags.parse_args()
    report = Report(options)
    for cell_type in ("mingru", "minlstm"):
        if report.wants(f"cores {cell_type}"):
            report.add(**on_two_cores(cell_type, options.rounds))
        for length in LENGTHS:
            for ranks in RANKS:
                if report.wants(f"context {cell_type} {length} {ranks}"):
                    report.add(**counted(cell_type, length, ranks))
        if report.wants(f"prediction {cell_type}"):
            [(alone, shared)] = in_processes(1, step_seconds, cell_type, LENGTHS[0], options.rounds)
            sent = in_processes(2, count, cell_type, LENGTHS[0])[0]
            for link in options.links:
                for devices in DEVICES:
                    report.add(
                        section="prediction", cell=cell_type, T=LENGTHS[0], step_ms=1e3 * alone,
                        shared_step_ms=1e3 * shared, link_gb_per_s=link, devices=devices,
                        **efficiencies(alone, shared, sent, devices, 1e9 * link),
                    )  # fmt: skip
    report.print_table()


def counted(cell_type: str, length: int, ranks: int) -> dict[str, object]:
    """A row about processes that share a sequence."""
    processes = in_processes(ranks, count, cell_type, length)
    model, windows = minrnn(cell_type), tokens(length)
    with torch.no_grad():
        expected = loss_of(model, windows, 0, 1, None).item()
    verify(f"{cell_type} T={length} ranks={ranks}", abs(processes[0]["loss"] / expected - 1), TOLERANCE)
    most = {name: max(process[name] for process in processes) for name in processes[0]}
    state_bytes = 4 * BATCH * model.config.state_size
    return {
        "section": "context", "cell": cell_type, "T": length, "ranks": ranks,
        "activation_bytes": most["activation_bytes"],
        "scan_bytes": Bound(most["scan"] / LAYERS, at_most=2 * state_bytes),
        "scan_bytes_back": Bound(most["scan_back"] / LAYERS, at_most=2 * ranks * state_bytes),
        "conv_bytes": most["conv"] / LAYERS,
        "conv_bytes_back": most["conv_back"] / LAYERS,
        "gradient_bytes": most["gradient"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
