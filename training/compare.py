"""Compare runs by what they leave in their folders:  python -m training.compare runs/a runs/b [--picture FILE]

Prints a Markdown table of their figures and of the settings that differ, and draws their held-out loss.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .checkpoint import SETTINGS_FILE
from .config import InputError, exit_with_one_line, flat_settings, load_config
from .report import read_metrics

NOT_COMPARED = {"train.output_dir"}


def main(folders: list[str], picture: str) -> None:
    runs = {folder: read_run(Path(folder)) for folder in folders}
    key = draw(runs, Path(picture))
    print(table(runs))
    print(f"\n{picture}: {key.replace('_', ' ')} against steps")


def read_run(folder: Path) -> dict[str, Any]:
    """Its settings, the rows of its evaluations, and figures of the best one.

    Raises InputError where there is no run, or none that was evaluated.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise InputError(f"{folder}: no run, which has a {SETTINGS_FILE}")
    config, metrics = load_config(str(folder / SETTINGS_FILE), []), read_metrics(folder)
    evaluations = [row for row in metrics if "held_out_loss" in row]
    if not evaluations:
        raise InputError(f"{folder}: the run has no evaluation yet, train.eval_every_steps is "
                         f"{config.train.eval_every_steps}")  # fmt: skip
    best = min(evaluations, key=lambda row: row["held_out_loss"])
    speeds = sorted(row["tokens_per_s"] for row in metrics if "tokens_per_s" in row)
    figures = {
        "bits per byte, held out": number(best.get("bits_per_byte")),
        "held-out loss, nats per token": number(best["held_out_loss"]),
        "held-out accuracy": number(best["held_out_accuracy"]),
        "at step": f"{best['step']:,}",
        "steps in all": f"{metrics[-1]['step']:,}",
        "tokens a second, median": f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
    }
    return {"settings": flat_settings(config), "evaluations": evaluations, "figures": figures}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Figures, then the settings in which not all runs agree."""
    columns = list(runs.values())
    rows = [(name, [run["figures"][name] for run in columns]) for name in columns[0]["figures"]]
    for key in dict.fromkeys(key for run in columns for key in run["settings"]):
        values = [str(run["settings"].get(key, "")) for run in columns]
        if len({*values}) > 1 and key not in NOT_COMPARED:
            rows.append((key, values))
    lines = [["", *runs], ["---"] * (len(runs) + 1), *([name, *values] for name, values in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(runs: dict[str, dict[str, Any]], picture: Path) -> str:
    """Bits per byte where all runs have them, which compare whatever the tokenizers are; else nats per token."""
    evaluations = [run["evaluations"] for run in runs.values()]
    in_bytes = all("bits_per_byte" in row for rows in evaluations for row in rows)
    key = "bits_per_byte" if in_bytes else "held_out_loss"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="step", ylabel="bits per byte, held out" if in_bytes else "nats per token, held out"
    )
    for folder, rows in zip(runs, evaluations):
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], "o-", label=folder, linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return key


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare runs of train.py.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="the output folder of a run, e.g. runs/demo")
    parser.add_argument("--picture", default="comparison.png", help="where to draw (%(default)s)")
    command_line = parser.parse_args()
    with exit_with_one_line():
        main(command_line.folders, command_line.picture)
