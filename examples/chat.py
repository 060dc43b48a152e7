"""Talk to a model that keeps no transcript, only its state:  python -m examples.chat [--model FOLDER]

Every line of the input is a turn; end with Ctrl-D. What the model knows of all that was said is its state, whose size
does not change. The turns are put together by the tokenizer's chat template, which must write one after the other.
"""

import argparse
import sys

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from examples.tiny_model import load


@torch.no_grad()
def answer(model: PreTrainedModel, state: Cache, ids: list[int], max_new_tokens: int) -> list[int]:
    """Read `ids`, return what the model (greedily) says; `state` then knows all of it but the end of the turn."""
    said: list[int] = []
    while len(said) < max_new_tokens:
        logits = model(torch.tensor([ids]), past_key_values=state, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            return said
        said.append(token)
        ids = [token]
    model(torch.tensor([ids]), past_key_values=state, use_cache=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to a model that keeps only its state.")
    parser.add_argument("--model", help="a model folder whose tokenizer has a chat template")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    state = DynamicCache(config=model.config)
    end_of_turn: list[int] = []  # of the model's last turn, which it has not read yet
    for line in sys.stdin:
        turn = [{"role": "user", "content": line.strip()}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        print(tokenizer.decode(answer(model, state, end_of_turn + ids, options.max_new_tokens)))
        end_of_turn = [tokenizer.eos_token_id]
        kept = sum(tensor.nbytes for layer in state.layers for tensor in (layer.keys, layer.values))
        print(f"[{state.get_seq_length()} tokens in a state of {kept / 1000:.1f} kB]")


if __name__ == "__main__":
    main()
