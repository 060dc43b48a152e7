"""Stream text from a model in ONNX, without torch or transformers:

    python -m modeling_minrnn.export MODEL FOLDER
    python -m examples.onnx_stream FOLDER "def read_" --max-new-tokens 200

Needs onnxruntime, tokenizers and numpy. Greedy unless a temperature is given.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


def generate(folder: Path, ids: list[int], temperature: float, seed: int) -> Iterator[int]:
    """Token ids after the prompt `ids`, without end."""
    prefill, decode = (InferenceSession(folder / f"{name}.onnx") for name in ("prefill", "decode"))
    names = [value.name for value in decode.get_inputs()]  # input_ids, then the state
    rng = np.random.default_rng(seed)
    input_ids = np.array([ids])
    logits, *state = prefill.run(None, {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)})
    while True:
        # The largest of logits + Gumbel noise is a sample from softmax(logits).
        token = int(np.argmax(logits[0] + temperature * rng.gumbel(size=logits.shape[1])))
        yield token
        logits, *state = decode.run(None, dict(zip(names, [np.array([[token]]), *state])))


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream text from a MinRNN model in ONNX.")
    parser.add_argument("folder", type=Path, help="what `python -m modeling_minrnn.export` wrote")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    end = json.loads((options.folder / "generation_config.json").read_text()).get("eos_token_id")
    stream = DecodeStream()  # holds back the bytes of a character until it is whole
    tokens = generate(options.folder, tokenizer.encode(options.prompt).ids, options.temperature, options.seed)
    print(options.prompt, end="", flush=True)
    for _, token in zip(range(options.max_new_tokens), tokens):
        if token == end:
            break
        print(stream.step(tokenizer, token) or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
