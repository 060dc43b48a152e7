"""Offline reinforcement learning, after the D4RL experiments of arXiv 2410.01201, on one CPU thread and own data.

Decision Transformers (Chen et al., arXiv 2106.01345) of equal size with three trunks: MinRNNModel with minGRU, with
minLSTM, and GPT2Model. A step is three tokens, the action before it, the return still to come and the observation; at
the last one the action is predicted, by a cross-entropy where actions are discrete, else by a mean squared error. The
data: `episodes` of medium behaviour from benchmarks/paper/trajectories.py, the same for all seeds.

All are trained alike, on windows of CONTEXT steps. Then each plays EPISODES episodes for every return that it is asked
for, those of quantiles of the data (asked). reads: "window", the last CONTEXT steps again at every step, as in
training; or "state", one step at a time, with the recurrent state carried from the first step of the episode on.

score: mean return. normalised: 0 is the mean of random actions, 100 that of the data. (D4RL's 100 is an expert.)

    python -m benchmarks.paper.offline_rl Acrobot-v1 Hopper-v5 --seeds 0 1 2 3 4 [--only minGRU] [--steps 1000]
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, pad
from transformers import DynamicCache, PreTrainedModel

from benchmarks.harness import Report, parser
from benchmarks.paper.models import Family, parameters
from benchmarks.paper.training import mixed_precision, train
from benchmarks.paper.trajectories import (
    TASKS,
    Array,
    Dataset,
    Task,
    action_bounds,
    load_or_make,
    make_environments,
    play,
    returns,
)

DATA_SEED, PLAY_SEED = 0, 1_000_000
CONTEXT = 20  # steps of three tokens
WIDTH, LAYERS = 64, 2  # width of minGRU
BATCH = 32
STEPS = 1000
EPISODES = 10
ASKED = (0.1, 0.5, 0.9)
LEARNING_RATES = {"minGRU": 3e-3, "minLSTM": 3e-3, "GPT-2": 1e-3}


# ---- Models


class DecisionModel(nn.Module):
    """A trunk that reads the action before, return to go and observation of each step, and answers with an action."""

    def __init__(self, trunk: PreTrainedModel, observation_size: int, action_size: int, discrete: bool):
        super().__init__()
        width = trunk.config.hidden_size
        self.discrete = discrete
        self.embed_action = nn.Linear(action_size, width)
        self.embed_return = nn.Linear(1, width)
        self.embed_observation = nn.Linear(observation_size, width)
        self.norm = nn.LayerNorm(width)
        self.trunk = trunk
        self.predict_action = nn.Linear(width, action_size)

    def forward(self, actions: Tensor, returns_to_go: Tensor, observations: Tensor, cache=None) -> Tensor:
        """
        Args:
            actions: (B, T, m), each the one before the step; 0 before the first.
            returns_to_go: (B, T, 1); observations: (B, T, n).
            cache: what an earlier call has kept of the steps before; updated in place.

        Returns:
            (B, T, m): logits of discrete actions, or actions in (-1, 1).
        """
        tokens = [self.embed_action(actions), self.embed_return(returns_to_go), self.embed_observation(observations)]
        inputs = self.norm(torch.stack(tokens, 2).flatten(1, 2))
        outputs = self.trunk(inputs_embeds=inputs, past_key_values=cache, use_cache=cache is not None)
        answers = self.predict_action(outputs.last_hidden_state[:, 2::3])
        return answers if self.discrete else answers.tanh()


def build(name: str, observation_size: int, action_size: int, discrete: bool) -> DecisionModel:
    """With the trunk of this name, as large as that of minGRU at WIDTH."""
    # A vocabulary of one: tokens are given as vectors. All trunks start from weights of 0.02, as GPT-2 does by itself.
    family = Family(1, LAYERS, positions=3 * CONTEXT, minrnn={"max_timescale": 3 * CONTEXT, "initializer_range": 0.02})
    trunk = family.of_equal_size(name, WIDTH).model.base_model
    return DecisionModel(trunk, observation_size, action_size, discrete)


def sizes(environment: gymnasium.Env) -> tuple[int, int, bool]:
    """Of an observation and of the vector that stands for an action; whether actions are discrete."""
    discrete = isinstance(environment.action_space, gymnasium.spaces.Discrete)
    return environment.observation_space.shape[0], len(action_bounds(environment.action_space)[0]), discrete


# ---- Data


def returns_to_go(rewards: Array) -> Array:
    """(T,): the sum of each reward and those after it."""
    return rewards[::-1].cumsum(dtype=np.float64)[::-1]


class Trajectories:
    """All steps of a data set one after the other, as a model reads them."""

    def __init__(self, dataset: Dataset):
        episodes = dataset.episodes
        observations = np.concatenate([episode.observations for episode in episodes])
        self.mean, self.deviation = observations.mean(0), observations.std(0) + 1e-6
        self.return_scale = float(np.abs(returns(episodes)).max())
        self.actions = torch.from_numpy(np.concatenate([episode.actions for episode in episodes]))
        before = [pad(torch.from_numpy(episode.actions[:-1]), (0, 0, 1, 0)) for episode in episodes]
        to_go = np.concatenate([returns_to_go(episode.rewards) for episode in episodes])
        self.inputs = (torch.cat(before), self.scaled_returns(to_go), self.normalised(observations))
        lengths = np.array([len(episode.rewards) for episode in episodes])
        self.ends = torch.from_numpy(lengths.cumsum().repeat(lengths))

    def scaled_returns(self, values: Array) -> Tensor:
        return torch.from_numpy(values / self.return_scale).float()[:, None]

    def normalised(self, observations: Array) -> Tensor:
        return torch.from_numpy((observations - self.mean) / self.deviation).float()

    def batches(self, seed: int) -> Iterator[list[Tensor]]:
        """Windows of CONTEXT steps: inputs of DecisionModel, the actions that were taken (B, T, m), and which steps
        are real (B, T), as an episode may end in a window."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.ends), (BATCH, 1), generator=generator)
            steps = starts + torch.arange(CONTEXT)
            real = steps < self.ends[starts]
            steps = steps.minimum(self.ends[starts] - 1)
            yield [*(values[steps] for values in self.inputs), self.actions[steps], real]


