"""The settings of a run: a YAML file with the sections `model`, `data`, `train` and `hub`, and key=value overrides."""

import difflib
import importlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

STDLIB = "python-stdlib"
LARGEST_SEED = 2**31 - 1  # numpy takes 32 bits, and each process adds its rank
MOST_LAYERS = 10_000  # the configuration of a model lists them

# What a resumed run may change; it holds from the first step of that start on. Any other setting is refused by name.
CHANGEABLE = {
    "model": {"dropout", "scan_backend"},
    # A text and a tokenizer are known by their content, see `token_digests`, except a streamed data set.
    "data": {"dataset", "files", "held_out_files", "tokenizer"},
    "train": {
        "batch_size", "betas", "bf16", "chunk_length", "compile", "context_parallel_size", "decay_steps",
        "early_stopping_patience", "eval_every_steps", "grad_clip_norm", "gradient_accumulation_steps",
        "learning_rate", "log_every_steps", "min_learning_rate_ratio", "muon_learning_rate", "on_nonfinite",
        "output_dir", "sample_prompts", "sample_tokens", "save_every_steps", "schedule", "sequence_length", "steps",
        "trackers", "warmup_steps", "weight_decay",
    },
    "hub": {"license", "private", "push", "repository"},
}  # fmt: skip
# With train.carry_state they decide where the rows read on, and which state is whose.
SHAPE_OF_STATES = {"train.batch_size", "train.gradient_accumulation_steps", "train.sequence_length"}


class InputError(ValueError):
    """Something the user gave cannot be used: one line that says what, where and what would be right."""


@dataclass
class DataConfig:
    """Which text is read, how it is split and which tokenizer encodes it. `dataset`, `files` or `task` is set."""

    # "python-stdlib" (the running Python's own source, nothing is downloaded), a Hub data set id, or a local folder of
    # parquet, JSON lines or CSV files, or one such file: whatever datasets.load_dataset takes, with its configuration
    # and columns.
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    text_column: str = "text"
    # Documents arrive in the order of the data set while the model trains; nothing is stored on disk.
    streaming: bool = False
    # Processes that read and tokenise ahead for each training process; 0: it does so itself, between its steps.
    workers: int = 0

    # Plain UTF-8 text: paths or globs. One document a file.
    files: list[str] = field(default_factory=list)
    held_out_files: list[str] = field(default_factory=list)

    # A synthetic task of training/tasks.py, which has a tokenizer of its own, with the lengths of the shortest and the
    # longest question, which must fit into train.sequence_length together with its answer.
    task: str | None = None
    task_lengths: tuple[int, int] = (1, 40)
    held_out_lengths: tuple[int, int] = (40, 256)

    # Without a held-out split or files: this fraction of the documents (chosen by a hash, so that neither order nor
    # seed matters), or for `files` this fraction of the characters, from the end.
    held_out_fraction: float = 0.1
    # At most this many held-out tokens, from the start of the held-out split; null: all of them.
    held_out_tokens: int | None = None

    # "byte", "character", or the name or path of any tokenizer that transformers loads.
    tokenizer: str = "byte"

    def check(self) -> None:
        if bool(self.dataset) + bool(self.files) + bool(self.task) != 1:
            raise InputError(f"data: set one of data.dataset (e.g. {STDLIB}), data.files and data.task")
        if not 0 < self.held_out_fraction < 1:
            raise InputError(f"data.held_out_fraction is {self.held_out_fraction}: must be between 0 and 1")
        if self.held_out_files and not self.files:
            raise InputError("data.held_out_files needs data.files; for a data set give data.held_out_split")
        if self.held_out_tokens is not None and self.held_out_tokens < 2:
            raise InputError(f"data.held_out_tokens is {self.held_out_tokens}: must be at least 2, or null for all")
        if self.streaming and (self.held_out_tokens is None or not self.dataset or self.dataset == STDLIB):
            raise InputError("data.streaming needs a data set of the Hub or a local folder, and data.held_out_tokens")
        if self.workers < 0 or (self.workers and not self.streaming):
            raise InputError(f"data.workers is {self.workers}: must be 0, or positive with data.streaming")


