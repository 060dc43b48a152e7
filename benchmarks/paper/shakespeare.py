"""Shakespeare, character by character (arXiv 2410.01201, section 4.3), on the first 1,003,854 characters.

    python -m benchmarks.paper.shakespeare PATH_TO/input.txt paper|best|equal [--only minGRU] [--seeds 0] [--steps 600]
    python -m benchmarks.paper.shakespeare PATH_TO/input.txt equal --only Llama --steps 300 --choose --layers 2 4
        --initializer-ranges 0.02 width --optimizer muon --muon-learning-rates 0.01 0.02 --learning-rates 2e-3

paper  `train.py configs/shakespeare-char.yaml`, the paper's set-up, stopped after PATIENCE
       evaluations in a row without a new best. The paper has 1.548 for minGRU after 575 steps, 1.555 for minLSTM
       after 625.
best   `train.py configs/shakespeare-char-best.yaml`: below nanoGPT's 1.4697, which takes 10.65 million parameters.
equal  the small setting, configs/shakespeare-char-cpu.yaml, for models of equal size (benchmarks/paper/models.py) on
       the same batches: at equal tokens, and at equal time, for as many steps as last as long as minGRU's. ms_a_step
       is the median of interleaved steps. --steps makes a sweep in their place, over all that is given of depth,
       initialisation and rates; with --choose it trains on the first nine tenths of the training text and reads the
       last, as settings are not to be chosen on the text that is reported.

held_out_loss: nats a character over all of the last 111,540. MinRNN reads them once with its state carried; others in
windows of their context, each begun in the middle of the one before, whose second halves count. window_loss: of all in
disjoint windows of their context, each begun with nothing read.
"""

import itertools
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Bound, Report, interleave, now, parser, run_train
from benchmarks.paper.models import Family, Logits, parameters
from benchmarks.paper.training import train
from modeling_minrnn import MinRNNForCausalLM
from train import evaluate
from training.config import load_config
from training.data import RandomWindows, TokenStream, load_documents, token_stream
from training.optimizers import hidden_matrices, optimizer_of, parameter_groups
from training.tokenizers import load_tokenizer

TARGETS = {"minGRU": 1.548, "minLSTM": 1.555}  # the paper's
NANOGPT = 1.4697
EVERY, PATIENCE = 100, 3


@dataclass(frozen=True)
class Contender:
    """A model of models.Family, and how it is trained. learning_rate: of AdamW."""

    model: str
    learning_rate: float
    muon_learning_rate: float | None = None  # None: AdamW alone
    layers: int = 2
    sequence_length: int = 128
    initializer_range: float | str | None = None  # of GPT-2 and Llama: None for their own, "width" for 1 / sqrt(width)
    minrnn: dict[str, Any] = field(default_factory=dict)


# Each as it was best in the sweeps of 300 steps; a minRNN's rate is that of the configuration.
OF_EQUAL_SIZE = {
    "minGRU": Contender("minGRU", 4e-3),
    "minGRU, linear, output gate, Muon": Contender(  # configs/shakespeare-1m.yaml
        "minGRU",
        4e-3,
        0.03,
        sequence_length=256,
        minrnn={"candidate": "linear", "output_gate": True, "intermediate_size": 784},
    ),
    "minLSTM": Contender("minLSTM", 4e-3),
    "GPT-2": Contender("GPT-2", 4e-3),
    "Llama": Contender("Llama", 1e-3),
    "Mamba": Contender("Mamba", 4e-3),
}
BUDGETS = ["tokens", "time"]
SMALL = "configs/shakespeare-char-cpu.yaml"


