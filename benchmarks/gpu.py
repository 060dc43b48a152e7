"""Is the scan right on this GPU, how near is it to the memory's bandwidth, and what does it gain over its peers?

The most telling cases come first. Each runs for itself: one that fails says so in its row, and timings taken beside a
failed check name it in theirs ("checks_failed"). Every row is appended to results/gpu.jsonl at once, and gpu.md beside
it is rendered from it, whatever happens: the last run of each case, and "not yet measured" for the others.

    python benchmarks/gpu.py [--seconds 480] [--only bandwidth decoding] [--rounds 15]
                                          without a GPU: the machine code alone. What would not be ready within the
                                          seconds is skipped, and named
    python benchmarks/gpu.py --render     only render gpu.md
    python benchmarks/gpu.py --dry-run    two cases of each kind once on tiny shapes on the CPU, kernels interpreted;
                                          to a folder of its own

carry.py says what a machine without a network needs, and how to start it there.

Timed is the device: a contender is captured into a CUDA graph, so that neither Python nor the launch counts, and
replayed in turn with the others; "captured" says of which that was so. Inputs take turns with copies of themselves, in
more bytes than the L2 holds. "copy" is the bandwidth of a copy of 1 GiB within the device's memory, measured in the
same run, in bytes read and written. A scan of N = B T D states in bf16 moves at least (G + 1) * 2 N bytes forward, G =
2 (minGRU) or 3 (minLSTM), and (2 G + 1 + 1/8) * 2 N backward, where every eighth row of states is read again. Where T
is cut into segments, a first kernel reads G * 2 N more forward and (G + 1) * 2 N backward, of all segments but one,
unless the gates forget so soon that it stops early: "ordinary" gates of N(0, 1) do; "remembering" ones, 4 lower, do
not, and their rows count these bytes. Peers that take gates get them from a compiled elementwise function.
"""

import concurrent.futures
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

STARTED = time.monotonic()
DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or no forked process could use the device any more

import isolated  # noqa: E402
import torch  # noqa: E402
from harness import HERE, Bound, Report, Samples, interleave, parser, relative_error, timed  # noqa: E402
from isolated import Case, measured  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel  # noqa: E402

from modeling_minrnn import NO_LOGITS, MinRNNConfig, MinRNNForCausalLM  # noqa: E402
from modeling_minrnn.causal_conv import causal_conv  # noqa: E402
from modeling_minrnn.cells import cell_of  # noqa: E402
from modeling_minrnn.masks import conv_taps  # noqa: E402
from modeling_minrnn.modeling_minrnn import MinRNNRecurrence  # noqa: E402
from modeling_minrnn.scan import minrnn_scan  # noqa: E402

DEVICE = torch.device("cpu" if DRY or not torch.cuda.is_available() else "cuda")
CELLS = ("mingru", "minlstm")
SHAPES = [(8, 2048, 1024), (1, 65536, 1024), (64, 512, 512), (16, 4096, 2048)]  # B, T, D
UGLY = [(3, 2, 5), (2, 1000, 100), (1, 2049, 64)]
GATES = {"ordinary": 0.0, "remembering": -4.0}  # what is added to them
ROUNDS = int(os.environ.get("MINRNN_ROUNDS", "1"))  # of `main`, for the processes that it starts
ROTATED_BYTES = 1 << 28  # several times any L2

CASES: list[Case] = []
CAPTURED: dict[str, bool] = {}  # of the contenders of the case at hand: whether they are replayed from a CUDA graph
SPOILT: list[str] = []  # whose capture failed, after which generators and allocator may be in the midst of it


def case(section: str, seconds: float, *variants: object, alone: bool = False) -> Callable:
    """Register a function as one case a variant, which is its argument; without variants, as one.

    seconds: about how long a case takes on an H100.
    """

    def register(function: Callable) -> Callable:
        for variant in (variants or (None,))[: 2 if DRY else None]:
            arguments = () if variant is None else variant if isinstance(variant, tuple) else (variant,)
            name = " ".join([function.__name__.replace("_", " "), *map(str, arguments)])
            CASES.append(Case(section, name, seconds, functools.partial(row_of, function, *arguments), alone))
        return function

    return register


