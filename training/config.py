"""The settings of a run: a YAML file with the sections `model`, `data`, `train` and `hub`, and key=value overrides."""

import difflib
import importlib
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from omegaconf import MISSING, Container, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

STDLIB = "python-stdlib"
LARGEST_SEED = 2**31 - 1  # numpy takes 32 bits, and each process adds its rank
MOST_SKIPPED_STEPS = 10  # in a row, with train.on_nonfinite=skip
MOST_LAYERS = 10_000  # the configuration of a model lists them

# Settings that a resumed run may change, from its first step on. A change of any other is an error.
CHANGEABLE = {
    "model": {"dropout", "scan_backend"},
    # Texts and tokenizers are compared by content, see `token_digests`, except streamed data sets.
    "data": {"dataset", "files", "held_out_files", "mixture", "tokenizer"},
    "train": {
        "batch_size", "betas", "bf16", "chunk_length", "compile", "context_parallel_size", "decay_steps",
        "early_stopping_patience", "eval_every_steps", "grad_clip_norm", "gradient_accumulation_steps",
        "learning_rate", "log_every_steps", "min_learning_rate_ratio", "muon_learning_rate", "on_nonfinite",
        "output_dir", "sample_prompts", "sample_tokens", "save_every_steps", "schedule", "sequence_length", "steps",
        "trackers", "warmup_steps", "weight_decay",
    },
    "hub": {"license", "private", "push", "repository"},
}  # fmt: skip
# The keys that name a source of text, each with the keys that belong to it: setting one replaces those set before.
SOURCES = {
    "dataset": {"dataset_config", "split", "held_out_split", "text_column"},
    "files": {"held_out_files", "text_column"},
    "mixture": set(),
    "task": {"task_lengths", "held_out_lengths"},
}
TOKENIZERS = ("byte", "character", "bpe")
SMALLEST_BPE = 258
# With train.carry_state they decide where the rows continue, and to which rows the states belong.
SHAPE_OF_STATES = {"train.batch_size", "train.gradient_accumulation_steps", "train.sequence_length"}


class InputError(ValueError):
    """Something the user gave cannot be used: one line that says what, where and what would be right."""


def setting(default: Any, meaning: str) -> Any:
    """A key of a section: its default, and the meaning that --help shows."""
    metadata = {"meaning": meaning}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class SourceConfig:
    """Where a text is read. One of `dataset` and `files` is set."""

    dataset: str | None = setting(
        None,
        f"{STDLIB} (the running Python's own source, nothing is downloaded), a Hub data set id, or a local folder, "
        "file or glob: what datasets.load_dataset takes, or text as in data.files",
    )
    dataset_config: str | None = setting(None, "configuration of a data set of the Hub")
    split: str = setting("train", "split of data.dataset to train on")
    held_out_split: str | None = setting(None, "split of data.dataset to hold out; null: see held_out_fraction")
    text_column: str = setting(
        "text", "column of a data set, or of .jsonl, .parquet and .csv files, that holds the text"
    )
    files: list[str] = setting(
        [],
        "paths, globs or folders. Rows of .jsonl, .json, .parquet and .csv files are documents, any other file is one "
        "of plain UTF-8 text; of a folder and the folders in it, those and .txt files are read",
    )
    held_out_files: list[str] = setting(
        [], "files to hold out, as in data.files, and never to train on; none: see held_out_fraction"
    )

    def check_source(self, name: str) -> None:
        if bool(self.dataset) == bool(self.files):
            raise InputError(f"{name}: set one of dataset (e.g. {STDLIB}) and files")
        if self.held_out_files and not self.files:
            raise InputError(f"{name}.held_out_files needs {name}.files; for a data set give {name}.held_out_split")


@dataclass
class MixedConfig(SourceConfig):
    """A source of a mixture."""

    weight: float = setting(1.0, "how often the next document is drawn from this source, relative to the others")