def run_of_train(report: Report, experiment: str, contender: str, text: Path, seed: int, steps: int | None) -> None:
    overrides = [f"data.files=[{text}]", f"model.cell_type={contender.lower()}", f"train.seed={seed}"]
    if experiment == "paper":
        target, config = TARGETS[contender], "shakespeare-char.yaml"
        overrides += [
            f"train.eval_every_steps={EVERY}",
            f"train.early_stopping_patience={PATIENCE}",
            "train.bf16=true",
        ]
    else:
        target, config = NANOGPT, "shakespeare-char-best.yaml"
    if steps:
        overrides.append(f"train.steps={steps}")
    run = run_train(config, *overrides)
    report.add(
        experiment=experiment,
        contender=contender,
        seed=seed,
        parameters=run.parameters,
        steps=run.step,
        minutes=run.seconds / 60,
        held_out_loss=Bound(run.held_out_loss, at_most=target),
    )


def held_out_loss(model: Logits, held_out: TokenStream, context: int) -> float:
    if isinstance(model.model, MinRNNForCausalLM):
        return evaluate(model.model, held_out)[0]
    model.eval()
    tokens, losses = held_out.read(0, len(held_out)), []
    half = context // 2
    for start in range(0, len(tokens) - 1, half):
        window = tokens[max(start - half, 0) : start + half + 1]
        counted = len(tokens[start : start + half + 1]) - 1
        with torch.no_grad():
            losses.append(cross_entropy(model(window[None, :-1])[0, -counted:], window[-counted:], reduction="none"))
    return torch.cat(losses).mean().item()


def parameter_groups_of(model: Logits, weight_decay: float) -> list[dict]:
    """As train.py has them; of other models the matrices that are no embeddings decay."""
    if isinstance(model.model, MinRNNForCausalLM):
        return parameter_groups(model.model, weight_decay)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {p for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("A_log")} - embeddings
    return [
        {"params": [p for p in model.parameters() if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p not in matrices], "weight_decay": 0.0},
    ]


@torch.no_grad()
def window_loss(model: Logits, held_out: TokenStream, context: int) -> float:
    losses = [
        cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        for inputs, targets in held_out.windows(context, 32 * context)
    ]
    return torch.cat(losses).mean().item()


class Equal:
    """Models of equal size, on the batches of the small setting."""

    def __init__(self, text: Path, choose: bool):
        config = load_config(SMALL, [f"data.files=[{text}]"])
        documents, held_out_documents = load_documents(config.data)
        tokenizer = load_tokenizer(config.data.tokenizer, (document["text"] for document in documents))
        self.stream, self.held_out = token_stream(documents, tokenizer), token_stream(held_out_documents, tokenizer)
        if choose:
            tokens = self.stream.read(0, len(self.stream)).numpy()
            cut = int(0.9 * len(tokens))
            self.stream, self.held_out = TokenStream([tokens[:cut]]), TokenStream([tokens[cut:]])
        self.setting, self.width = config.train, config.model["hidden_size"]
        self.family = Family(len(tokenizer), config.model["num_hidden_layers"], self.setting.sequence_length, heads=4)
        with torch.device("meta"):
            self.target = parameters(self.family.build("minGRU", self.width))

    def training(self, contender: Contender, seed: int, steps: int) -> tuple[Logits, Iterator[int]]:
        setting, length = self.setting, contender.sequence_length
        own = {"initializer_range": contender.initializer_range} if contender.initializer_range else {}
        family = replace(
            self.family, layers=contender.layers, positions=length, transformer=own, minrnn=contender.minrnn
        )
        torch.manual_seed(seed)
        model = family.of_equal_size(contender.model, self.width, self.target)
        rows = setting.batch_size * setting.sequence_length // length
        with_rates = replace(
            setting,
            optimizer="muon" if contender.muon_learning_rate else "adamw",
            learning_rate=contender.learning_rate,
            muon_learning_rate=contender.muon_learning_rate,
        )
        groups = parameter_groups_of(model, setting.weight_decay)
        is_minrnn = isinstance(model.model, MinRNNForCausalLM)
        matrices = hidden_matrices(model.model) if is_minrnn else set(groups[0]["params"])
        return model, train(
            model,
            RandomWindows(self.stream, length, rows, seed, slice(None)),
            steps,
            optimizer_of(groups, matrices, with_rates),
            warmup=setting.warmup_steps / setting.steps,
            final_rate=0,
        )

    def scores(self, model: Logits, contender: Contender) -> dict[str, float]:
        context = contender.sequence_length
        return {
            "held_out_loss": held_out_loss(model, self.held_out, context),
            "window_loss": window_loss(model, self.held_out, context),
        }


