"""What a decision costs late in an episode: one step of the models of offline_rl.py, on one CPU thread.

One episode, of HalfCheetah's sizes, in float32: the action of its last step, of three tokens like all before it.
reads: "state", the recurrent state of MinRNN; "cache", keys and values of all tokens before, for GPT-2 with a table of
as many positions; "window", the last CONTEXT steps again, as positions move with the window. What state or cache give
is checked against one pass over the whole episode.

ms: median of a step. slowdown: over that of the first contender.
kept_bytes: what is carried from step to step.

    python -m benchmarks.paper.decision_step [--only minGRU] [--horizons 10 100 1000] [--rounds 50]
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from benchmarks.harness import Report, interleave, parser, relative_error, timed, verify
from benchmarks.paper.models import parameters
from benchmarks.paper.offline_rl import CONTEXT, build

OBSERVATION_SIZE, ACTION_SIZE = 17, 6  # HalfCheetah's
HORIZONS = [10, 100, 1000]
CONTENDERS = [("minGRU", "state"), ("minLSTM", "state"), ("GPT-2", "cache"), ("GPT-2", "window")]
TOLERANCE = 1e-5  # float32 in another order; the worst was 3e-7

Inputs = tuple[Tensor, ...]  # of DecisionModel, (1, T, .)


class Contender:
    """A model that has read all steps of `inputs` but the last one."""

    @torch.no_grad()
    def __init__(self, name: str, reads: str, inputs: Inputs):
        torch.manual_seed(0)
        horizon = inputs[0].shape[1]
        self.model = build(name, OBSERVATION_SIZE, ACTION_SIZE, discrete=False).eval()
        if reads == "cache":
            self.model.trunk.wpe = nn.Embedding(3 * horizon, self.model.trunk.config.n_embd)
        self.parameters = parameters(self.model)
        if reads == "window":
            self.cache, self.inputs = None, tuple(values[:, -CONTEXT:] for values in inputs)
            self.kept_bytes = sum(values.nbytes for values in self.inputs)
            return
        self.cache, self.inputs = DynamicCache(config=self.model.trunk.config), tuple(v[:, -1:] for v in inputs)
        self.model(*(values[:, :-1] for values in inputs), cache=self.cache)
        self.kept_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        error = relative_error([self.step(copy.deepcopy(self.cache))], [self.model(*inputs)[:, -1:]])
        verify(f"{name}, {reads}", error, TOLERANCE)

    @torch.no_grad()
    def step(self, cache: Cache | None) -> Tensor:
        return self.model(*self.inputs, cache=cache)[:, -1:]

    def sample(self) -> float:
        """Seconds of the last step, each time from the same cache."""
        return timed(partial(self.step, copy.deepcopy(self.cache)))()


def main() -> None:
    flags = parser("paper_decision_step", __doc__, rounds=50)
    flags.add_argument("--horizons", type=int, nargs="+", default=HORIZONS, help="steps, the last of them timed")
    options = flags.parse_args()
    report = Report(options)
    chosen = [(name, reads) for name, reads in CONTENDERS if report.wants(f"{name} {reads}")]
    for horizon in options.horizons:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(torch.randn(1, horizon, n, generator=generator) for n in (ACTION_SIZE, 1, OBSERVATION_SIZE))
        contenders = {key: Contender(*key, inputs) for key in chosen}
        samples = interleave({key: contender.sample for key, contender in contenders.items()}, options.rounds)
        for (name, reads), contender in contenders.items():
            report.add(
                contender=name,
                reads=reads,
                horizon=horizon,
                ms=1e3 * samples.seconds((name, reads)),
                slowdown=samples.ratio((name, reads), chosen[0]),
                kept_bytes=contender.kept_bytes,
                parameters=contender.parameters,
            )
    report.print_table()


if __name__ == "__main__":
    main()
