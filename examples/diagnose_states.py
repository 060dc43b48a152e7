"""What a model remembers, and for how long, layer by layer:  python -m examples.diagnose_states [--model FOLDER] FILE

Reads a text and prints for each layer the timescales of its channels, how many gates are saturated and how large the
state is; writes a plot of it.
"""

import argparse
from pathlib import Path

from examples.tiny_model import load
from training.report import plot_states

parser = argparse.ArgumentParser(description="What a model remembers, layer by layer.")
parser.add_argument("text", type=Path, help="a file in UTF-8")
parser.add_argument("--model", help="a model folder, e.g. runs/demo")
parser.add_argument("--plot", type=Path, default=Path("states.png"))
options = parser.parse_args()

model, tokenizer = load(options.model)
reports = model.diagnose_states(tokenizer(options.text.read_text("utf-8"), return_tensors="pt").input_ids)
print(*reports, sep="\n")
plot_states(reports, options.plot)
print(f"{options.plot} shows it")