# ---- Training and playing


def action_loss(model: DecisionModel, *tensors: Tensor) -> Tensor:
    """Of a batch of `Trajectories.batches`."""
    *inputs, actions, real = tensors
    with mixed_precision():
        answers = model(*inputs)
    return (cross_entropy if model.discrete else mse_loss)(answers[real].float(), actions[real])


class Player:
    """The policy of a model that is asked for returns (E,), of as many episodes played side by side."""

    def __init__(self, model: DecisionModel, trajectories: Trajectories, asked: Array, reads: str):
        self.model, self.trajectories, self.to_go = model, trajectories, asked.copy()
        self.cache = DynamicCache(config=model.trunk.config) if reads == "state" else None
        self.window: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def __call__(self, actions: Array, rewards: Array, observations: Array) -> Array:
        self.to_go -= rewards
        of_step = (
            torch.from_numpy(actions),
            self.trajectories.scaled_returns(self.to_go),
            self.trajectories.normalised(observations),
        )
        # With the state that a cache carries one step is all there is to read.
        self.window = [*self.window, of_step][-1 if self.cache is not None else -CONTEXT :]
        inputs = [torch.stack(values, 1) for values in zip(*self.window)]
        return self.model(*inputs, cache=self.cache)[:, -1].numpy()


def learn(task: Task, options: argparse.Namespace, report: Report) -> None:
    contenders = [name for name in LEARNING_RATES if report.wants(f"{task.environment} {name}")]
    if not contenders:
        return
    dataset = load_or_make(task, DATA_SEED, options.data)
    trajectories = Trajectories(dataset)
    environments = make_environments(task.environment, len(ASKED) * EPISODES)
    behaviour_return = returns(dataset.episodes).mean()
    asked_returns = np.quantile(returns(dataset.episodes), ASKED)
    for name, seed in itertools.product(contenders, options.seeds):
        torch.manual_seed(seed)
        model = build(name, *sizes(environments[0]))
        started = time.perf_counter()
        for _ in train(
            model, trajectories.batches(seed), options.steps, LEARNING_RATES[name], warmup=0.1, loss=action_loss
        ):
            pass
        minutes = (time.perf_counter() - started) / 60
        for reads in ("window",) if name == "GPT-2" else ("window", "state"):
            player = Player(model, trajectories, asked_returns.repeat(EPISODES), reads)
            scores = returns(play(environments, PLAY_SEED + 1000 * seed, player)).reshape(len(ASKED), EPISODES).mean(1)
            for asked, asked_return, score in zip(ASKED, asked_returns, scores):
                report.add(
                    environment=task.environment,
                    contender=name,
                    reads=reads,
                    seed=seed,
                    asked=asked,
                    asked_return=asked_return,
                    score=score,
                    normalised=100 * (score - dataset.random_return) / (behaviour_return - dataset.random_return),
                    random_return=dataset.random_return,
                    behaviour_return=behaviour_return,
                    parameters=parameters(model),
                    learning_rate=LEARNING_RATES[name],
                    steps=options.steps,
                    minutes=minutes,
                )


def main() -> None:
    flags = parser("paper_offline_rl", __doc__, rounds=1)
    flags.add_argument("environments", choices=TASKS, nargs="+")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--steps", type=int, default=STEPS)
    flags.add_argument("--data", type=Path, metavar="FOLDER", help="keep trajectories there, or take them from there")
    options = flags.parse_args()
    report = Report(options)
    for environment in options.environments:
        learn(TASKS[environment], options, report)
    report.print_table()


if __name__ == "__main__":
    main()