@dataclass
class TrainConfig:
    """How long and how the model is trained. A step is one optimizer step; lengths are in tokens."""

    steps: int = MISSING
    # Sequences per step, over all processes and accumulated micro-batches.
    batch_size: int = MISSING
    gradient_accumulation_steps: int = 1
    # Predictions per sequence: the model reads this many tokens, and one more is the last target.
    sequence_length: int = MISSING
    # Processes that share each sequence, a chunk each: for sequences too long for the memory of one device.
    context_parallel_size: int = 1
    # Tokens at a time in an exact backward pass: the memory of so many, whatever sequence_length is, for one more
    # forward pass; null: the whole sequence at once.
    chunk_length: int | None = None
    # Every row of a batch reads on from where it stopped in the step before, with the state it then had, which gets no
    # gradient: truncated backpropagation through time. Nothing is carried from one document to the next. Otherwise a
    # sequence begins anywhere in the text, with nothing read.
    carry_state: bool = False
    seed: int = 0

    # "muon": torch.optim.Muon for the matrices of the layers, AdamW for embeddings, output, norms and all else.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Of AdamW, and of Muon: the highest of the run.
    learning_rate: float = MISSING
    muon_learning_rate: float | None = None
    # After a linear warm-up either "cosine", down to the minimum at the last step, or "wsd": constant until the last
    # decay_steps, which go down to the minimum.
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip_norm: float = 1.0
    # A loss or gradient that is infinite or not a number changes no parameter: the run stops, or skips the step, but
    # stops too after MOST_SKIPPED_STEPS of train.py in a row.
    on_nonfinite: Literal["stop", "skip"] = "stop"

    # Mixed precision. A CPU without instructions for bfloat16 trains in float32 instead, unless "force" is set.
    bf16: Literal[False, True, "force"] = False
    compile: bool = False

    output_dir: str = MISSING
    # Go on from the newest checkpoint; "auto": or begin where there is none, so that a launcher can repeat a command.
    resume: Literal[False, True, "auto"] = False
    overwrite: bool = False
    log_every_steps: int = 10
    # Each evaluation reads the whole held-out split; the model folder holds the model of the best one.
    eval_every_steps: int = MISSING
    # Stop after this many evaluations in a row without a new best; null: never.
    early_stopping_patience: int | None = None
    # Every evaluation continues each prompt by sample_tokens tokens.
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 100
    save_every_steps: int = MISSING
    # Names of trackers that accelerate knows, e.g. tensorboard, trackio.
    trackers: list[str] = field(default_factory=list)

    def check(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "sequence_length", "context_parallel_size",
                     "chunk_length",
                     "log_every_steps", "eval_every_steps", "save_every_steps", "sample_tokens",
                     "early_stopping_patience"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"train.{name} is {value}: must be at least 1")
        if self.context_parallel_size > self.sequence_length:
            raise InputError(
                f"train.context_parallel_size is {self.context_parallel_size}: must be at most train.sequence_length, "
                f"{self.sequence_length}"
            )
        if self.context_parallel_size > 1 and (self.chunk_length or self.carry_state):
            raise InputError(
                f"train.context_parallel_size is {self.context_parallel_size}: must be 1 with train.chunk_length and "
                "train.carry_state, which read a sequence from left to right in one process"
            )
        for name in ("learning_rate", "muon_learning_rate", "grad_clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"train.{name} is {value}: must be positive and finite")
        if (self.optimizer == "muon") != (self.muon_learning_rate is not None):
            raise InputError(
                f"train.muon_learning_rate is {self.muon_learning_rate}: must be set, e.g. to 0.02, with "
                "train.optimizer=muon, and null with adamw"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"train.betas is {list(self.betas)}: both must be at least 0 and below 1")
        if self.seed > LARGEST_SEED:
            raise InputError(f"train.seed is {self.seed}: must be at most {LARGEST_SEED}")
        if not all(self.sample_prompts):
            raise InputError("train.sample_prompts has an empty text: each must have something to go on from")
        for name in ("seed", "warmup_steps", "decay_steps", "weight_decay", "min_learning_rate_ratio"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"train.{name} is {getattr(self, name)}: must not be negative, and finite")
        if self.warmup_steps + self.decay_steps > self.steps:
            raise InputError(
                f"train.warmup_steps + train.decay_steps is {self.warmup_steps + self.decay_steps}: "
                f"must be at most train.steps, {self.steps}"
            )
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise InputError(f"train.decay_steps is {self.decay_steps}: must be positive with schedule wsd, else 0")


@dataclass
class HubConfig:
    """Where the finished run is published."""

    # Upload the best model with its tokenizer, code, model card and loss curve when training is done.
    push: bool = False
    # "user/name"; must not exist yet.
    repository: str | None = None
    private: bool = True
    # Of the weights, as the Hub names licences: https://huggingface.co/docs/hub/repositories-licenses
    license: str = "apache-2.0"

    def check(self) -> None:
        if self.push and not self.repository:
            raise InputError("hub.push needs hub.repository, e.g. user/name")
        if self.repository:
            try:
                validate_repo_id(self.repository)
            except HFValidationError as error:
                raise InputError(f"hub.repository: {one_line(error)}") from error


@dataclass
class RunConfig:
    """`model` holds the arguments of MinRNNConfig, which is also their only list."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def check(self) -> None:
        self.data.check()
        self.train.check()
        self.hub.check()
        check_model(self.model)
        if self.train.carry_state and (self.data.streaming or self.data.task):
            raise InputError("train.carry_state reads a stored text on: not with data.streaming or data.task")


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """Read a YAML file and "section.key=value" overrides. Every fault is an InputError naming the key and the file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such configuration file")
    for override in overrides:
        if not is_text(override):  # a file name of other bytes
            raise InputError(f"command line: {override!r} is not UTF-8 text")
        if "=" not in override:
            raise InputError(f"command line: {override!r} is not of the form section.key=value")
    config = OmegaConf.structured(RunConfig)
    sources = {path: lambda: OmegaConf.load(path), "command line": lambda: OmegaConf.from_dotlist(overrides)}
    for origin, read in sources.items():
        try:
            set_values(config, OmegaConf.to_container(read(), resolve=True))
        except (InputError, OmegaConfBaseException, UnicodeDecodeError, YAMLError) as error:
            raise InputError(f"{origin}: {one_line(error)}") from error
    try:
        run: RunConfig = OmegaConf.to_object(config)
        run.check()
    except MissingMandatoryValue as error:
        raise InputError(f"{path}: {error.full_key} is missing") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return run


def set_values(config: DictConfig, sections: Any) -> None:
    """Key by key, because a merge of whole sections does not always say which key was wrong."""
    if not isinstance(sections, dict):
        raise InputError("not a mapping of the sections model, data, train and hub")
    for section, values in sections.items():
        if section not in config:
            raise InputError(f"unknown section {section}; the nearest known one is {nearest(section, config)}")
        if not isinstance(values, dict):
            raise InputError(f"section {section} is not a mapping of keys to values")
        for key, value in values.items():
            # `model` takes any key here: check_model knows which there are.
            if section != "model" and key not in config[section].keys():
                near = nearest(key, config[section])
                raise InputError(f"unknown key {section}.{key}; the nearest known one is {section}.{near}")
            if isinstance(value, str) and section != "model" and OmegaConf.is_list(config[section]._get_node(key)):
                value = [value]  # one path, prompt or tracker
            if not is_text(str(value)):  # by an escape
                raise InputError(f"{section}.{key} is {value!r}: half a character is no text")
            try:
                OmegaConf.update(config[section], key, value)
            except OmegaConfBaseException as error:
                raise InputError(f"{section}.{key}: {one_line(error)}") from error


def check_model(arguments: dict[str, Any]) -> None:
    """Raises InputError for what MinRNNConfig does not take, whatever the tokenizer will add."""
    config_class = model_config_class()
    known = [field.name for field in fields(config_class)]
    for key in arguments:
        if key not in known:  # transformers would keep it without a word
            raise InputError(f"unknown key model.{key}; the nearest known one is model.{nearest(key, known)}")
    layers = arguments.get("num_hidden_layers")
    if isinstance(layers, (int, float)) and not layers <= MOST_LAYERS:
        raise InputError(f"model.num_hidden_layers is {layers}: must be at most {MOST_LAYERS}")
    try:
        config_class(**arguments)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise InputError(f"model: {one_line(error)}") from error


def model_config_class() -> type:
    """MinRNNConfig. Where modeling_minrnn is not imported yet, without the models, whose import takes seconds."""
    if "modeling_minrnn" in sys.modules:
        return importlib.import_module("modeling_minrnn.configuration_minrnn").MinRNNConfig
    package = ModuleType("settings_of_minrnn")
    package.__path__ = [str(Path(__file__).parent.parent / "modeling_minrnn")]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.configuration_minrnn").MinRNNConfig


def is_text(string: str) -> bool:
    """False with a lone surrogate, which no file and no tokenizer takes."""
    return string.isascii() or not any("\ud800" <= character <= "\udfff" for character in string)


def nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(str(word), known, n=1, cutoff=0)[0]


def one_line(error: Exception) -> str:
    """The message of an error without line breaks and without what OmegaConf appends about its own types."""
    return " ".join(str(error).split("full_key:")[0].split())


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """What the user can mend ends the process with exit code 2 and one line. OSError: a disk, in its own words."""
    try:
        yield
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
