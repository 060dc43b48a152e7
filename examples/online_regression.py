"""Learning while predicting, one pass over a series:  python -m examples.online_regression [--seeds 0 1 2]

For every sample: predict it from what came before, see it, add the squared error, take one step of gradient descent.
No sample is seen twice and none is held out: its error counts before it has taught anything. This is how "Achieving
Online Regression Performance of LSTMs with Simple RNNs" (arXiv 2005.08948) judges recurrent networks. The series, made
below, is a nonlinear autoregression whose coefficients drift, so that what was learned has to be unlearned:

    y[t] = a[t] tanh(2 y[t-1]) + b[t] y[t-2] + c[t] sin(3 y[t-3]) + 0.1 noise

A network reads one value a sample and keeps the rest in its state. A step follows the gradient through the last WINDOW
samples, from the state that was left before them. minGRU runs beside nn.LSTM with as many parameters, each at the
learning rate that did best on another series. Predicting the last value again is what learning has to beat.
"""

import argparse
import math
import time
from collections import deque

import torch
from torch import Tensor, nn

from modeling_minrnn import minrnn_scan
from modeling_minrnn.cells import MinGRU

WINDOW, LEARNING_RATES = 8, (1e-3, 3e-3, 1e-2, 3e-2)


def make_series(samples: int, seed: int) -> Tensor:
    """The series (samples,); each coefficient is a sinusoid with a period of its own and a random phase."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.arange(samples) / torch.tensor([[1000], [1700], [2900]]) + torch.rand(3, 1, generator=generator)
    coefficients = 0.7 * torch.sin(2 * math.pi * turns)
    noise = torch.randn(samples, generator=generator).tolist()
    y = [0.0] * 3
    for (a, b, c), e in zip(coefficients.T.tolist(), noise):
        y.append(a * math.tanh(2 * y[-1]) + b * y[-2] + c * math.sin(3 * y[-3]) + 0.1 * e)
    return torch.tensor(y[3:])


def mean_squared_error(predictions: Tensor, series: Tensor) -> float:
    return (predictions - series[1:]).square().mean().item()


class MinGRURegressor(nn.Module):
    """A minGRU layer and, as in the layers of the package, an MLP after it: its states are weighted sums."""

    def __init__(self, D: int = 16):
        super().__init__()
        self.in_proj, self.cell = nn.Linear(1, 2 * D), MinGRU(candidate="linear")  # values of either sign
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (1, T, 1) -> predictions (1, T, 1) of what follows each, and the state to go on from."""
        states, state = minrnn_scan(self.in_proj(x), self.cell, state)
        return self.mlp(states), state


class LSTMRegressor(nn.Module):
    def __init__(self, D: int = 8):
        super().__init__()
        self.lstm, self.out_proj = nn.LSTM(1, D, batch_first=True), nn.Linear(D, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states, state = self.lstm(x, state)
        return self.out_proj(states), state


def learn_online(model: nn.Module, series: Tensor, learning_rate: float) -> Tensor:
    """Predictions (T - 1,) of series[1:], each made before its sample is seen."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    states = deque([None], WINDOW)  # those before each sample of the window, as they were when it was read
    predictions = []
    for t in range(1, len(series)):
        outputs, state = model(series[t - len(states) : t].reshape(1, -1, 1), states[0])
        prediction = outputs[0, -1, 0]
        predictions.append(prediction.detach())
        (prediction - series[t]).square().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach())
    return torch.stack(predictions)


def run(regressor: type[nn.Module], series: Tensor, learning_rate: float, seed: int) -> tuple[float, float]:
    """The mean squared error over one pass, and its seconds."""
    torch.manual_seed(seed)
    start, predictions = time.perf_counter(), learn_online(regressor(), series, learning_rate)
    return mean_squared_error(predictions, series), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict a series while learning it, minGRU beside nn.LSTM.")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    N, tuning = options.samples, make_series(options.samples, seed=1000)
    for regressor in (MinGRURegressor, LSTMRegressor):
        rate = min((run(regressor, tuning, rate, 0)[0], rate) for rate in LEARNING_RATES)[1]
        print(f"{regressor.__name__}, {sum(p.numel() for p in regressor().parameters())} parameters, rate {rate}")
        for seed in options.seeds:
            error, seconds = run(regressor, make_series(N, seed), rate, seed)
            print(f"  seed {seed}: squared error {error:.4f} a sample, {error * (N - 1):.0f} in all, {seconds:.1f} s")
    errors = [mean_squared_error(y[:-1], y) for y in (make_series(N, seed) for seed in options.seeds)]
    print("the last value:", *(f"{error:.4f}" for error in errors), "a sample; the noise alone: 0.01")


if __name__ == "__main__":
    main()
