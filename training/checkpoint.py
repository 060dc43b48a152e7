"""The output folder of a run: who may write into it, and the checkpoints that a run resumes from.

OUTPUT_DIR/                     the best model so far, a folder for from_pretrained, with the reports of the run
    run.yaml                    the settings
    run.lock                    held by the process that writes here, and by no other
    manifest.json               the SHA-256 of each file of the model
    checkpoints/step-00000100/  everything that training needs to go on, and no pickle
        run.yaml                the settings
        model.safetensors       the parameters
        optimizer.safetensors   the tensors of the optimizer, "INDEX.NAME" for the parameter of that index
        state.json              progress, scaler, digests of the data and the groups of the optimizer
        tokenizer.json          a tokenizer that was trained with the run
        process_0.safetensors   random states of torch, for each process
        process_0.cache_0       what train.carry_state carries on, for each process and micro-batch
        process_0.json          random states of Python and numpy and the position in the data, for each process
        manifest.json           the SHA-256 of each of these, written last

Where processes share the parameters (FSDP2), shard-*.safetensors take the place of the first two: a part of each for
each process, see sharded.py.

A folder gets the name of a checkpoint when all of it is on the disk. Names in .partial are incomplete and may be
deleted. model.ready is a complete model that a killed process could not move into place; the next start does. Files of
other names belong to the user, as do those that the user has edited: a run removes and replaces neither.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.optim import Optimizer
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_minrnn import load_state, save_state

from .config import CHANGEABLE, SHAPE_OF_STATES, InputError, RunConfig, load_config, one_line, settings_yaml
from .data import StreamedWindows, WorkerWindows
from .sharded import SHARDS, is_sharded, load_shards, save_shards

SETTINGS_FILE = "run.yaml"
MANIFEST_FILE = "manifest.json"
PARTIAL = ".partial"
LOCK_FILE = "run.lock"
READY = "model.ready"
WEIGHTS = ".safetensors"
CHECKPOINT = re.compile(r"step-\d{8,}")
CARD_FILE = "README.md"
LOSS_CURVE_FILE = "loss_curve.png"
METRICS_FILE = "metrics.jsonl"
FULL_METRICS_FILES = "metrics-[0-9][0-9][0-9][0-9].jsonl"
NONFINITE_FILES = "nonfinite-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].json"
STARTS_FILE = "starts.jsonl"
TOKENIZER_FILE = "tokenizer.json"
# What a run leaves in its folder beside the model, as patterns.
OWN_FILES = (
    SETTINGS_FILE, MANIFEST_FILE, CARD_FILE, LOSS_CURVE_FILE, METRICS_FILE, FULL_METRICS_FILES, NONFINITE_FILES,
    STARTS_FILE, "events.out.tfevents.*",
)  # fmt: skip
KEPT_CHECKPOINTS = 2


@dataclass
class Progress:
    """How far a run has come. Losses are in nats per token."""

    step: int = 0
    tokens: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    best_tokens: int = 0
    evaluations_since_best: int = 0
    skipped_steps: int = 0  # for a loss or gradient that was not finite
    skipped_in_a_row: int = 0

    def __post_init__(self):
        counts = {name: value for name, value in vars(self).items() if name != "best_loss"}
        if not all(type(value) is int and value >= 0 for value in counts.values()) or self.best_loss != float(
            self.best_loss
        ):
            raise ValueError(f"no progress of a run: {vars(self)}")


@dataclass
class TrainingState:
    """Everything that changes while a run trains, except the random states."""

    model: nn.Module
    optimizer: Optimizer
    batches: Any  # an iterator over tensors with state_dict and load_state_dict
    data: dict[str, str] = field(default_factory=dict)  # token_digests
    progress: Progress = field(default_factory=Progress)
    context_ranks: int = 1  # processes that share each sequence
    caches: list[Cache] = field(default_factory=list)  # what each micro-batch reads on from, with train.carry_state
    checkpoint: Path | None = None  # that this process has last loaded or saved
    trained_tokenizer: PreTrainedTokenizerFast | None = None  # if it was trained with the run


@contextmanager
def sole_run(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Creates the folder and keeps all other runs out of it. The lock goes with the process, however that ends.

    Raises InputError in all processes if another run has the folder. Where nothing came of a run, nothing is left.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with raise_on_all("train.output_dir"):
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except Timeout as error:
                    raise OSError(f"another run is writing to {folder}: choose another folder or end it") from error
        yield
    finally:
        if lock.is_locked:
            if not (folder / SETTINGS_FILE).exists():
                (folder / LOCK_FILE).unlink()
                with suppress(OSError):  # not empty
                    for path in missing:
                        path.rmdir()
            lock.release()


def check_output_dir(config: RunConfig, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint that is no dead end, if a run is to be resumed; changes nothing.

    Says to `warn` what is wrong with later ones.

    Raises InputError if the folder holds something that this run would overwrite, or nothing that it could resume.
    """
    folder = Path(config.train.output_dir)
    if config.train.resume and config.train.overwrite:
        raise InputError("train.resume and train.overwrite are both set: choose one")
    if config.train.resume:
        checkpoints, whole = list_checkpoints(folder), []
        for checkpoint in reversed(checkpoints):
            if reason := damage(checkpoint):
                warn(f"warning: {reason}: this checkpoint is damaged, the one before it is used")
                continue
            whole.append(checkpoint)
            if not is_dead_end(checkpoint):
                break
        if whole:
            # If each is a dead end, take the newest: train.on_nonfinite=skip may lead out of it.
            chosen = whole[0] if is_dead_end(whole[-1]) else whole[-1]
            if chosen != whole[0]:
                warn(f"warning: the step after {whole[0]} was not finite: {chosen.name} is used")
            changed_settings(chosen, config)
            return chosen
        # Without checkpoint and model the run was killed in its first moments: with "auto" it starts again.
        if config.train.resume is True or checkpoints or any(folder.glob("*.safetensors")):
            raise InputError(f"train.resume: {folder} holds no {'whole ' if checkpoints else ''}checkpoint")
    if any(path.suffix != PARTIAL and path.name != LOCK_FILE for path in folder.glob("*")):
        if not (folder / SETTINGS_FILE).is_file():
            raise InputError(f"train.output_dir {folder} is not empty and holds no run: choose another folder")
        if not config.train.resume and not config.train.overwrite:
            raise InputError(
                f"train.output_dir {folder} holds a run: continue it with train.resume=true "
                "or replace it with train.overwrite=true"
            )
    return None


