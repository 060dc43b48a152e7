"""Is the scan right on this GPU, how near is it to the memory's bandwidth, and what does it gain over its peers?

Checks come first; a check that fails ends the run before anything is timed. Every row goes to results/gpu.jsonl at
once, and results/gpu.md is rendered from it: the last run of each case, and "not yet measured" for the others.

    python benchmarks/gpu.py [--only bandwidth] [--rounds 15]     without a GPU: the machine code alone
    python benchmarks/gpu.py --render     only render results/gpu.md
    python benchmarks/gpu.py --dry-run    every case once on tiny shapes on the CPU, kernels interpreted; to a folder
                                          of its own

Timed is the device: a contender is captured into a CUDA graph (where it lets itself be captured), so that neither
Python nor the launch counts, and replayed in turn with the others. "copy" is the bandwidth of a copy of 1 GiB within
the device's memory, measured in the same run, in bytes read and written. A scan of N = B T D states in bf16 moves at
least (G + 1) * 2 N bytes forward, G = 2 (minGRU) or 3 (minLSTM), and (2 G + 1 + 1/8) * 2 N backward, where every
eighth row of states is read again. Peers that take gates get them from a compiled elementwise function.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch  # noqa: E402
from harness import HERE, Bound, Report, Samples, interleave, parser, relative_error, timed  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel  # noqa: E402

from modeling_minrnn import NO_LOGITS, MinRNNConfig, MinRNNForCausalLM  # noqa: E402
from modeling_minrnn.cells import cell_of  # noqa: E402
from modeling_minrnn.modeling_minrnn import MinRNNRecurrence  # noqa: E402
from modeling_minrnn.scan import minrnn_scan  # noqa: E402

DEVICE = torch.device("cpu" if DRY or not torch.cuda.is_available() else "cuda")
CELLS = ("mingru", "minlstm")
SHAPES = [(8, 2048, 1024), (1, 65536, 1024), (64, 512, 512), (16, 4096, 2048)]  # B, T, D
UGLY = [(1, 1, 1), (3, 2, 5), (2, 63, 33), (2, 1000, 100), (1, 2049, 257), (5, 300, 64)]
SUMMARY = HERE / "results" / "gpu.md"


@dataclass(frozen=True)
class Case:
    section: str
    name: str
    measure: Callable[[], dict[str, object]]


CASES: list[Case] = []


def case(section: str, *variants: object) -> Callable:
    """Register a function as one case a variant, which is its argument; without variants, as one."""

    def register(function: Callable) -> Callable:
        for variant in variants or (None,):
            arguments = () if variant is None else variant if isinstance(variant, tuple) else (variant,)
            name = " ".join([function.__name__.replace("_", " "), *map(str, arguments)])
            CASES.append(Case(section, name, functools.partial(function, *arguments)))
        return function

    return register


def small(*shape: int) -> tuple[int, ...]:
    """The shape itself, or a tiny one for a dry run."""
    return tuple(min(size, 2 + 3 * i) for i, size in enumerate(shape)) if DRY else shape


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(dtype)


# Timing


def sampler(function: Callable[[], object], repeats: int = 10) -> Callable[[], float]:
    """Seconds of one call on the device."""
    if DEVICE.type == "cpu":
        return timed(function)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled, tuned and warm before it is captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                function()
        play = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

        def play() -> None:
            for _ in range(repeats):
                function()

    def sample() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        play()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats

    return sample


def compare(contenders: dict[str, Callable[[], object]]) -> Samples:
    return interleave({name: sampler(function) for name, function in contenders.items()}, ROUNDS)


ROUNDS = 1


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source, target = torch.ones(2, 1 << (14 if DRY else 30), dtype=torch.uint8, device=DEVICE)
    return 2 * source.numel() / compare({"copy": lambda: target.copy_(source)}).seconds("copy")


def forward_and_backward(function: Callable, inputs: list[Tensor], gradient: Tensor) -> Callable[[], object]:
    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, gradient)

    return run


# 1. Checks


def outcome(cell_type: str, shape, dtype, backend: str, masked: bool = False, shift: float = 0.0) -> list[Tensor]:
    """States, final state and gradients."""
    B, T, D = shape
    projected = normal(B, T, sum(cell_of(cell_type).blocks(D)), dtype=torch.float32)
    sign = 1.0 if cell_type == "mingru" else -1.0
    projected[..., :D] += sign * shift
    projected = projected.to(dtype)
    initial_state = normal(B, D, dtype=torch.float32, seed=1)
    masks = {}
    if masked:
        masks = {"reset_mask": normal(B, T, seed=2) > 1.5, "padding_mask": normal(B, T, seed=3) > 1}
    d_states, d_final_state = normal(B, T, D, dtype=dtype, seed=4), normal(B, D, dtype=torch.float32, seed=5)
    exact = backend == "loop"  # in float64
    inputs = [x.double() if exact else x for x in (projected, initial_state)]
    inputs = [x.requires_grad_() for x in inputs]
    outputs = minrnn_scan(inputs[0], cell_type, inputs[1], backend=backend, **masks)
    upstream = [d.to(y.dtype) for d, y in zip((d_states, d_final_state), outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


@case("checks", *((cell, dtype) for cell in CELLS for dtype in ("float32", "bfloat16")))
def parity_with_the_float64_loop(cell_type: str, dtype: str) -> dict[str, object]:
    """The largest relative L2 error over ugly shapes, masks, and gates that forget, remember or do neither."""
    tolerance = 3e-6 if dtype == "float32" else 4e-3
    dtype, error = getattr(torch, dtype), 0.0
    for shape in [small(*shape) for shape in (UGLY[3:4] if DRY else UGLY)]:
        for masked in (False, True):
            for shift in (0.0, 8.0, -12.0):
                expected = outcome(cell_type, shape, dtype, "loop", masked, shift)
                error = max(error, relative_error(outcome(cell_type, shape, dtype, "triton", masked, shift), expected))
    # Interpreted, a cast to bfloat16 truncates.
    return {"error": Bound(error, at_most=2 * tolerance if DRY else tolerance)}


@case("checks", *CELLS)
def two_runs_are_equal_to_the_bit(cell_type: str) -> dict[str, object]:
    shape = small(1, 65536, 1024)
    first, second = (outcome(cell_type, shape, torch.bfloat16, "triton") for _ in range(2))
    return {"unequal_tensors": Bound(sum(not torch.equal(a, b) for a, b in zip(first, second)), at_most=0)}


@case("checks", "memcheck", "racecheck")
def compute_sanitizer(tool: str) -> dict[str, object]:
    """On small shapes, in a process of its own."""
    if DRY or shutil.which("compute-sanitizer") is None:
        return {"result": "compute-sanitizer is not installed"}
    script = "import gpu, torch; [gpu.outcome(c, s, torch.bfloat16, 'triton', m) for c in gpu.CELLS " + (
        "for s in gpu.UGLY for m in (False, True)]"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", script]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return {"exit_code": Bound(run.returncode, at_most=0), "result": run.stdout.strip().splitlines()[-1]}


# 2. Bandwidth


@case("bandwidth", *((cell, *shape) for shape in SHAPES for cell in CELLS))
def fraction_of_copy(cell_type: str, *shape: int) -> dict[str, object]:
    B, T, D = small(*shape)
    G = len(cell_of(cell_type).blocks(0))
    projected, gradient = normal(B, T, G * D), normal(B, T, D, seed=1)
    scan = functools.partial(minrnn_scan, cell_type=cell_type, backend="triton")
    inputs = [projected.clone().requires_grad_()]
    samples = compare(
        {
            "forward": lambda: scan(projected),
            "both": forward_and_backward(lambda x: scan(x)[0], inputs, gradient),
        }
    )
    moved = {"forward": (G + 1) * 2 * B * T * D, "both": (3 * G + 2 + 1 / 8) * 2 * B * T * D}
    fractions = {name: size / samples.seconds(name) / copy_bandwidth() for name, size in moved.items()}
    large = shape in SHAPES[2:]
    return {
        "forward_us": 1e6 * samples.seconds("forward"),
        "both_us": 1e6 * samples.seconds("both"),
        "forward_of_copy": Bound(fractions["forward"], at_least=0.85 if large else 0.75),
        "both_of_copy": Bound(fractions["both"], at_least=0.75),
        "copy_gb_per_s": copy_bandwidth() / 1e9,
    }


# 3. Peers


def gates(projected: Tensor) -> tuple[Tensor, Tensor]:
    """minGRU's a and (1 - a) * c."""
    k, x = projected.chunk(2, -1)
    return torch.sigmoid(-k), torch.sigmoid(k) * torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def peers(B: int, T: int, D: int) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """By name, a function that imports and makes a peer: projected (B, T, 2 D) -> states (B, T, D)."""
    compiled_gates = gates if DRY else torch.compile(gates)

    def hgrn(name: str):
        from fla.ops import hgrn as ops

        function = getattr(ops, name)

        def run(projected: Tensor) -> Tensor:
            a, b = compiled_gates(projected)
            return function(b, a.log())[0]

        return run

    def accelerated(module: str):
        scan = __import__(f"accelerated_scan.{module}", fromlist=["scan"]).scan

        def run(projected: Tensor) -> Tensor:
            a, b = (x.mT.contiguous() for x in compiled_gates(projected))
            return scan(a, b).mT

        return run

    def mingru_scans():
        os.environ["MINGRU_SCAN"] = "triton"
        from mingru.min_gru import linear_scan

        return lambda projected: linear_scan(*compiled_gates(projected))[1]

    def mambapy():
        from mambapy.pscan import pscan

        def run(projected: Tensor) -> Tensor:
            a, b = compiled_gates(projected)
            return pscan(a[..., None], b[..., None])[..., 0]

        return run

    def mingru_pytorch():
        from minGRU_pytorch import minGRU

        layer = minGRU(D)
        layer.to_hidden_and_gate = nn.Identity()
        return lambda projected: layer(projected.roll(D, -1))  # its halves are [candidate | gate]

    def associative_scan():
        from torch._higher_order_ops.associative_scan import associative_scan

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        def run(projected: Tensor) -> Tensor:
            return associative_scan(combine, gates(projected), dim=1, combine_mode="generic" if DRY else "pointwise")[
                1
            ]

        return run if DRY else torch.compile(run)

    return {
        "fla fused_recurrent_hgrn": functools.partial(hgrn, "fused_recurrent_hgrn"),
        "fla chunk_hgrn": functools.partial(hgrn, "chunk_hgrn"),
        "accelerated-scan warp": functools.partial(accelerated, "warp"),
        "accelerated-scan scalar": functools.partial(accelerated, "scalar"),
        "mingru-scans": mingru_scans,
        "mambapy": mambapy,
        "minGRU-pytorch": mingru_pytorch,
        "compiled associative_scan": associative_scan,
    }


