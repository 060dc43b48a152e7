"""A policy that has to remember:  python -m examples.policy [--plot policy.png]

CartPole with the velocities hidden: how fast it moves shows in the observations before. The policy acts step by step
with the state that it carries, and learns (PPO, arXiv 1707.06347) from rows of ROW steps in which episodes end and
begin. A minGRU reads such a row in one parallel pass, `reset_mask` saying where the state begins anew. nn.GRU knows no
resets: for it the rows are cut where an episode begins, and the pieces padded.

Needs gymnasium: pip install 'modeling-minrnn[rl]'.
"""

import argparse
import time
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.wrappers.vector import TransformObservation
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modeling_minrnn import MinGRU
from modeling_minrnn.cells import MinGRU as MinGRUCell

ENVIRONMENTS, ROW, WIDTH = 32, 128, 64
EPOCHS, MINIBATCHES, CLIP, DISCOUNT, TRACE = 4, 4, 0.2, 0.99, 0.95
SEEN, SCALE = [0, 2], np.array([2.4, 0.21], dtype=np.float32)  # position and angle, and where an episode ends


def make_environments(number: int) -> gymnasium.vector.VectorEnv:
    """After the last observation of an episode one more step, whose action does nothing, leads to the next episode."""
    environments = gymnasium.make_vec("CartPole-v1", num_envs=number, vectorization_mode="vector_entry_point")
    space = gymnasium.spaces.Box(-2.0, 2.0, (len(SEEN),))
    return TransformObservation(environments, lambda seen: seen[:, SEEN] / SCALE, single_observation_space=space)


