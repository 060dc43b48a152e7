"""examples/forecast.py and examples/policy.py: the pendulum, the forecasts, and the rows that a policy learns from."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from examples import forecast, policy


def test_the_pendulum_swings_as_its_equation_says():
    gaps, angles = forecast.make_series(3, forecast.MEAN_GAP, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.rand(gaps.shape, generator=generator)
    starts = 3.2 * torch.rand(3, generator=generator) - 1.6, torch.randn(3, generator=generator)

    def slope(t, state):
        return [state[1], -forecast.DAMPING * state[1] - forecast.STIFFNESS * np.sin(state[0])]

    for row, times in enumerate(gaps.double().cumsum(1).numpy()):
        start = [float(values[row]) for values in starts]
        exact = solve_ivp(slope, (0, times[-1]), start, t_eval=times, rtol=1e-9, atol=1e-9).y[0]
        assert np.abs(exact - angles[row].numpy()).max() < 1e-3  # steps of up to 0.07 s, and float32; worst 2e-4


@pytest.mark.parametrize("name", forecast.CONTENDERS)
def test_a_forecast_knows_the_times_ahead_and_not_the_angles(name):
    torch.manual_seed(0)
    model = forecast.CONTENDERS[name]()
    gaps, angles = forecast.make_series(2, forecast.MEAN_GAP, torch.Generator().manual_seed(0))
    inputs = forecast.observed(angles)
    first = model(gaps, inputs)
    angles[:, forecast.SEEN :] += 1
    assert torch.equal(forecast.observed(angles), inputs)
    later = gaps.clone()
    later[:, -1] += 1
    changed = (model(later, inputs) - first).abs()
    assert changed[:, :-1].max() == 0 and changed[:, -1].min() > 0


def test_a_forecast_is_learned():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = forecast.CONTENDERS["LRU, time_deltas"]()
    forecast.train(model, forecast.make_series(500, forecast.MEAN_GAP, generator), steps=60, seed=0)
    assert forecast.error(model, forecast.make_series(200, forecast.MEAN_GAP, generator)) < 0.9


@pytest.fixture(params=policy.MEMORIES)
def collected(request):
    torch.manual_seed(0)
    actor = policy.Actor(policy.Policy(policy.MEMORIES[request.param]()), seed=0)
    actor.collect(37)  # three of the rows begin with an episode, the others within one
    return actor.policy, actor.collect(70)


def test_rows_read_at_once_give_what_was_thought_step_by_step(collected):
    model, rows = collected
    assert rows.begins[:, 1:].sum() > 50 and 0 < rows.begins[:, 0].sum() < len(rows.begins)
    logits, _ = model.rows(rows.observations, rows.state, rows.begins)
    chosen = torch.distributions.Categorical(logits=logits).log_prob(rows.actions)
    torch.testing.assert_close(chosen, rows.log_probabilities, rtol=0, atol=1e-5)  # float32; worst 2e-7
    forgotten, _ = model.rows(rows.observations, rows.state, torch.zeros_like(rows.begins))
    assert (forgotten - logits).abs().max() > 1e-2  # the resets matter


def test_an_episode_begins_after_the_step_that_does_not_count(collected):
    _, rows = collected
    assert torch.equal(rows.begins[:, 1:], ~rows.counts[:, :-1])
    starts = rows.observations[rows.begins] * torch.from_numpy(policy.SCALE)
    assert starts.abs().max() <= 0.05  # as CartPole says
    last = (rows.observations[~rows.counts] * torch.from_numpy(policy.SCALE)).abs()
    assert ((last[:, 0] > 2.4) | (last[:, 1] > 0.2094)).all()  # the cart left, or the pole fell


def test_advantages_are_discounted_sums_of_errors_within_an_episode():
    torch.manual_seed(0)
    values, last, rewards = torch.randn(1, 5), torch.randn(1), torch.randn(1, 5)
    terminated = torch.tensor([[False, True, False, False, False]])
    ended = terminated | torch.tensor([[False, False, False, True, False]])
    found = policy.estimate_advantages(values, last, rewards, terminated, ended)[0]
    (v, r), g, fade = (values[0], rewards[0]), policy.DISCOUNT, policy.DISCOUNT * policy.TRACE
    errors = [
        r[0] + g * v[1] - v[0],
        r[1] - v[1],
        r[2] + g * v[3] - v[2],
        r[3] + g * v[4] - v[3],
        r[4] + g * last[0] - v[4],
    ]
    expected = [errors[0] + fade * errors[1], errors[1], errors[2] + fade * errors[3], errors[3], errors[4]]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_policy_soon_keeps_the_pole_up_for_longer():
    _, curve = policy.run("minGRU", rounds=16, row=64, seed=0)
    assert curve.steps[-1] == 16 * 64 * policy.ENVIRONMENTS
    assert curve.lengths[-1] > 1.5 * curve.lengths[0]
