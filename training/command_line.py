"""The command line of train.py, which tells what is wrong with it before the imports that take seconds."""

import argparse
import sys

from .config import check_tokenizer, exit_with_one_line, load_config, resolved, settings_help, settings_yaml
from .files import names_files, training_and_held_out


class Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return super().format_help() + settings_help()


def parse_command_line() -> argparse.Namespace:
    """Ends the process where the settings cannot be used, or are only to be shown."""
    parser = Parser(description="Train a minGRU or minLSTM language model.")
    parser.add_argument("config", help="YAML file with the settings of the run, e.g. configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. train.steps=500, or another YAML file"
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings of the run as YAML, and exit")
    command_line = parser.parse_intermixed_args()
    with exit_with_one_line():
        settings = load_config(command_line.config, command_line.overrides)
        if command_line.print_config:
            print(settings_yaml(resolved(settings)), end="")
            sys.exit()
        check_tokenizer(settings.data.tokenizer)
        for source in settings.data.mixture or [settings.data]:
            if source.files or source.dataset and names_files(source.dataset):
                training_and_held_out(source)
    return command_line
