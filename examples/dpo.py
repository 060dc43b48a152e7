"""Preferences, by DPO (pip install trl):  python -m examples.dpo [--model FOLDER] [--steps 60]

Of two answers to a sum the short one is preferred. A pair counts as learned when the model, measured against the one
that it began as, has moved towards the preferred answer; half of the pairs are held out.
"""

import argparse

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from examples.tiny_model import load

parser = argparse.ArgumentParser(description="Teach a model which answers are preferred.")
parser.add_argument("--model", help="a model folder, e.g. runs/chat")
parser.add_argument("--output", default="runs/dpo", help="where the model goes (default %(default)s)")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

model, tokenizer = load(options.model)
reference, _ = load(options.model)
pairs = [
    {
        "prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}],
        "chosen": [{"role": "assistant", "content": f"{a + b}."}],
        "rejected": [{"role": "assistant", "content": f"Well, {a} plus {b}, let me see, is {a + b}."}],
    }
    for a in range(10)
    for b in range(10)
]
settings = {"per_device_train_batch_size": 16, "bf16": False, "report_to": "none", "disable_tqdm": True}
trainer = DPOTrainer(
    model,
    reference,
    args=DPOConfig(options.output, max_steps=options.steps, learning_rate=1e-3, save_strategy="no", **settings),
    train_dataset=Dataset.from_list(pairs[::2]),
    eval_dataset=Dataset.from_list(pairs[1::2]),
    processing_class=tokenizer,
)
trainer.train()
scores = trainer.evaluate()
print(
    f"held-out pairs learned: {scores['eval_rewards/accuracies']:.0%}, loss {scores['eval_loss']:.3f} (log 2 at first)"
)
trainer.save_model(options.output)