def is_dead_end(checkpoint: Path) -> bool:
    """Whether the step after it was not finite; another learning rate would not help. See `write_nonfinite`."""
    try:
        report = json.loads(nonfinite_file(checkpoint.parent.parent, step_of(checkpoint) + 1).read_text())
        return report["after"] == sha256(checkpoint / MANIFEST_FILE)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def nonfinite_file(folder: Path, step: int) -> Path:
    return folder / f"nonfinite-{step:08d}.json"


def changed_settings(checkpoint: Path, config: RunConfig) -> dict[str, Any]:
    """The settings of `config` that differ from the checkpoint, as {"section.key": value}.

    Raises InputError for what a resumed run may not change, see CHANGEABLE.
    """
    file = checkpoint / SETTINGS_FILE
    # As read from a file: lists instead of tuples.
    before, now = (
        OmegaConf.to_container(OmegaConf.create(settings_yaml(settings)))
        for settings in (load_config(str(file), []), config)
    )
    changed = {}
    for section, changeable in CHANGEABLE.items():
        for key in sorted(now[section].keys() | before[section].keys()):
            name, value = f"{section}.{key}", now[section].get(key)
            if value == before[section].get(key):
                continue
            by_name = key not in changeable or (section == "data" and config.data.streaming)
            if by_name or (config.train.carry_state and name in SHAPE_OF_STATES):
                raise InputError(f"train.resume: {name} is {value}, but {file} has {before[section].get(key)}")
            changed[name] = value
    return changed


def open_output_dir(config: RunConfig) -> Path:
    """Write the settings into the folder, with train.overwrite in place of the run that is there."""
    folder = Path(config.train.output_dir)
    if config.train.overwrite:
        remove_run(folder)
    write_file(folder / SETTINGS_FILE, settings_yaml(config))
    return folder


def remove_run(folder: Path) -> None:
    """Remove the files of a run, by their names; other files in the folder stay."""
    for path in [*list_checkpoints(folder), folder / READY]:
        shutil.rmtree(path, ignore_errors=True)
    for path in [*(folder / name for name in manifest(folder)), *chain.from_iterable(map(folder.glob, OWN_FILES))]:
        path.unlink(missing_ok=True)


# ---- Checkpoints


