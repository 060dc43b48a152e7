"""Offline reinforcement learning: the data is as described, and what a model plays is what it was trained to do."""

import json
import sys
from dataclasses import replace
from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from benchmarks.paper import decision_step, offline_rl
from benchmarks.paper.models import parameters
from benchmarks.paper.offline_rl import (
    ASKED,
    BATCH,
    CONTEXT,
    LEARNING_RATES,
    Player,
    Trajectories,
    action_loss,
    build,
    returns_to_go,
    sizes,
)
from benchmarks.paper.training import train
from benchmarks.paper.trajectories import TASKS, Dataset, Episode, load_or_make, make_environments, play, returns

# torch falls back to an unfused norm where autocast hands it bfloat16 and the weight is float32.
MIXED_NORM = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
CARTPOLE = replace(TASKS["CartPole-v1"], episodes=9)
PENDULUM = replace(CARTPOLE, environment="Pendulum-v1", target=-2000.0, directions=2, best=1, episodes=2)


def random_inputs(batch: int, steps: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, steps, n, generator=generator) for n in (3, 1, 5))


def random_episode(length: int, seed: int) -> Episode:
    generator = np.random.default_rng(seed)
    return Episode(*(generator.standard_normal((length, *n)).astype(np.float32) for n in ((4,), (2,), ())))


# ---- Data


@pytest.mark.parametrize("task", [CARTPOLE, PENDULUM], ids=lambda task: task.environment)
def test_trajectories_are_the_same_for_a_seed_and_are_what_the_environment_does(task, tmp_path):
    made = load_or_make(task, 3, None)
    kept = [load_or_make(task, 3, tmp_path) for _ in range(2)]  # written, then read
    other = load_or_make(task, 4, None)
    assert len(made.episodes) == task.episodes and made.random_return != other.random_return
    for dataset in kept:
        assert dataset.random_return == made.random_return
        for own, again in zip(dataset.episodes, made.episodes, strict=True):
            for field in ("observations", "actions", "rewards"):
                np.testing.assert_array_equal(getattr(own, field), getattr(again, field))
    (environment,) = make_environments(task.environment, 1)
    discrete = isinstance(environment.action_space, gymnasium.spaces.Discrete)
    for episode in made.episodes:
        T = len(episode.rewards)
        assert len(episode.observations) == len(episode.actions) == T
        environment.reset(seed=0)
        if task is PENDULUM:  # its observation tells all of its state
            cosine, sine, velocity = episode.observations[0].astype(np.float64)
            environment.unwrapped.state = np.array([np.arctan2(sine, cosine), velocity])
        else:
            environment.unwrapped.state = episode.observations[0].astype(np.float64)
        for t in range(T):
            action = episode.actions[t].argmax() if discrete else episode.actions[t]
            observation, reward, terminated, truncated, _ = environment.step(action)
            # The state started from a float32 observation; both tasks are unstable, so that only the start is exact.
            assert abs(reward - episode.rewards[t]) < 1e-3 * (1 + abs(reward))
            if t < min(T - 1, 20):
                np.testing.assert_allclose(observation, episode.observations[t + 1], atol=1e-4)
            if t == 50:
                break


def test_trajectories_of_other_settings_are_refused(tmp_path):
    load_or_make(CARTPOLE, 0, tmp_path)
    with pytest.raises(ValueError, match=r"CartPole-v1.npz was made with other settings.*delete it"):
        load_or_make(CARTPOLE, 1, tmp_path)


def test_the_behaviour_is_of_medium_quality():
    dataset = load_or_make(TASKS["CartPole-v1"], 0, None)
    assert 2 * dataset.random_return < returns(dataset.episodes).mean() < 250  # of 500
    assert returns(dataset.episodes).std() > 50


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=70))
def test_returns_to_go_are_the_sums_of_what_follows(rewards):
    expected = [sum(rewards[t:]) for t in range(len(rewards))]
    # Python sums in float64 from the other end.
    np.testing.assert_allclose(returns_to_go(np.array(rewards, dtype=np.float32)), expected, atol=1e-7)


