"""State tuning: a model learns a style while all its weights stay as they are.

A recurrent model need not start from nothing: `learned_initial_state` adds the state before the first token to the
parameters, D numbers a layer, which then say what a prompt would have to say. Trained alone, they tell a model of sums
in five styles which of them is wanted.

    python -m examples.tune_initial_state    # less than a minute on one CPU core; it makes its text itself
"""

import random
import tempfile

import torch
from torch.nn.utils.rnn import pad_sequence

from modeling_minrnn import MinRNNConfig, MinRNNForCausalLM

STYLES = {
    "plain": "{} and {} make {}.",
    "loud": "{}! AND {}! MAKE {}!",
    "formal": "The sum of {} and {} is {}.",
    "code": "assert {} + {} == {}",
    "table": "| {} | {} | {} |",
}


def write(styles, pairs):
    """A batch of sums, each between line feeds and in any of the styles, as bytes; -100 is padding."""
    texts = [STYLES[random.choice(styles)].format(a, b, a + b) for a, b in pairs]
    lines = [torch.tensor(list(f"\n{text}\n".encode())) for text in texts]
    labels = pad_sequence(lines, batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "labels": labels, "use_cache": False}


def train(model, styles, pairs, steps, learning_rate):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**write(styles, random.sample(pairs, 32))).loss.backward()
        optimizer.step()
        schedule.step()


random.seed(0)
torch.manual_seed(0)
pairs = [(a, b) for a in range(50) for b in range(50)]
random.shuffle(pairs)
training, held_out = pairs[:2000], pairs[2000:]

# In place of a model from the Hub: one that knows the styles, and cannot know which is wanted.
frozen = MinRNNForCausalLM(MinRNNConfig(hidden_size=64, num_hidden_layers=2))
train(frozen, list(STYLES), training, steps=300, learning_rate=5e-3)

# State tuning. The new parameters start at zero, which is where the frozen model starts from.
with tempfile.TemporaryDirectory() as folder:
    frozen.save_pretrained(folder)
    tuned = MinRNNForCausalLM.from_pretrained(folder, learned_initial_state=True)
for name, parameter in tuned.named_parameters():
    parameter.requires_grad = name.endswith("initial_state")
train(tuned, ["table"], training, steps=100, learning_rate=0.1)

for title, model in (("frozen", frozen), ("tuned", tuned)):
    with torch.no_grad():
        loss = model(**write(["table"], held_out)).loss.item()
    settings = {"do_sample": True, "max_new_tokens": 30, "eos_token_id": 10, "pad_token_id": 10}
    lines = [bytes(line).decode().strip() for line in model.generate(torch.full((4, 1), 10), **settings).tolist()]
    print(f"{title}: held-out loss {loss:.3f} nats/byte, writes {lines}")
