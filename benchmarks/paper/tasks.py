"""Selective copying and the Chomsky hierarchy (arXiv 2410.01201, tables 1, 2 and 6), scaled down to one CPU thread.

The tasks of training/tasks.py, which train.py runs too, for models of equal size (benchmarks/paper/models.py): minGRU,
minLSTM, nn.GRU, nn.LSTM, Mamba (mambapy's scan) and Llama, trained as
benchmarks/paper/training.py does. A row is one training run:

accuracy: tokens of held-out answers predicted, on average over the held-out lengths, at the last step.
steps_to_99: the first evaluation, of one every 250 steps, with an accuracy of at least 99 %; null if there was none.

    python -m benchmarks.paper.tasks selective_copying --layers 1 2 3 --seeds 0 1 2 3 4 [--only minGRU] [--steps 8000]
    python -m benchmarks.paper.tasks even_pairs --learning-rates 1e-3 3e-3 1e-2
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, parser
from benchmarks.paper.models import Family, parameters
from benchmarks.paper.training import train
from training.data import IGNORED
from training.tasks import MARK, TASKS, HeldOutQuestions, Questions, TaskBatches
from training.tokenizers import character_tokenizer

CONTENDERS = ("minGRU", "minLSTM", "nn.GRU", "nn.LSTM", "Mamba", "Llama")
EVALUATE_EVERY_STEPS = 250
EVALUATION_TOKENS = 2**14


@dataclass
class Setting:
    lengths: tuple[int, int]
    held_out_lengths: tuple[int, int]
    batch_size: int
    steps: int
    layers: list[int]
    width: int  # of the minGRU
    minrnn: dict[str, Any]  # further arguments of MinRNNConfig
    betas: tuple[float, float] = (0.9, 0.999)
    learning_rates: dict[str, float] = field(default_factory=dict)  # where it is not DEFAULT_LEARNING_RATE


DEFAULT_LEARNING_RATE = 3e-3
# In both: untied embeddings, and weights drawn wider than for text, or the layers see next to nothing of each other.
SELECTIVE_COPYING = Setting(
    lengths=(256, 256),
    held_out_lengths=(256, 256),
    batch_size=32,
    steps=8000,
    layers=[1, 2, 3],
    # Like the paper's: no convolution, no MLP. It starts with memories of up to the length of the question.
    width=64,
    minrnn=dict(expansion_factor=4, conv_kernel_size=0, intermediate_size=0, max_timescale=256,
                initializer_range=0.1),
    learning_rates={"Llama": 1e-3, "Mamba": 1e-3},
)  # fmt: skip
CHOMSKY = Setting(
    lengths=(1, 40),
    held_out_lengths=(40, 256),
    batch_size=128,
    steps=2000,
    layers=[2],
    width=64,
    minrnn=dict(expansion_factor=2, conv_kernel_size=4, intermediate_size=0, max_timescale=256,
                initializer_range=0.1),
)  # fmt: skip


def cut_to_answers(batches: TaskBatches) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) without what follows the answers, which end together in all rows of a batch."""
    for inputs, targets in batches:
        end = (targets[0] != IGNORED).nonzero()[-1].item() + 1
        yield inputs[:, :end].contiguous(), targets[:, :end].contiguous()


@torch.no_grad()
def accuracy(model: nn.Module, held_out: HeldOutQuestions) -> float:
    model.eval()
    right = count = 0
    for inputs, targets in held_out.batches(EVALUATION_TOKENS):
        with torch.autocast("cpu", torch.bfloat16):
            guesses = model(inputs).argmax(-1)
        right += (guesses == targets).sum().item()
        count += (targets != IGNORED).sum().item()
    return right / count


def main() -> None:
    flags = parser("paper_tasks", __doc__, rounds=1)
    flags.add_argument("task", choices=TASKS)
    flags.add_argument("--layers", type=int, nargs="+")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--steps", type=int)
    flags.add_argument("--learning-rates", type=float, nargs="+", help="a sweep, in place of one for each contender")
    options = flags.parse_args()
    report = Report(options)
    setting = SELECTIVE_COPYING if options.task == "selective_copying" else CHOMSKY
    task, steps = TASKS[options.task], options.steps or setting.steps
    tokenizer = character_tokenizer([task.symbols, MARK])
    lengths = max(task.shortest, setting.lengths[0]), setting.lengths[1]
    questions = Questions(task, tokenizer, lengths[1])
    held_out = HeldOutQuestions(Questions(task, tokenizer, setting.held_out_lengths[1]), setting.held_out_lengths)
    positions = held_out.questions.sequence_length
    for layers in options.layers or setting.layers:
        family = Family(len(tokenizer), layers, positions, tied=False, minrnn=setting.minrnn)
        for name in CONTENDERS:
            if not report.wants(f"{options.task} {name} {layers}"):
                continue
            for rate in options.learning_rates or [setting.learning_rates.get(name, DEFAULT_LEARNING_RATE)]:
                for seed in options.seeds:
                    torch.manual_seed(seed)
                    model = family.of_equal_size(name, setting.width)
                    batches = TaskBatches(questions, lengths, setting.batch_size, seed, slice(None))
                    started = time.perf_counter()
                    curve = {}
                    for step in train(model, cut_to_answers(batches), steps, rate, betas=setting.betas):
                        if step % EVALUATE_EVERY_STEPS == 0 or step == steps:
                            curve[step] = accuracy(model, held_out)
                    reached = [step for step, value in curve.items() if value >= 0.99]
                    report.add(
                        task=options.task,
                        contender=name,
                        layers=layers,
                        seed=seed,
                        parameters=parameters(model),
                        learning_rate=rate,
                        steps=steps,
                        accuracy=curve[steps],
                        steps_to_99=min(reached, default=None),
                        minutes=(time.perf_counter() - started) / 60,
                    )
    report.print_table()


if __name__ == "__main__":
    main()