class MinGRUMemory(nn.Module):
    """Two layers, their channels mixed: the gates of one see what was just observed and nothing of the past."""

    layers = 2

    def __init__(self):
        super().__init__()
        cell = MinGRUCell(candidate="linear")
        self.rnns = nn.ModuleList(MinGRU(WIDTH, WIDTH, batch_first=True, cell_type=cell) for _ in range(self.layers))
        self.mixes = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(self.layers))

    def rows(self, x: Tensor, state: Tensor, begins: Tensor) -> Tensor:
        for rnn, mix, h in zip(self.rnns, self.mixes, state.split(1)):
            x = x + mix(rnn(x, h, reset_mask=begins)[0])
        return x

    def step(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        states = []
        for rnn, mix, h in zip(self.rnns, self.mixes, state.split(1)):
            output, h = rnn.step(x, h, reset_mask=begins)
            x = x + mix(output)
            states.append(h)
        return x, torch.cat(states)


class GRUMemory(nn.Module):
    layers = 1

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def rows(self, x: Tensor, state: Tensor, begins: Tensor) -> Tensor:
        B, T, _ = x.shape
        starts = begins.clone()
        starts[:, 0] = True
        first = starts.flatten().nonzero()[:, 0]
        lengths = torch.cat([first, torch.tensor([B * T])]).diff().tolist()
        initial = torch.zeros(1, len(lengths), WIDTH)
        initial[:, first % T == 0] = state * ~begins[:, :1]  # the other pieces begin with an episode
        output, _ = self.rnn(pad_sequence(x.flatten(0, 1).split(lengths), batch_first=True), initial)
        return torch.cat([piece[:length] for piece, length in zip(output, lengths)]).unflatten(0, (B, T))

    def step(self, x: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.rnn(x[:, None], state * ~begins[:, None])
        return output[:, 0], state


MEMORIES = {"minGRU": MinGRUMemory, "nn.GRU": GRUMemory}


class Policy(nn.Module):
    def __init__(self, memory: nn.Module, actions: int = 2):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(len(SEEN), WIDTH), nn.Tanh())
        self.memory = memory
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, actions + 1))

    def rows(self, observations: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """observations (B, T, features), begins (B, T) -> logits (B, T, actions), values (B, T)."""
        outputs = self.head(self.memory.rows(self.embed(observations), state, begins))
        return outputs[..., :-1], outputs[..., -1]

    def step(self, observations: Tensor, state: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """observations (B, features), begins (B,) -> logits (B, actions), values (B,), and the state after them."""
        x, state = self.memory.step(self.embed(observations), state, begins)
        outputs = self.head(x)
        return outputs[:, :-1], outputs[:, -1], state


class Rows(NamedTuple):
    """What was seen and done, (B, T) each but `state` (layers, B, WIDTH), with which the rows begin."""

    observations: Tensor  # (B, T, features)
    begins: Tensor  # an episode does, with this observation
    counts: Tensor  # not for the step that leads from one episode to the next
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor
    state: Tensor

    def of(self, rows: Tensor) -> "Rows":
        return Rows(*(values[rows] for values in self[:-1]), self.state[:, rows])


class Actor:
    """Environments, and what a policy remembers of them."""

    def __init__(self, policy: Policy, seed: int):
        self.policy, self.environments = policy, make_environments(ENVIRONMENTS)
        observations, _ = self.environments.reset(seed=seed)
        self.observations = torch.from_numpy(observations)
        self.state = torch.zeros(policy.memory.layers, ENVIRONMENTS, WIDTH)
        self.begins, self.ended = torch.ones(ENVIRONMENTS, dtype=torch.bool), torch.zeros(ENVIRONMENTS).bool()
        self.lengths, self.finished = torch.zeros(ENVIRONMENTS), []  # of the episodes

    @torch.no_grad()
    def collect(self, steps: int) -> Rows:
        state, columns = self.state, []
        for _ in range(steps):
            logits, values, self.state = self.policy.step(self.observations, self.state, self.begins)
            chosen = torch.distributions.Categorical(logits=logits, validate_args=False)
            actions = chosen.sample()
            after, rewards, terminated, truncated, _ = self.environments.step(actions.numpy())
            rewards, terminated, truncated = map(torch.from_numpy, (rewards, terminated, truncated))
            log_probabilities = chosen.log_prob(actions)
            columns.append((self.observations, self.begins, ~self.ended, actions, log_probabilities, values, rewards,
                            terminated, terminated | truncated))  # fmt: skip
            self.lengths += rewards
            self.begins, self.ended = self.ended, terminated | truncated
            self.finished += self.lengths[self.ended].tolist()
            self.lengths[self.ended] = 0
            self.observations = torch.from_numpy(after)
        *read, values, rewards, terminated, ended = (torch.stack(column, 1) for column in zip(*columns))
        last = self.policy.step(self.observations, self.state, self.begins)[1]
        advantages = estimate_advantages(values, last, (1 - DISCOUNT) * rewards, terminated, ended)  # values up to 1
        return Rows(*read, advantages, advantages + values, state)


def estimate_advantages(values: Tensor, last: Tensor, rewards: Tensor, terminated: Tensor, ended: Tensor) -> Tensor:
    """(B, T), generalised (arXiv 1506.02438); last (B,): the values after the rows."""
    following = torch.cat([values[:, 1:], last[:, None]], 1)
    errors = rewards + DISCOUNT * following * ~terminated - values
    advantage, advantages = torch.zeros_like(last), []
    for error, end in zip(errors.unbind(1)[::-1], ended.unbind(1)[::-1]):
        advantage = error + DISCOUNT * TRACE * advantage * ~end
        advantages.append(advantage)
    return torch.stack(advantages[::-1], 1)


def loss(policy: Policy, rows: Rows) -> Tensor:
    """The clipped one of PPO, with the squared error of the values and the entropy of the actions."""
    logits, values = policy.rows(rows.observations, rows.state, rows.begins)
    chosen = torch.distributions.Categorical(logits=logits[rows.counts], validate_args=False)
    ratio = torch.exp(chosen.log_prob(rows.actions[rows.counts]) - rows.log_probabilities[rows.counts])
    advantages = rows.advantages[rows.counts]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    error = (values - rows.returns)[rows.counts].square().mean()
    return error - gain - 0.01 * chosen.entropy().mean()


def learn(policy: Policy, optimizer: torch.optim.Optimizer, rows: Rows) -> None:
    for _ in range(EPOCHS):
        for some in torch.randperm(len(rows.actions)).chunk(MINIBATCHES):
            optimizer.zero_grad()
            loss(policy, rows.of(some)).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


class Curve(NamedTuple):
    steps: list[int]  # of the environments, all together
    lengths: list[float]  # of the episodes that ended since the last point; 500 is the most
    acting_s: float  # in all
    learning_s: float

    @property
    def at_last(self) -> float:
        last = self.lengths[-10:]
        return sum(last) / max(len(last), 1)


def run(memory: str, rounds: int, row: int, seed: int) -> tuple[Policy, Curve]:
    torch.manual_seed(seed)
    policy = Policy(MEMORIES[memory]())
    optimizer = torch.optim.Adam(policy.parameters(), 2e-3)
    actor, seconds, points = Actor(policy, seed), [0.0, 0.0], []
    for number in range(1, rounds + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - (number - 1) / rounds)
        start = time.process_time()
        rows = actor.collect(row)
        middle = time.process_time()
        learn(policy, optimizer, rows)
        seconds[0] += middle - start
        seconds[1] += time.process_time() - middle
        if actor.finished:
            points.append((number * row * ENVIRONMENTS, sum(actor.finished) / len(actor.finished)))
            actor.finished.clear()
    steps, lengths = zip(*points) if points else ((), ())
    return policy, Curve(list(steps), list(lengths), *seconds)


def draw(curves: dict[str, Curve], path: str) -> None:
    """The lengths of the episodes, and where the time of a run went."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for name, curve in curves.items():
        left.plot([steps / 1000 for steps in curve.steps], curve.lengths, label=name)
    left.set(xlabel="thousand steps", ylabel="steps of an episode, of 500")
    left.legend()
    acting = [curve.acting_s for curve in curves.values()]
    right.bar(list(curves), acting, label="acting")
    right.bar(list(curves), [curve.learning_s for curve in curves.values()], bottom=acting, label="learning")
    right.set(ylabel="seconds of one core")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a policy with memory by PPO, minGRU beside nn.GRU.")
    parser.add_argument("--memories", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--rounds", type=int, default=50, help=f"of {ENVIRONMENTS} rows each, to act and to learn")
    parser.add_argument("--row", type=int, default=ROW, help="steps of a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="where to draw the curves")
    options = parser.parse_args()
    curves: dict[str, Curve] = {}
    for name in options.memories:
        policy, curve = run(name, options.rounds, options.row, options.seed)
        parameters, curves[name] = sum(p.numel() for p in policy.parameters()), curve
        print(f"{name}, {parameters} parameters: episodes of {curve.at_last:.0f} steps at last,", end=" ")
        print(f"{curve.acting_s:.1f} s of acting, {curve.learning_s:.1f} s of learning", flush=True)
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
