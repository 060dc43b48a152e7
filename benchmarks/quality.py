"""Does the small Shakespeare model beat nanoGPT's CPU setting in no more wall time on the same core?

    python benchmarks/quality.py PATH_TO/input.txt     (the 1,115,394 characters of tiny Shakespeare)

nanogpt: GPT2LMHeadModel in the setting that nanoGPT's README gives for a CPU (4 layers, 4 heads, width 128, context
    64, batch 12, 2000 steps, dropout 0, AdamW 1e-3 to 1e-4, fp32). Timed: its training steps alone.
minrnn: `train.py configs/shakespeare-char-cpu.yaml`. Timed: the whole process, with start-up, tokenising, evaluations
    and saving.
Both train on the first 1,003,854 characters and report nats per character over all of the last 111,540: minrnn reads
them once with its state carried, nanogpt in windows of its context, as it was trained. window_loss: minrnn in disjoint
windows of its training length.

Target: held-out loss of minrnn <= 1.58, its time <= nanogpt's. One run of each, one after the other.

    python benchmarks/quality.py input.txt train.optimizer=muon train.muon_learning_rate=0.01,0.02 [--seeds 0 1 2]
    python benchmarks/quality.py input.txt --config shakespeare-1m.yaml --held-out

One row for each combination of the values between commas, overrides of train.py, and seed. They choose settings, so
they never read those last characters: the first 1,003,854 are the text, and their last tenth is held out. --held-out
reads the last 111,540 of all, once the settings are chosen. cpu_seconds is comparable only between rows of one call.
"""

import tempfile
import time
from pathlib import Path

import torch
from harness import Bound, Report, combinations, parser, run_train
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_with_min_lr_schedule_with_warmup

CONTEXT, BATCH, STEPS, WARMUP_STEPS = 64, 12, 2000, 100
TARGET_LOSS = 1.58
SMALL = "shakespeare-char-cpu.yaml"


def nanogpt(text: str) -> tuple[float, float, int]:
    """(held-out loss, seconds of training, parameters)"""
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    cut = int(0.9 * len(tokens))
    training, held_out = tokens[:cut], tokens[cut:]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(alphabet), n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, WARMUP_STEPS, STEPS, min_lr_rate=0.1)
    windows = training.unfold(0, CONTEXT + 1, 1)
    started = time.perf_counter()
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - started

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(held_out) - 1, CONTEXT):
            window = held_out[start : start + CONTEXT + 1]
            total += cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    return total / (len(held_out) - 1), seconds, model.num_parameters()


def sweep(report: Report, config: str, text: Path, overrides: list[str], seeds: list[int], held_out: bool) -> None:
    """Rows of `train.py configs/CONFIG` with each combination of overrides."""
    with tempfile.TemporaryDirectory() as folder:
        if not held_out:
            content = text.read_text()
            text = Path(folder, "training.txt")
            text.write_text(content[: int(0.9 * len(content))])
        for tried in combinations(overrides):
            for seed in seeds:
                once = [f"train.{key}_every_steps=100000" for key in ("eval", "save")]
                run = run_train(config, f"data.files=[{text}]", *once, *tried, f"train.seed={seed}")
                report.add(
                    config=config,
                    contender=" ".join(tried),
                    read="held-out text" if held_out else "the last tenth of the training text",
                    seed=seed,
                    parameters=run.parameters,
                    steps=run.step,
                    seconds=run.seconds,
                    cpu_seconds=run.cpu_seconds,
                    held_out_loss=run.held_out_loss,
                    window_loss=run.window_loss,
                )


def main() -> None:
    flags = parser("quality", __doc__, rounds=1)
    flags.add_argument("text", type=Path, help="tiny Shakespeare, as one file")
    flags.add_argument("overrides", nargs="*", metavar="section.key=value[,value]")
    flags.add_argument("--config", help=f"of configs/, for the overrides (default {SMALL})")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--held-out", action="store_true", help="read the held-out text: when all is chosen")
    options = flags.parse_intermixed_args()
    report = Report(options)
    text = options.text.resolve()
    if options.overrides or options.config:
        sweep(report, options.config or SMALL, text, options.overrides, options.seeds, options.held_out)
    else:
        beside_nanogpt(report, text)
    report.print_table()


def beside_nanogpt(report: Report, text: Path) -> None:
    loss, budget, parameters = nanogpt(text.read_text())
    report.add(contender="nanogpt", parameters=parameters, seconds=budget, held_out_loss=loss)
    small = run_train(SMALL, f"data.files=[{text}]")
    report.add(
        contender="minrnn",
        parameters=small.parameters,
        seconds=Bound(small.seconds, at_most=budget),
        held_out_loss=Bound(small.held_out_loss, at_most=TARGET_LOSS),
        window_loss=small.window_loss,
    )


if __name__ == "__main__":
    main()