@dataclass
class DataConfig(SourceConfig):
    """Which text is read, how it is split and which tokenizer encodes it.

    One of `dataset`, `files`, `mixture` and `task` is set.
    """

    mixture: list[MixedConfig] = setting(
        [],
        "several sources, each {dataset: ... or files: ..., weight: 1, and if need be dataset_config, split, "
        "held_out_split, held_out_files, text_column}. Documents, of plain text pieces of it, are drawn by weight "
        "until each has been, those of short sources several times",
    )
    streaming: bool = setting(
        False,
        "read documents in their order while the model trains, with nothing stored on disk; needs held_out_tokens",
    )
    workers: int = setting(
        0,
        "processes that read and tokenise a stream ahead, for each training process; 0: it does so itself, between "
        "its steps",
    )
    task: str | None = setting(
        None, "a synthetic task of training/tasks.py in place of a text, with its own tokenizer"
    )
    task_lengths: tuple[int, int] = setting(
        (1, 40), "tokens of the shortest and longest question of data.task; train.sequence_length includes the answer"
    )
    held_out_lengths: tuple[int, int] = setting((40, 256), "the same for the held-out questions")
    held_out_fraction: float = setting(
        0.1,
        "without held-out files or split: so many of the documents, chosen by a hash of their text, so that neither "
        "order nor seed matters; of a plain text file so many of its characters, from its end",
    )
    held_out_tokens: int | None = setting(
        None, "at most so many held-out tokens, from the start of the held-out text; null: all of them"
    )
    tokenizer: str = setting(
        "byte",
        "byte, character (or char), bpe (byte-level, trained on the start of the training text), or the folder or "
        "OWNER/NAME of any tokenizer that transformers loads",
    )
    tokenizer_vocab_size: int = setting(
        4096, "at most so many tokens with data.tokenizer=bpe: 256 bytes, <eos>, <pad> and merges"
    )

    def __post_init__(self):
        self.tokenizer = {"char": "character"}.get(self.tokenizer, self.tokenizer)

    def check(self) -> None:
        if sum(map(bool, (self.dataset, self.files, self.mixture, self.task))) != 1:
            raise InputError(f"data: set one of data.dataset (e.g. {STDLIB}), data.files, data.mixture and data.task")
        if self.dataset or self.files:
            self.check_source("data")
        for number, source in enumerate(self.mixture):
            source.check_source(f"data.mixture[{number}]")
            if not 0 < source.weight < float("inf"):
                raise InputError(f"data.mixture[{number}].weight is {source.weight}: must be positive and finite")
        if not 0 < self.held_out_fraction < 1:
            raise InputError(f"data.held_out_fraction is {self.held_out_fraction}: must be between 0 and 1")
        if self.held_out_tokens is not None and self.held_out_tokens < 2:
            raise InputError(f"data.held_out_tokens is {self.held_out_tokens}: must be at least 2, or null for all")
        if self.tokenizer_vocab_size < SMALLEST_BPE:
            raise InputError(
                f"data.tokenizer_vocab_size is {self.tokenizer_vocab_size}: must be at least {SMALLEST_BPE}, 256 "
                "bytes and 2 special tokens"
            )
        if self.streaming and (self.held_out_tokens is None or self.task):
            raise InputError("data.streaming needs data.held_out_tokens, and a text: not data.task")
        if self.workers < 0 or (self.workers and not self.streaming):
            raise InputError(f"data.workers is {self.workers}: must be 0, or positive with data.streaming")


