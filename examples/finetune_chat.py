"""From a base model to one that answers (pip install trl):  python -m examples.finetune_chat [--model FOLDER]

The script makes its dialogues itself, by a seed: sums, words to say twice, and a name to remember. Only the turns of
the assistant are learned (`assistant_only_loss`), by the marks in the tokenizer's chat template. Then talk to it:

    python -m modeling_minrnn.serve runs/chat        and        transformers chat runs/chat http://localhost:8000
"""

import argparse
import random

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from examples.tiny_model import load

NAMES = "Ada Alan Barbara Edsger Emmy Grace Hedy Ken Linus Lise Marie Niklaus Rosa Tim Vint".split()
WORDS = "apple bread chair door early fish green house ink jump kind lamp moon north open piano river stone".split()
TRAINING, HELD_OUT = 4000, 100  # dialogues; of the latter those that are not among the former


def turn(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def make_dialogue(rng: random.Random) -> list[dict[str, str]]:
    """Messages: a greeting, then two questions of three kinds."""
    name, word, a, b = rng.choice(NAMES), rng.choice(WORDS), rng.randrange(10), rng.randrange(10)
    questions = [
        turn("What is my name?", f"Your name is {name}."),
        turn(f"Say {word} twice.", f"{word} {word}"),
        turn(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."),
    ]
    return [*turn(f"Hello, I am {name}.", f"Hello, {name}!"), *sum(rng.sample(questions, 2), [])]


def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list) -> float:
    """The share of last answers that the model gives, greedily, letter by letter."""
    right = 0
    for *before, last in dialogues:
        inputs = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_tensors="pt").to(
            model.device
        )
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer == last["content"]
    return right / len(dialogues)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model to answer.")
    parser.add_argument("--model", help="a model folder, e.g. runs/demo, whose tokenizer has a chat template")
    parser.add_argument("--output", default="runs/chat", help="where the model goes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    remembering = {} if options.model else {"max_timescale": 300}  # as long as a dialogue, from the first step on
    model, tokenizer = load(options.model, **remembering)
    rng = random.Random(0)
    dialogues = [make_dialogue(rng) for _ in range(TRAINING)]
    held_out = [dialogue for dialogue in (make_dialogue(rng) for _ in range(HELD_OUT)) if dialogue not in dialogues]
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=options.output,
            assistant_only_loss=True,
            max_length=512,
            packing=True,  # several dialogues a row, each read alone
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 10,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"messages": dialogue} for dialogue in dialogues]),
        processing_class=tokenizer,
    )
    print(f"answers right before: {share_right(model, tokenizer, held_out):.0%} of {len(held_out)} held-out dialogues")
    trainer.train()
    print(f"after: {share_right(model, tokenizer, held_out):.0%}")
    trainer.save_model(options.output)
    print(f"{options.output} holds the model: python -m modeling_minrnn.serve {options.output}")


if __name__ == "__main__":
    main()