def list_checkpoints(folder: Path) -> list[Path]:
    """All folders with the name of a checkpoint, also damaged ones, oldest first."""
    found = (path for path in folder.glob("checkpoints/step-*") if CHECKPOINT.fullmatch(path.name))
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(accelerator: Accelerator, folder: Path, config: RunConfig, state: TrainingState) -> None:
    """Called by all processes. A checkpoint gets its name when all of it is on the disk; old ones are then removed.

    Raises InputError in all processes if one of them cannot write; the checkpoints from before are then untouched.
    """
    final = folder / "checkpoints" / f"step-{state.progress.step:08d}"
    if final == state.checkpoint and damage(final) is None:
        return
    partial = final.with_suffix(PARTIAL)
    main, failure = accelerator.is_main_process, f"{final} cannot be written, checkpoints from before are intact"
    try:
        with raise_on_all(failure):
            if main:
                for left in final.parent.glob("step-*" + PARTIAL):  # by a process that was killed
                    if CHECKPOINT.fullmatch(left.stem):
                        shutil.rmtree(left)
                partial.mkdir(parents=True)
        with raise_on_all(failure):
            write_process_state(partial, accelerator, state)
        if is_sharded(state.model):
            with raise_on_all(failure):
                save_shards(partial, state.model, state.optimizer)
        with raise_on_all(failure):
            if main:
                write_shared_state(partial, accelerator, config, state)
                write_manifest(partial)
                if final.exists():  # a run resumed from an earlier one has come to this step again
                    discard(final)
                os.replace(partial, final)
                sync(final.parent)
                # Keep later ones, which may be damaged: this one may be the only one that is not.
                before = [path for path in list_checkpoints(folder) if step_of(path) < step_of(final)]
                for old in before[: max(0, len(before) + 1 - KEPT_CHECKPOINTS)]:
                    discard(old)
        state.checkpoint = final
    except InputError:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, state: TrainingState) -> None:
    """Called by all processes: restore all of `state` and the random states of this process.

    Learning rate, weight decay and betas are settings, not state: those of `state.optimizer` stay.

    Another number of processes, or one that shares sequences otherwise, goes on with the same batches, save where it
    would draw other random numbers for dropout, read other documents of a stream or need the states of other rows.
    Raises InputError then, and if the checkpoint is of another model or other data.
    """
    try:
        shared = json.loads((checkpoint / "state.json").read_text())
        before, now = [*shared["processes"]], [accelerator.num_processes, state.context_ranks]
        bound = {
            "model.dropout": state.model.config.dropout,
            "data.streaming": isinstance(state.batches, (StreamedWindows, WorkerWindows)),
            "train.carry_state": state.caches,
        }
        if before != now and any(bound.values()):
            raise InputError(
                f"saved by {before[0]} processes, {before[1]} to a sequence, resumed by {now[0]}, {now[1]} to a "
                f"sequence: with {' and '.join(key for key in bound if bound[key])} it would not go on as before"
            )
        others = [name for name in state.data if state.data[name] != shared["data"][name]]
        if others:
            raise InputError(
                "data.files, data.dataset or data.tokenizer name another text or tokenizer than before, with other "
                f"{' and '.join(others)}"
            )
        if is_sharded(state.model) or any(checkpoint.glob(SHARDS)):
            tensors = load_shards(checkpoint, state.model, state.optimizer)
        else:
            load_model(state.model, checkpoint / "model.safetensors")
            tensors = {}
            for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
                index, key = name.split(".")
                tensors.setdefault(int(index), {})[key] = tensor
        check_shapes(tensors, state.optimizer)
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": tensors, "param_groups": groups})
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(shared["scaler"])
        state.progress, state.checkpoint = Progress(**shared["progress"]), checkpoint
        if before == now:
            load_process_state(accelerator, checkpoint, state)
        else:  # all processes have the same position in the data, and draw no random numbers
            state.batches.load_state_dict(json.loads((checkpoint / "process_0.json").read_text())["batches"])
    except (
        SafetensorError, RuntimeError, OSError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError
    ) as error:  # fmt: skip
        raise InputError(f"checkpoint {checkpoint} cannot be resumed: {one_line(error)[:200]}") from error


