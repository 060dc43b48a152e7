"""Train a classifier:  python -m examples.classify [--model FOLDER]

A model folder lends its weights, all but those of the head. The question is whether a text is one.
"""

import argparse
import random

from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from examples.tiny_model import load

parser = argparse.ArgumentParser(description="Train a classifier of text.")
parser.add_argument("--model", help="a model folder, e.g. runs/demo")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

labels = {0: "question", 1: "statement"}
model, tokenizer = load(options.model, AutoModelForSequenceClassification, id2label=labels)
random.seed(0)
dataset = []
for a, b in ((random.randrange(100), random.randrange(100)) for _ in range(1000)):
    label = random.randrange(2)
    text = f"{a} and {b} are {a + b}." if label else f"What are {a} and {b}?"
    dataset.append(tokenizer(text) | {"labels": label})

trainer = Trainer(
    model,
    TrainingArguments(
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    DataCollatorWithPadding(tokenizer),  # shorter texts are padded; the head reads the last real token of each
    train_dataset=dataset[:900],
)
trainer.train()
hits = trainer.predict(dataset[900:]).predictions.argmax(-1) == [row["labels"] for row in dataset[900:]]
print(f"accuracy on 100 held-out texts: {hits.mean():.2f}")
print(pipeline("text-classification", model, tokenizer=tokenizer)(["What are 3 and 4?", "3 and 4 are 7."]))
