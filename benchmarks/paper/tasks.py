"""Selective copying and the Chomsky hierarchy (arXiv 2410.01201, tables 1, 2 and 6), scaled down to one CPU thread.

The tasks of training/tasks.py, which train.py runs too, for models of equal size (benchmarks/paper/models.py): minGRU,
minLSTM, nn.GRU, nn.LSTM, Mamba (mambapy's scan) and a Transformer (Llama). AdamW without weight decay, gradient norm
clipped to 1, learning rate warmed up over a twentieth of the steps and then down to a tenth along a cosine, bfloat16
products. A row is one training run:

accuracy: tokens of held-out answers predicted, on average over the held-out lengths, at the last step.
steps_to_99: the first evaluation, of one every 250 steps, with an accuracy of at least 99 %; null if there was none.

    python -m benchmarks.paper.tasks selective_copying --layers 1 2 3 --seeds 0 1 2 3 4 [--only minGRU] [--steps 8000]
    python -m benchmarks.paper.tasks even_pairs --learning-rates 1e-3 3e-3 1e-2
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from benchmarks.harness import Report, parser
from benchmarks.paper.models import contenders, parameters
from training.data import IGNORED
from training.tasks import MARK, TASKS, HeldOutQuestions, Questions, TaskBatches
from training.tokenizers import character_tokenizer

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
                initializer_range=0.1, tie_word_embeddings=False),
    learning_rates={"Transformer": 1e-3, "Mamba": 1e-3},
)  # fmt: skip
CHOMSKY = Setting(
    lengths=(1, 40),
    held_out_lengths=(40, 256),
    batch_size=128,
    steps=2000,
    layers=[2],
    width=64,
    minrnn=dict(expansion_factor=2, conv_kernel_size=4, intermediate_size=0, max_timescale=256,
                initializer_range=0.1, tie_word_embeddings=False),
)  # fmt: skip


def accuracy(model: nn.Module, held_out: HeldOutQuestions) -> float:
    model.eval()
    right = count = 0
    for inputs, targets in held_out.batches(EVALUATION_TOKENS):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            guesses = model(inputs).argmax(-1)
        right += (guesses == targets).sum().item()
        count += (targets != IGNORED).sum().item()
    model.train()
    return right / count


def train(model: nn.Module, batches: TaskBatches, held_out: HeldOutQuestions, steps: int, learning_rate: float):
    """Trains in place; returns {step: accuracy} of every evaluation."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0, fused=True)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, steps // 20, steps, min_lr_rate=0.1)
    curve = {}
    for step in range(1, steps + 1):
        inputs, targets = next(batches)
        end = (targets[0] != IGNORED).nonzero()[-1].item() + 1  # all rows of a batch end there, and padding follows
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs[:, :end].contiguous())
        scored = targets[:, :end] != IGNORED
        cross_entropy(logits[scored].float(), targets[:, :end][scored]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVALUATE_EVERY_STEPS == 0 or step == steps:
            curve[step] = accuracy(model, held_out)
    return curve


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
    questions = Questions(task, tokenizer, setting.lengths[1])
    held_out = HeldOutQuestions(Questions(task, tokenizer, setting.held_out_lengths[1]), setting.held_out_lengths)
    positions = held_out.questions.sequence_length
    for layers in options.layers or setting.layers:
        models = contenders(len(tokenizer), setting.width, layers, positions, setting.minrnn)
        for name, build in models.items():
            if not report.wants(f"{options.task} {name} {layers}"):
                continue
            for rate in options.learning_rates or [setting.learning_rates.get(name, DEFAULT_LEARNING_RATE)]:
                for seed in options.seeds:
                    torch.manual_seed(seed)
                    model = build()
                    batches = TaskBatches(questions, setting.lengths, setting.batch_size, seed, slice(None))
                    started = time.perf_counter()
                    curve = train(model, batches, held_out, steps, rate)
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
