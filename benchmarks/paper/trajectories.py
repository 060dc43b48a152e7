"""Trajectories to learn from offline, made on the spot with gymnasium: all of them seeded, none of them stored here.

The behaviour is of medium quality, as in D4RL's "medium" (arXiv 2004.07219): augmented random search over linear
policies (Mania et al., arXiv 1803.07055, version V2-t) is stopped well before the best that it can reach. Each
episode is then played by a policy of its own, the found one with noise in its weights, so that good and bad episodes
differ in what is done in them; and with noise in its actions, so that the way back from a slip is shown, too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium
import numpy as np

RANDOM_EPISODES = 50  # of random actions, whose mean return is a score of 0
MAX_ITERATIONS = 1000  # of the search
CHECKS = 4  # episodes of each iteration of the search that the unchanged weights play

Array = np.ndarray
# What E environments took and gave last: actions (E, m) and rewards (E,), 0 at first, and observations (E, n); returns
# the actions to take next (E, m).
Policy = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class Task:
    environment: str
    target: float  # mean return at which the search stops
    step_size: float
    noise: float  # standard deviation of what the search tries on the weights, for observations of unit variance
    directions: int
    best: int  # directions that a step of the search is made of
    scatter: float  # standard deviation around the found weights of those that play the episodes
    action_noise: float  # standard deviation, on the numbers that these weights answer with
    alive: float = 0.0  # of each reward, which the search leaves out, lest it learn to stand still
    episodes: int = 200


TASKS = {
    task.environment: task
    for task in (
        Task("CartPole-v1", 200, 0.02, 0.05, 8, 4, scatter=0.02, action_noise=0.01),
        Task("Acrobot-v1", -200, 0.02, 0.05, 8, 4, scatter=0.01, action_noise=0.01),
        Task("HalfCheetah-v5", 1500, 0.02, 0.03, 16, 8, scatter=0.025, action_noise=0.1, episodes=100),
        Task("Hopper-v5", 1000, 0.01, 0.025, 8, 4, scatter=0.025, action_noise=0.2, alive=1.0),
    )
}


@dataclass(frozen=True)
class Episode:
    observations: Array  # (T, n)
    actions: Array  # (T, m): within the bounds of a Box, or one-hot
    rewards: Array  # (T,)


@dataclass(frozen=True)
class Dataset:
    episodes: list[Episode]
    random_return: float  # mean over episodes of random actions


def make_environments(name: str, number: int) -> list[gymnasium.Env]:
    return [gymnasium.make(name, disable_env_checker=True) for _ in range(number)]


def action_bounds(space: gymnasium.Space) -> tuple[Array, Array]:
    """Of the vector that stands for an action; of a discrete one the largest of its n numbers is taken."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return np.zeros(int(space.n)), np.ones(int(space.n))
    return space.low, space.high


def play(environments: Sequence[gymnasium.Env], seed: int, policy: Policy) -> list[Episode]:
    """One episode in each environment, stepped together; environment i starts from the seed `seed` + i."""
    space = environments[0].action_space
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    low, high = action_bounds(space)
    observations = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(environments)])
    actions, rewards = np.zeros((len(environments), len(low)), np.float32), np.zeros(len(environments))
    steps: list[list[tuple[Array, Array, float]]] = [[] for _ in environments]
    running = list(range(len(environments)))
    while running:
        actions = policy(actions, rewards, observations)
        actions = np.eye(len(low))[actions.argmax(1)] if discrete else actions.clip(low, high)
        actions = actions.astype(np.float32)
        before, ended = observations.copy(), []
        for i in running:
            action = int(actions[i].argmax()) if discrete else actions[i]
            observations[i], rewards[i], terminated, truncated, _ = environments[i].step(action)
            steps[i].append((before[i], actions[i], float(rewards[i])))
            if terminated or truncated:
                ended.append(i)
        running = [i for i in running if i not in ended]
    return [Episode(*(np.array(column, dtype=np.float32) for column in zip(*own))) for own in steps]


def returns(episodes: Sequence[Episode]) -> Array:
    return np.array([episode.rewards.sum(dtype=np.float64) for episode in episodes])


