"""Print text as it is generated:  python -m examples.generate [--model FOLDER] [--prompt TEXT]"""

import argparse

import torch
from transformers import TextStreamer

from examples.tiny_model import load

parser = argparse.ArgumentParser(description="Print text as it is generated.")
parser.add_argument("--model", help="a model folder, e.g. runs/demo")
parser.add_argument("--prompt", default="def read_")
parser.add_argument("--max-new-tokens", type=int, default=200)
options = parser.parse_args()

model, tokenizer = load(options.model)
torch.manual_seed(0)
model.generate(
    **tokenizer(options.prompt, return_tensors="pt"),
    max_new_tokens=options.max_new_tokens,
    do_sample=True,
    temperature=0.8,
    streamer=TextStreamer(tokenizer, skip_special_tokens=True),
)