AHEAD_OF_PEER = {"fla fused_recurrent_hgrn": 10.0, "fla chunk_hgrn": 4.0, "minGRU-pytorch": 30.0}  # at SHAPES[0]


@case("peers", *SHAPES)
def minGRU_against(*shape: int) -> dict[str, object]:  # noqa: N802
    """How many times faster than each, forward and backward, from pre-activations to states and back."""
    B, T, D = small(*shape)
    gradient = normal(B, T, D, seed=1)
    ours = functools.partial(minrnn_scan, cell_type="mingru", backend="triton")
    contenders, row = {}, {}
    functions = {"ours": lambda: lambda x: ours(x)[0]} | peers(B, T, D)
    for name, make in functions.items():
        inputs = [normal(B, T, 2 * D).requires_grad_()]
        try:
            run = forward_and_backward(make(), inputs, gradient)
            run()
            contenders[name] = run
        except Exception as error:  # a peer that is absent, or refuses the shape: its row says so
            if name == "ours":
                raise
            row[name] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    samples = compare(contenders)
    for name in contenders.keys() - {"ours"}:
        everywhere = 1.0 if name != "minGRU-pytorch" else 30.0
        at_least = AHEAD_OF_PEER.get(name, 1.0) if shape == SHAPES[0] else everywhere
        row[name] = Bound(samples.ratio(name, "ours"), at_least=at_least)
    return {"ours_us": 1e6 * samples.seconds("ours")} | row