@dataclass
class TrainConfig:
    """How long and how the model is trained. A step is one optimizer step; lengths are in tokens."""

    steps: int = setting(MISSING, "optimizer steps in all")
    batch_size: int = setting(MISSING, "sequences a step, over all processes and accumulated micro-batches")
    gradient_accumulation_steps: int = setting(1, "micro-batches a step")
    sequence_length: int = setting(
        MISSING, "predictions a sequence: so many tokens are read, and one more is the last target"
    )
    context_parallel_size: int = setting(
        1, "processes that share each sequence, a chunk each: for sequences too long for the memory of one device"
    )
    chunk_length: int | None = setting(
        None,
        "tokens at a time in an exact backward pass: the memory of so many, whatever sequence_length is, for one more "
        "forward pass; null: the whole sequence at once",
    )
    carry_state: bool = setting(
        False,
        "each row of a batch reads on from where it stopped in the step before, with the state it then had, which "
        "gets no gradient: truncated backpropagation through time. Nothing is carried from one document to the next. "
        "false: sequences in random order, each begun with nothing read; a round of them reads the whole text",
    )
    seed: int = setting(0, "of the initial weights, the batches and dropout")

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw, or muon: torch.optim.Muon for the matrices of the layers, AdamW for all else"
    )
    learning_rate: float = setting(MISSING, "of AdamW: the highest, after the warm-up")
    muon_learning_rate: float | None = setting(None, "of Muon: the highest, e.g. 0.02")
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine",
        "after a linear warm-up cosine, down to the minimum at the last step, or wsd: constant until the last "
        "decay_steps, which go down to the minimum",
    )
    warmup_steps: int = setting(0, "the first, in which the learning rate rises")
    decay_steps: int = setting(0, "with wsd the last, in which the learning rate falls")
    min_learning_rate_ratio: float = setting(0.1, "the learning rate at the end, as a part of the highest")
    weight_decay: float = setting(0.1, "of the matrices of linear layers, save those of gates and candidate")
    betas: tuple[float, float] = setting((0.9, 0.95), "of AdamW")
    grad_clip_norm: float = setting(1.0, "the largest norm of all gradients together")
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "a loss or gradient that is infinite or not a number changes no parameter: the run stops, or skips the step, "
        f"but stops too after {MOST_SKIPPED_STEPS} such steps in a row",
    )

    bf16: Literal[False, True, "force"] = setting(
        False,
        "mixed precision. A CPU without instructions for bfloat16 trains in float32 instead, unless force is set",
    )
    compile: bool = setting(False, "torch.compile")

    output_dir: str = setting(MISSING, "folder of the run; its name is that of the run in trackers")
    resume: Literal[False, True, "auto"] = setting(
        False,
        "go on from the newest checkpoint; auto: or begin where there is none, so that a command can be repeated",
    )
    overwrite: bool = setting(False, "replace a run in output_dir")
    log_every_steps: int = setting(10, "steps from one line of metrics.jsonl and of the trackers to the next")
    eval_every_steps: int = setting(
        MISSING, "each evaluation reads all held-out text; output_dir holds the model of the best one"
    )
    early_stopping_patience: int | None = setting(
        None, "stop after so many evaluations in a row without a new best; null: never"
    )
    sample_prompts: list[str] = setting([], "texts that each evaluation continues")
    sample_tokens: int = setting(100, "tokens of each continuation")
    save_every_steps: int = setting(MISSING, "steps from one checkpoint to the next")
    trackers: list[str] = setting([], "names that accelerate knows, e.g. tensorboard, trackio")

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

    push: bool = setting(
        False, "upload the best model with tokenizer, code, card and loss curve when training is done"
    )
    repository: str | None = setting(None, "user/name; must not exist yet")
    private: bool = setting(True, "whether others may not see it")
    license: str = setting(
        "apache-2.0", "of the weights, as the Hub names it: https://huggingface.co/docs/hub/repositories-licenses"
    )

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
    """Read a YAML file and overrides: other YAML files, and after all of these "section.key=value".

    Every fault is an InputError naming the key and the file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such configuration file")
    for override in overrides:
        if not is_text(override):  # a file name of other bytes
            raise InputError(f"command line: {override!r} is not UTF-8 text")
        if "=" not in override and not Path(override).is_file():
            raise InputError(f"command line: {override!r} is not of the form section.key=value")
    config = OmegaConf.structured(RunConfig)
    values = [override for override in overrides if "=" in override]
    sources = {file: partial(OmegaConf.load, file) for file in (path, *overrides) if file not in values}
    sources["command line"] = partial(OmegaConf.from_dotlist, values)
    for origin, read in sources.items():
        try:
            sections = OmegaConf.to_container(read(), resolve=True)
            replace_source(config.data, sections)
            set_values(config, sections)
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


def replace_source(data: DictConfig, sections: Any) -> None:
    """If the data section of `sections` sets one of SOURCES, reset the others and the keys that belong to them."""
    values = sections.get("data") if isinstance(sections, dict) else None
    if not isinstance(values, dict) or not any(values.get(source) for source in SOURCES):
        return
    default = OmegaConf.structured(DataConfig)
    for source, belongs in SOURCES.items():
        if not values.get(source):
            for key in {source, *belongs} - values.keys():
                data[key] = default[key]


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
            # `model` takes any key here; check_model knows the valid ones.
            if section != "model" and key not in config[section].keys():
                near = nearest(key, config[section])
                raise InputError(f"unknown key {section}.{key}; the nearest known one is {section}.{near}")
            if isinstance(value, str) and section != "model" and OmegaConf.is_list(config[section]._get_node(key)):
                value = [value]  # one path, prompt or tracker
            if key == "mixture":
                value = [with_lists(source) for source in value] if isinstance(value, list) else [with_lists(value)]
            if not is_text(str(value)):  # by an escape
                raise InputError(f"{section}.{key} is {value!r}: half a character is no text")
            try:
                OmegaConf.update(config[section], key, value)
            except OmegaConfBaseException as error:
                raise InputError(f"{section}.{key}: {one_line(error)}") from error


def settings_yaml(config: RunConfig) -> str:
    """The settings as YAML, except resume and overwrite, which are requests of a single call."""
    settings = replace(config, train=replace(config.train, resume=False, overwrite=False))
    return OmegaConf.to_yaml(OmegaConf.structured(settings))


def resolved(config: RunConfig) -> RunConfig:
    """The settings with the default arguments of the model filled in, except those that the tokenizer gives."""
    defaults = {key: default for key, (default, _) in model_settings().items() if key != "vocab_size"}
    return replace(config, model=defaults | config.model)


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """All settings as {"section.key": value}, with lists and null as the command line takes them."""
    sections = OmegaConf.to_container(OmegaConf.structured(resolved(config)))
    return {
        f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else yaml_value(value)
        for section, values in sections.items()
        for key, value in values.items()
    }


def model_settings() -> dict[str, tuple[Any, str]]:
    """Default and meaning of each argument of MinRNNConfig that its docstring explains."""
    config_class = model_config_class()
    arguments = re.search(r"\n    Args:\n(.*?)\n\n", config_class.__doc__, re.DOTALL)[1]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", arguments, re.MULTILINE)
    return {
        name: (getattr(config_class, name), " ".join(meaning.split()))
        for names, meaning in entries
        for name in names.split(", ")
    }


def settings_help() -> str:
    """Every key with its default and meaning."""
    sections = {"model": [(key, *entry) for key, entry in model_settings().items()]}
    for section in fields(RunConfig)[1:]:
        defaults = OmegaConf.structured(section.default_factory)
        sections[section.name] = [
            (key.name, "required" if OmegaConf.is_missing(defaults, key.name) else defaults[key.name],
             key.metadata["meaning"])
            for key in fields(section.default_factory)
        ]  # fmt: skip
    wrap = partial(textwrap.fill, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    lines = []
    for section, keys in sections.items():
        lines.append(f"\n{section}:")
        for key, default, meaning in keys:
            lines += [f"    {section}.{key}  ({yaml_value(default)})", wrap(meaning)]
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """In one line, as the command line takes it."""
    if isinstance(value, Container):
        value = OmegaConf.to_container(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def check_tokenizer(name: str) -> None:
    """Raises InputError for a string that cannot name a tokenizer. Whether it can be loaded turns out later."""
    if name not in TOKENIZERS and not Path(name).exists() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise InputError(
            f"data.tokenizer is {name!r}: must be {', '.join(TOKENIZERS)}, the folder of a tokenizer, or the "
            "OWNER/NAME of one on the Hub"
        )


def check_model(arguments: dict[str, Any]) -> None:
    """Raises InputError for arguments that MinRNNConfig refuses, whatever the tokenizer adds later."""
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
    """MinRNNConfig. If modeling_minrnn is not imported yet, without importing the models, which takes seconds."""
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


def with_lists(source: Any) -> dict[str, Any]:
    """A source of a mixture, in which a single path becomes a list."""
    if not isinstance(source, dict) or not source.keys() & {"dataset", "files"}:
        raise InputError(
            f"data.mixture has {source!r}: a source is {{dataset: NAME, weight: 1}} or {{files: [PATH], ...}}"
        )
    lone = {key for key in ("files", "held_out_files") if isinstance(source.get(key), str)}
    return source | {key: [source[key]] for key in lone}


@contextmanager
def exit_with_one_line() -> Iterator[None]:
    """Errors that the user can correct end the process with one line and exit code 2. OSError: a full disk, say."""
    try:
        yield
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