def row_of(function: Callable[..., dict[str, object]], *arguments: object) -> dict[str, object]:
    CAPTURED.clear()
    row = function(*arguments)
    missing = [name for name, was in CAPTURED.items() if not was]
    if CAPTURED:
        all_but = f"all but {', '.join(missing)}" if missing else "all"
        row["captured"] = "none" if len(missing) == len(CAPTURED) else all_but
    return row


def small(*shape: int) -> tuple[int, ...]:
    """The shape itself, or a tiny one for a dry run."""
    return tuple(min(size, 2 + 3 * i) for i, size in enumerate(shape)) if DRY else shape


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(dtype)


def projected(cell_type: str, shape: tuple[int, int, int], dtype: torch.dtype, shift: float = 0.0) -> Tensor:
    """What a scan reads. shift: of the gates, below zero to remember."""
    B, T, D = shape
    x = normal(B, T, sum(cell_of(cell_type).blocks(D)), dtype=torch.float32)
    x[..., :D] += shift if cell_type == "mingru" else -shift
    return x.to(dtype)


# Timing


def sampler(name: str, function: Callable[[], object], repeats: int = 10) -> Callable[[], float]:
    """Seconds of one call on the device."""
    if DEVICE.type == "cpu":
        CAPTURED[name] = False
        return timed(function)
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):  # compiled, tuned and warm before it is captured
        for _ in range(3):
            function()
    before.wait_stream(stream)

    def play() -> None:
        for _ in range(repeats):
            function()

    CAPTURED[name] = False
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            play()
        play, CAPTURED[name] = graph.replay, True
    except RuntimeError as error:
        SPOILT.append(name)
        torch.cuda.set_stream(before)  # a capture that cannot be ended keeps its own
        torch.cuda.synchronize()
        print(f"{name} is not captured: {error}".splitlines()[0], file=sys.stderr)

    def sample() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        play()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats

    return sample