class Scale:
    """Mean and standard deviation of the observations seen so far."""

    def __init__(self, size: int):
        self.count, self.total, self.squares = 0, np.zeros(size), np.zeros(size)

    def add(self, observations: Array) -> None:
        self.count += len(observations)
        self.total += observations.sum(0, dtype=np.float64)
        self.squares += np.square(observations, dtype=np.float64).sum(0)

    def linear_policy(self, weights: Array) -> Policy:
        """The actions weights (E, m, n) @ normalised observations."""
        mean, deviation = np.zeros_like(self.total), np.ones_like(self.total)
        if self.count:
            mean = self.total / self.count
            deviation = np.sqrt(np.maximum(self.squares / self.count - mean**2, 1e-8))

        def policy(actions: Array, rewards: Array, observations: Array) -> Array:
            return np.einsum("emn,en->em", weights, (observations - mean) / deviation)

        return policy


def search(task: Task, generator: np.random.Generator) -> tuple[Array, Scale]:
    """Weights (m, n) of a policy whose mean return is at least `task.target`, and the scale of its observations.

    Raises RuntimeError where MAX_ITERATIONS do not get there.
    """
    environments = make_environments(task.environment, 2 * task.directions + CHECKS)
    size, width = environments[0].observation_space.shape[0], len(action_bounds(environments[0].action_space)[0])
    weights, scale = np.zeros((width, size)), Scale(size)
    for _ in range(MAX_ITERATIONS):
        directions = generator.standard_normal((task.directions, width, size))
        noise = task.noise * np.concatenate([directions, -directions, np.zeros((CHECKS, width, size))])
        seed = int(generator.integers(2**31))
        episodes = play(environments, seed, scale.linear_policy(weights + noise))
        mean_return = returns(episodes[-CHECKS:]).mean()
        if mean_return >= task.target:
            return weights, scale
        scores = returns(episodes) - task.alive * np.array([len(episode.rewards) for episode in episodes])
        up, down = scores[: 2 * task.directions].reshape(2, -1)
        best = np.maximum(up, down).argsort()[-task.best :]
        spread = np.concatenate([up[best], down[best]]).std() + 1e-6
        weights = weights + task.step_size / task.best / spread * np.tensordot((up - down)[best], directions[best], 1)
        scale.add(np.concatenate([episode.observations for episode in episodes]))
    raise RuntimeError(f"{task.environment}: no policy of return {task.target} in {MAX_ITERATIONS} iterations")


def make_dataset(task: Task, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    weights, scale = search(task, generator)
    environments = make_environments(task.environment, task.episodes)
    scattered = weights + task.scatter * generator.standard_normal((task.episodes, *weights.shape))
    steady = scale.linear_policy(scattered)
    low, high = action_bounds(environments[0].action_space)

    def behave(actions: Array, rewards: Array, observations: Array) -> Array:
        noise = task.action_noise * generator.standard_normal(actions.shape)
        return steady(actions, rewards, observations) + noise

    def guess(actions: Array, rewards: Array, observations: Array) -> Array:
        return generator.uniform(low, high, actions.shape)

    episodes = play(environments, int(generator.integers(2**31)), behave)
    guesses = play(environments[:RANDOM_EPISODES], int(generator.integers(2**31)), guess)
    return Dataset(episodes, float(returns(guesses).mean()))


def load_or_make(task: Task, seed: int, folder: Path | None) -> Dataset:
    """The data set of `make_dataset`, read from a file in `folder`, or made and, where there is a folder, written.

    Raises ValueError for a file that was made with other settings.
    """
    if folder is None:
        return make_dataset(task, seed)
    path, settings = folder / f"{task.environment}.npz", json.dumps({**asdict(task), "seed": seed})
    if not path.exists():
        dataset = make_dataset(task, seed)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {
            name: np.concatenate([getattr(episode, name) for episode in dataset.episodes])
            for name in ("observations", "actions", "rewards")
        }
        lengths = [len(episode.rewards) for episode in dataset.episodes]
        unfinished = path.with_suffix(".unfinished.npz")
        np.savez_compressed(
            unfinished, settings=settings, lengths=lengths, random_return=dataset.random_return, **columns
        )
        unfinished.replace(path)
    with np.load(path, allow_pickle=False) as file:
        if file["settings"] != settings:
            raise ValueError(f"{path} was made with other settings, {file['settings']}, not {settings}; delete it")
        borders = file["lengths"].cumsum()[:-1]
        columns = [np.split(file[name], borders) for name in ("observations", "actions", "rewards")]
        return Dataset([Episode(*own) for own in zip(*columns)], float(file["random_return"]))
