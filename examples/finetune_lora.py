"""Fine-tune a model with LoRA (pip install peft):  python -m examples.finetune_lora [--model FOLDER] [--output FOLDER]

Trains low-rank additions to every linear layer on lines of sums, merges them into the weights, and saves a model that
needs no PEFT any more.
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from examples.tiny_model import load

parser = argparse.ArgumentParser(description="Fine-tune a model with LoRA.")
parser.add_argument("--model", help="a model folder, e.g. runs/demo")
parser.add_argument("--output", default="runs/lora", help="where the merged model goes (default %(default)s)")
parser.add_argument("--steps", type=int, default=60)
options = parser.parse_args()

model, tokenizer = load(options.model)
lines = [f"{a} plus {b} is {a + b}.\n" for a in range(40) for b in range(40)]
dataset = [tokenizer(line + tokenizer.eos_token) for line in lines]

lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
lora.print_trainable_parameters()
trainer = Trainer(
    lora,
    TrainingArguments(
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    ),
    DataCollatorWithFlattening(),  # no padding: the documents of a batch in one row
    train_dataset=dataset[::2],
    eval_dataset=dataset[1::50],  # not among those trained on
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]

merged = lora.merge_and_unload()
merged.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)
print(f"loss before {before:.3f}, after {after:.3f} nats per token; merged into {options.output}")