def seconds_of_step(progress: Iterator[int]) -> float:
    started = now()
    next(progress)
    return now() - started


def tried(contender: Contender, options: Namespace) -> list[Contender]:
    """With all that is given to try in place of what it has."""
    given = {
        "learning_rate": options.learning_rates,
        "muon_learning_rate": options.muon_learning_rates,
        "layers": options.layers,
        "sequence_length": options.sequence_lengths,
        "initializer_range": options.initializer_ranges,
    }
    swept = {name: values for name, values in given.items() if values}
    return [replace(contender, **dict(zip(swept, values))) for values in itertools.product(*swept.values())]


def equal(report: Report, text: Path) -> None:
    options = report.options
    setting = Equal(text, options.choose)
    chosen = [
        (name, contender)
        for name, own in OF_EQUAL_SIZE.items()
        if report.wants(f"equal {name}")
        for contender in tried(own, options)
    ]
    timed = [OF_EQUAL_SIZE["minGRU"], *(contender for _, contender in chosen)]
    runs = [setting.training(contender, 0, 10**6)[1] for contender in timed]
    samples = interleave(
        {number: partial(seconds_of_step, progress) for number, progress in enumerate(runs)}, options.rounds
    )
    del runs
    steps = setting.setting.steps
    for number, (name, contender) in enumerate(chosen, 1):
        times_as_long = samples.ratio(number, 0)
        budgets = {"tokens": steps, "time": round(steps / times_as_long)}
        for budget, own_steps in ({"": options.steps} if options.steps else budgets).items():
            if (budget, name) == ("time", "minGRU") or budget not in ("", *options.budgets):
                continue  # minGRU's is both at once
            for seed in options.seeds:
                model, progress = setting.training(contender, seed, own_steps)
                deque(progress, maxlen=0)
                report.add(
                    experiment="equal",
                    contender=name,
                    equal=budget,
                    read="the last tenth of the training text" if options.choose else "held-out text",
                    seed=seed,
                    parameters=parameters(model),
                    **{key: value for key, value in asdict(contender).items() if key != "model"},
                    ms_a_step=1e3 * samples.seconds(number),
                    times_as_long=times_as_long,  # as a step of minGRU
                    steps=own_steps,
                    **setting.scores(model, contender),
                )


def range_or_width(text: str) -> float | str:
    return text if text == "width" else float(text)


def main() -> None:
    flags = parser("paper_shakespeare", __doc__, rounds=5)
    flags.add_argument("text", type=Path, help="tiny Shakespeare, as one file")
    flags.add_argument("experiment", choices=["paper", "best", "equal"])
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--learning-rates", type=float, nargs="+", help="of `equal`, as all below: of AdamW")
    flags.add_argument("--muon-learning-rates", type=float, nargs="+", help="train with Muon too")
    flags.add_argument("--layers", type=int, nargs="+")
    flags.add_argument("--sequence-lengths", type=int, nargs="+", help="of as many tokens a step")
    flags.add_argument(
        "--initializer-ranges", type=range_or_width, nargs="+", help="a number, or width: 1 / sqrt(width)"
    )
    flags.add_argument("--choose", action="store_true", help="read the last tenth of the training text instead")
    flags.add_argument("--steps", type=int, help="in place of the configuration's or the budget's")
    flags.add_argument("--budgets", nargs="+", choices=BUDGETS, default=BUDGETS, help="of `equal`")
    options = flags.parse_args()
    report, text = Report(options), options.text.resolve()
    if options.experiment == "equal":
        equal(report, text)
    else:
        for contender in TARGETS:
            if report.wants(f"{options.experiment} {contender}"):
                for seed in options.seeds:
                    run_of_train(report, options.experiment, contender, text, seed, options.steps)
    report.print_table()


if __name__ == "__main__":
    main()
