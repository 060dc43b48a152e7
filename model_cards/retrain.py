"""Train a model of model_cards/ anew:

    python -m model_cards.retrain python-1m
    python -m model_cards.retrain shakespeare-1m data.files=[input.txt]

`train.py configs/NAME.yaml` into runs/NAME, then into model_cards/NAME the best model in bfloat16, its tokenizer and
what model_cards/write.py writes. The losses, a row of benchmarks/results/published.jsonl, are of what was written.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness import Report, parser
from model_cards.write import CARDS, HERE, ROOT, write
from modeling_minrnn import MinRNNForCausalLM
from train import evaluate
from training.config import load_config
from training.data import counted_stream, load_documents
from training.report import held_out_scores


def save(run: Path, folder: Path) -> None:
    """The model of a run in bfloat16, in place of the one in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    MinRNNForCausalLM.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(run).save_pretrained(folder)


def scores(run: Path, folder: Path) -> dict[str, float]:
    """Of the model in `folder` on the text that `run` held out."""
    config = load_config(str(run / "run.yaml"), [])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    held_out = counted_stream(load_documents(config.data)[1], tokenizer, config.data.held_out_tokens)
    loss, accuracy = evaluate(model, held_out)
    in_windows, _ = evaluate(model, held_out, window=config.train.sequence_length)
    return held_out_scores(loss, held_out) | {"held_out_window_loss": in_windows, "held_out_accuracy": accuracy}


def main() -> None:
    flags = parser("published", __doc__, rounds=1)
    flags.add_argument("name", choices=CARDS)
    flags.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = flags.parse_args()
    report, run, folder = Report(options), ROOT / "runs" / options.name, HERE / options.name
    command = ["train.py", f"configs/{options.name}.yaml", *options.overrides, "train.resume=auto"]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    save(run, folder)
    [newest] = sorted(run.glob("checkpoints/step-*"))[-1:]
    progress = json.loads((newest / "state.json").read_text())["progress"]
    report.add(
        model=options.name,
        parameters=MinRNNForCausalLM.from_pretrained(folder).num_parameters(),
        step=progress["best_step"],
        tokens=progress["best_tokens"],
        **scores(run, folder),
    )
    report.print_table()
    write(options.name)


if __name__ == "__main__":
    main()
