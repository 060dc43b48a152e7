"""Write what stands beside the weights in model_cards/:  python -m model_cards.write

A card is made of a file in configs/ and of the model's newest row in benchmarks/results/published.jsonl. The code is
links into modeling_minrnn/, which an upload to the Hub follows: there is one copy of it in the repository.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_import_files

from training.config import RunConfig, load_config
from training.report import TrainedModel, model_card

HERE = Path(__file__).parent
ROOT = HERE.parent
ROWS = ROOT / "benchmarks" / "results" / "published.jsonl"
SCORES = ("held_out_loss", "held_out_window_loss", "bits_per_byte", "held_out_accuracy")


@dataclass(frozen=True)
class Published:
    """What is known of a model beside its settings and its row."""

    license: str  # of its text, as a sentence
    overrides: str = ""  # what a user gives to train it anew


CARDS = {
    "python-1m": Published(
        "The text, the source of Python's standard library, is under the licence of the Python Software Foundation "
        "(https://docs.python.org/3/license.html)."
    ),
    "shakespeare-1m": Published("The text, plays by Shakespeare, is in the public domain.", " data.files=[input.txt]"),
}


def card(name: str) -> ModelCard:
    published, (config, settings), row = CARDS[name], read_config(name), newest_row(name)
    trained = TrainedModel(
        parameters=row["parameters"],
        command=f"python -m model_cards.retrain {name}{published.overrides}",
        commit=row["commit"] + ("-dirty" if row["dirty"] else ""),
        versions={"Python": row["python"]} | row["versions"],
        best_step=row["step"],
        tokens=row["tokens"],
        scores={key: row[key] for key in SCORES if key in row},
        corpus_license=published.license,
    )
    return model_card(name, config, settings, trained)


def newest_row(name: str) -> dict:
    return [row for row in map(json.loads, ROWS.read_text().splitlines()) if row["model"] == name][-1]


def read_config(name: str) -> tuple[RunConfig, str]:
    path = ROOT / "configs" / f"{name}.yaml"
    return load_config(str(path), []), path.read_text()


def link_code(folder: Path) -> None:
    for path in folder.glob("*.py"):
        path.unlink()
    model = ROOT / "modeling_minrnn" / "modeling_minrnn.py"
    for path in {model, *map(Path, get_relative_import_files(model))}:
        (folder / path.name).symlink_to(os.path.relpath(path, folder))


def write(name: str) -> None:
    link_code(HERE / name)
    card(name).save(HERE / name / "README.md")


if __name__ == "__main__":
    for name in CARDS:
        write(name)
