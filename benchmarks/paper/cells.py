"""Which cell for what: every cell of modeling_minrnn/cells.py on five small tasks, on one CPU thread; and how far the
best go in three that most cannot do.

    python -m benchmarks.paper.cells parity majority recall selective_copying [--only Aaren] [--seeds 0 1 2]
    python -m benchmarks.paper.cells shakespeare --text PATH_TO/input.txt
    python -m benchmarks.paper.cells s3 s5 mqar

parity             random bits, and at every position whether the ones so far are odd. Trained on 64 tokens. One layer
                   with a convolution and no MLP, H = D = 64, float32. accuracy_N: of all positions of N tokens;
                   last_1024: of the last position alone.
majority           the same with whether there are more ones than zeros so far.
recall             associative recall of benchmarks/paper/long_context.py in its setting. accuracy_N: with N pairs.
selective_copying  that of training/tasks.py, 16 letters among 64 tokens: two layers without convolution and MLP.
shakespeare        two layers of 128 in the setting of benchmarks/paper/ablations.py. held_out_loss: nats a character
                   over the whole held-out text, read once with the state carried.
s3, s5             random permutations of 3 or 5 things, and at every position the product of those so far. Trained on
                   8 tokens in the first 100 steps, on 16 in the next 100, then on 64. One layer without convolution
                   and MLP, with a learned initial state, float32. accuracy_N: of all positions of N tokens.
mqar               multi-query associative recall (arXiv 2312.04927): 16 pairs of 64 keys and 64 values, then each key
                   once more, in another order, among other tokens: its value is to follow. Two layers, no MLP.

The layers of mingru-scans 0.2.0 (pip install mingru-scans) take part in the last three where they are installed, with
the MLP that their authors gave them.

Models start as MinRNNConfig has it. In recall, selective_copying and shakespeare each has the state width with which
its parameters come nearest to minGRU's. A row is one training run, training_seconds of the CPU; step_error: of the
logits of one token at a time from those of all at once. The learning rate is that of RATES which does best in
SWEEP_STEPS with SWEEP_SEED, which no other run has (rows with `sweep` true); a single rate in --learning-rates is
taken as it is.
"""

import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Report, now, parser, relative_error
from benchmarks.paper import long_context, tasks
from benchmarks.paper.ablations import SETTING
from benchmarks.paper.models import Logits, Scans, parameters
from benchmarks.paper.training import mean_loss, train
from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM
from modeling_minrnn.cells import CELLS
from train import evaluate
from training.config import load_config
from training.data import IGNORED, RandomWindows, load_documents, token_stream
from training.optimizers import parameter_groups
from training.tasks import load_task
from training.tokenizers import load_tokenizer

STEPS = {
    "parity": 1000, "majority": 500, "recall": 600, "selective_copying": 400, "shakespeare": 300, "s3": 2000,
    "s5": 2000, "mqar": 1000,
}  # fmt: skip
SWEEP_STEPS = {
    "parity": 200, "majority": 200, "recall": 300, "selective_copying": 300, "shakespeare": 300, "s3": 250, "s5": 250,
    "mqar": 100,
}  # fmt: skip
RATES = dict.fromkeys(STEPS, (1e-2, 3e-3, 3e-2)) | {"shakespeare": (8e-3, 4e-3, 1.6e-2)}  # of equals, the first
SWEEP_SEED = 100
MEASURED = {  # what a rate is chosen by
    "parity": "accuracy_1024",
    "majority": "accuracy_256",
    "recall": "accuracy_8",
    "selective_copying": "accuracy",
    "shakespeare": "held_out_loss",
    "s3": "accuracy_128",
    "s5": "accuracy_16",
    "mqar": "accuracy",
}
TRAINED_LENGTH, LENGTHS, ASKED = 64, (64, 256, 1024), 64
COPIED_FROM = 64
FIRST_LENGTHS, FIRST_STEPS = (8, 16), 100  # of words, before those of TRAINED_LENGTH: so many steps of each
WORD_LENGTHS = 16, 64, 128, 256, 1024
WORD_TOKENS = 512  # of a batch
KEYS, PAIRS = 64, 16
STATE_STEP = 16  # of state widths; memory_order of "lmu" divides it

