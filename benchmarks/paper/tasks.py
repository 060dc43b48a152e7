"""Selective copying and the Chomsky hierarchy (arXiv 2410.01201, tables 1, 2 and 6), scaled down to one CPU thread.

The tasks of training/tasks.py in the settings of configs/paper/, which train.py runs too, for models of equal size
(benchmarks/paper/models.py): minGRU and the other cells, nn.GRU, nn.LSTM, Mamba and Llama, trained as
benchmarks/paper/training.py does. A row is one training run:

accuracy: tokens of held-out answers predicted, on average over the held-out lengths, at the last step. With --choose,
of other questions than those that are reported: settings are chosen by such rows (`choosing` true).
steps_to_99: the first evaluation, of one every 250 steps, with an accuracy of at least 99 %; null if there was none.

    python -m benchmarks.paper.tasks selective_copying --layers 1 2 3 --seeds 0 1 2 3 4 [--only minGRU] [--steps 6000]
    python -m benchmarks.paper.tasks even_pairs --choose --seeds 100 --steps 500 --learning-rates 1e-3 3e-3 1e-2
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Report, parser
from benchmarks.paper.models import CELL_TYPES, Family, parameters
from benchmarks.paper.training import mixed_precision, train
from training.config import RunConfig, load_config
from training.data import IGNORED
from training.tasks import TASKS, HeldOutQuestions, TaskBatches, load_task

OWN: dict[str, dict[str, Any]] = {  # by contender, arguments of MinRNNConfig in place of those of the file
    # As in cells.py: a turn in a plane is two reflections. Of H columns, not 2 H, as each key is another matrix.
    "gated DeltaNet, 2 keys": {
        "householder_steps": 2, "num_heads": 8, "expansion_factor": 1, "max_timescale": 1e5, "conv_kernel_size": 0,
        "learned_initial_state": True,
    },
    "minGRU, state x8": {"expansion_factor": 8},  # of fewer columns, as parameters are equal
}  # fmt: skip
CONTENDERS = (*CELL_TYPES, *OWN, "nn.GRU", "nn.LSTM", "Mamba", "Llama")
INITIALISATION = ("max_timescale", "initializer_range")
OF_THE_FAMILY = ("cell_type", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
EVALUATE_EVERY_STEPS = 250
EVALUATION_TOKENS = 2**14
CHOOSING_DRAW = 2  # of held-out questions

# In place of the rate in the file, which is that of recurrent models: the best of 5e-4, 1e-3 and 2e-3 in 1500 steps.
LEARNING_RATES = {("selective_copying", "Llama"): 1e-3}


def load_setting(task: str) -> RunConfig:
    """The settings that train.py would train this task with."""
    name = "selective-copying-cpu" if task == "selective_copying" else "chomsky"
    config = load_config(f"configs/paper/{name}.yaml", [f"data.task={task}"])
    shortest, longest = config.data.task_lengths
    config.data.task_lengths = (max(shortest, TASKS[task].shortest), longest)
    return config


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
        with mixed_precision():
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
    flags.add_argument("--choose", action="store_true", help="measure by questions that no reported row has seen")
    flags.add_argument("--plain", action="store_true", help="MinRNN with the initialisation that MinRNNConfig has")
    options = flags.parse_args()
    report = Report(options)
    config = load_setting(options.task)
    setting, arguments = config.train, config.model
    if options.plain:
        arguments = {name: value for name, value in arguments.items() if name not in INITIALISATION}
    minrnn = {name: value for name, value in arguments.items() if name not in OF_THE_FAMILY}
    steps = options.steps or setting.steps
    tokenizer, _, held_out = load_task(config, slice(None))
    if options.choose:
        held_out.draw = CHOOSING_DRAW
    for layers in options.layers or [arguments["num_hidden_layers"]]:
        positions = max(held_out.questions.sequence_length, setting.sequence_length)
        family = Family(len(tokenizer), layers, positions, tied=arguments["tie_word_embeddings"], minrnn=minrnn)
        size = parameters(family.build("minGRU", arguments["hidden_size"]))
        for name in CONTENDERS:
            if not report.wants(f"{options.task} {name} {layers}"):
                continue
            for rate in options.learning_rates or [LEARNING_RATES.get((options.task, name), setting.learning_rate)]:
                for setting.seed in options.seeds:
                    torch.manual_seed(setting.seed)
                    own = replace(family, minrnn=minrnn | OWN.get(name, {}))
                    model = own.of_equal_size(name.split(",")[0], arguments["hidden_size"], size)
                    _, batches, _ = load_task(config, slice(None))
                    started, curve = time.perf_counter(), {}
                    warmup = setting.warmup_steps / setting.steps
                    for step in train(
                        model, cut_to_answers(batches), steps, rate, betas=setting.betas, warmup=warmup,
                        final_rate=setting.min_learning_rate_ratio,
                    ):  # fmt: skip
                        if step % EVALUATE_EVERY_STEPS == 0 or step == steps:
                            curve[step] = accuracy(model, held_out)
                            print(f"{step} steps: {curve[step]:.3f}", file=sys.stderr, flush=True)
                    reached = [step for step, value in curve.items() if value >= 0.99]
                    report.add(
                        task=options.task,
                        contender=name,
                        layers=layers,
                        seed=setting.seed,
                        parameters=parameters(model),
                        plain=options.plain,
                        choosing=options.choose,
                        learning_rate=rate,
                        steps=steps,
                        accuracy=curve[steps],
                        steps_to_99=min(reached, default=None),
                        minutes=(time.perf_counter() - started) / 60,
                    )
    report.print_table()


if __name__ == "__main__":
    main()
