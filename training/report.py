"""What a run leaves for people: metrics and starts as JSON lines, the loss curve as a picture, and the model card."""

import glob
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from modeling_minrnn import MinRNNConfig
from modeling_minrnn.cells import cell_of
from modeling_minrnn.diagnose import StateReport

from .checkpoint import (
    CARD_FILE,
    FULL_METRICS_FILES,
    LOSS_CURVE_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    SETTINGS_FILE,
    STARTS_FILE,
    Progress,
    TrainingState,
    nonfinite_file,
    sha256,
    step_of,
    write_file,
)
from .config import STDLIB, InputError, RunConfig, SourceConfig, settings_yaml
from .data import TokenStream
from .sharded import gathered
from .tasks import HeldOutQuestions

METRICS_FILE_BYTES = 2**24
# Settings that are paths.
PATHS = (
    "data.dataset", "data.files", "data.held_out_files", "data.mixture", "data.tokenizer", "train.output_dir",
)  # fmt: skip
NEW_CARD_FILE = "README.new.md"
CARD_TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"


class MetricsLog:
    """Appends one JSON object a line to `folder`, after dropping what an interrupted run wrote beyond `last_step`.

    A file of METRICS_FILE_BYTES gets a number, metrics-0001.jsonl and so on, and another is begun.
    """

    def __init__(self, folder: Path, last_step: int):
        self.path = folder / METRICS_FILE
        for path in metrics_files(folder):
            kept = [row for row in read_rows(path) if row["step"] <= last_step]
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            full = file.tell() >= METRICS_FILE_BYTES
        if full:
            numbers = [int(path.stem.rpartition("-")[2]) for path in self.path.parent.glob(FULL_METRICS_FILES)]
            self.path.replace(self.path.with_stem(f"{self.path.stem}-{max(numbers, default=0) + 1:04d}"))


def metrics_files(folder: Path) -> list[Path]:
    """Oldest first."""
    current = folder / METRICS_FILE
    return sorted(folder.glob(FULL_METRICS_FILES)) + [current] * current.exists()


def read_metrics(folder: Path, first_step: int = 0) -> list[dict[str, Any]]:
    return [row for path in metrics_files(folder) for row in read_rows(path) if row["step"] >= first_step]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Raises InputError for a line that is not a JSON object with a step; the last may be incomplete, after a kill."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            int(row["step"])
            rows.append(row)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            if line.endswith(b"\n"):
                raise InputError(f"{path}, line {number} is not a JSON object with a step: remove it") from error
    return rows


