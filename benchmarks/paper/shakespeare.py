"""Shakespeare, character by character (arXiv 2410.01201, section 4.3), on the first 1,003,854 characters.

    python -m benchmarks.paper.shakespeare PATH_TO/input.txt paper|best|equal [--only minGRU] [--seeds 0] [--steps 600]

paper  `train.py configs/shakespeare-char.yaml`, the paper's set-up, stopped after PATIENCE
       evaluations in a row without a new best. The paper has 1.548 for minGRU after 575 steps, 1.555 for minLSTM
       after 625.
best   `train.py configs/shakespeare-char-best.yaml`: below nanoGPT's 1.4697, which takes 10.65 million parameters.
equal  the small setting, configs/shakespeare-char-cpu.yaml, for models of equal size (benchmarks/paper/models.py) on
       the same batches: at equal tokens, and at equal time, for as many steps as last as long as minGRU's. ms_a_step
       is the median of interleaved steps; --learning-rates and --steps make a sweep in their place.

held_out_loss: nats a character over all of the last 111,540. MinRNN reads them once with its state carried; others in
windows of their context, each begun in the middle of the one before, whose second halves count.
"""

from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Bound, Report, interleave, parser, run_train, timed
from benchmarks.paper.models import Family, Logits, parameters
from benchmarks.paper.training import train
from modeling_minrnn import MinRNNForCausalLM
from train import evaluate
from training.config import load_config
from training.data import RandomWindows, TokenStream, load_documents, token_stream
from training.optimizers import parameter_groups
from training.tokenizers import load_tokenizer

TARGETS = {"minGRU": 1.548, "minLSTM": 1.555}  # the paper's
NANOGPT = 1.4697
EVERY, PATIENCE = 100, 3
# The best of 300 steps at 1, 2, 4 and 8e-3; a minRNN's is that of the configuration.
RATES = {"minGRU": 4e-3, "minLSTM": 4e-3, "GPT-2": 4e-3, "Llama": 1e-3, "Mamba": 4e-3}
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


def equal(report: Report, text: Path) -> None:
    options = report.options
    config = load_config(SMALL, [f"data.files=[{text}]"])
    setting = config.train
    documents, held_out_documents = load_documents(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer, (document["text"] for document in documents))
    stream, held_out = token_stream(documents, tokenizer), token_stream(held_out_documents, tokenizer)
    initialisation = {} if options.initializer_range is None else {"initializer_range": options.initializer_range}
    family = Family(len(tokenizer), config.model["num_hidden_layers"], setting.sequence_length, heads=4,
                    transformer=initialisation)  # fmt: skip

    def training(name: str, seed: int, steps: int, rate: float) -> tuple[Logits, Iterator[int]]:
        torch.manual_seed(seed)
        model = family.of_equal_size(name, config.model["hidden_size"])
        batches = RandomWindows(stream, setting.sequence_length, setting.batch_size, seed, slice(None))
        decay = parameter_groups_of(model, setting.weight_decay)
        warmup = setting.warmup_steps / setting.steps
        return model, train(
            model, batches, steps, rate, groups=decay, betas=setting.betas, warmup=warmup, final_rate=0
        )

    names = [name for name in RATES if report.wants(f"equal {name}")]
    runs = {name: training(name, 0, 10**6, RATES[name])[1] for name in dict.fromkeys(["minGRU", *names])}
    samples = interleave({name: timed(partial(next, progress)) for name, progress in runs.items()}, options.rounds)
    del runs
    for name in names:
        budgets = {"tokens": setting.steps, "time": round(setting.steps / samples.ratio(name, "minGRU"))}
        for budget, own_steps in ({"": options.steps} if options.steps else budgets).items():
            if (budget, name) == ("time", "minGRU") or budget not in ("", *options.budgets):
                continue  # minGRU's is both at once
            for rate in options.learning_rates or [RATES[name]]:
                for seed in options.seeds:
                    model, progress = training(name, seed, own_steps, rate)
                    deque(progress, maxlen=0)
                    report.add(
                        experiment="equal",
                        contender=name,
                        equal=budget,
                        seed=seed,
                        parameters=parameters(model),
                        learning_rate=rate,
                        initializer_range=options.initializer_range,
                        ms_a_step=1e3 * samples.seconds(name),
                        steps=own_steps,
                        held_out_loss=held_out_loss(model, held_out, setting.sequence_length),
                    )


def main() -> None:
    flags = parser("paper_shakespeare", __doc__, rounds=5)
    flags.add_argument("text", type=Path, help="tiny Shakespeare, as one file")
    flags.add_argument("experiment", choices=["paper", "best", "equal"])
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--learning-rates", type=float, nargs="+", help="of `equal`: a sweep, in place of RATES")
    flags.add_argument("--initializer-range", type=float, help="of `equal`: GPT-2's and Llama's, for their own")
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
