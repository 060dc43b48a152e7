"""The programs of this project under one name:  minrnn COMMAND ...  or  python -m minrnn COMMAND ...

`minrnn COMMAND --help` is the help of the program itself. Nothing is imported before one is chosen, as torch and
transformers take seconds. train.py and training/ are not in the wheel: `train` and `compare` run in a clone.
"""

import argparse
import logging
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent


def hush_torchao() -> None:
    """Of a program: transformers imports torchao where it is installed, which warns of kernels for other devices and
    of how it is made."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load(folder: str, auto_class: str) -> tuple:
    """The model and the tokenizer of a folder or repository."""
    import transformers

    import modeling_minrnn  # noqa: F401 registers the models

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return getattr(transformers, auto_class).from_pretrained(folder), tokenizer


def sample() -> None:
    """The text of `minrnn sample`, as it is written."""
    parser = argparse.ArgumentParser("minrnn sample", description="Print a text as a language model goes on with it.")
    parser.add_argument("model", help="a model folder, e.g. runs/demo, or a repository id")
    parser.add_argument("prompt", nargs="?", default="\n", help="the beginning of the text; a new line by default")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="%(default)s by default")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="%(default)s by default; 0: the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, help="%(default)s by default")
    options = parser.parse_args()
    if not options.prompt:
        parser.error("the prompt is empty: it must hold at least one character")
    try:
        model, tokenizer = load(options.model, "AutoModelForCausalLM")
        from transformers import TextStreamer, set_seed

        set_seed(options.seed)
        drawn = (
            {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
        )
        model.generate(
            **tokenizer(options.prompt, return_tensors="pt"),
            **drawn,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


def diagnose() -> None:
    """What `minrnn diagnose` prints: a line for each recurrence."""
    parser = argparse.ArgumentParser(
        "minrnn diagnose", description="What a model remembers of a text, layer by layer."
    )
    parser.add_argument("model", help="a model folder, e.g. runs/demo, or a repository id")
    parser.add_argument("text", type=Path, help="a file in UTF-8; examples/diagnose_states.py plots the same")
    options = parser.parse_args()
    try:
        text = options.text.read_text("utf-8")
        model, tokenizer = load(options.model, "AutoModel")
        print(*model.diagnose_states(tokenizer(text, return_tensors="pt").input_ids), sep="\n")
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))


# What each does, the program (a module to run as `python -m` does, or a function), and the extra that it needs.
COMMANDS: dict[str, tuple[str, str | Callable[[], None], str]] = {
    "train": ("train a language model: minrnn train configs/NAME.yaml [section.key=value ...]", "train", "train"),
    "sample": ("print a text as a model goes on with it", sample, ""),
    "serve": ("an OpenAI-compatible server for a model", "modeling_minrnn.serve", "serving"),
    "export": ("a model as ONNX files", "modeling_minrnn.export", "onnx"),
    "diagnose": ("what a model remembers of a text, layer by layer", diagnose, ""),
    "compare": ("runs of training beside each other: minrnn compare runs/a runs/b", "training.compare", "train"),
}


def main() -> None:
    parser = argparse.ArgumentParser("minrnn", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "\n".join(f"{name:10}{meaning}" for name, (meaning, *_) in COMMANDS.items())
    parser.add_argument("--version", action="version", version=version("modeling-minrnn"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see minrnn COMMAND --help")
    options = parser.parse_args()
    _, program, extra = COMMANDS[options.command]
    if extra == "train":
        if not (ROOT / "training" / "config.py").exists():
            parser.error(
                f"{options.command} is not in the installed package: clone the repository, run "
                "pip install -e '.[train]' there, and then this command"
            )
        sys.path.insert(0, str(ROOT))  # as `python train.py` does
    hush_torchao()
    sys.argv = [f"minrnn {options.command}", *options.arguments]
    if not isinstance(program, str):
        return program()
    try:
        runpy.run_module(program, run_name="__main__")
    except ModuleNotFoundError as error:
        parser.error(f"{options.command} needs {error.name}: pip install 'modeling-minrnn[{extra}]'")


if __name__ == "__main__":
    main()