def on_the_clock(name: str, function: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call as its caller waits for it: launches are a part of its cost."""
    CAPTURED[name] = False

    def run() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return timed(run)


def compare(contenders: dict[str, Callable[[], object]], repeats: int = 10) -> Samples:
    samplers = {name: sampler(name, function, repeats) for name, function in contenders.items()}
    return interleave(samplers, ROUNDS)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source, target = torch.ones(2, 1 << (14 if DRY else 30), dtype=torch.uint8, device=DEVICE)
    return 2 * source.numel() / compare({"copy": lambda: target.copy_(source)}).seconds("copy")


def rotating(function: Callable, *inputs: Tensor) -> Callable[[], object]:
    """Calls the function with the inputs and copies of them in turn, so that they do not lie in the L2 from before."""
    copies = 1 if DRY else min(10, math.ceil(ROTATED_BYTES / sum(x.nbytes for x in inputs)))
    sets = [[x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(copies - 1)]
    turns = itertools.cycle([list(inputs), *sets])
    return lambda: function(*next(turns))


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(x), x, gradient)


def kernels_of(function: Callable[[], object]) -> int | None:
    """How many kernels and copies a call starts on the device."""
    if DEVICE.type == "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


# 1. Checks


def outcome(cell_type: str, shape, dtype, backend: str, masked: bool = False, shift: float = 0.0) -> list[Tensor]:
    """States, final state and gradients."""
    B, T, D = shape
    x = projected(cell_type, shape, dtype, shift)
    initial_state = normal(B, D, dtype=torch.float32, seed=1)
    masks = {}
    if masked:
        masks = {"reset_mask": normal(B, T, seed=2) > 1.5, "padding_mask": normal(B, T, seed=3) > 1}
    d_states, d_final_state = normal(B, T, D, dtype=dtype, seed=4), normal(B, D, dtype=torch.float32, seed=5)
    exact = backend == "loop"  # in float64
    inputs = [tensor.double() if exact else tensor for tensor in (x, initial_state)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = minrnn_scan(inputs[0], cell_type, inputs[1], backend=backend, **masks)
    upstream = [d.to(y.dtype) for d, y in zip((d_states, d_final_state), outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def parity(cell_type: str, dtype: str, shapes, masks, shifts) -> dict[str, object]:
    tolerance = 3e-6 if dtype == "float32" else 4e-3
    error = 0.0
    for shape, masked, shift in itertools.product([small(*shape) for shape in shapes], masks, shifts):
        arguments = dict(shape=shape, dtype=getattr(torch, dtype), masked=masked, shift=shift)
        expected = outcome(cell_type, backend="loop", **arguments)
        error = max(error, relative_error(outcome(cell_type, backend="triton", **arguments), expected))
    # Interpreted, a cast to bfloat16 truncates.
    return {"error": Bound(error, at_most=2 * tolerance if DRY else tolerance)}


@case("checks", 15)
def each_kernel_starts() -> dict[str, object]:
    """The four kernels of minGRU in float32, against the loop."""
    return parity("mingru", "float32", UGLY[-1:], [False], [0.0])


def compiled_kernels(variant: tuple) -> None:
    cell_type, dtype, shape, masked = variant
    outcome(cell_type, shape, getattr(torch, dtype), "triton", masked)


@case("checks", 45, alone=True)
def kernels_of_all_cases_compiled_beforehand() -> dict[str, object]:
    """By so many processes; which did not compile, by name. What follows finds them in Triton's cache."""
    variants = [
        (cell, dtype, small(*shape), masked)
        for dtype, shape, masked, cell in itertools.product(("float32", "bfloat16"), UGLY, (False, True), CELLS)
    ]
    # The number of sequences, and of tokens beyond a few segments, changes no kernel.
    variants += [(cell, "bfloat16", small(1, 4096, D), False) for D in (1024, 2048, 512, 768, 100) for cell in CELLS]
    variants = variants[:2] if DRY else variants
    processes = min(16, len(variants), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(processes, isolated.CONTEXT) as pool:
        waiting = {pool.submit(compiled_kernels, variant): variant for variant in variants}
        concurrent.futures.wait(waiting)
    errors = {variant: future.exception() for future, variant in waiting.items()}
    refused = [f"{' '.join(map(str, variant))}: {error}" for variant, error in errors.items() if error]
    return {"processes": processes, "refused": Bound(len(refused), at_most=0), "first": "".join(refused[:1])[:200]}


@case("checks", 8, *((cell, dtype) for cell in CELLS for dtype in ("float32", "bfloat16")))
def parity_with_the_float64_loop(cell_type: str, dtype: str) -> dict[str, object]:
    """The largest relative L2 error over ugly shapes, masks, and gates that forget, remember or do neither."""
    return parity(cell_type, dtype, UGLY[1:2] if DRY else UGLY, (False, True), (0.0, 8.0, -12.0))


@case("checks", 3, *CELLS)
def two_runs_are_equal_to_the_bit(cell_type: str) -> dict[str, object]:
    shape = small(1, 65536, 1024)
    first, second = (outcome(cell_type, shape, torch.bfloat16, "triton") for _ in range(2))
    return {"unequal_tensors": Bound(sum(not torch.equal(a, b) for a, b in zip(first, second)), at_most=0)}


# 2. Bandwidth


def shares_reduced(B: int, T: int, D: int) -> tuple[float, float]:
    """Of the tokens, which the first kernel reads to reduce their segments: all but those of one, each way."""
    from modeling_minrnn.scan_triton import BACKWARD_TILES, FORWARD_TILES, choose_tile, plan, processors

    tiles = (choose_tile(tiles, D, plain=True) for tiles in (FORWARD_TILES, BACKWARD_TILES))
    segments = [plan(B, T, D, tile, processors(DEVICE)).segments for tile in tiles]
    return 1 - 1 / segments[0], 1 - 1 / segments[1]


@case("bandwidth", 2, *((cell, gates, *shape) for shape in SHAPES for cell in CELLS for gates in GATES))
def fraction_of_copy(cell_type: str, gates: str, *shape: int) -> dict[str, object]:
    B, T, D = small(*shape)
    G = len(cell_of(cell_type).blocks(0))
    x, gradient = projected(cell_type, (B, T, D), torch.bfloat16, GATES[gates]), normal(B, T, D, seed=1)
    scan = functools.partial(minrnn_scan, cell_type=cell_type, backend="triton")
    both = functools.partial(forward_and_backward, lambda x: scan(x)[0])
    with_gradient = x.clone().requires_grad_()
    samples = compare({"forward": rotating(scan, x), "both": rotating(both, with_gradient, gradient)})
    again = shares_reduced(B, T, D) if gates == "remembering" else (0.0, 0.0)
    numbers = {"forward": G + 1 + again[0] * G}  # an element, of two bytes
    numbers["both"] = numbers["forward"] + 2 * G + 1 + 1 / 8 + again[1] * (G + 1)
    fractions = {
        name: number * 2 * B * T * D / samples.seconds(name) / copy_bandwidth() for name, number in numbers.items()
    }
    large = shape in SHAPES[2:]
    return {
        "forward_us": 1e6 * samples.seconds("forward"),
        "both_us": 1e6 * samples.seconds("both"),
        "bytes_forward": 2 * numbers["forward"],
        "bytes_both": 2 * numbers["both"],
        "forward_of_copy": Bound(fractions["forward"], at_least=0.85 if large else 0.75),
        "both_of_copy": Bound(fractions["both"], at_least=0.75),
        "copy_gb_per_s": copy_bandwidth() / 1e9,
    }


# 3. A training step of 125M parameters


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


def of_125M(name: str) -> PreTrainedModel:  # noqa: N802
    return language_model(name, *((64, 16, 1) if DRY else (50304, 768, 12)))


@case("training step", 12, *CELLS, "llama", "mamba")
def of_125M_parameters(name: str) -> dict[str, object]:  # noqa: N802
    """bf16, rows of 2048, 16 at a time; of Mamba one, as transformers' own scan keeps 20 GB of each. MFU is 6 *
    parameters * tokens/s over the rate of an 8192 x 8192 product in this run."""
    B, T = small(1 if name == "mamba" else 16, 2048)
    model = of_125M(name)
    with_gpu = DEVICE.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=with_gpu)
    tokens = torch.randint(64, (B, T), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    without_logits = {"logits_to_keep": NO_LOGITS} if name in CELLS else {}

    def step(**masks: Tensor) -> None:
        model(tokens, labels=tokens, use_cache=False, **without_logits, **masks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if with_gpu:
        torch.cuda.reset_peak_memory_stats()
    factor = normal(*(32, 32) if DRY else (8192, 8192))
    contenders = {"step": sampler("step", step, 1), "product": sampler("product", lambda: factor @ factor)}
    samples = interleave(contenders, ROUNDS)
    rate = B * T / samples.seconds("step")
    peak = 2 * len(factor) ** 3 / samples.seconds("product")
    row = {
        "rows": B,
        "parameters": model.num_parameters(),
        "tokens_per_s": rate,
        "mfu": 6 * model.num_parameters() * rate / peak,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if with_gpu else None,
    }
    if name != "mamba":
        row["kernels"] = kernels_of(step)
        row["kernels_with_a_mask_of_ones"] = kernels_of(lambda: step(attention_mask=torch.ones_like(tokens)))
    return row


# 4. The convolution, and decoding


def documents(B: int, T: int) -> Tensor:
    """The mask of documents of some 500 tokens."""
    return normal(B, T, dtype=torch.float32) > 2.88


@case("convolution", 15, (16, 2048, 768), (8, 4096, 2048))
def of_four_taps(*shape: int) -> dict[str, object]:
    """Forward and backward: causal_conv, which is torch's conv1d, also with documents in the rows; and shifted slices.
    Each also compiled."""
    B, T, H = small(*shape)
    x, gradient, weight = normal(B, T, H), normal(B, T, H, seed=1), normal(H, 4, dtype=torch.float32, seed=2)
    window, taps = normal(B, 3, H, seed=3), conv_taps(4, documents(B, T), None)
    parameters = [tensor.requires_grad_() for tensor in (weight, window)]

    def slices(x: Tensor) -> Tensor:
        rows = torch.cat([window, x], 1)
        return sum(rows[:, k : k + T] * weight[:, k].to(x.dtype) for k in range(4))

    def both(conv: Callable, x: Tensor, gradient: Tensor) -> object:
        return torch.autograd.grad(conv(x), [x, *parameters], gradient)

    convs = {"ours": lambda x: causal_conv(x, weight, window), "slices": slices}
    convs["documents"] = lambda x: causal_conv(x, weight, window, taps)
    with torch.no_grad():
        error = relative_error([convs["ours"](x.double())], [slices(x.double())])
    if not DRY:
        convs |= {f"{name} compiled": torch.compile(convs[name]) for name in tuple(convs)}
    x.requires_grad_()
    contenders = {name: rotating(functools.partial(both, conv), x, gradient) for name, conv in convs.items()}
    samples = compare(contenders)
    row = {f"{name}_us": 1e6 * samples.seconds(name) for name in convs}
    return row | {
        "error": Bound(error, at_most=1e-6),
        "slices_over_ours": Bound(samples.ratio("slices", "ours"), at_least=1),
        "bytes_at_copy_us": 1e6 * 5 * 2 * B * T * H / copy_bandwidth(),  # x twice, y, its gradient, x's
    }


@case("decoding", 12, *((name, batch) for name in ("mingru", "llama", "minlstm") for batch in (1, 64)))
@torch.no_grad()
def of_125M_after_16_tokens(name: str, batch: int) -> dict[str, object]:  # noqa: N802
    """`generate`, greedy, with a mask of ones; a token of the 64 in the middle of it."""
    model, (few, many) = of_125M(name).eval(), (2, 4) if DRY else (32, 96)
    tokens = torch.randint(64, (batch, 16), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))

    def generate(new: int) -> None:
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )

    contenders = {new: on_the_clock(str(new), functools.partial(generate, new)) for new in (few, many)}
    samples = interleave(contenders, min(ROUNDS, 5))
    seconds = (samples.seconds(many) - samples.seconds(few)) / (many - few)
    kernels = [kernels_of(functools.partial(generate, new)) for new in (4, 12)]
    return {
        "ms_a_token": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "kernels_a_token": None if None in kernels else (kernels[1] - kernels[0]) / 8,
    }


# 5. Layers


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
    6,
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


# 6. A million tokens


@case("a million tokens", 6, *CELLS)
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
    seconds = compare({"step": step}, repeats=1).seconds("step")
    return {
        "ms": 1e3 * seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else None,
    }


# 5, continued: loops take longer


@case("layers", 6, ("mingru", 512, 175), ("mingru", 4096, 1324), ("minlstm", 512, 235), ("minlstm", 4096, 1361))
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

    contenders = {"ours": on_the_clock("ours", layer_step(ours, x)), "loop": on_the_clock("loop", loop)}
    samples = interleave(contenders, min(ROUNDS, 3))
    return {
        "loop_ms": 1e3 * samples.seconds("loop"),
        "loop_over_ours": Bound(samples.ratio("loop", "ours"), at_least=target),
    }


# 7. Peers


def gates(x: Tensor) -> tuple[Tensor, Tensor]:
    """minGRU's a and (1 - a) * c."""
    k, x = x.chunk(2, -1)
    return torch.sigmoid(-k), torch.sigmoid(k) * torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def compiled_gates() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return gates if DRY else torch.compile(gates, dynamic=False)


def hgrn(name: str, D: int):
    from fla.ops import hgrn as ops

    function, make_gates = getattr(ops, name), compiled_gates()

    def run(x: Tensor) -> Tensor:
        a, b = make_gates(x)
        return function(b, a.log())[0]

    return run


def accelerated(module: str, D: int):
    scan, make_gates = __import__(f"accelerated_scan.{module}", fromlist=["scan"]).scan, compiled_gates()

    def run(x: Tensor) -> Tensor:
        a, b = (tensor.mT.contiguous() for tensor in make_gates(x))
        return scan(a, b).mT

    return run


def mingru_scans(D: int):
    os.environ["MINGRU_SCAN"] = "triton"
    from mingru.min_gru import linear_scan

    make_gates = compiled_gates()
    return lambda x: linear_scan(*make_gates(x))[1]


def mambapy(D: int):
    from mambapy.pscan import pscan

    make_gates = compiled_gates()

    def run(x: Tensor) -> Tensor:
        a, b = make_gates(x)
        return pscan(a[..., None], b[..., None])[..., 0]

    return run


def mingru_pytorch(D: int):
    from minGRU_pytorch import minGRU

    layer = minGRU(D)
    layer.to_hidden_and_gate = nn.Identity()
    return lambda x: layer(x.roll(D, -1))  # its halves are [candidate | gate]


def associative_scan(D: int):
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def run(x: Tensor) -> Tensor:
        return associative_scan(combine, gates(x), dim=1, combine_mode="generic" if DRY else "pointwise")[1]

    return run if DRY else torch.compile(run, dynamic=False)


# By name: what imports and makes it for a width, (B, T, 2 D) -> states (B, T, D); and by how much ours is to be ahead
# at the first shape, and at the others.
PEERS: dict[str, tuple[Callable, float, float]] = {
    "compiled associative_scan": (associative_scan, 1, 1),
    "fla fused_recurrent_hgrn": (functools.partial(hgrn, "fused_recurrent_hgrn"), 10, 1),
    "fla chunk_hgrn": (functools.partial(hgrn, "chunk_hgrn"), 4, 1),
    "mingru-scans": (mingru_scans, 1, 1),
    "mambapy": (mambapy, 1, 1),
    "minGRU-pytorch": (mingru_pytorch, 30, 30),
    "accelerated-scan scalar": (functools.partial(accelerated, "scalar"), 1, 1),
    "accelerated-scan warp": (functools.partial(accelerated, "warp"), 1, 1),
}


def minGRU_against(peer: str, *shape: int) -> dict[str, object]:  # noqa: N802
    """How many times faster, forward and backward, from pre-activations to states and back."""
    B, T, D = small(*shape)
    make, *ahead = PEERS[peer]
    x, gradient = projected("mingru", (B, T, D), torch.bfloat16).requires_grad_(), normal(B, T, D, seed=1)
    try:
        function = make(D)
        states = function(x).detach()
    except Exception as error:  # it is absent, refuses the shape or does not fit: its row says so
        return {"result": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
    ours = functools.partial(minrnn_scan, cell_type="mingru", backend="triton")
    error = relative_error([states], [ours(x)[0].detach()])
    del states
    runs = {"ours": lambda x: ours(x)[0], "peer": function}
    contenders = {
        name: rotating(functools.partial(forward_and_backward, run), x, gradient) for name, run in runs.items()
    }
    samples = compare(contenders)
    return {
        "ours_us": 1e6 * samples.seconds("ours"),
        "peer_over_ours": Bound(samples.ratio("peer", "ours"), at_least=ahead[shape != SHAPES[0]]),
        "states_apart": error,
    }


case("peers", 12, *((peer, *SHAPES[0]) for peer in PEERS))(minGRU_against)

# 8. What can be left out


@case("checks", 40, "memcheck", "racecheck")
def compute_sanitizer(tool: str) -> dict[str, object]:
    """On small shapes, in a process of its own."""
    if DRY or shutil.which("compute-sanitizer") is None:
        return {"result": "compute-sanitizer is not installed"}
    script = "import gpu, torch; [gpu.outcome(c, s, torch.bfloat16, 'triton', m) for c in gpu.CELLS " + (
        "for s in gpu.UGLY for m in (False, True)]"
    )
    # Without what torch asks of the driver and expects to be refused.
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    run = subprocess.run([*command, sys.executable, "-c", script], cwd=HERE, capture_output=True, text=True)
    return {"exit_code": Bound(run.returncode, at_most=0), "result": run.stdout.strip().splitlines()[-1]}


case("peers", 12, *((peer, *shape) for shape in SHAPES[1:] for peer in PEERS))(minGRU_against)

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


@case("machine code", 20, *KERNELS_AND_CELLS)
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
                figures = text_of(row)
                versions = " ".join(f"{name} {row['versions'][name]}" for name in ("torch", "triton"))
                run = f"{row['device']}, {versions}, {row['commit']}"
            lines.append(f"| {case.name} | {figures} | {run} |")
    return "\n".join(lines) + "\n"


def text_of(row: dict[str, object]) -> str:
    named = {name: value for name, value in row.items() if name not in RUN_FIELDS and value is not None}
    return "; ".join(f"{name} {figure(value)}" for name, value in named.items())


RUN_FIELDS = {
    *"section case seconds benchmark rounds commit dirty command".split(),
    *"device threads bf16 load_average python versions time".split(),
}


def read_rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gpu_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def device_is_sound() -> bool:
    """Whether the device answers, and this process can go on with it; what a case left there is freed."""
    gc.collect()
    try:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return not SPOILT


def touch() -> None:
    torch.zeros(1, device=DEVICE)


def a_fork_can_use_the_device() -> bool:
    """Not where something has asked for it in this process."""
    with concurrent.futures.ProcessPoolExecutor(1, isolated.CONTEXT) as pool:
        return pool.submit(touch).exception() is None


def run(report: Report, until: float) -> None:
    without_gpu = DEVICE.type == "cpu" and not DRY
    cases = [case for case in CASES if not without_gpu or case.section == "machine code"]
    wanted = [case for case in cases if any(text in f"{case.section}: {case.name}" for text in report.options.only)]
    missed: list[str] = []
    for case, row in measured(wanted, until, device_is_sound):
        print(f"{case.section}: {case.name}: {text_of(row)}", flush=True)
        if "skipped" not in row:
            report.add(section=case.section, case=case.name, **row, **({"checks_failed": missed} if missed else {}))
        if case.section == "checks" and not all(x.met for x in row.values() if isinstance(x, Bound)):
            missed.append(case.name)


def main() -> None:
    global ROUNDS
    flags = parser("gpu", __doc__, rounds=15)
    flags.add_argument(
        "--seconds", type=float, default=math.inf, help="be done by then; a case that is not is left out"
    )
    flags.add_argument("--render", action="store_true", help="only render gpu.md")
    flags.add_argument("--dry-run", action="store_true", help="two cases of each kind, tiny, interpreted, on the CPU")
    options = flags.parse_args()
    if options.dry_run:
        options.output = Path(tempfile.mkdtemp(prefix="minrnn-gpu-dry-run-")) / "gpu.jsonl"
        options.rounds = 1
    ROUNDS = options.rounds
    os.environ["MINRNN_ROUNDS"] = str(ROUNDS)
    summary = options.output.with_suffix(".md")
    try:
        if not options.render:
            if not a_fork_can_use_the_device():
                isolated.CONTEXT = multiprocessing.get_context("spawn")
            report = Report(options, device=gpu_name() if DEVICE.type == "cuda" else None)
            run(report, STARTED + options.seconds)
    finally:
        summary.write_text(render(read_rows(options.output)))
    print(f"\n{summary.read_text()}\nin {summary}, rows in {options.output}")


if __name__ == "__main__":
    main()
