"""Past the training length: do loss, states and recall hold where a model was never trained?

minGRU and the other cells, Mamba and GPT-2 (transformers' classes) of equal size, trained alike on one CPU thread, as
benchmarks/paper/training.py does, on BATCH sequences of TRAINED_LENGTH tokens. GPT-2's table of positions, of which it
learns the first TRAINED_LENGTH, is not counted. Experiments:

text     bytes of Python's standard library. loss: nats a byte of held-out text at positions up to 64 times
         TRAINED_LENGTH, each row from half its position on; loss_in_parts: of the same bytes, each read with no more
         than TRAINED_LENGTH before it, so that a text which is harder there does not pass for a failure. state_rms and
         largest_state: of the states after so many tokens (none of GPT-2, which keeps all it read). minGRU's and
         minLSTM's are means of candidates, and so bounded; "Stuffed Mamba" (arXiv 2410.07145) warns of states that
         are not.
passkey  a 5-digit key anywhere in a text of random letters, asked for at its end; trained on lengths up to
         TRAINED_LENGTH. accuracy: all five digits right, by length, for minGRU with states of 1, 2 and 4 times the
         width as well, and for minLSTM with memories of up to the longest text at the start.
recall   PAIRS pairs of a letter and a digit, then each letter once more: its digit is to follow (associative recall).
         accuracy: digits, by the number of pairs, of which training has seen up to TRAINED_PAIRS.

A row is a contender at one length. Runs of other than STEPS on the text, and those with SWEEP_SEED, are of a sweep.

    python -m benchmarks.paper.long_context [text passkey recall] [--only minGRU] [--seeds 0 1 2]
    python -m benchmarks.paper.long_context text --steps 200 --learning-rates 2e-3 4e-3
    python -m benchmarks.paper.long_context passkey --seeds 100 --learning-rates 2e-2
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Report, parser
from benchmarks.paper.models import CELL_TYPES, Family, parameters
from benchmarks.paper.training import train
from modeling_minrnn import MinRNNForCausalLM
from training.config import STDLIB, DataConfig
from training.data import IGNORED, TokenStream, load_documents, token_stream
from training.tokenizers import byte_tokenizer

TRAINED_LENGTH = 64
LENGTHS = [TRAINED_LENGTH * 2**n for n in range(7)]  # to 64 times
TRAINED_PAIRS, PAIRS = 8, [4, 8, 12, 16, 24]
BATCH, WIDTH, LAYERS = 32, 64, 2
# The best on the text of those tried in 300 steps; Mamba's and GPT-2's are the highest tried.
LEARNING_RATES = {"minGRU": 1e-2, "minLSTM": 1e-2, "Mamba": 8e-3, "GPT-2": 4e-3}
# The other cells have minGRU's, which is not swept for them.
LEARNING_RATES |= {name: LEARNING_RATES["minGRU"] for name in CELL_TYPES if name not in LEARNING_RATES}
# For passkeys and recall: MinRNN's as on the text (minLSTM finds more at 2e-2); Mamba's and GPT-2's are not swept.
LEARNING_RATES_OF_QUESTIONS = LEARNING_RATES | {"Mamba": 4e-3, "GPT-2": 5e-4}
STEPS = {"text": 1000, "passkey": 2000, "recall": 4000}
SWEEP_SEED = 100  # of runs by which settings for questions are chosen; they are in no table
EVALUATED, ASKED = 16, 64  # texts read for the loss at each length, and questions asked
VOCABULARY = 258
LETTERS, DIGITS, QUESTION = range(ord("a"), ord("z") + 1), range(ord("0"), ord("9") + 1), ord("?")


def contenders(experiment: str) -> dict[str, Callable[[], nn.Module]]:
    def family(state: float = 1, memory: float = TRAINED_LENGTH) -> Family:
        minrnn = {"max_timescale": memory, "expansion_factor": state}
        return Family(VOCABULARY, LAYERS, LENGTHS[-1], heads=4, minrnn=minrnn)

    models = {name: partial(family().of_equal_size, name, WIDTH) for name in LEARNING_RATES}
    if experiment != "text":
        models |= {f"minGRU, state x{factor}": partial(family(factor).build, "minGRU", WIDTH) for factor in (2, 4)}
        # 48 wide it has the parameters of the first; of so many tokens is a memory that spans the longest passkeys.
        models["minGRU, 48 wide, state x4"] = partial(family(4).build, "minGRU", 48)
        models["minLSTM, memory 4096"] = partial(family(memory=LENGTHS[-1]).of_equal_size, "minLSTM", WIDTH)
    return models


def rate_of(experiment: str, contender: str) -> float:
    """The learning rate of a contender, which a variant of it has too."""
    rates = LEARNING_RATES if experiment == "text" else LEARNING_RATES_OF_QUESTIONS
    return rates[contender.split(",")[0]]


# ---- Data: batches of tokens (B, T) and of what follows each (B, T), IGNORED where there is no loss


def draw(choices: range, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(choices.start, choices.stop, shape, generator=generator)


def next_tokens(tokens: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
    """Targets at the positions (B, n) alone."""
    targets = torch.full_like(tokens, IGNORED).scatter(1, questions, tokens.gather(1, questions + 1))
    return tokens[:, :-1], targets[:, :-1]


def passkeys(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Letters, in them five digits, then a question mark and the digits again."""
    tokens = draw(LETTERS, (rows, length + 1), generator)
    key = draw(DIGITS, (rows, 5), generator)
    start = torch.randint(length - 10, (rows, 1), generator=generator)
    tokens.scatter_(1, start + torch.arange(5), key)
    tokens[:, -6] = QUESTION
    tokens[:, -5:] = key
    return next_tokens(tokens, torch.arange(length - 5, length).expand(rows, -1))


