"""Refresh tables and plots of docs/results.md and docs/long-context.md from the rows in benchmarks/results:

    python -m benchmarks.paper.render

A table stands between `<!-- NAME -->` and `<!-- end -->`; the text around it is written by hand.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from torch import nn

from benchmarks.paper import cells, long_context
from benchmarks.paper.shakespeare import BUDGETS, OF_EQUAL_SIZE, TARGETS
from benchmarks.paper.tasks import CONTENDERS, load_setting
from modeling_minrnn import MinRNNConfig
from modeling_minrnn.cells import cell_of
from modeling_minrnn.modeling_minrnn import MinRNNRecurrence

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
WINDOW_STEPS = 1500  # of the sweep over learning rates
TO_REACH = {("minGRU", 3): "99.5", ("minLSTM", 3): "96"}  # the paper's results on its longer questions
Row = dict[str, object]


def rows(name: str, *key: str) -> list[Row]:
    """The latest row of each `key`, in the order of their first appearance."""
    latest = {}
    path = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        latest[tuple(row.get(field) for field in key)] = row
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
            minimal = MinRNNRecurrence(config, 0).in_proj.weight.numel()
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


def spread(values: list[float], count: bool = False) -> str:
    """Mean and standard deviation in percent, with `count` of how many; nothing of none."""
    if not values:
        return ""
    of_several = f" ± {100 * stdev(values):.1f}" + (f" ({len(values)})" if count else "") if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}" + of_several


def task_runs() -> list[Row]:
    found = rows("paper_tasks", "task", "contender", "layers", "seed", "steps", "learning_rate", "plain", "choosing")
    return [row for row in found if not row.get("choosing")]


def grouped(found: list[Row], *key: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[field] for field in key), []).append(row)
    return groups


def selective_copying() -> str:
    found = [row for row in task_runs() if row["task"] == "selective_copying" and row["steps"] > WINDOW_STEPS]
    lines = []
    found.sort(key=lambda row: (CONTENDERS.index(row["contender"]), row["layers"]))
    for (name, layers, rate, steps), own in grouped(found, "contender", "layers", "learning_rate", "steps").items():
        reached = sorted(row["steps_to_99"] for row in own if row["steps_to_99"])
        lines.append(
            (
                name,
                layers,
                f"{own[0]['parameters']:,}",
                f"{rate:g}",
                f"{steps:,}",
                len(own),
                f"{reached[0]:,} to {reached[-1]:,}" if len(reached) == len(own) else "",
                spread([row["accuracy"] for row in own]),
                TO_REACH.get((name, layers), ""),
            )
        )
    columns = "layers", "parameters", "learning rate", "steps", "seeds", "past 99 % at step", "accuracy, %", "to reach"
    return table(["", *columns], lines)


def window() -> dict[str, dict[float, list[Row]]]:
    """Of the sweep over learning rates, by contender and initialisation, the runs of each rate."""
    found = [row for row in task_runs() if row["task"] == "selective_copying" and row["steps"] == WINDOW_STEPS]
    found.sort(key=lambda row: (CONTENDERS.index(row["contender"]), not row["plain"]))
    runs: dict[str, dict[float, list[Row]]] = {}
    for (name, plain), own in grouped(found, "contender", "plain").items():
        initialisation = ", MinRNNConfig's own" if plain else ", the preset's"
        label = name + (initialisation if name in TARGETS else "")
        runs[label] = {rate: of_rate for (rate,), of_rate in grouped(own, "learning_rate").items()}
    return runs


def learning_rates() -> str:
    rates = sorted({rate for own in window().values() for rate in own})
    lines = [
        (label, *(spread([row["accuracy"] for row in own[rate]]) if rate in own else "" for rate in rates))
        for label, own in window().items()
    ]
    return table(["", *(f"{rate:g}" for rate in rates)], lines)


def plot_selective_copying(path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    found = [row for row in task_runs() if row["task"] == "selective_copying"]
    axes = figure.add_subplot(1, 2, 1, xlabel="layers", ylabel="accuracy", ylim=(0, 1.02), xticks=(1, 2, 3))
    trained = [row for row in found if row["steps"] > WINDOW_STEPS]
    for (name,), own in grouped(trained, "contender").items():
        plot_means(axes, {layers: runs for (layers,), runs in grouped(own, "layers").items()}, "accuracy", name)
    axes = figure.add_subplot(1, 2, 2, xlabel=f"learning rate, {WINDOW_STEPS} steps", xscale="log", ylim=(0, 1.02))
    for label, by_rate in window().items():
        plot_means(axes, by_rate, "accuracy", label)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def plot_means(
    axes: Axes, runs: dict[float, list[Row]], value: str, label: str | None, **style: Any
) -> ErrorbarContainer:
    """Means with standard deviations, in the order of what they are plotted over."""
    ordered = sorted((at, [row[value] for row in own]) for at, own in runs.items())
    spreads = [stdev(values) if len(values) > 1 else 0 for _, values in ordered]
    means = [mean(values) for _, values in ordered]
    return axes.errorbar([at for at, _ in ordered], means, spreads, marker=".", capsize=2, label=label, **style)


def shakespeare() -> str:
    lines = []
    for row in rows("paper_shakespeare", "experiment", "contender", "seed"):
        if row["experiment"] != "equal":
            loss = row["held_out_loss"]
            settings = {"paper": "shakespeare-char.yaml", "best": "shakespeare-char-best.yaml"}[row["experiment"]]
            cells = f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['minutes']:.0f}"
            lines.append((row["contender"], settings, *cells, f"{loss['value']:.3f}", f"{loss['at_most']:g}"))
    return table(["", "settings", "parameters", "steps", "minutes", "held-out loss", "to reach"], lines)


CHOSEN = ("layers", "sequence_length", "initializer_range", "muon_learning_rate", "learning_rate")


def shakespeare_equal_runs() -> list[Row]:
    """minGRU, whose tokens and time the others have, has one run for both."""
    found = rows("paper_shakespeare", "experiment", "contender", "equal", "seed")
    runs = [row for row in found if row["experiment"] == "equal" and row["equal"]]  # not of a sweep
    runs += [row | {"equal": "time"} for row in runs if row["contender"] == "minGRU"]
    return sorted(runs, key=lambda row: list(OF_EQUAL_SIZE).index(row["contender"]))


def shakespeare_equal() -> str:
    lines = []
    for (name,), own in grouped(shakespeare_equal_runs(), "contender").items():
        cells = []
        for budget in BUDGETS:
            runs = [row for row in own if row["equal"] == budget]
            if not runs:
                cells += ["not run", "", ""]
                continue
            in_windows = [row["window_loss"] for row in runs if "window_loss" in row]
            losses = nats([row["held_out_loss"] for row in runs]), nats(in_windows) if in_windows else "not measured"
            cells += [f"{runs[0]['steps']:,}", *losses]
        row = own[0]
        rates = f"{row['learning_rate']:g}", row.get("muon_learning_rate") or ""
        lines.append((name, f"{row['parameters']:,}", *rates, f"{row['ms_a_step']:.0f}", *cells))
    columns = "parameters", "learning rate", "Muon's", "ms a step", "steps", "loss", "in windows"
    return table(["", *columns, "steps in equal time", "loss", "in windows"], lines)


def shakespeare_chosen() -> str:
    """The sweeps that read the last tenth of the training text."""
    found = rows("paper_shakespeare", "experiment", "contender", "read", "seed", "steps", *CHOSEN)
    lines = [
        (
            row["contender"],
            row["layers"],
            row["sequence_length"],
            {None: "own", "width": "1 / sqrt(width)"}.get(row["initializer_range"], row["initializer_range"]),
            row["muon_learning_rate"] or "",
            f"{row['learning_rate']:g}",
            f"{row['times_as_long']:.2f}",
            row["steps"],
            *(f"{row[loss]:.3f}" for loss in ("held_out_loss", "window_loss")),
        )
        for row in found
        if row.get("read", "").startswith("the last tenth")
    ]
    columns = "layers", "context", "initial weights", "Muon's rate", "AdamW's", "a step, minGRU's = 1"
    return table(["", *columns, "steps", "loss", "in windows"], lines)


def plot_shakespeare(path: Path) -> None:
    found = [row | {"equal": f"equal {row['equal']}"} for row in shakespeare_equal_runs()]
    bars(path, found, "equal", "held_out_loss", "held-out loss, nats a character")


def nats(losses: list[float], sign: str = "") -> str:
    rounded = round(mean(losses), 3) + 0.0  # no -0.000
    return f"{rounded:{sign}.3f}" + (f" ± {stdev(losses):.3f}" if len(losses) > 1 else "")


def chomsky_runs() -> list[Row]:
    return [row for row in task_runs() if row["task"] != "selective_copying"]


def chomsky() -> str:
    """A line for all runs of a contender with the same steps and learning rate."""
    found = sorted(chomsky_runs(), key=lambda row: (CONTENDERS.index(row["contender"]), row["steps"]))
    tasks = sorted({row["task"] for row in found})
    lines = []
    for (name, steps, rate), own in grouped(found, "contender", "steps", "learning_rate").items():
        of_task = grouped(own, "task")
        cells = [spread([row["accuracy"] for row in of_task.get((task,), ())], count=True) for task in tasks]
        lines.append((name, f"{steps:,}; {rate:g}", *cells))
    return table(["accuracy, %", "steps; rate", *(task.replace("_", " ") for task in tasks)], lines)


def plot_chomsky(path: Path) -> None:
    """Of each contender and task the longest runs with the learning rate of the settings."""
    rate = load_setting("parity").train.learning_rate
    found = []
    for runs in grouped(chomsky_runs(), "task", "contender", "learning_rate").values():
        most = max(row["steps"] for row in runs)
        found += [row for row in runs if (row["steps"], row["learning_rate"]) == (most, rate)]
    bars(path, found, "task", "accuracy", "accuracy at lengths 40 to 256")


def bars(path: Path, found: list[Row], across: str, value: str, label: str) -> None:
    """The mean value of each contender, in groups of `across`."""
    groups = list(dict.fromkeys(row[across] for row in found))
    contenders = grouped(found, "contender")
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.add_subplot(ylabel=label)
    for place, ((name,), own) in enumerate(contenders.items()):
        runs = grouped(own, across)
        at = [groups.index(group) + 0.8 * (place + 0.5) / len(contenders) - 0.4 for (group,) in runs]
        axes.bar(at, [mean(row[value] for row in rows) for rows in runs.values()], 0.75 / len(contenders), label=name)
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def offline_rl_runs(*key: str) -> dict[tuple, list[Row]]:
    return grouped(rows("paper_offline_rl", "environment", "contender", "reads", "seed", "asked"), *key)


def offline_rl() -> str:
    contenders = list(offline_rl_runs("contender", "reads"))
    lines = []
    for (environment, asked_return), found in offline_rl_runs("environment", "asked_return").items():
        by_contender = grouped(found, "contender", "reads")
        cells = [
            f"{spread([row['normalised'] / 100 for row in own])} ({mean(row['score'] for row in own):,.0f})"
            for own in map(by_contender.get, contenders)
        ]
        data = f"{environment} ({found[0]['random_return']:,.0f}, {found[0]['behaviour_return']:,.0f})"
        lines.append((data, f"{asked_return:,.0f}", *cells))
    return table(["(random, data)", "asked for", *(f"{name}, {reads}" for name, reads in contenders)], lines)


def plot_offline_rl(path: Path) -> None:
    environments = offline_rl_runs("environment")
    figure = Figure(figsize=(3.4 * len(environments), 3.4), layout="constrained")
    for place, ((environment,), found) in enumerate(environments.items(), 1):
        axes = figure.add_subplot(1, len(environments), place, title=environment, xlabel="return asked for")
        for (name, reads), own in grouped(found, "contender", "reads").items():
            scores = {asked: [row["score"] for row in runs] for (asked,), runs in grouped(own, "asked_return").items()}
            means, spreads = list(map(mean, scores.values())), list(map(stdev, scores.values()))
            axes.errorbar(list(scores), means, spreads, capsize=2, label=f"{name}, {reads}")
        axes.plot(list(scores), list(scores), ":", color="gray", label="as asked")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean return")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def decision_step() -> str:
    found = rows("paper_decision_step", "contender", "reads", "horizon")
    horizons = sorted({row["horizon"] for row in found})
    lines = []
    for (name, reads), own in grouped(found, "contender", "reads").items():
        own.sort(key=lambda row: row["horizon"])
        cells = [f"{row['ms']:.2f} ms, {row['kept_bytes'] / 1e3:,.1f} kB" for row in own]
        lines.append((f"{name}, {reads}", *cells, f"{own[-1]['slowdown']:.2f}"))
    return table(["", *(f"step {horizon:,}" for horizon in horizons), "times as long"], lines)


ABLATED = ("6 layers of 128", "minLSTM")  # what variants are compared with whose names begin so; others: the first


def ablation_runs() -> dict[str, tuple[list[Row], list[float]]]:
    """By variant its runs, and their losses less those with the same seeds of what it is a variant of."""
    runs = {name: own for (name,), own in grouped(rows("paper_ablations", "variant", "seed"), "variant").items()}
    compared = {}
    for name, own in runs.items():
        default = next((runs[begin] for begin in ABLATED if name.startswith(begin)), next(iter(runs.values())))
        losses = {row["seed"]: row["held_out_loss"] for row in default}
        differences = [row["held_out_loss"] - losses[row["seed"]] for row in own]
        compared[name] = own, [] if own is default else differences
    return compared


def ablations() -> str:
    lines = [
        (
            name,
            f"{own[0]['parameters']:,}",
            len(own),
            nats([row["held_out_loss"] for row in own]),
            nats(differences, "+") if differences else "",
            f"{mean(row['state_norm'] for row in own):.1f}",
            f"{max(row['largest_state'] for row in own):.0f}",
        )
        for name, (own, differences) in ablation_runs().items()
    ]
    columns = "parameters", "seeds", "held-out loss", "difference", "norm of states", "largest state"
    return table(["", *columns], lines)


def plot_ablations(path: Path) -> None:
    found = {name: differences for name, (_, differences) in ablation_runs().items() if differences}
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="difference of the held-out loss, nats a character; dots are seeds")
    axes.barh(list(found), [mean(differences) for differences in found.values()], color="lightgrey")
    for name, differences in found.items():
        axes.plot(differences, [name] * len(differences), "k.", markersize=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


CELL_FIGURES = {  # by experiment, what the table of cells shows
    "parity": ("parity at 1024, %", "accuracy_1024"),
    "majority": ("majority at 256, %", "accuracy_256"),
    "recall": ("recall of 8 pairs, %", "accuracy_8"),
    "selective_copying": ("selective copying, %", "accuracy"),
    "shakespeare": ("Shakespeare, nats", "held_out_loss"),
}


def cell_runs(sweep: bool) -> dict[tuple, list[Row]]:
    """Of each cell and experiment, in the order of the cells."""
    found = rows("paper_cells", "experiment", "contender", "sweep", "seed", *(["learning_rate"] if sweep else []))
    order = list(cells.CONTENDERS)
    own = [row for row in found if row["sweep"] == sweep and row["experiment"] in CELL_FIGURES]
    own.sort(key=lambda row: order.index(row["contender"]))
    return grouped(own, "contender", "experiment")


def which_cell() -> str:
    runs, lines = cell_runs(sweep=False), []
    for name in cells.CONTENDERS:
        figures = []
        for experiment, (_, value) in CELL_FIGURES.items():
            values = [row[value] for row in runs.get((name, experiment), ())]
            figures.append((nats if value == "held_out_loss" else spread)(values) if values else "not run")
        lines.append((name, cells.GOOD_FOR[name], *figures))
    return table(["", "what for", *(label for label, _ in CELL_FIGURES.values())], lines)


def cell_settings() -> str:
    """Of the same table, what each figure rests on."""
    runs, swept, lines = cell_runs(sweep=False), cell_runs(sweep=True), []
    for name in cells.CONTENDERS:
        found = {experiment: runs[name, experiment] for experiment in CELL_FIGURES if (name, experiment) in runs}
        texts = [f"{found[text][0][key]:,}" if text in found else "" for text in ("parity", "shakespeare")
                 for key in ("parameters", "state_size")]  # fmt: skip
        for experiment in CELL_FIGURES:
            own = found.get(experiment, [])
            tried = len(swept.get((name, experiment), ())) or 1
            seeds = f"{len(own)} seed" + "s" * (len(own) > 1)
            texts.append(f"{own[0]['steps']:,}; {seeds}; {own[0]['learning_rate']:g} of {tried}" if own else "not run")
        lines.append((name, *texts))
    columns = "parity: parameters", "state", "Shakespeare: parameters", "state"
    return table(["", *columns, *(experiment.replace("_", " ") for experiment in CELL_FIGURES)], lines)


def signed_parity() -> str:
    """By length, of all cells and seeds that were trained for as long as the signed cell."""
    kind = "parity", False, cells.STEPS["parity"]
    runs = rows("paper_cells", "experiment", "contender", "sweep", "seed", "steps")
    found = [row for row in runs if (row["experiment"], row["sweep"], row["steps"]) == kind]
    columns = [f"accuracy_{length}" for length in cells.LENGTHS] + [f"last_{cells.LENGTHS[-1]}"]
    lines = [
        (name, len(own), *(f"{100 * min(row[column] for row in own):.2f}" for column in columns))
        for (name,), own in grouped(found, "contender").items()
    ]
    return table(["worst seed, %", "seeds", *(f"{n} tokens" for n in cells.LENGTHS), "the last of 1024"], lines)


WORDS_AND_KEYS = {  # by experiment, the accuracies that are shown; the last is to be 99 %
    "s3": {"64 tokens": "accuracy_64", "1024 tokens": "accuracy_1024"},
    "s5": {"64 tokens": "accuracy_64", "128 tokens": "accuracy_128"},
    "mqar": {"16 pairs": "accuracy"},
}


def words_and_keys() -> str:
    found = rows("paper_cells", "experiment", "contender", "sweep", "seed", "learning_rate", "steps")
    lines = []
    for experiment, accuracies in WORDS_AND_KEYS.items():
        own = [row for row in found if row["experiment"] == experiment]
        reported = [row for row in own if not row["sweep"]]
        for (name, rate, steps), runs in grouped(reported, "contender", "learning_rate", "steps").items():
            tried = sum(row["sweep"] and row["contender"] == name for row in own) or 1
            shown = [f"{spread([row[value] for row in runs])} at {where}" for where, value in accuracies.items()]
            reached = sum(row[value] >= 0.99 for row in runs for value in list(accuracies.values())[-1:])
            lines.append(
                (
                    experiment.upper(),
                    name,
                    f"{runs[0]['parameters']:,}",
                    f"{steps:,}; {rate:g} of {tried}",
                    "; ".join(shown),
                    f"{reached} of {len(runs)}",
                    f"{1e3 * mean(row['training_seconds'] / row['steps'] for row in runs):.0f}",
                    f"{max(row['step_error'] for row in runs):.0e}",
                )
            )
    columns = "layers", "parameters", "steps; rate", "accuracy, %", "seeds past 99 %", "ms a step", "step error"
    return table(["", *columns], lines)


SWEPT = ("preset", "cell_type", "steps", "batch_size", "warmup_steps", "max_timescale", "initializer_range",
         "muon_learning_rate")  # fmt: skip


def sweep_runs() -> dict[tuple, dict[float, list[Row]]]:
    """Runs by learning rate, of each preset with each of the other settings."""
    runs = [{"muon_learning_rate": None} | row for row in rows("paper_sweep", *SWEPT, "learning_rate", "seed")]
    millions = {name: float(name.replace("m", "").replace("b", "e3")) for name in {row["preset"] for row in runs}}
    runs.sort(key=lambda row: (millions[row["preset"]], *(row[name] or 0 for name in SWEPT[1:])))
    found = grouped(runs, *SWEPT)
    return {
        settings: {rate: runs for (rate,), runs in grouped(own, "learning_rate").items()}
        for settings, own in found.items()
    }


def presets() -> str:
    found = sweep_runs()
    rates = sorted({rate for own in found.values() for rate in own})
    lines = [
        (
            preset,
            cell_of(cell).label,
            steps,
            batch,
            warmup,
            timescale or "",
            f"{initializer_range:.3g}",
            muon or "",
            *(nats([row["held_out_loss"] for row in own[rate]]) if rate in own else "" for rate in rates),
        )
        for (preset, cell, steps, batch, warmup, timescale, initializer_range, muon), own in found.items()
    ]
    columns = "cell", "steps", "batch", "warm-up", "max_timescale", "initializer_range", "Muon"
    return table(["", *columns, *(f"{rate:g}" for rate in rates)], lines)


def small_shakespeare() -> str:
    """Of benchmarks/quality.py, with which settings in the place of those of a file."""
    runs = [row for row in rows("quality", "config", "contender", "read", "seed") if "read" in row]
    shown = "train.steps", "train.warmup_steps"  # by a column
    lines = [
        (
            read,
            f"`{config}`",
            " ".join(f"`{each}`" for each in contender.split() if each.split("=")[0] not in shown),
            own[0]["steps"],
            len(own),
            round(mean(row["cpu_seconds"] for row in own)),
            nats([row["held_out_loss"] for row in own]),
            nats([row["window_loss"] for row in own]),
        )
        for (read, config, contender), own in grouped(runs, "read", "config", "contender").items()
    ]
    return table(["read", "of configs/", "with", "steps", "seeds", "s of CPU", "carried", "in windows"], lines)


def plot_presets(path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="held-out loss, nats a byte", xscale="log")
    for (preset, cell, steps, batch, *_, initializer_range, _), own in sweep_runs().items():
        if len(own) > 2:
            label = f"{preset}, {cell}, {steps} steps of {batch}, from {initializer_range:.3g}"
            plot_means(axes, own, "held_out_loss", label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def long_context_runs(experiment: str, *key: str) -> dict[tuple, list[Row]]:
    """Of the runs that are no sweep, in the order of the contenders; of the text those of STEPS alone."""
    steps, order = long_context.STEPS[experiment], list(long_context.contenders(experiment))
    found = rows("paper_long_context", "experiment", "contender", "length", "pairs", "seed", "steps", "learning_rate")
    own = [row for row in found if row["experiment"] == experiment and row["seed"] != long_context.SWEEP_SEED]
    own = [row for row in own if experiment != "text" or row["steps"] == steps]
    return grouped(sorted(own, key=lambda row: order.index(row["contender"])), *key)


def long_context_text() -> str:
    shown = {
        "loss": ("{name}", ".3f"),
        "loss_in_parts": ("the same, in parts of 64", ".3f"),
        "state_rms": ("root mean square of its states", ".2f"),
        "largest_state": ("its largest state", ".1f"),
    }
    lines = []
    for (name,), own in long_context_runs("text", "contender").items():
        for value, (label, digits) in shown.items():
            if value in own[0]:
                means = [mean(row[value] for row in own if row["length"] == length) for length in long_context.LENGTHS]
                lines.append((label.format(name=name), *(f"{figure:{digits}}" for figure in means)))
    return table(["bytes read", *long_context.LENGTHS], lines)


def answers(experiment: str, axis: str, ats: list[int]) -> str:
    lines = [
        (
            name,
            f"{steps:,}; {rate:g}",
            len({row["seed"] for row in own}),
            *(spread([row["accuracy"] for row in own if row[axis] == at]) for at in ats),
        )
        for (name, steps, rate), own in long_context_runs(experiment, "contender", "steps", "learning_rate").items()
    ]
    return table([axis, "steps; rate", "seeds", *ats], lines)


def plot_long_context(path: Path) -> None:
    """Means over the seeds; dotted: loss_in_parts."""
    panels = (("text", "loss", "length"), ("text", "state_rms", "length"), ("passkey", "accuracy", "length"),
              ("recall", "accuracy", "pairs"))  # fmt: skip
    figure = Figure(figsize=(16, 4), layout="constrained")
    for place, (experiment, value, axis) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place, xlabel=axis, ylabel=value, title=experiment)
        for (name, steps, rate), own in long_context_runs(experiment, "contender", "steps", "learning_rate").items():
            if value in own[0]:
                as_others = steps == long_context.STEPS[experiment] and rate == long_context.rate_of(experiment, name)
                name += "" if as_others else f", {steps:,} steps at {rate:g}"
                runs = {at: at_one for (at,), at_one in grouped(own, axis).items()}
                line = plot_means(axes, runs, value, name)
                if value == "loss":
                    plot_means(axes, runs, "loss_in_parts", None, linestyle=":", color=line[0].get_color())
        trained = long_context.TRAINED_LENGTH if axis == "length" else long_context.TRAINED_PAIRS
        axes.axvline(trained, color="gray", linestyle=":")
        if axis == "length":
            axes.set_xscale("log", base=2)
        if value == "state_rms":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "results.md": {
        "parameters": parameters,
        "speed": speed,
        "selective copying": selective_copying,
        "learning rates": learning_rates,
        "shakespeare": shakespeare,
        "shakespeare equal": shakespeare_equal,
        "shakespeare chosen": shakespeare_chosen,
        "chomsky": chomsky,
        "offline rl": offline_rl,
        "decision step": decision_step,
        "ablations": ablations,
        "signed parity": signed_parity,
        "which cell": which_cell,
        "cell settings": cell_settings,
        "words and keys": words_and_keys,
        "presets": presets,
        "small shakespeare": small_shakespeare,
    },
    "long-context.md": {
        "text": long_context_text,
        "passkey": lambda: answers("passkey", "length", long_context.LENGTHS),
        "recall": lambda: answers("recall", "pairs", long_context.PAIRS),
    },
}
PLOTS: dict[str, Callable[[Path], None]] = {
    "paper_speed.png": plot_speed,
    "paper_selective_copying.png": plot_selective_copying,
    "paper_shakespeare.png": plot_shakespeare,
    "paper_chomsky.png": plot_chomsky,
    "paper_offline_rl.png": plot_offline_rl,
    "paper_ablations.png": plot_ablations,
    "paper_presets.png": plot_presets,
    "paper_long_context.png": plot_long_context,
}


def render(page: str, tables: dict[str, Callable[[], str]]) -> str:
    for name, make in tables.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert begin and end, name
        page = f"{before}{begin}{make()}\n{end}{after}"
    return page


if __name__ == "__main__":
    for page, tables in TABLES.items():
        (DOCS / page).write_text(render((DOCS / page).read_text(), tables))
    for name, plot in PLOTS.items():
        plot(DOCS / "plots" / name)
