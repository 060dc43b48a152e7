"""Forecast a pendulum from samples at irregular times:  python -m examples.forecast [--plot forecast.png]

A damped pendulum is seen SEEN times, at random moments, and its angle asked for at AHEAD more, random too. Training
has one mean gap between the moments, MEAN_GAP seconds, and the test has others. What was learned holds for these if a
state changes with the time that passed, and not with the number of samples:

    h = a^d h + b      `time_deltas` d of a layer: LRU's a turns h, as a pendulum turns, and minGRU's a lets it fade

The contenders are the same two blocks of layer and MLP with `time_deltas`, the same with d as one more feature of the
input, and nn.GRU and, where it is installed (pip install mingru-scans), the MinGRUStack of mingru-scans with its
learned decay, which need d as a feature.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling_minrnn import MinRNN
from modeling_minrnn.cells import LRU, Cell, MinGRU

SEEN, AHEAD = 24, 12
MEAN_GAP, TEST_GAPS = 0.4, (0.1, 0.2, 0.4, 0.8)  # seconds; one swing takes 2 s
DAMPING, STIFFNESS = 0.1, 9.81  # of angle'' = -DAMPING angle' - STIFFNESS sin(angle)


def swing(state: Tensor, seconds: Tensor, substeps: int = 24) -> Tensor:
    """state (2, B), angle and velocity, after seconds (B,): the fourth-order method of Runge and Kutta."""

    def slope(state: Tensor) -> Tensor:
        return torch.stack([state[1], -DAMPING * state[1] - STIFFNESS * torch.sin(state[0])])

    h = seconds / substeps
    for _ in range(substeps):
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def make_series(number: int, mean_gap: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaps before the samples, in seconds and at most 4 * mean_gap, and the angles: each (number, SEEN + AHEAD)."""
    gaps = -mean_gap * torch.rand(number, SEEN + AHEAD, generator=generator).clamp(min=1e-6).log()
    gaps = gaps.clamp(max=4 * mean_gap)
    angle = 3.2 * torch.rand(number, generator=generator) - 1.6
    state = torch.stack([angle, torch.randn(number, generator=generator)])
    angles = []
    for gap in gaps.unbind(1):
        state = swing(state, gap)
        angles.append(state[0])
    return gaps, torch.stack(angles, 1)


def observed(angles: Tensor) -> Tensor:
    """(B, T, 2): the angle, zero once it is to be forecast, and whether it is seen."""
    is_seen = (torch.arange(angles.shape[1]) < SEEN).float().expand_as(angles)
    return torch.stack([angles * is_seen, is_seen], -1)


class Forecaster(nn.Module):
    """Blocks of a layer and an MLP. by_time: the gaps are `time_deltas`; else they are one more feature."""

    def __init__(self, cell: Cell, by_time: bool, width: int = 48, blocks: int = 2):
        super().__init__()
        self.by_time = by_time
        self.embed, self.head = nn.Linear(2 if by_time else 3, width), nn.Linear(width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.layers = nn.ModuleList(MinRNN(width, width, batch_first=True, cell_type=cell) for _ in range(blocks))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )

    def forward(self, gaps: Tensor, inputs: Tensor) -> Tensor:
        """gaps (B, T), inputs (B, T, 2) -> the angle at each time, (B, T)."""
        x = self.embed(inputs if self.by_time else torch.cat([inputs, gaps[..., None]], -1))
        for norm, layer, mlp in zip(self.norms, self.layers, self.mlps):
            x = x + layer(norm(x), time_deltas=gaps if self.by_time else None)[0]
            x = x + mlp(x)
        return self.head(x)[..., 0]


class GRUForecaster(nn.Module):
    def __init__(self, width: int = 56):
        super().__init__()
        self.gru = nn.GRU(3, width, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, gaps: Tensor, inputs: Tensor) -> Tensor:
        return self.head(self.gru(torch.cat([inputs, gaps[..., None]], -1))[0])[..., 0]