def write_start(
    folder: Path, command: str, accelerator: Accelerator, step: int, changed: dict[str, Any], notes: list[str]
) -> None:
    """A line about each start of a run: when, from which step, with which command, code, versions and devices.

    changed: the settings that hold from the next step on, but did not hold before it.
    """
    start = {
        "command": command,
        "changed": changed,
        "notes": notes,
        "commit": code_commit(),
        "versions": versions(),
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    append_to_starts(folder, step, start)


def write_end(folder: Path, step: int, exit_code: int) -> None:
    """A line about the end of the last start, with the exit code that a launcher hides; none after a kill or error."""
    append_to_starts(folder, step, {"exit_code": exit_code})


def append_to_starts(folder: Path, step: int, row: dict[str, Any]) -> None:
    path = folder / STARTS_FILE
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = [*read_starts(folder), {"time": time, "step": step, **row}]
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_starts(folder: Path) -> list[dict[str, Any]]:
    path = folder / STARTS_FILE
    return read_rows(path) if path.exists() else []


def lasting_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts except those whose steps were lost because a later start began at the same step or before."""
    lasting: list[dict[str, Any]] = []
    for row in read_starts(folder):
        if "command" in row:
            lasting = [start for start in lasting if start["step"] < row["step"]] + [row]
    return lasting


def write_nonfinite(accelerator: Accelerator, folder: Path, state: TrainingState, losses: list[torch.Tensor]) -> Path:
    """Called by all processes after a backward pass with a loss or gradient that is not finite; returns the file.

    It names the windows of the batch by their first token in the training data, the losses of each process and
    micro-batch, and the L2 norm of each parameter and of its gradient; "after": the SHA-256 of the manifest of the
    checkpoint that this step followed at once.
    """
    step = state.progress.step
    path, saved = nonfinite_file(folder, step + 1), state.checkpoint
    batch = gather_object([{"windows": state.batches.window_starts, "losses": torch.stack(losses).tolist()}])
    norms = {
        name: {"parameter": gathered(parameter.norm()).item(), "gradient": gathered(parameter.grad.norm()).item()}
        for name, parameter in state.model.named_parameters()
        if parameter.grad is not None
    }
    if accelerator.is_main_process:
        after = sha256(saved / MANIFEST_FILE) if saved and step_of(saved) == step else None
        report = {"step": step + 1, "after": after, "processes": batch, "norms": norms}
        write_file(path, json.dumps(report, indent=1))
    return path


def plot_loss_curve(folder: Path) -> None:
    """Training loss and held-out loss against steps, from the metrics in `folder`.

    In nats per token, and on the right, where a text is held out, in bits per byte of that text.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    metrics = read_metrics(folder)
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o-")):
        rows = [row for row in metrics if key in row]
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], style, label=label, linewidth=1)
    finite = [row for row in metrics if 0 < row.get("bits_per_byte", 0) < math.inf]
    if finite:
        ratio = finite[-1]["bits_per_byte"] / finite[-1]["held_out_loss"]
        scales = (lambda nats: nats * ratio, lambda bits: bits / ratio)
        axes.secondary_yaxis("right", functions=scales).set_ylabel("bits per byte of the held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / LOSS_CURVE_FILE, dpi=120)


def plot_states(reports: list[StateReport], path: Path) -> None:
    """By layer, from `model.diagnose_states`: timescales in tokens, share of saturated gates, size of the state."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    memory, gates, size = figure.subplots(1, 3, sharey=True)
    rows = range(len(reports))
    tenths = torch.stack([report.timescales.quantile(torch.tensor([0.1, 0.5, 0.9])) for report in reports]).tolist()
    for row, (low, middle, high) in zip(rows, tenths):
        memory.plot([low, high], [row, row], "-", color="C0")
        memory.plot(middle, row, "o", color="C0")
    memory.set(xscale="log", xlabel="timescale, tokens (median, 10 to 90 % of channels)")
    memory.set_yticks(rows, [report.name for report in reports])
    gates.plot([report.remembering for report in reports], rows, "o-", label="a > 0.99")
    gates.plot([report.forgetting for report in reports], rows, "o-", label="a < 0.01")
    gates.set(xlabel="share of the gates")
    size.plot([report.mean_norm for report in reports], rows, "o-", label="root mean square")
    size.plot([report.largest_state for report in reports], rows, "o-", label="largest")
    size.set(xlabel="state")
    for axes in (memory, gates, size):
        axes.grid(alpha=0.3)
    gates.legend()
    size.legend()
    figure.savefig(path, dpi=120)


@dataclass
class TrainedModel:
    """What a model card says beyond the settings of the run; unknown facts are left out."""

    parameters: int
    command: str  # or several, a line each
    commit: str | None = None  # of the code that trained it
    versions: dict[str, str] = field(default_factory=dict)  # of Python and of packages
    best_step: int | None = None
    tokens: int | None = None  # until then
    scores: dict[str, float] = field(default_factory=dict)  # as held_out_scores has them
    loss_curve: str | None = None  # a picture beside the card
    corpus_license: str = "The corpus has a licence of its own."


def model_card(name: str, config: RunConfig, settings: str, model: TrainedModel) -> ModelCard:
    """What the model is, how good it is, how it was trained, and how to load it, after model_cards/template.md.

    name: a repository id, or what the folder is called. settings: `config` as the YAML that a reader is to see.
    """
    data = config.data
    cell_type = config.model.get("cell_type", MinRNNConfig.cell_type)
    cells = [cell_type] if isinstance(cell_type, str) else cell_type
    if data.task:
        corpus = f"questions of the synthetic task {data.task}"
        held_out = "questions of {} to {} tokens".format(*data.held_out_lengths)
    else:
        corpus = " and ".join(map(corpus_of, data.mixture or [data]))
        held_out = "over the whole held-out split, read once with the state carried through it"
    unit = "character" if data.tokenizer == "character" else "token"
    labels = {
        "held_out_loss": f"Held-out loss, nats per {unit}",
        "held_out_window_loss": f"In disjoint windows of {config.train.sequence_length} tokens, nats per {unit}",
        "held_out_accuracy": f"Held-out accuracy, {unit}s predicted",
        "bits_per_byte": "Held-out loss, bits per byte",
    }
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.dataset and relative_path(data.dataset) or "text",
            dataset_name=corpus,
            dataset_split="held out",
            metric_type=key,
            metric_name=labels[key],
            metric_value=round(value, 4),
        )
        for key, value in model.scores.items()
    ]
    code = [f"commit {model.commit}"] if model.commit else []
    code += [f"{package} {version}" for package, version in model.versions.items()]
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            license=config.hub.license,
            pipeline_tag="text-generation",
            tags=[MinRNNConfig.model_type],
            datasets=[source.dataset for source in data.mixture or [data] if is_on_hub(source)] or None,
            model_name=name,
            eval_results=results or None,
        ),
        template_path=str(CARD_TEMPLATE),
        name=name,
        cell=" and ".join(dict.fromkeys(cell_of(name).label for name in cells)),
        sources=list(dict.fromkeys(cell_of(name).source for name in cells)),
        parameters=f"{model.parameters:,}",
        corpus=corpus,
        held_out=held_out,
        scores=results,
        loss_curve=model.loss_curve,
        best_step=model.best_step,
        tokens=f"{model.tokens or 0:,}",
        command=model.command,
        code=", ".join(code),
        prompt=json.dumps(config.train.sample_prompts[0] if config.train.sample_prompts else ""),
        settings=settings.strip(),
        license=config.hub.license,
        corpus_license=model.corpus_license,
    )


def is_on_hub(source: SourceConfig) -> bool:
    """Whether data.dataset names a data set of the Hub, not a path of this machine."""
    name = source.dataset
    return bool(name) and name != STDLIB and not Path(name).exists() and not glob.has_magic(name)


def corpus_of(source: SourceConfig) -> str:
    if source.dataset == STDLIB:
        return "the source of Python's standard library"
    paths = [source.dataset] if source.dataset else source.files
    return ", ".join(
        relative_path(path) if source.dataset else "/".join(Path(relative_path(path)).parts[-2:]) for path in paths
    )


def write_model_card(folder: Path, config: RunConfig, model: PreTrainedModel, progress: Progress) -> Path:
    """README.md of the model that a run has left in `folder`, or where the user has edited that, a file beside it.

    Returns the file.
    """
    rows = [
        row
        for row in read_metrics(folder, progress.best_step)
        if (row["step"] == progress.best_step and "held_out_loss" in row) or "held_out_window_loss" in row
    ]
    scores = {key: value for row in rows for key, value in row.items() if key != "step"}
    trained = TrainedModel(
        parameters=model.num_parameters(),
        command="\n".join(commands_of(lasting_starts(folder))),
        commit=code_commit(),
        versions=versions(),
        best_step=progress.best_step,
        tokens=progress.best_tokens,
        scores=scores,
        loss_curve=LOSS_CURVE_FILE,
    )
    name = config.hub.repository or folder.resolve().name
    content = str(model_card(name, config, settings_yaml(without_folders(config)), trained))
    path = folder / CARD_FILE
    own = {row["card"] for row in read_starts(folder) if "card" in row}
    if path.exists() and digest_of(path.read_text()) not in own:
        path = path.with_name(NEW_CARD_FILE)
    append_to_starts(folder, progress.step, {"card": digest_of(content)})
    write_file(path, content)
    return path


def next_steps(config: RunConfig, step: int) -> list[str]:
    """Commands that do something with a finished run, one a line."""
    folder = config.train.output_dir
    prompt = config.train.sample_prompts[:1]
    resume = ["python", "train.py", str(Path(folder) / SETTINGS_FILE), "train.resume=true"]
    longer = [f"train.steps={2 * step}"]
    longer += ["train.early_stopping_patience=null"] if config.train.early_stopping_patience else []
    longer += ["hub.push=false"] if config.hub.push else []  # no repository is pushed to twice
    repository = config.hub.repository or "USER/NAME"
    commands = {
        "sample": ["python", "-m", "minrnn", "sample", folder, *prompt],
        "resume": [*resume, *longer],
        "push": [*resume, "hub.push=true", f"hub.repository={repository}"],
        "serve": ["python", "-m", "minrnn", "serve", folder],
    }
    if config.hub.push:
        del commands["push"]
    return [f"{name + ':':8}{shlex.join(words)}" for name, words in commands.items()]


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def commands_of(starts: list[dict[str, Any]]) -> list[str]:
    """The command of each start; before later ones a comment with their first step and the settings they changed."""
    lines = []
    for start in starts:
        words = [without_folder(word) for word in shlex.split(start["command"])]
        if start["step"]:
            changed = [without_folder(f"{key}={value}") for key, value in start.get("changed", {}).items()]
            lines.append(
                f"# from step {start['step'] + 1} on" + (f", changed: {', '.join(changed)}" if changed else "")
            )
        lines += [shlex.join(words), *(f"# {note}" for note in start.get("notes", []))]
    return lines


def relative_path(path: str) -> str:
    """The path relative to the current folder, or its last part if it lies elsewhere: published cards name no more."""
    if not os.path.isabs(path):
        return path
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else Path(path).name


def without_folder(word: str) -> str:
    """A word of a command, KEY=PATH or KEY=[PATH, ...] or PATH, with relative paths."""
    key, equals, value = word.partition("=")
    if key not in PATHS:
        return relative_path(word)
    return key + equals + re.sub(r"(?<![^\['\" ,])/[^,\]}'\"]*", lambda match: relative_path(match[0]), value)


def without_folders(config: RunConfig) -> RunConfig:
    def shorter(value: Any) -> Any:
        if isinstance(value, list):
            return [shorter(one) for one in value]
        if isinstance(value, SourceConfig):
            paths = {key: shorter(getattr(value, key)) for key in ("dataset", "files", "held_out_files")}
            return replace(value, **paths)
        return value and relative_path(value)

    sections = {}
    for section, key in (path.split(".") for path in PATHS):
        values = sections.get(section, getattr(config, section))
        sections[section] = replace(values, **{key: shorter(getattr(values, key))})
    return replace(config, **sections)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect the results of a run."""
    packages = ("torch", "transformers", "accelerate", "datasets")
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def code_commit() -> str | None:
    """The commit of this checkout, with "-dirty" after it where files differ; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def held_out_scores(loss: float, held_out: TokenStream | HeldOutQuestions) -> dict[str, float]:
    """`loss` in nats per token; of a text also in bits per byte, by which models of different tokenizers compare.

    That is the loss of all predicted tokens, end tokens too, over the bytes of the text that they stand for.
    """
    scores = {"held_out_loss": loss}
    if held_out.predicted_bytes:
        scores["bits_per_byte"] = loss * (len(held_out) - 1) / held_out.predicted_bytes / math.log(2)
    return scores