def pairs(number: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Letters that differ, each with a digit, twice, the second time in another order."""
    letters = torch.rand(rows, len(LETTERS), generator=generator).argsort(1)[:, :number]
    letters, digits = letters + LETTERS.start, draw(DIGITS, (rows, number), generator)
    order = torch.rand(rows, number, generator=generator).argsort(1)
    first = torch.stack([letters, digits], -1).flatten(1)
    second = torch.stack([letters.gather(1, order), digits.gather(1, order)], -1).flatten(1)
    questions = 2 * number + 2 * torch.arange(number)
    return next_tokens(torch.cat([first, second], 1), questions.expand(rows, -1))


@cache
def text() -> list[TokenStream]:
    """To train on, and held out."""
    return [token_stream(documents, byte_tokenizer()) for documents in load_documents(DataConfig(dataset=STDLIB))]


def training_batches(experiment: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    if experiment == "text":
        stream = text()[0]
        while True:
            starts = torch.randint(len(stream) - TRAINED_LENGTH, (BATCH,), generator=generator).tolist()
            windows = torch.stack([stream.read(start, start + TRAINED_LENGTH + 1) for start in starts])
            yield windows[:, :-1], windows[:, 1:]
    while True:
        if experiment == "passkey":
            length = int(torch.randint(16, TRAINED_LENGTH + 1, (), generator=generator))
            yield passkeys(length, BATCH * TRAINED_LENGTH // length, generator)
        else:
            yield pairs(int(torch.randint(1, TRAINED_PAIRS + 1, (), generator=generator)), 2 * BATCH, generator)


# ---- Training and measuring


def states(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """All that the recurrence keeps of the tokens, flat; None of GPT-2, which has none."""
    output = model.model(tokens, use_cache=True)
    if isinstance(model.model, MinRNNForCausalLM):
        kept = [layer.keys for layer in output.past_key_values.layers]
    elif hasattr(output, "cache_params"):
        kept = [output.cache_params.get_recurrent_state(i) for i in range(model.model.config.num_hidden_layers)]
    else:
        return None
    return torch.cat([state.flatten() for state in kept])


@torch.no_grad()
def measure(experiment: str, model: nn.Module, seed: int) -> Iterator[dict[str, float]]:
    generator = torch.Generator().manual_seed(10_000 + seed)
    if experiment == "text":
        stream = text()[1]
        starts = torch.linspace(0, len(stream) - LENGTHS[-1] - 1, EVALUATED).long().tolist()
        windows = torch.stack([stream.read(start, start + LENGTHS[-1] + 1) for start in starts])
        losses = torch.stack([cross_entropy(model(w[None, :-1])[0], w[1:], reduction="none") for w in windows]).mean(0)
        half = TRAINED_LENGTH // 2
        # Of each part the second half: together, all positions but those of the first half.
        parts = windows.unfold(1, TRAINED_LENGTH + 1, half)
        in_parts = [cross_entropy(model(p[:, :-1])[:, half:].mT, p[:, half + 1 :], reduction="none") for p in parts]
        losses_in_parts = torch.stack(in_parts).mean(0).flatten()
        for length in LENGTHS:
            row = {
                "length": length,
                "loss": losses[length // 2 : length].mean().item(),
                "loss_in_parts": losses_in_parts[length // 2 - half : length - half].mean().item(),
            }
            if (kept := states(model, windows[:4, :length])) is not None:
                row |= {"state_rms": kept.square().mean().sqrt().item(), "largest_state": kept.abs().max().item()}
            yield row
        return
    for length in LENGTHS if experiment == "passkey" else PAIRS:
        correct = []
        for _ in range(ASKED // 8):
            tokens, targets = (passkeys if experiment == "passkey" else pairs)(length, 8, generator)
            asked = targets != IGNORED
            right = (model(tokens).argmax(-1) == targets) | ~asked
            correct.append(right.all(1) if experiment == "passkey" else right[asked])
        key = "length" if experiment == "passkey" else "pairs"
        yield {key: length, "accuracy": torch.cat(correct).float().mean().item()}


def main() -> None:
    flags = parser("paper_long_context", __doc__, rounds=1)
    flags.add_argument("experiments", nargs="*", default=list(STEPS))
    flags.add_argument("--steps", type=int)
    flags.add_argument("--learning-rates", type=float, nargs="+")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = flags.parse_args()
    report = Report(options)
    for experiment in options.experiments:
        steps = options.steps or STEPS[experiment]
        for name, build in contenders(experiment).items():
            if not report.wants(f"{experiment} {name}"):
                continue
            rates = options.learning_rates or [rate_of(experiment, name)]
            for rate, seed in itertools.product(rates, options.seeds):
                torch.manual_seed(seed)
                model = build()
                start = time.perf_counter()
                deque(train(model, training_batches(experiment, seed), steps, rate), maxlen=0)
                run = {
                    "experiment": experiment,
                    "contender": name,
                    "seed": seed,
                    "parameters": parameters(model),
                    "steps": steps,
                    "learning_rate": rate,
                    "training_seconds": time.perf_counter() - start,
                }
                for row in measure(experiment, model, seed):
                    report.add(**run, **row)
    report.print_table()


if __name__ == "__main__":
    main()
