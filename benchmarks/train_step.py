"""How much of a training step is the recurrence, how far is the step from its matrix products, and is it faster than
Llama and GPT-2 of equal size?

Timed on one CPU thread, fp32: forward, loss, backward and a fused AdamW step of a causal language model of 6 layers,
width 384, vocabulary 256, on 4096 tokens a batch. Contenders:
    torch, numba  MinRNNForCausalLM with that scan backend; otherwise its default configuration
    identity      the same step with the scan replaced by a slice: states = the first D columns of its input
    products      the step's matrix products alone: for each Linear, one forward and two backward products
    llama, gpt2   from transformers, sdpa attention, equal parameter counts (within 3 %)
Before timing, loss and gradients of "torch" and "numba" are compared with the loop's, and the multiplications of
"products" are counted against those of the model.

Targets: step / identity <= 1.10 numba, 1.20 torch (T = 256); step / products <= 1.15 (numba, T = 256);
faster than llama and gpt2 (numba, T >= 1024).

--norm times the step of "numba" at T = 256, and that of configs/demo.yaml as it is and with the 128 columns that it
had when its target was set, with RMSNorm by its kernel and by torch.
Targets: step / products <= 1.10, the demo's <= 1.30.
--cells times the step with each cell that --only wants beside minGRU's instead, and beside a Llama's of its size, in
half as many layers, T = 1024, by "numba".
--compiled times the step by torch.compile, of "numba", llama and gpt2, and at T = 256 without it beside, after its
loss and gradients were compared with those without.

    python benchmarks/train_step.py [--only "256 mingru"] [--rounds 7] [--cells | --compiled | --norm] [--profile]
"""

from collections.abc import Callable
from unittest import mock

import torch
from harness import Bound, Report, interleave, now, parser, relative_error, timed, verify
from models import LAYERS, VOCABULARY, WIDTH, minrnn, transformers_of_equal_size
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM, modeling_minrnn
from modeling_minrnn.cells import CELLS
from modeling_minrnn.norm import MinRNNRMSNorm
from modeling_minrnn.scan import ScanOutputs
from training.config import load_config

TOKENS = 4096  # a batch
LENGTHS = [256, 1024, 4096]
OVER_IDENTITY = {"torch": 1.20, "numba": 1.10}  # at SHORTEST
OVER_PRODUCTS = {"torch": None, "numba": 1.15}  # at SHORTEST
SHORTEST = LENGTHS[0]
OVER_PRODUCTS_BY_KERNEL = {"10m": 1.10, "demo": 1.30, "demo128": 1.30}  # with the norm's kernel, at SHORTEST
TOLERANCE = 5e-3  # g has a kink at 0: one candidate within rounding of 0 moves a gradient by 1 / sqrt(elements)


