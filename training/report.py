"""What a run leaves for people: metrics as JSON lines, the loss curve as a picture, and the model card."""

import json
import math
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from .checkpoint import SETTINGS_FILE, Progress
from .config import DataConfig, RunConfig

METRICS_FILE = "metrics.jsonl"
LOSS_CURVE_FILE = "loss_curve.png"
CARD_TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"


class MetricsLog:
    """Appends one JSON object a line to `folder`, after dropping what an interrupted run wrote beyond `last_step`."""

    def __init__(self, folder: Path, last_step: int):
        self.path = folder / METRICS_FILE
        kept = [row for row in read_metrics(folder) if row["step"] <= last_step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_loss_curve(folder: Path) -> None:
    """Training loss and held-out loss (nats per token) against steps, from the metrics in `folder`."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        rows = [row for row in read_metrics(folder) if key in row]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=label, linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / LOSS_CURVE_FILE, dpi=120)


def write_model_card(folder: Path, config: RunConfig, model: PreTrainedModel, progress: Progress) -> None:
    """README.md of the model in `folder`: what it is, how it was trained, how good it is and how to load it."""
    scores = held_out_scores(progress.best_loss, config.data)
    losses = f"{scores['held_out_loss']:.4f} nats per token"
    if "bits_per_byte" in scores:
        losses += f", {scores['bits_per_byte']:.4f} bits per byte"
    corpus = config.data.dataset or ", ".join(config.data.files)
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[model.config.model_type]),
        template_path=str(CARD_TEMPLATE),
        name=folder.resolve().name,
        cell={"mingru": "minGRU", "minlstm": "minLSTM"}[model.config.cell_type],
        parameters=f"{model.num_parameters():,}",
        corpus=corpus,
        losses=losses,
        best_step=progress.best_step,
        tokens=f"{progress.best_step * config.train.batch_size * config.train.sequence_length:,}",
        loss_curve=LOSS_CURVE_FILE,
        prompt=repr(config.train.sample_prompts[0] if config.train.sample_prompts else ""),
        settings=(folder / SETTINGS_FILE).read_text().strip(),
        transformers_version=transformers.__version__,
    )
    card.save(folder / "README.md")


def held_out_scores(loss: float, data: DataConfig) -> dict[str, float]:
    """`loss` in nats per token; where tokens are bytes also in bits per byte."""
    return {"held_out_loss": loss} | ({"bits_per_byte": loss / math.log(2)} if data.tokenizer == "byte" else {})
