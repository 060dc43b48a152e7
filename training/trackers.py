"""Experiment trackers: one project, in which a run is named after its folder and has all of its settings."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, on_main_process

from .config import RunConfig, flat_settings

PROJECT = "minrnn"
SCORES = ("loss", "held_out_loss", "bits_per_byte", "held_out_accuracy")


class TensorBoard(TensorBoardTracker):
    """Writes into the folder of the run, so that the folder above it is what tensorboard calls a log directory."""

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """As hyperparameters of this run: SummaryWriter.add_hparams would begin one more, named after the time."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, dict.fromkeys(SCORES)):
            self.writer.file_writer.add_summary(summary)
        self.writer.flush()


def trackers_of(config: RunConfig) -> list[str | GeneralTracker]:
    """What Accelerator takes as `log_with`."""
    folder = Path(config.train.output_dir).resolve()
    own = {"tensorboard": TensorBoard(folder.name, folder.parent)}
    return [own.get(name, name) for name in config.train.trackers]


def start_trackers(accelerator: Accelerator, config: RunConfig, resumed: bool) -> None:
    """resumed: go on with the run of this name, where the tracker keeps one."""
    name = Path(config.train.output_dir).resolve().name
    arguments = {
        "trackio": {"name": name, "resume": "allow" if resumed else "never"},
        "wandb": {"name": name},
        "mlflow": {"run_name": name},
        "swanlab": {"experiment_name": name},
    }
    accelerator.init_trackers(PROJECT, flat_settings(config), arguments)