class TrainingStep:
    """Forward, loss, backward and update; made anew for each contender, so that none trains another's weights."""

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor, compiled: bool = False):
        self.model = model.train()
        self.run = torch.compile(model) if compiled else model
        self.tokens = tokens
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_and_gradients(self) -> list[torch.Tensor]:
        loss = self.run(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(self.model.parameters()))]

    def __call__(self) -> None:
        self.run(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def without_scan(step: TrainingStep) -> Callable[[], None]:
    def identity(projected, cell, *_):
        states = projected[..., : cell.state_width(projected.shape[-1])]
        return ScanOutputs(states, states[..., :0], states[:, -1])

    def run() -> None:
        with mock.patch.object(modeling_minrnn, "scan_states", identity):
            step()

    return run


def matrix_products(model: PreTrainedModel, rows: int) -> Callable[[], None]:
    """Per Linear (in -> out) on `rows` rows: outputs, gradient of the inputs, gradient of the weight."""
    weights = [m.weight.detach().clone() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    operands = [(torch.randn(rows, w.shape[1]), w, torch.randn(rows, w.shape[0])) for w in weights]

    def run() -> None:
        for inputs, weight, gradient in operands:
            inputs @ weight.T
            gradient @ weight
            gradient.T @ inputs

    return run


def product_flops(function: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))


def measure(report: Report, length: int, cell_type: str) -> None:
    tokens = torch.randint(VOCABULARY, (TOKENS // length, length), generator=torch.Generator().manual_seed(0))
    steps = {backend: TrainingStep(minrnn(cell_type, backend), tokens) for backend in OVER_IDENTITY}
    oracle = TrainingStep(minrnn(cell_type, "loop"), tokens).loss_and_gradients()
    for backend, step in steps.items():
        verify(f"{backend} {cell_type} T={length}", relative_error(step.loss_and_gradients(), oracle), TOLERANCE)
    del oracle

    contenders: dict[str, Callable[[], None]] = dict(steps)
    if length == SHORTEST:
        contenders["identity"] = without_scan(TrainingStep(minrnn(cell_type), tokens))
        contenders["products"] = matrix_products(minrnn(cell_type), TOKENS)
        if product_flops(contenders["products"]) != product_flops(contenders["identity"]):
            raise RuntimeError("the stand-alone matrix products are not those of the training step")
    for name, model in transformers_of_equal_size(steps["torch"].model, positions=length).items():
        steps[name] = contenders[name] = TrainingStep(model, tokens)

    samples = interleave({name: timed(run, now) for name, run in contenders.items()}, report.options.rounds)
    for name in contenders:
        row = {"T": length, "cell": cell_type, "contender": name, "ms": 1e3 * samples.seconds(name)}
        if name in steps:
            row |= {
                "parameters": steps[name].model.num_parameters(),
                "tokens_per_s": TOKENS / samples.seconds(name),
            }
        if name in OVER_IDENTITY:
            ahead = 1 if name == "numba" and length > SHORTEST else None
            row |= {f"speedup_over_{m}": Bound(samples.ratio(m, name), at_least=ahead) for m in ("llama", "gpt2")}
            if length == SHORTEST:
                row["over_identity"] = Bound(samples.ratio(name, "identity"), at_most=OVER_IDENTITY[name])
                row["over_products"] = Bound(samples.ratio(name, "products"), at_most=OVER_PRODUCTS[name])
        report.add(**row)


def measure_compiled(report: Report, length: int, cell_type: str) -> None:
    torch.compiler.reset()
    tokens = torch.randint(VOCABULARY, (TOKENS // length, length), generator=torch.Generator().manual_seed(0))
    model = minrnn(cell_type)
    models = {"numba": model} | transformers_of_equal_size(model, positions=length)
    contenders = {}
    for name, model in models.items():
        eager, compiled = (TrainingStep(model, tokens, compiled) for compiled in (False, True))
        error = relative_error(compiled.loss_and_gradients(), eager.loss_and_gradients())
        verify(f"compiled {name} {cell_type} T={length}", error, TOLERANCE)
        contenders[f"{name} compiled"] = compiled
        if length == SHORTEST:
            contenders[name] = eager
    samples = interleave({name: timed(run, now) for name, run in contenders.items()}, report.options.rounds)
    for name in contenders:
        row = {"T": length, "cell": cell_type, "contender": name, "ms": 1e3 * samples.seconds(name)}
        row |= {"tokens_per_s": TOKENS / samples.seconds(name)}
        own, _, compiled = name.partition(" ")
        if compiled and own in contenders:
            row["eager_over_compiled"] = samples.ratio(own, name)
        if own == "numba":
            for other in ("llama", "gpt2"):
                ratio = samples.ratio(name.replace(own, other), name)
                row[f"speedup_over_{other}"] = Bound(ratio, at_least=1 if compiled else None)
        report.add(**row)


def measure_cells(report: Report) -> None:
    tokens = torch.randint(VOCABULARY, (TOKENS // 1024, 1024), generator=torch.Generator().manual_seed(0))
    steps = {}
    for cell_type in CELLS:
        if cell_type == "mingru" or report.wants(cell_type):
            torch.manual_seed(0)
            config = MinRNNConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS // 2, cell_type=cell_type
            )
            steps[cell_type] = TrainingStep(MinRNNForCausalLM(config), tokens)
            model = transformers_of_equal_size(steps[cell_type].model, positions=1024)["llama"]
            steps[f"llama of {cell_type}"] = TrainingStep(model, tokens)
    samples = interleave({name: timed(run, now) for name, run in steps.items()}, report.options.rounds)
    for name, step in steps.items():
        row = {"T": 1024, "cell": name, "contender": "numba" if name in CELLS else "llama", "layers": LAYERS // 2}
        row |= {"ms": 1e3 * samples.seconds(name), "parameters": step.model.num_parameters()}
        row["times_mingru"] = samples.ratio(name, "mingru")
        if name in CELLS:
            row["speedup_over_llama"] = samples.ratio(f"llama of {name}", name)
        report.add(**row)


def demo(*overrides: str) -> MinRNNForCausalLM:
    """The model of configs/demo.yaml."""
    torch.manual_seed(0)
    config = load_config("configs/demo.yaml", list(overrides))
    return MinRNNForCausalLM(MinRNNConfig(vocab_size=VOCABULARY, **config.model))


def measure_norm(report: Report, name: str, build: Callable[[], MinRNNForCausalLM]) -> None:
    tokens = torch.randint(VOCABULARY, (TOKENS // SHORTEST, SHORTEST), generator=torch.Generator().manual_seed(0))
    steps = {norm: TrainingStep(build(), tokens) for norm in ("numba", "torch")}
    for module in steps["torch"].model.modules():
        if isinstance(module, MinRNNRMSNorm):
            module.backend = "torch"
    error = relative_error(steps["numba"].loss_and_gradients(), steps["torch"].loss_and_gradients())
    verify(f"norm {name}", error, TOLERANCE)
    runs = steps | {"products": matrix_products(build(), TOKENS)}
    samples = interleave({norm: timed(run, now) for norm, run in runs.items()}, report.options.rounds)
    for norm in runs:
        row = {"T": SHORTEST, "model": name, "norm": norm, "ms": 1e3 * samples.seconds(norm)}
        if norm in steps:
            most = OVER_PRODUCTS_BY_KERNEL[name] if norm == "numba" else None
            row["over_products"] = Bound(samples.ratio(norm, "products"), at_most=most)
            row["over_torch_norm"] = samples.ratio(norm, "torch")
        report.add(**row)


def print_profile(length: int, cell_type: str) -> None:
    tokens = torch.randint(VOCABULARY, (TOKENS // length, length))
    step = TrainingStep(minrnn(cell_type), tokens)
    step()  # warm-up
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def main() -> None:
    flags = parser("train_step", __doc__, rounds=7)
    flags.add_argument("--cells", action="store_true", help="the step of every cell beside minGRU's")
    flags.add_argument("--norm", action="store_true", help="what the kernel of RMSNorm gains")
    flags.add_argument("--compiled", action="store_true", help="by torch.compile, against llama and gpt2 by the same")
    flags.add_argument("--profile", action="store_true", help="print where one step spends its time instead")
    options = flags.parse_args()
    report = Report(options)
    if options.cells:
        measure_cells(report)
    models = {"10m": lambda: minrnn("mingru"), "demo": demo, "demo128": lambda: demo("model.hidden_size=128")}
    for name, build in models.items() if options.norm else ():
        if report.wants(name):
            measure_norm(report, name, build)
    for length in LENGTHS if not (options.cells or options.norm) else []:
        for cell_type in ("mingru", "minlstm"):
            if report.wants(f"{length} {cell_type}"):
                if options.profile:
                    print_profile(length, cell_type)
                else:
                    (measure_compiled if options.compiled else measure)(report, length, cell_type)
    if not options.profile:
        report.print_table()


if __name__ == "__main__":
    main()
