"""How fast is the scan on one CPU thread, against the paper's listing and against a plain copy?

Timed: `minrnn_scan` from gate pre-activations to states, in fp32 unless --dtype says more, with the backends "log"
(the paper's cumsum and logcumsumexp), "torch" and "numba"; forward without gradient, and forward + backward to the
pre-activations. "copy" copies as many bytes within existing memory as the pass has to move at least. With N = B T D
and G = 2 (minGRU) or 3 (minLSTM) pre-activations a state, in elements of 4 bytes (of 2 in half precision), that is
    forward   reads projected (G N), writes states (N):                                                  (G + 1) N
    backward  reads projected (G N), states (N) and their gradient (N), writes projected's gradient (G N): (2 G + 2) N
A copy reads and writes every byte, so it copies half of that sum.

error: the largest relative L2 error of states, final state and gradient against the float64 loop. It is reported for
"log", which loses precision with the length, and must be <= 3e-6 for the others before anything is timed (in half
precision 1.5e-3 for float16 and 6e-3 for bfloat16, the rounding of what goes in and out).
saved: bytes that autograd keeps for the backward pass, per state element; projected and states alone are 4 (G + 1).

Targets, forward + backward in fp32:  torch >= 6x the speed of log (4.5x at 1,262144,64), numba >= 25x (20x).

--cells times every cell beside minGRU instead, forward + backward by "numba". Targets: at most 2.5 times its time
for those that are convex combinations, at most 4 times for the others; error against the float64 loop as above.

--bounds times "numba" at the first shape, in ns a state, beside its two bounds: the copy, and the same kernel on what
fits a core's cache (T = 64 less T = 16 of one sequence, which leaves out what a call costs).
The least of the rounds, as what else runs takes of the cache too.

    python benchmarks/scan.py [--only 16,256,384] [--rounds 11] [--dtype bfloat16] [--cells | --bounds]
"""

from collections.abc import Callable
from functools import partial

import torch
from harness import Bound, Report, interleave, now, parser, relative_error, timed, verify

from modeling_minrnn import scan_numba
from modeling_minrnn.cells import (
    HGRN,
    LMU,
    LRU,
    RGLRU,
    RWKV4,
    Aaren,
    Convex,
    MinGRU,
    MinLSTM,
    SignedMinGRU,
    cell_of,
)
from modeling_minrnn.scan import minrnn_scan, stack_parameters
from modeling_minrnn.scan_blocks import ScanInputs

SHAPES = [(16, 256, 384), (8, 1024, 512), (64, 512, 64), (1, 16384, 512), (1, 262144, 64)]  # B, T, D
BACKENDS = ["log", "torch", "numba"]
LONGEST = (1, 262144, 64)
SPEEDUPS = {"torch": (6, 4.5), "numba": (25, 20)}  # over "log": elsewhere, at LONGEST
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}


def forward(projected: torch.Tensor, gradient: torch.Tensor, cell_type: str, backend: str) -> None:
    with torch.no_grad():
        minrnn_scan(projected, cell_type, backend=backend)


def forward_backward(
    projected: torch.Tensor, gradient: torch.Tensor, cell_type: str, backend: str
) -> list[torch.Tensor]:
    """States, final state, and the gradient of sum(states * gradient) with respect to `projected`."""
    states, final_state = minrnn_scan(projected, cell_type, backend=backend)
    return [states.detach(), final_state.detach(), *torch.autograd.grad(states, projected, gradient)]