OTHERS = "mingru_signed", "aaren", "rwkv4", "lru", "rglru", "hgrn", "lmu"
LINEAR = {"candidate": "linear"}
CONTENDERS: dict[str, dict[str, Any]] = {  # arguments of MinRNNConfig
    "minGRU": {"cell_type": "mingru"},
    "minGRU, linear": {"cell_type": "mingru"} | LINEAR,
    "minGRU, linear, output gate": {"cell_type": "mingru", "output_gate": True} | LINEAR,
    "minLSTM": {"cell_type": "minlstm"},
    "minLSTM, linear": {"cell_type": "minlstm"} | LINEAR,
} | {CELLS[name].label: {"cell_type": name} for name in OTHERS}
CONTENDERS |= {CELLS[name].label: {"cell_type": name, "num_heads": 2} for name in ("hgrn2", "gated_delta")}
GOOD_FOR = {
    "minGRU": "the default: the paper's",
    "minGRU, linear": "text, in its place: a state of either sign at the same cost",
    "minGRU, linear, output gate": "text, where one matrix more a layer is no matter",
    "minLSTM": "the paper's other cell",
    "minLSTM, linear": "the same with a state of either sign",
    "signed minGRU": "states that flip (parity, switches), counting; text no worse",
    "Aaren": "means over all that was read, which nothing pushes out",
    "RWKV-4": "means of the past that fade at learned rates, as in models of RWKV-4",
    "LRU": "signals with a rhythm: memories that turn, whatever the input",
    "RG-LRU": "the cell of Griffin, with long memories from the start",
    "HGRN": "deep stacks: the deeper the layer, the less it may forget",
    "HGRN2": "recall: a matrix of what was read, by what let it in",
    "gated DeltaNet": "recall, and states that are written over: pairs, permutations",
    "LMU": "signals over a known window: nothing of the memory is learned",
}

NEVER_FORGETS = {"num_heads": 8, "max_timescale": 1e5}  # at the start
# By experiment: arguments of MinRNNConfig, or of Scans where there is a mixer.
BEYOND: dict[str, dict[str, dict[str, Any]]] = {
    "s3": {
        "gated DeltaNet, 2 keys": {"cell_type": "gated_delta", "householder_steps": 2} | NEVER_FORGETS,
        "signed minGRU": {"cell_type": "mingru_signed"},
        "mingru-scans, signed": {"mixer": "signed"},
        "mingru-scans, rotation": {"mixer": "rotation"},
        "mingru-scans, givens": {"mixer": "givens"},
        "mingru-scans, delta, 2 keys": {"mixer": "delta", "nh": 2},
    },
    "s5": {
        "gated DeltaNet, 4 keys": {"cell_type": "gated_delta", "householder_steps": 4} | NEVER_FORGETS,
        "mingru-scans, givens": {"mixer": "givens"},
        "mingru-scans, delta, 4 keys": {"mixer": "delta", "nh": 4},
    },
    "mqar": {
        "gated DeltaNet": {"cell_type": "gated_delta", "num_heads": 2},
        "HGRN2": {"cell_type": "hgrn2", "num_heads": 2},
        "mingru-scans, delta": {"mixer": "delta"},
    },
}
if importlib.util.find_spec("mingru") is None:
    BEYOND = {
        name: {label: own for label, own in all_of.items() if "mixer" not in own} for name, all_of in BEYOND.items()
    }

Batches = Iterator[Iterable[Tensor]]