# 4. Layers


class Layer(nn.Module):
    """The projection and the scan, as the paper has its layer."""

    def __init__(self, cell_type: str, input_size: int, hidden_size: int):
        super().__init__()
        self.cell_type = cell_type
        self.projection = nn.Linear(input_size, sum(cell_of(cell_type).blocks(hidden_size)), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return minrnn_scan(self.projection(x), self.cell_type, backend="triton")[0]


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    parameters = list(layer.parameters())

    def run() -> tuple[Tensor, ...]:
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(output.sum(), parameters)

    return run


@case(
    "layers",
    *((cell, *size) for size in [(512, 512, 64, 512), (512, 512, 64, 4096), (10, 100, 64, 1000)] for cell in CELLS),
)
def over_cudnn(cell_type: str, *size: int) -> dict[str, object]:
    """Forward and backward of one layer (input, hidden, B, T), bf16; cuDNN's nn.GRU or nn.LSTM over ours."""
    H, D, B, T = small(*size)
    x = normal(B, T, H)
    library = {"mingru": nn.GRU, "minlstm": nn.LSTM}[cell_type](H, D, batch_first=True).to(DEVICE, torch.bfloat16)
    ours = Layer(cell_type, H, D).to(DEVICE, torch.bfloat16)
    samples = compare({"ours": layer_step(ours, x), "library": layer_step(library, x)})
    ahead = Bound(samples.ratio("library", "ours"), at_least=10 if size[-1] == 4096 else 1)
    return {"ours_us": 1e6 * samples.seconds("ours"), "library_over_ours": ahead}


@case("layers", ("mingru", 512, 175), ("mingru", 4096, 1324), ("minlstm", 512, 235), ("minlstm", 4096, 1361))
def over_a_loop_of_cells(cell_type: str, length: int, target: float) -> dict[str, object]:
    """The paper's own comparison (section 4.1): nn.GRUCell or nn.LSTMCell in a Python loop, batch 64, hidden 512."""
    B, T, D = small(64, length, 512)
    x = normal(B, T, D)
    cell = {"mingru": nn.GRUCell, "minlstm": nn.LSTMCell}[cell_type](D, D).to(DEVICE, torch.bfloat16)
    ours = Layer(cell_type, D, D).to(DEVICE, torch.bfloat16)

    def loop() -> tuple[Tensor, ...]:
        state, outputs = None, []
        for t in range(T):
            state = cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.autograd.grad(torch.stack(outputs, 1).sum(), list(cell.parameters()))

    def on_the_clock(function: Callable[[], object]) -> Callable[[], float]:  # the loop's launches are its cost
        def run() -> None:
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return timed(run)

    samples = interleave({"ours": on_the_clock(layer_step(ours, x)), "loop": on_the_clock(loop)}, min(ROUNDS, 3))
    return {
        "loop_ms": 1e3 * samples.seconds("loop"),
        "loop_over_ours": Bound(samples.ratio("loop", "ours"), at_least=target),
    }


# 5. A training step of 125M parameters


def language_model(name: str, vocabulary: int, width: int, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers)
    if name in CELLS:
        model = MinRNNForCausalLM(MinRNNConfig(**sizes, cell_type=name))
    elif name == "llama":
        sizes |= dict(num_attention_heads=max(1, width // 64), intermediate_size=8 * width // 3)
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    else:
        model = MambaForCausalLM(MambaConfig(**sizes | dict(num_hidden_layers=2 * layers)))
    return model.to(DEVICE, torch.bfloat16).train()


@case("training step", *CELLS, "llama", "mamba")
def of_125M_parameters(name: str) -> dict[str, object]:  # noqa: N802
    """bf16, 16 rows of 2048; MFU is 6 * parameters * tokens/s over the rate of an 8192 x 8192 product in this run."""
    B, T = small(16, 2048)
    model = language_model(name, *((64, 16, 1) if DRY else (50304, 768, 12)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(64, (B, T), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    without_logits = {"logits_to_keep": NO_LOGITS} if name in CELLS else {}

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False, **without_logits).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    factor = normal(*(32, 32) if DRY else (8192, 8192))
    samples = interleave({"step": sampler(step, 1), "product": sampler(lambda: factor @ factor)}, ROUNDS)
    rate = B * T / samples.seconds("step")
    peak = 2 * len(factor) ** 3 / samples.seconds("product")
    return {
        "parameters": model.num_parameters(),
        "tokens_per_s": rate,
        "mfu": 6 * model.num_parameters() * rate / peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
    }


# 6. A million tokens


@case("a million tokens", *CELLS)
def recurrence_of_width_768(cell_type: str) -> dict[str, object]:
    """Forward and backward of in_proj, scan and out_proj over 1,048,576 tokens of one sequence, bf16."""
    T, H = small(1 << 20, 768)
    layer = MinRNNRecurrence(MinRNNConfig(hidden_size=H, cell_type=cell_type, scan_backend="triton"), 0)
    layer = layer.to(DEVICE, torch.bfloat16)
    x = normal(1, T, H)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))

    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = interleave({"step": sampler(step, 1)}, min(ROUNDS, 5)).seconds("step")
    return {
        "ms": 1e3 * seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
    }


# Machine code: no GPU needed

KERNELS_AND_CELLS = [(k, c) for k in ("forward", "forward_reduce", "backward", "backward_reduce") for c in CELLS]


@functools.cache
def machine_code() -> dict[tuple[str, str], list]:
    """[registers, stack, instructions, special] and the limit of each; see machine_code.py. Compiled for sm_90 in a
    process of its own, since this one may interpret."""
    script = """if True:
        import json, sys
        from machine_code import LIMITS, Variant, compile_variant
        for variant in json.loads(sys.argv[1]):
            print(json.dumps([compile_variant(Variant(*variant)), LIMITS.get(tuple(variant))]))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, "-c", script, json.dumps(KERNELS_AND_CELLS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(KERNELS_AND_CELLS, map(json.loads, run.stdout.splitlines()), strict=True))


@case("machine code", *KERNELS_AND_CELLS)
def of_the_kernel(kernel: str, cell_type: str) -> dict[str, object]:
    (registers, stack, instructions, special), limit = machine_code()[kernel, cell_type]
    return {
        "registers": Bound(registers, at_most=128),
        "stack_bytes": Bound(stack, at_most=0),
        "instructions_per_element": Bound(instructions, at_most=limit),
        "special_per_element": special,
    }


# The run and its summary


def figure(value: object) -> str:
    """A row's value as it is stored, for a reader."""
    if isinstance(value, dict):
        return str(Bound(**{key: value[key] for key in ("value", "at_least", "at_most")}))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def render(rows: list[dict[str, object]]) -> str:
    """The summary: for each case its last row, or that there is none."""
    last = {(row["section"], row["case"]): row for row in rows}
    lines = [
        "# The scan on a GPU",
        "",
        "Rendered from `gpu.jsonl` by `python benchmarks/gpu.py --render`; `benchmarks/gpu.py` says what each figure",
        "is. A figure with a target says whether it is met.",
    ]
    for section in dict.fromkeys(case.section for case in CASES):
        lines += [
            "",
            f"## {section.capitalize()}",
            "",
            "| case | figures | device, versions, commit |",
            "| --- | --- | --- |",
        ]
        for case in CASES:
            if case.section != section:
                continue
            row = last.get((section, case.name))
            figures, run = "not yet measured", ""
            if row:
                names = [
                    name for name in row if name not in {"section", "case", *RUN_FIELDS} and row[name] is not None
                ]
                figures = "; ".join(f"{name} {figure(row[name])}" for name in names)
                versions = " ".join(f"{name} {row['versions'][name]}" for name in ("torch", "triton"))
                run = f"{row['device']}, {versions}, {row['commit']}"
            lines.append(f"| {case.name} | {figures} | {run} |")
    return "\n".join(lines) + "\n"


RUN_FIELDS = set("benchmark rounds commit dirty command device threads load_average python versions time".split())


def read_rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def main() -> None:
    global ROUNDS
    flags = parser("gpu", __doc__, rounds=15)
    flags.add_argument("--render", action="store_true", help="only render results/gpu.md")
    flags.add_argument("--dry-run", action="store_true", help="every case once, tiny and interpreted, on the CPU")
    options = flags.parse_args()
    summary = SUMMARY
    if options.dry_run:
        folder = Path(tempfile.mkdtemp(prefix="minrnn-gpu-dry-run-"))
        options.output, summary, options.rounds = folder / "gpu.jsonl", folder / "gpu.md", 1
    ROUNDS = options.rounds
    if not options.render:
        with_gpu = DEVICE.type == "cuda"
        report = Report(options, device=gpu_name() if with_gpu else None)
        for case in CASES:
            if not (with_gpu or DRY or case.section == "machine code") or not report.wants(
                f"{case.section}: {case.name}"
            ):
                continue
            row = case.measure()
            report.add(section=case.section, case=case.name, **row)
            failed = [name for name, value in row.items() if isinstance(value, Bound) and not value.met]
            if case.section == "checks" and failed:
                raise SystemExit(f"{case.name}: {', '.join(failed)} failed; nothing is timed")
    summary.write_text(render(read_rows(options.output)))
    print(f"{summary.read_text()}\nin {summary}, rows in {options.output}")


if __name__ == "__main__":
    main()