def check_best_model(
    accelerator: Accelerator, folder: Path, state: TrainingState, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Called by all processes of a resumed run: put the best model into place, if it was not, and mend it.

    What the user has edited stays. Files but weights that are missing or cannot be read are written again; if they
    were there, what they held goes to NAME.damaged. Where the weights are damaged, warns and forgets their loss, so
    that the next evaluation writes a whole model.
    """
    reason = None
    with raise_on_all(f"{folder}: the best model cannot be put into place"):
        if accelerator.is_main_process:
            install_best_model(folder)
            for name in rewrite_unreadable(folder, state.model, tokenizer):
                accelerator.print(f"{folder / name} was missing or damaged: it is written again")
            edited = edited_files(folder)
            for name in sorted(edited):
                accelerator.print(f"{folder / name} was edited: it stays as it is")
            reason = damage(folder, edited) if state.progress.best_step else None
    if reason := broadcast_object_list([reason])[0]:
        accelerator.print(f"warning: {reason}: the best model is damaged, the next evaluation writes another")
        state.progress.best_loss = float("inf")


def check_shapes(tensors: dict[int, dict[str, torch.Tensor]], optimizer: Optimizer) -> None:
    """Raises ValueError if the state of the optimizer does not fit its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, kept in tensors.items():
        for key, tensor in kept.items():
            if tensor.shape not in (torch.Size(), parameters[index].shape):
                raise ValueError(f"{key} of parameter {index} has the shape {tuple(tensor.shape)}")


def load_process_state(accelerator: Accelerator, checkpoint: Path, state: TrainingState) -> None:
    """Position in the data, carried states and random states of this process."""
    process = json.loads(process_file(checkpoint, accelerator, "json").read_text())
    state.batches.load_state_dict(process["batches"])
    for i in range(len(state.caches) if state.progress.step else 0):  # empty before the first step
        state.caches[i] = load_state(process_file(checkpoint, accelerator, f"cache_{i}"), state.model)
    version, internal, gauss = process["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(process["numpy"])
    random_states = load_file(process_file(checkpoint, accelerator, "safetensors"))
    torch.set_rng_state(random_states["cpu"])
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).set_rng_state(random_states["device"], accelerator.device)


def write_shared_state(folder: Path, accelerator: Accelerator, config: RunConfig, state: TrainingState) -> None:
    optimizer = state.optimizer.state_dict()
    shared = {
        "processes": [accelerator.num_processes, state.context_ranks],
        "progress": asdict(state.progress),
        "data": state.data,
        "param_groups": optimizer["param_groups"],  # for the reader: a resumed run has those of its settings
        "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
    }
    if not is_sharded(state.model):
        tensors = {f"{i}.{key}": tensor for i, kept in optimizer["state"].items() for key, tensor in kept.items()}
        save_model(state.model, folder / "model.safetensors")
        save_file(tensors, folder / "optimizer.safetensors")
    if state.trained_tokenizer is not None:
        (folder / TOKENIZER_FILE).write_text(state.trained_tokenizer.backend_tokenizer.to_str())
    (folder / "state.json").write_text(json.dumps(shared))
    (folder / SETTINGS_FILE).write_text(settings_yaml(config))


def write_process_state(folder: Path, accelerator: Accelerator, state: TrainingState) -> None:
    random_states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type != "cpu":
        random_states["device"] = torch.get_device_module(accelerator.device).get_rng_state(accelerator.device)
    save_file(random_states, process_file(folder, accelerator, "safetensors"))
    for i, cache in enumerate(state.caches if state.progress.step else []):
        # The folder is new. To overwrite is to rename, which file systems without hard links can do as well.
        save_state(cache, process_file(folder, accelerator, f"cache_{i}"), state.model, overwrite=True)
    process = {"batches": state.batches.state_dict(), "python": random.getstate(), "numpy": np.random.get_state()}
    process_file(folder, accelerator, "json").write_text(json.dumps(process, default=np.ndarray.tolist))


def process_file(folder: Path, accelerator: Accelerator, extension: str) -> Path:
    return folder / f"process_{accelerator.process_index}.{extension}"


def write_manifest(folder: Path) -> None:
    """Once this returns, the folder and all of its files are on the disk."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = sha256(path)
    write_file(folder / MANIFEST_FILE, json.dumps(digests, indent=1))


def read_manifest(folder: Path) -> dict[str, str]:
    """Raises OSError or ValueError."""
    try:
        digests = json.loads((folder / MANIFEST_FILE).read_bytes())
    except RecursionError as error:
        raise ValueError(one_line(error)) from error
    if not isinstance(digests, dict) or not digests:
        raise ValueError("not a mapping of files to digests")
    return digests


def manifest(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of the model in `folder` when it was written; empty if there is no valid manifest."""
    try:
        digests = read_manifest(folder)
    except (OSError, ValueError):
        return {}
    return {name: digest for name, digest in digests.items() if ".." not in Path(name).parts and name[:1] != "/"}


def edited_files(folder: Path) -> set[str]:
    """Files of the model in `folder`, except weights, that the user has edited: readable, but not as written."""
    return {
        name
        for name, digest in manifest(folder).items()
        if WEIGHTS not in name and is_readable(folder / name) and sha256(folder / name) != digest
    }


def is_readable(path: Path) -> bool:
    try:
        text = path.read_text()
        if path.suffix == ".json":
            json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return bool(text)


def damage(folder: Path, edited: Iterable[str] = ()) -> str | None:
    """Which file of a checkpoint or model, except `edited` ones, differs from what was written, and why; or None."""
    try:
        digests = read_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{folder / MANIFEST_FILE}: {one_line(error)}"
    for name, digest in digests.items():
        if name in edited:
            continue
        path = folder / name
        inside = path.is_relative_to(folder) and ".." not in path.parts
        if not inside or not path.is_file():  # what else a damaged name leads to is not opened
            return f"{path}: no such file, but {MANIFEST_FILE} lists it"
        try:
            actual = sha256(path)
        except OSError as error:
            return f"{path}: {one_line(error)}"
        if actual != digest:
            return f"{path}: its SHA-256 is not that of {MANIFEST_FILE}"
    return None


# ---- Files


@contextmanager
def raise_on_all(what: str) -> Iterator[None]:
    """Raise an error of one process on all of them: otherwise the others would wait for that process.

    All processes leave the block together.
    """
    reason = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = f"{what}: {one_line(error)}"
    if reasons := [reason for reason in gather_object([reason]) if reason]:
        raise InputError(reasons[0])


def save_best_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace the model in `folder` once all new files are on the disk; the next start finishes after a kill."""
    with written_model(folder, model, tokenizer) as partial:
        write_manifest(partial)
        os.replace(partial, folder / READY)
        sync(folder)
    install_best_model(folder)


@contextmanager
def written_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **kwargs
) -> Iterator[Path]:
    """A temporary folder inside `folder` with the files of the model."""
    partial = folder / f"model{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, **kwargs)
        try:
            tokenizer.save_pretrained(partial)
        except Exception as error:  # tokenizers has no other for a full disk
            raise OSError(one_line(error)) from error
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rewrite_unreadable(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Write again the files, except weights, of the model in `folder` that are missing or cannot be read.

    Returns their names. What was in an unreadable one, which the user may have edited, goes to NAME.damaged.
    """
    digests = manifest(folder)
    lost = [name for name in digests if WEIGHTS not in name and not is_readable(folder / name)]
    if not lost:
        return []
    with written_model(folder, model, tokenizer, state_dict={}) as partial:
        lost = [name for name in lost if (partial / name).is_file()]
        for name in lost:
            path = folder / name
            if path.exists():
                os.replace(path, path.with_name(path.name + ".damaged"))
            path.parent.mkdir(exist_ok=True)
            os.replace(partial / name, path)
            sync(path)
            digests[name] = sha256(path)
    write_file(folder / MANIFEST_FILE, json.dumps(digests, indent=1))
    return lost


def install_best_model(folder: Path) -> None:
    """Finish save_best_model, also after a process that was killed in it. Files that the user has edited stay."""
    ready, edited = folder / READY, edited_files(folder)
    # The manifest last: the old one tells files that the user has edited from those that are not replaced yet.
    for path in sorted(ready.rglob("*"), key=lambda path: (path.name == MANIFEST_FILE, path)):
        target = folder / path.relative_to(ready)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.relative_to(ready).as_posix() not in edited:
            os.replace(path, target)
    sync(folder)
    shutil.rmtree(ready, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write the file atomically; it is on the disk when this returns."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def discard(folder: Path) -> None:
    """Rename before deleting: a kill in between leaves no incomplete checkpoint."""
    partial = folder.with_name(folder.name + ".old" + PARTIAL)
    os.replace(folder, partial)
    shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def stop_on_signal(accelerator: Accelerator) -> Iterator[list[int]]:
    """Ctrl-C and termination set accelerator's trigger, so that all processes can stop after the same step.

    Yields the signals that this process has got.
    """
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        got.append(number)
        accelerator.set_trigger()

    previous = {number: signal(number, stop) for number in (SIGINT, SIGTERM)}
    try:
        yield got
    finally:
        for number, handler in previous.items():
            signal(number, handler)