class ScansForecaster(nn.Module):
    """The blocks of mingru-scans: its decay multiplies a by exp(-rate * gap), with a learned rate."""

    def __init__(self, width: int = 32, mixer: str = "log"):
        super().__init__()
        from mingru import MinGRUStack

        self.stack = MinGRUStack(3, width, n_layers=2, mixer=mixer, mixer_kwargs={"decay": "learnable"})
        self.head = nn.Linear(width, 1)

    def forward(self, gaps: Tensor, inputs: Tensor) -> Tensor:
        return self.head(self.stack(torch.cat([inputs, gaps[..., None]], -1), delta_t=gaps)[0])[..., 0]


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    "LRU, time_deltas": lambda: Forecaster(LRU(), by_time=True),
    "LRU, time as a feature": lambda: Forecaster(LRU(), by_time=False),
    "minGRU, time_deltas": lambda: Forecaster(MinGRU("linear"), by_time=True),
    "minGRU, time as a feature": lambda: Forecaster(MinGRU("linear"), by_time=False),
    "nn.GRU, time as a feature": GRUForecaster,
}
if importlib.util.find_spec("mingru"):
    CONTENDERS["mingru-scans, its decay and time as a feature"] = ScansForecaster


def train(model: nn.Module, series: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    """The squared error of the angles ahead, with batches of 64 of the series."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(steps, 2))
    for _ in range(steps):
        batch = torch.randint(len(series[0]), (64,), generator=generator)
        gaps, angles = (values[batch] for values in series)
        (model(gaps, observed(angles)) - angles)[:, SEEN:].square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def error(model: nn.Module, series: tuple[Tensor, Tensor]) -> float:
    """The root mean square of the error ahead, as a share of that of the angle there: 1 for a forecast of zero."""
    gaps, angles = series
    wrong = (model(gaps, observed(angles)) - angles)[:, SEEN:]
    return (wrong.square().mean() / angles[:, SEEN:].square().mean()).sqrt().item()


def run(name: str, steps: int, seed: int) -> tuple[nn.Module, list[float], float]:
    """The trained contender, its errors at the TEST_GAPS, and the seconds that training took."""
    generator = torch.Generator().manual_seed(seed)
    series = make_series(8192, MEAN_GAP, generator)
    torch.manual_seed(seed)
    model, start = CONTENDERS[name](), time.process_time()
    train(model, series, steps, seed)
    seconds = time.process_time() - start
    return model, [error(model, make_series(1000, gap, generator)) for gap in TEST_GAPS], seconds


def draw(models: dict[str, nn.Module], errors: dict[str, list[float]], path: str) -> None:
    """The errors by mean gap, and the forecasts of one swing seen at another rate than in training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in errors.items():
        left.plot(TEST_GAPS, values, marker="o", label=name)
    left.axvline(MEAN_GAP, color="grey", linestyle=":", label="in training")
    left.set(xscale="log", yscale="log", xlabel="mean gap between samples, s", ylabel="error ahead / rms of the angle")
    left.minorticks_off()
    left.set_xticks(TEST_GAPS, list(map(str, TEST_GAPS)))
    left.set_yticks((0.1, 0.2, 0.5, 1), ("0.1", "0.2", "0.5", "1"))
    gaps, angles = make_series(1, TEST_GAPS[1], torch.Generator().manual_seed(7))
    times = gaps.cumsum(1)[0]
    right.plot(times[:SEEN], angles[0, :SEEN], "ko", markersize=4, label="seen")
    right.plot(times[SEEN:], angles[0, SEEN:], "kx", label="to be forecast")
    for model in models.values():
        with torch.no_grad():
            forecast = model(gaps, observed(angles))[0, SEEN:]
        right.plot(times[SEEN:], forecast, marker=".", linewidth=0.8)
    right.set(xlabel=f"s, with a mean gap of {TEST_GAPS[1]} s", ylabel="angle, rad")
    right.legend()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecast a pendulum from samples at irregular times.")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="where to draw the errors and a forecast")
    options = parser.parse_args()
    print("error ahead, as a share of the angle, with mean gaps of", *TEST_GAPS, "s; in training", MEAN_GAP)
    models, errors = {}, {}
    for name in options.only:
        models[name], errors[name], seconds = run(name, options.steps, options.seed)
        parameters = sum(p.numel() for p in models[name].parameters())
        shares = "  ".join(f"{value:.3f}" for value in errors[name])
        print(f"{name}, {parameters} parameters, {seconds:.0f} s:  {shares}", flush=True)
    if options.plot:
        draw(models, errors, options.plot)


if __name__ == "__main__":
    main()
