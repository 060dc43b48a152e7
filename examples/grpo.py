"""Reinforcement by a reward of one's own, by GRPO (pip install trl):  python -m examples.grpo [--model FOLDER]

The model writes eight answers to each prompt, and learns from how they compare. Rewarded is the share of digits.
"""

import argparse

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from examples.tiny_model import load

parser = argparse.ArgumentParser(description="Teach a model by a reward.")
parser.add_argument("--model", help="a model folder, e.g. runs/demo")
parser.add_argument("--output", default="runs/grpo", help="where the model goes (default %(default)s)")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()


def share_of_digits(completions: list[str], **kwargs) -> list[float]:
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in completions]


model, tokenizer = load(options.model)
settings = {"max_completion_length": 16, "num_generations": 8, "per_device_train_batch_size": 32, "logging_steps": 1}
others = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
trainer = GRPOTrainer(
    model,
    share_of_digits,
    args=GRPOConfig(options.output, max_steps=options.steps, learning_rate=1e-2, **settings, **others),
    train_dataset=Dataset.from_list([{"prompt": f"Number {n}: "} for n in range(100)]),
    processing_class=tokenizer,
)
trainer.train()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward of the first step {rewards[0]:.2f}, of the last {rewards[-1]:.2f}")
trainer.save_model(options.output)
