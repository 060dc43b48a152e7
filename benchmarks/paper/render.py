"""Refresh the tables and plots of docs/results.md from the rows in benchmarks/results:

    python -m benchmarks.paper.render

A table stands between `<!-- NAME -->` and `<!-- end -->`; the text around it is written by hand.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from torch import nn

from modeling_minrnn import MinRNNConfig
from modeling_minrnn.modeling_minrnn import MinRNNRecurrence

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "results.md"
Row = dict[str, object]


def rows(name: str, *key: str) -> list[Row]:
    """The latest row of each `key`, in the order of their first appearance."""
    latest = {}
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        latest[tuple(row[field] for field in key)] = row
    return list(latest.values())


def table(columns: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    columns = list(columns)
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def parameters() -> str:
    """Of what turns an input of width H into the gates and candidate of a state of width alpha H, without biases."""
    hidden, lines = 64, []
    for name, cell_type, baseline in (
        ("minGRU / nn.GRU", "mingru", nn.GRU),
        ("minLSTM / nn.LSTM", "minlstm", nn.LSTM),
    ):
        cells = []
        for alpha in (1, 2, 3, 4):
            config = MinRNNConfig(vocab_size=1, hidden_size=hidden, expansion_factor=alpha, cell_type=cell_type)
            minimal = MinRNNRecurrence(config).in_proj.weight.numel()
            full = sum(p.numel() for p in baseline(hidden, alpha * hidden, bias=False).parameters())
            cells.append(f"{100 * minimal / full:.1f}")
        lines.append((name, *cells))
    return table(["%", *(f"alpha = {alpha}" for alpha in (1, 2, 3, 4))], lines)


def figure_text(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def speed() -> str:
    found = rows("paper_speed", "contender", "T")
    lengths = sorted({row["T"] for row in found})
    lines = []
    for name in dict.fromkeys(row["contender"] for row in found):
        own = {row["T"]: row for row in found if row["contender"] == name}
        cells = [
            f"{figure_text(own[T]['ms'])} ms, {figure_text(own[T]['peak_mb'])} MB" if T in own else "" for T in lengths
        ]
        longest = own[max(own)]
        slope = "" if longest["slope"] is None else f"{longest['slope']:.2f}"
        lines.append((name, *cells, slope, f"{figure_text(longest['slowdown'])} at {max(own)}"))
    return table(["", *(f"T = {T}" for T in lengths), "slope", "times as long"], lines)


def plot_speed(path: Path) -> None:
    found = rows("paper_speed", "contender", "T")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for place, (key, label) in enumerate((("ms", "forward + backward, ms"), ("peak_mb", "memory, MB")), 1):
        axes = figure.add_subplot(1, 2, place, xlabel="T", ylabel=label, xscale="log", yscale="log")
        for name in dict.fromkeys(row["contender"] for row in found):
            own = sorted((row["T"], row[key]) for row in found if row["contender"] == name)
            axes.plot(*zip(*own), "--" if "block" in name else "-", marker=".", linewidth=1, label=name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def task_runs() -> list[Row]:
    return rows("paper_tasks", "task", "contender", "layers", "seed", "steps", "learning_rate")


def selective_copying() -> str:
    found = [row for row in task_runs() if row["task"] == "selective_copying"]
    groups: dict[tuple, list[Row]] = {}
    for row in found:
        groups.setdefault((row["contender"], row["layers"], row["learning_rate"], row["steps"]), []).append(row)
    lines = [
        (
            name,
            layers,
            f"{own[0]['parameters']:,}",
            f"{rate:g}",
            steps,
            len(own),
            spread([row["accuracy"] for row in own]),
        )
        for (name, layers, rate, steps), own in groups.items()
    ]
    return table(["", "layers", "parameters", "learning rate", "steps", "seeds", "accuracy, %"], lines)


def chomsky() -> str:
    found = [row for row in task_runs() if row["task"] != "selective_copying"]
    names = list(dict.fromkeys(row["contender"] for row in found))
    lines = []
    for task in dict.fromkeys(row["task"] for row in found):
        cells = [
            [row["accuracy"] for row in found if (row["task"], row["contender"]) == (task, name)] for name in names
        ]
        lines.append((task.replace("_", " "), *(spread(values) if values else "not run" for values in cells)))
    return table(["accuracy, %", *names], lines)


def nats(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation of losses."""
    rounded = round(mean(values), 3) + 0.0  # no -0.000
    return f"{rounded:{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


ABLATED = ("6 layers of 128", "minLSTM")  # what variants are compared with whose names begin so; others: the first


def ablations() -> str:
    """The difference is that to what the variant is one of, seed by seed."""
    runs: dict[str, dict[int, Row]] = {}
    for row in rows("paper_ablations", "variant", "seed", "steps"):
        runs.setdefault(row["variant"], {})[row["seed"]] = row
    lines = []
    for name, own in runs.items():
        default = next((runs[begin] for begin in ABLATED if name.startswith(begin)), next(iter(runs.values())))
        differences = [row["held_out_loss"] - default[seed]["held_out_loss"] for seed, row in own.items()]
        lines.append(
            (
                name,
                f"{own[0]['parameters']:,}",
                len(own),
                nats([row["held_out_loss"] for row in own.values()]),
                "" if own is default else nats(differences, "+"),
                f"{mean(row['state_norm'] for row in own.values()):.1f}",
                f"{max(row['largest_state'] for row in own.values()):.0f}",
            )
        )
    columns = ("", "parameters", "seeds", "held-out loss", "difference", "norm of states", "largest state")
    return table(columns, lines)


TABLES: dict[str, Callable[[], str]] = {
    "parameters": parameters,
    "speed": speed,
    "selective copying": selective_copying,
    "chomsky": chomsky,
    "ablations": ablations,
}
PLOTS: dict[str, Callable[[Path], None]] = {"paper_speed.png": plot_speed}


def render(page: str) -> str:
    for name, make in TABLES.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, name
        page = f"{before}{begin}{make()}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
    for name, plot in PLOTS.items():
        plot(ROOT / "docs" / "plots" / name)