def copy(bytes_moved: int) -> Callable[[], object]:
    """A copy within existing memory that reads half of `bytes_moved` and writes the other half."""
    source, target = torch.ones(2, bytes_moved // 2, dtype=torch.uint8)
    return lambda: target.copy_(source)


def saved_bytes(projected: torch.Tensor, cell_type: str, backend: str) -> int:
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept: a freed address could come back as another tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        minrnn_scan(projected, cell_type, backend=backend)
    return sum(storage.nbytes() for storage in storages.values())


def measure(report: Report, shape: tuple[int, int, int], cell_type: str, dtype: torch.dtype) -> None:
    B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(B, T, sum(cell_of(cell_type).blocks(D)), generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(B, T, D, generator=generator).to(dtype)

    oracle = forward_backward(projected.detach().double().requires_grad_(), gradient.double(), cell_type, "loop")
    errors = {b: relative_error(forward_backward(projected, gradient, cell_type, b), oracle) for b in BACKENDS}
    for backend in SPEEDUPS:
        verify(f"{backend} {cell_type} {shape}", errors[backend], TOLERANCES[dtype])
    del oracle

    elements = gradient.numel()
    saved = {backend: saved_bytes(projected, cell_type, backend) / elements for backend in BACKENDS}
    tensors_moved = len(cell_of(cell_type).blocks(D)) + 1
    for name, run, bytes_moved in (
        ("forward", forward, gradient.nbytes * tensors_moved),
        ("forward+backward", forward_backward, gradient.nbytes * 3 * tensors_moved),
    ):
        contenders = {
            backend: timed(partial(run, projected, gradient, cell_type, backend), now) for backend in BACKENDS
        }
        samples = interleave({"copy": timed(copy(bytes_moved), now), **contenders}, report.options.rounds)
        for backend in BACKENDS:
            has_target = backend in SPEEDUPS and run is forward_backward and dtype == torch.float32
            report.add(
                shape=",".join(map(str, shape)),
                cell=cell_type,
                dtype=str(dtype).removeprefix("torch."),
                timed=name,
                backend=backend,
                ms=1e3 * samples.seconds(backend),
                speedup_over_log=Bound(
                    samples.ratio("log", backend), at_least=SPEEDUPS[backend][shape == LONGEST] if has_target else None
                ),
                times_copy=samples.ratio(backend, "copy"),
                error=errors[backend],
                saved_bytes_per_element=saved[backend],
            )


CELLS = [
    MinGRU(), MinGRU("linear"), MinLSTM(), MinLSTM("linear"), SignedMinGRU(), Aaren(num_heads=8), RWKV4(), LRU(),
    RGLRU(), HGRN(), LMU(memory_order=16),
]  # fmt: skip


def measure_cells(report: Report, shape: tuple[int, int, int]) -> None:
    B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(B, T, D, generator=generator)
    runs, errors, convex = {}, {}, {}
    for cell in CELLS:
        torch.manual_seed(0)
        parameters = cell.initial_parameters(D, 1, 4, None, torch.device("cpu"))
        projected = torch.randn(B, T, sum(cell.blocks(D)), generator=generator).requires_grad_()

        def run(projected=projected, cell=cell, parameters=parameters, backend="numba"):
            states, final_state = minrnn_scan(projected, cell, parameters=parameters, backend=backend)
            gradients = torch.autograd.grad(states, projected, gradient.to(states.dtype))
            return [states.detach(), final_state.detach(), *gradients]

        exact = {name: parameter.double() for name, parameter in parameters.items()}
        errors[cell.spec] = relative_error(
            run(), run(projected.detach().double().requires_grad_(), cell, exact, "loop")
        )
        verify(f"{cell.spec} {shape}", errors[cell.spec], TOLERANCES[torch.float32])
        runs[cell.spec] = timed(run, now)
        one = stack_parameters(cell, parameters, projected)
        log_sums = torch.zeros(1, 1, cell.log_sums(D))
        convex[cell.spec] = cell.system is None and isinstance(cell.gates(projected[:1, :1], one, log_sums), Convex)
    samples = interleave(runs, report.options.rounds)
    for cell in CELLS:
        report.add(
            shape=",".join(map(str, shape)),
            cell=cell.spec,
            dtype="float32",
            timed="forward+backward",
            backend="numba",
            ms=1e3 * samples.seconds(cell.spec),
            times_mingru=Bound(samples.ratio(cell.spec, "mingru"), at_most=2.5 if convex[cell.spec] else 4),
            error=errors[cell.spec],
        )


def kernels_alone(B: int, T: int, D: int, cell_type: str) -> dict[str, Callable[[], object]]:
    cell = cell_of(cell_type)
    projected, none, zeros = torch.randn(B, T, sum(cell.blocks(D))), torch.empty(0, D), torch.zeros(B, D)
    inputs = ScanInputs(projected, none, zeros, zeros[0], None, None, cell, "numba")
    outputs, rest, final_state = scan_numba.forward(inputs)
    gradients = torch.randn(B, T, D), torch.zeros_like(rest), zeros
    return {
        "forward": partial(scan_numba.forward, inputs),
        "backward": partial(scan_numba.backward, inputs, outputs, rest, *gradients),
    }


def measure_bounds(report: Report, cell_type: str) -> None:
    B, T, D = SHAPES[0]
    columns, calls, (long, short) = sum(cell_of(cell_type).blocks(D)), 8, (64, 16)
    tensors_moved = {"forward": columns + D, "backward": 2 * (columns + D)}
    for name in tensors_moved:
        memory = kernels_alone(B, T, D, cell_type)[name]
        cached = {length: kernels_alone(1, length, D, cell_type)[name] for length in (long, short)}
        runs: dict[object, Callable[[], float]] = {"memory": timed(memory, now)}
        runs["copy"] = timed(copy(4 * B * T * tensors_moved[name]), now)
        for length, kernel in cached.items():
            runs[length, "cold"] = timed(kernel, now)
            runs[length] = timed(lambda kernel=kernel: [kernel() for _ in range(calls)], now)
        least = {run: min(times) for run, times in interleave(runs, report.options.rounds).items()}
        report.add(
            shape=f"{B},{T},{D}",
            cell=cell_type,
            timed=name,
            backend="numba",
            ns=1e9 * least["memory"] / (B * T * D),
            ns_copy=1e9 * least["copy"] / (B * T * D),
            ns_in_cache=1e9 * (least[long] - least[short]) / (calls * (long - short) * D),
        )


def main() -> None:
    flags = parser("scan", __doc__, rounds=11)
    flags.add_argument("--cells", action="store_true", help="every cell beside minGRU")
    flags.add_argument("--bounds", action="store_true", help="how fast it could be")
    flags.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    options = flags.parse_args()
    report = Report(options)
    for shape in SHAPES[:3] if options.cells else []:
        if report.wants(",".join(map(str, shape))):
            measure_cells(report, shape)
    for cell_type in ("mingru", "minlstm") if options.bounds else ():
        measure_bounds(report, cell_type)
    for shape in [] if options.cells or options.bounds else SHAPES:
        for cell_type in ("mingru", "minlstm"):
            if report.wants(f"{','.join(map(str, shape))} {cell_type}"):
                measure(report, shape, cell_type, getattr(torch, options.dtype))
    report.print_table()


if __name__ == "__main__":
    main()