@dataclass(frozen=True)
class Experiment:
    """A task and how models are trained on it.

    model: arguments of MinRNNConfig, with the state of a minGRU. equal: "state" or "parameters". training: further
    arguments of `train`, weight_decay: of the matrices that train.py decays. contenders: arguments of MinRNNConfig, or
    of Scans where there is a mixer.
    """

    model: dict[str, Any]
    batches: Callable[[int], Batches]
    measure: Callable[[Logits, int], dict[str, float]]
    equal: str = "parameters"
    weight_decay: float = 0.0
    training: dict[str, Any] = field(default_factory=dict)
    contenders: dict[str, dict[str, Any]] = field(default_factory=lambda: CONTENDERS)

    def config(self, contender: str, state: int) -> MinRNNConfig:
        width = {"expansion_factor": state / self.model["hidden_size"]}
        return MinRNNConfig(**self.model | width | self.contenders[contender])

    def build(self, contender: str) -> nn.Module:
        own = self.contenders[contender]
        if "mixer" in own:
            return Scans(*(self.model[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")), **own)
        return Logits(MinRNNForCausalLM(self.config(contender, self.state_of(contender))))

    def state_of(self, contender: str) -> int:
        """D, a multiple of STATE_STEP."""
        own = round(self.model["hidden_size"] * self.model["expansion_factor"])
        if self.equal == "state":
            return own

        def size(name: str, state: int) -> int:
            return MinRNNForCausalLM(self.config(name, state)).num_parameters()

        least, more = (size(contender, state) for state in (STATE_STEP, 2 * STATE_STEP))  # a straight line
        return STATE_STEP * max(1, round(1 + (size("minGRU", own) - least) / (more - least)))


def more_ones(tokens: Tensor) -> Tensor:
    return 2 * tokens.cumsum(1) > torch.arange(1, tokens.shape[1] + 1)


def odd_ones(tokens: Tensor) -> Tensor:
    return tokens.cumsum(1) % 2


def answers_at_all(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Nats a position, in float32."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def counting(answer: Callable[[Tensor], Tensor]) -> Experiment:
    """Random bits, and at every position the answer to those so far."""

    def questions(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(2, (rows, length), generator=generator)
        return tokens, answer(tokens).long()

    def batches(seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield questions(TRAINED_LENGTH, 32, generator)

    @torch.no_grad()
    def measure(model: Logits, seed: int) -> dict[str, float]:
        tokens, targets = questions(LENGTHS[-1], ASKED, torch.Generator().manual_seed(10_000 + seed))
        right = (model(tokens).argmax(-1) == targets).double()
        of_length = {f"accuracy_{length}": right[:, :length].mean().item() for length in LENGTHS}
        return of_length | {f"last_{LENGTHS[-1]}": right[:, -1].mean().item()}

    model = {"vocab_size": 2, "hidden_size": 64, "expansion_factor": 1, "num_hidden_layers": 1, "intermediate_size": 0}
    training = {"betas": (0.9, 0.95), "warmup": 0.05, "final_rate": 0.0, "loss": answers_at_all}
    return Experiment(model, batches, measure, "state", training=training)


def products(things: int) -> Tensor:
    """(N, N): the number of b after a, of all N permutations of so many things in lexicographic order."""
    permutations = list(itertools.permutations(range(things)))
    number = {permutation: i for i, permutation in enumerate(permutations)}
    return torch.tensor([[number[tuple(b[a[i]] for i in range(things))] for b in permutations] for a in permutations])


def words(things: int) -> Experiment:
    """Random permutations of so many things, and at every position the product of those so far."""
    table = products(things)

    def questions(length: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(len(table), (rows, length), generator=generator)
        so_far = [tokens[:, 0]]
        for token in tokens.unbind(1)[1:]:
            so_far.append(table[so_far[-1], token])
        return tokens, torch.stack(so_far, 1)

    def batches(seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        first = [length for length in FIRST_LENGTHS for _ in range(FIRST_STEPS)]
        for length in itertools.chain(first, itertools.repeat(TRAINED_LENGTH)):
            yield questions(length, WORD_TOKENS // length, generator)

    @torch.no_grad()
    def measure(model: nn.Module, seed: int) -> dict[str, float]:
        tokens, targets = questions(WORD_LENGTHS[-1], ASKED, torch.Generator().manual_seed(10_000 + seed))
        logits = model(tokens)
        right = (logits.argmax(-1) == targets).double()
        of_length = {f"accuracy_{length}": right[:, :length].mean().item() for length in WORD_LENGTHS}
        stepped = model.step_by_step(tokens[:4])
        return of_length | {"step_error": relative_error([stepped], [logits[:4]])}

    # Tied, the output would favour the token itself, the more the longer the state has faded.
    model = {"vocab_size": len(table), "hidden_size": 64, "expansion_factor": 1, "num_hidden_layers": 1,
             "intermediate_size": 0, "conv_kernel_size": 0, "learned_initial_state": True,
             "tie_word_embeddings": False}  # fmt: skip
    training = {"betas": (0.9, 0.95), "warmup": 0.05, "final_rate": 0.0, "loss": answers_at_all}
    return Experiment(model, batches, measure, "state", training=training, contenders=BEYOND[f"s{things}"])


def keys_and_values(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs, then their keys among other tokens; the value is the target of a key there, and there alone."""
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(KEYS, (rows, PAIRS), generator=generator)
    places = torch.rand(rows, 2 * PAIRS, generator=generator).argsort(1)[:, :PAIRS]  # among the rest
    asked = torch.full((rows, 2 * PAIRS), 2 * KEYS).scatter(1, places, keys)
    answers = torch.full((rows, 2 * PAIRS), IGNORED).scatter(1, places, values)
    pairs = torch.stack([keys, values], 2).flatten(1)
    return torch.cat([pairs, asked], 1), torch.cat([torch.full_like(pairs, IGNORED), answers], 1)


def mqar() -> Experiment:
    def batches(seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield keys_and_values(32, generator)

    @torch.no_grad()
    def measure(model: nn.Module, seed: int) -> dict[str, float]:
        tokens, targets = keys_and_values(4 * ASKED, torch.Generator().manual_seed(10_000 + seed))
        logits = model(tokens)
        asked = targets != IGNORED
        error = relative_error([model.step_by_step(tokens[:4])], [logits[:4]])
        return {"accuracy": (logits.argmax(-1) == targets)[asked].double().mean().item(), "step_error": error}

    model = {"vocab_size": 2 * KEYS + 1, "hidden_size": 64, "expansion_factor": 1, "num_hidden_layers": 2,
             "intermediate_size": 0}  # fmt: skip
    training = {"betas": (0.9, 0.95), "warmup": 0.05, "final_rate": 0.0, "loss": answers_at_all}
    return Experiment(model, batches, measure, "state", training=training, contenders=BEYOND["mqar"])


def recall() -> Experiment:
    def measure(model: Logits, seed: int) -> dict[str, float]:
        return {f"accuracy_{row['pairs']}": row["accuracy"] for row in long_context.measure("recall", model, seed)}

    model = {
        "vocab_size": long_context.VOCABULARY,
        "hidden_size": long_context.WIDTH,
        "expansion_factor": 1,
        "num_hidden_layers": long_context.LAYERS,
    }
    return Experiment(model, partial(long_context.training_batches, "recall"), measure)


def selective_copying() -> Experiment:
    setting = tasks.load_setting("selective_copying")
    setting.data.task_lengths = setting.data.held_out_lengths = (COPIED_FROM, COPIED_FROM)
    tokenizer, _, held_out = load_task(setting, slice(None))

    def batches(seed: int) -> Batches:
        setting.train.seed = seed
        return tasks.cut_to_answers(load_task(setting, slice(None))[1])

    model = {
        "vocab_size": len(tokenizer),
        "hidden_size": setting.model["hidden_size"],
        "expansion_factor": 2,
        "num_hidden_layers": 2,
        "conv_kernel_size": 0,
        "intermediate_size": 0,
    }
    return Experiment(model, batches, lambda model, seed: {"accuracy": tasks.accuracy(model, held_out)})


def shakespeare(text: Path) -> Experiment:
    setting = load_config(str(SETTING), [f"data.files=[{text}]", "model.hidden_size=128"])
    train_config = setting.train
    documents, held_out_documents = load_documents(setting.data)
    tokenizer = load_tokenizer(setting.data.tokenizer, (document["text"] for document in documents))
    stream, held_out = token_stream(documents, tokenizer), token_stream(held_out_documents, tokenizer)
    model = {name: setting.model[name] for name in ("hidden_size", "num_hidden_layers")}
    model |= {"vocab_size": len(tokenizer), "expansion_factor": 1}

    def batches(seed: int) -> Batches:
        return RandomWindows(stream, train_config.sequence_length, train_config.batch_size, seed, slice(None))

    training = {
        "betas": train_config.betas,
        "warmup": train_config.warmup_steps / train_config.steps,
        "final_rate": train_config.min_learning_rate_ratio,
    }
    measure = lambda model, seed: {"held_out_loss": evaluate(model.model, held_out)[0]}  # noqa: E731
    return Experiment(model, batches, measure, weight_decay=train_config.weight_decay, training=training)


EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "parity": lambda: counting(odd_ones),
    "majority": lambda: counting(more_ones),
    "recall": recall,
    "selective_copying": selective_copying,
    "shakespeare": shakespeare,
    "s3": lambda: words(3),
    "s5": lambda: words(5),
    "mqar": mqar,
}


def run(experiment: Experiment, contender: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """One training run, as a row."""
    torch.manual_seed(seed)
    model = experiment.build(contender)
    started = now()
    groups = parameter_groups(model.model, experiment.weight_decay) if experiment.weight_decay else None
    settings = {"loss": mean_loss} | experiment.training
    deque(train(model, experiment.batches(seed), steps, rate, groups=groups, **settings), maxlen=0)
    seconds = now() - started
    return {
        "seed": seed,
        "parameters": parameters(model),
        "state_size": None if isinstance(model, Scans) else model.model.config.state_size,
        "learning_rate": rate,
        "steps": steps,
        "training_seconds": seconds,
        **experiment.measure(model, seed),
    }


def main() -> None:
    flags = parser("paper_cells", __doc__, rounds=1)
    flags.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    flags.add_argument("--text", type=Path, help="of shakespeare: tiny Shakespeare, as one file")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--steps", type=int, help="in place of STEPS")
    flags.add_argument("--sweep-steps", type=int, help="in place of SWEEP_STEPS")
    flags.add_argument("--learning-rates", type=float, nargs="+", help="in place of RATES; one is not swept")
    options = flags.parse_args()
    if "shakespeare" in options.experiments and options.text is None:
        flags.error("shakespeare needs --text")
    report = Report(options)
    for name in options.experiments:
        experiment = EXPERIMENTS[name](*([options.text] if name == "shakespeare" else []))
        sign = -1 if name == "shakespeare" else 1
        for contender in experiment.contenders:
            if not report.wants(f"{name} {contender}"):
                continue
            rates, scores = options.learning_rates or RATES[name], {}
            for rate in rates if len(rates) > 1 else ():
                row = run(experiment, contender, SWEEP_SEED, rate, options.sweep_steps or SWEEP_STEPS[name])
                report.add(experiment=name, contender=contender, sweep=True, **row)
                scores[rate] = sign * row[MEASURED[name]]
            best = max(rates, key=lambda rate: scores.get(rate, 0))
            for seed in options.seeds:
                row = run(experiment, contender, seed, best, options.steps or STEPS[name])
                report.add(experiment=name, contender=contender, sweep=False, **row)
    report.print_table()


if __name__ == "__main__":
    main()
