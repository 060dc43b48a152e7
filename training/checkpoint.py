"""The output folder of a run: who may write into it, and the checkpoints that a run resumes from.

OUTPUT_DIR/                     the best model so far, a folder for from_pretrained, with the reports of the run
    run.yaml                    the settings
    checkpoints/step-00000100/  everything that training needs to go on
"""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGINT, SIGTERM, signal
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors import SafetensorError

from .config import InputError, RunConfig

# It warns of every checkpoint that tied weights are saved once, which is what they are tied for.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)

SETTINGS_FILE = "run.yaml"
KEPT_CHECKPOINTS = 2


@dataclass
class Progress:
    """How far a run has come. Losses are in nats per token."""

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    evaluations_since_best: int = 0


def check_output_dir(config: RunConfig) -> Path | None:
    """The checkpoint to resume from, if any; changes nothing.

    Raises InputError if the folder holds something that this run would overwrite, or nothing that it could resume.
    """
    folder = Path(config.train.output_dir)
    if config.train.resume and config.train.overwrite:
        raise InputError("train.resume and train.overwrite are both true: choose one")
    if config.train.resume:
        checkpoints = list_checkpoints(folder)
        if not checkpoints:
            raise InputError(f"train.resume: {folder} holds no checkpoint")
        check_same_settings(folder, config)
        return checkpoints[-1]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / SETTINGS_FILE).is_file():
            raise InputError(f"train.output_dir {folder} is not empty and holds no run: choose another folder")
        if not config.train.overwrite:
            raise InputError(
                f"train.output_dir {folder} holds a run: continue it with train.resume=true "
                "or replace it with train.overwrite=true"
            )
    return None


def check_same_settings(folder: Path, config: RunConfig) -> None:
    """A run may be resumed with other `train` settings (say, more steps), but not with another model or data."""
    before = OmegaConf.to_container(OmegaConf.load(folder / SETTINGS_FILE))
    for section in ("model", "data"):
        now = OmegaConf.to_container(OmegaConf.structured(config)[section])
        for key in sorted(now.keys() | before[section].keys()):
            if now.get(key) != before[section].get(key):
                raise InputError(
                    f"train.resume: {section}.{key} is {now.get(key)}, but {folder / SETTINGS_FILE} "
                    f"has {before[section].get(key)}"
                )


def open_output_dir(config: RunConfig) -> Path:
    """Create the folder, in place of a run that may be overwritten, and write the settings into it.

    What was asked of this call alone, to resume or to overwrite, is no property of the run and is not kept.
    """
    folder = Path(config.train.output_dir)
    if config.train.overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(config, train=replace(config.train, resume=False, overwrite=False))
    OmegaConf.save(OmegaConf.structured(settings), folder / SETTINGS_FILE)
    return folder


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("checkpoints/step-*") if path.suffix != ".partial")


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, batches: Any) -> None:
    """Called by all processes. A checkpoint gets its name when it is complete; older ones are then removed."""
    final = folder / "checkpoints" / f"step-{progress.step:08d}"
    if final.exists():
        return
    partial = final.with_suffix(".partial")
    accelerator.save_state(partial)
    saved = {"processes": accelerator.num_processes, "progress": asdict(progress), "batches": batches.state_dict()}
    progress_file(partial, accelerator).write_text(json.dumps(saved))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, final)
        for old in list_checkpoints(folder)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def progress_file(checkpoint: Path, accelerator: Accelerator) -> Path:
    """Each process has its own, like accelerate's random states: streams of data differ."""
    return checkpoint / f"progress_{accelerator.process_index}.json"


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, batches: Any) -> Progress:
    """Restore model, optimizer, schedule and random states, and the position of `batches`.

    Raises InputError if the checkpoint is damaged, of another model, or of another number of processes.
    """
    try:
        saved = json.loads(progress_file(checkpoint, accelerator).read_text())
        if saved["processes"] != accelerator.num_processes:
            raise InputError(f"saved by {saved['processes']} processes, resumed by {accelerator.num_processes}")
        accelerator.load_state(checkpoint)
        batches.load_state_dict(saved["batches"])
        return Progress(**saved["progress"])
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {checkpoint} cannot be resumed: {reason}") from error


@contextmanager
def stop_on_signal(accelerator: Accelerator) -> Iterator[None]:
    """Ctrl-C and termination set accelerator's trigger, so that all processes can stop after the same step."""
    previous = {number: signal(number, lambda *_: accelerator.set_trigger()) for number in (SIGINT, SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal(number, handler)