def test_windows_are_those_of_single_episodes():
    episodes = [random_episode(length, length) for length in (1, 2, 33, CONTEXT)]
    trajectories = Trajectories(Dataset(episodes, 0.0))
    scale = max(abs(episode.rewards.sum()) for episode in episodes)
    every = np.concatenate([episode.observations for episode in episodes]).astype(np.float64)
    before, to_go, observations, actions, real = next(trajectories.batches(0))
    assert before.shape[:2] == to_go.shape[:2] == actions.shape[:2] == real.shape == (BATCH, CONTEXT)
    starts = set()
    for row in range(BATCH):
        raw = observations[row].numpy() * every.std(0) + every.mean(0)
        # The observation tells the episode and the step.
        [(episode, start)] = [
            (episode, t)
            for episode in episodes
            for t in range(len(episode.rewards))
            if np.abs(episode.observations[t] - raw[0]).max() < 1e-4
        ]
        starts.add((len(episode.rewards), start))
        assert real[row].sum() == min(CONTEXT, len(episode.rewards) - start)
        for i in range(int(real[row].sum())):
            t = start + i
            assert real[row, i]
            np.testing.assert_allclose(raw[i], episode.observations[t], atol=1e-5)
            np.testing.assert_allclose(to_go[row, i], episode.rewards[t:].sum() / scale, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(actions[row, i], episode.actions[t])
            np.testing.assert_array_equal(before[row, i], episode.actions[t - 1] if t else np.zeros(2))
    assert len(starts) > BATCH // 2


# ---- Models


def test_trunks_are_of_equal_size():
    size = parameters(build("minGRU", 5, 3, discrete=False))
    for name in LEARNING_RATES:
        assert abs(parameters(build(name, 5, 3, discrete=False)) / size - 1) < 0.06, name


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_an_action_depends_on_what_was_before_it_alone(name):
    torch.manual_seed(0)
    model = build(name, 5, 3, discrete=False).eval()
    inputs = random_inputs(2, CONTEXT)
    with torch.no_grad():
        answers = model(*inputs)
        for changed in range(3):  # the action before step 7, its return to go, its observation
            others = [values.clone() for values in inputs]
            others[changed][:, 7:] += 1
            after = model(*others)
            torch.testing.assert_close(after[:, :7], answers[:, :7])
            assert ((after[:, 7:] - answers[:, 7:]).abs().amax(-1) > 1e-6).all()
    assert answers.shape == (2, CONTEXT, 3) and answers.abs().max() < 1


@pytest.mark.parametrize("name", LEARNING_RATES)
def test_one_step_at_a_time_answers_like_one_pass(name):
    torch.manual_seed(0)
    model = build(name, 5, 3, discrete=True).eval()
    steps = CONTEXT if name == "GPT-2" else 201  # GPT-2 has no more positions
    inputs = random_inputs(3, steps)
    cache = DynamicCache(config=model.trunk.config)
    with torch.no_grad():
        answers = [model(*(values[:, t : t + 1] for values in inputs), cache=cache) for t in range(steps)]
        # float32 in another order; the worst was 4e-7.
        torch.testing.assert_close(torch.cat(answers, 1), model(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "reads"), [("minGRU", "state"), ("minLSTM", "state"), ("minGRU", "window"), ("GPT-2", "window")]
)
def test_a_player_reads_its_own_episode_as_training_reads_one(name, reads):
    """Against one pass over the episode as a data set would hold it, asked for what came of it."""
    dataset = load_or_make(CARTPOLE, 0, None)
    trajectories, environments = Trajectories(dataset), make_environments("CartPole-v1", 3)
    torch.manual_seed(0)
    model = build(name, *sizes(environments[0])).eval()
    asked, answers = np.array([5.0, 50.0, 500.0]), []
    player = Player(model, trajectories, asked, reads)

    def recorded(actions, rewards, observations):
        answers.append(player(actions, rewards, observations))
        return answers[-1]

    episodes = play(environments, 0, recorded)
    assert any(len(episode.rewards) != len(answers) for episode in episodes)  # they end at different times
    for i, (episode, wish) in enumerate(zip(episodes, asked)):
        T = len(episode.rewards)
        before = np.concatenate([np.zeros((1, 2)), episode.actions[:-1]])
        to_go = wish - np.concatenate([[0.0], episode.rewards[:-1].cumsum()])
        inputs = [
            torch.from_numpy(before).float(),
            torch.from_numpy(to_go / trajectories.return_scale).float()[:, None],
            torch.from_numpy((episode.observations - trajectories.mean) / trajectories.deviation).float(),
        ]
        for t in {0, T // 2, T - 1}:
            first = max(t + 1 - CONTEXT, 0) if reads == "window" else 0
            with torch.no_grad():
                expected = model(*(values[None, first : t + 1] for values in inputs))[0, -1]
            torch.testing.assert_close(torch.from_numpy(answers[t][i]), expected, atol=1e-5, rtol=1e-5)


# ---- The benchmarks


class Choice(gymnasium.Env):
    """30 steps, in each of which action 1 is worth 1 and action 0 nothing."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.standard_normal(4), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.standard_normal(4), float(action), False, self.steps == 30, {}


@MIXED_NORM
@pytest.mark.parametrize("name", LEARNING_RATES)
def test_a_model_does_what_it_is_asked_for(name):
    generator, environments = np.random.default_rng(0), [Choice() for _ in range(60)]
    chances = np.linspace(0, 1, len(environments))[:, None]
    behaviour = play(environments, 0, lambda *_: np.eye(2)[(generator.random((60, 1)) < chances).astype(int)[:, 0]])
    trajectories = Trajectories(Dataset(behaviour, 15.0))
    torch.manual_seed(0)
    model = build(name, 4, 2, discrete=True)
    for _ in train(model, trajectories.batches(0), 150, 3e-3, loss=action_loss):
        pass
    for reads in ("window",) if name == "GPT-2" else ("window", "state"):
        player = Player(model, trajectories, np.array([2.0, 2.0, 28.0, 28.0]), reads)
        got = returns(play(environments[:4], 1000, player))
        assert got[:2].max() < 10 and got[2:].min() > 20, (reads, got)


def run(tmp_path, monkeypatch, module, *flags):
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags, "--output", str(output)])
    module.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


@MIXED_NORM
def test_a_second_run_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_rl, "EPISODES", 2)
    flags = ["CartPole-v1", "--only", "minGRU", "--steps", "20", "--seeds", "0", "1", "0"]
    scores = {}
    for row in run(tmp_path, monkeypatch, offline_rl, *flags):
        scores.setdefault((row["reads"], row["asked"]), []).append((row["seed"], row["score"]))
    assert set(scores) == set(product(("window", "state"), ASKED))
    assert all(first == again for first, _, again in scores.values())
    assert any(first[1] != other[1] for first, other, _ in scores.values())


def test_the_cost_of_a_step_is_measured(tmp_path, monkeypatch):
    rows = run(tmp_path, monkeypatch, decision_step, "--horizons", "7", "30", "--rounds", "1")
    kept = {(row["contender"], row["reads"], row["horizon"]): row["kept_bytes"] for row in rows}
    assert kept["minGRU", "state", 7] == kept["minGRU", "state", 30]
    # The keys and values of three tokens a step, but for the last one.
    assert kept["GPT-2", "cache", 30] / kept["GPT-2", "cache", 7] == pytest.approx(29 / 6)
    assert all(row["ms"] > 0 for row in rows) and len(rows) == 8
