"""Which settings the presets of configs/presets should have: short runs of train.py, one row each.

    python -m benchmarks.paper.sweep configs/presets/1m.yaml \\
        train.steps=400 train.warmup_steps=20 train.learning_rate=2e-3,4e-3 model.cell_type=mingru,minlstm

Overrides are those of train.py; values between commas are tried one by one, all combinations of them.

held_out_loss: nats per token over the whole held-out text after the last step. minutes: the whole of train.py.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Report, parser
from modeling_minrnn import MinRNNForCausalLM
from train import main as train
from training.config import load_config


def combinations(overrides: list[str]) -> list[list[str]]:
    """Of ["a.b=1,2", "c.d=3"]: [["a.b=1", "c.d=3"], ["a.b=2", "c.d=3"]]."""
    pairs = [override.split("=", 1) for override in overrides]
    tried = [[f"{key}={value}" for value in values.split(",")] for key, values in pairs]
    return [list(each) for each in itertools.product(*tried)]


def main() -> None:
    flags = parser("paper_sweep", __doc__, rounds=1)
    flags.add_argument("preset", type=Path)
    flags.add_argument("overrides", nargs="*", metavar="section.key=value[,value]")
    options = flags.parse_args()
    report = Report(options)
    for overrides in combinations(options.overrides):
        if not report.wants(" ".join(overrides)):
            continue
        settings = load_config(str(options.preset), overrides).train
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            once = [f"train.{key}={settings.steps}" for key in ("eval_every_steps", "save_every_steps")]
            started = time.perf_counter()
            train(str(options.preset), [*overrides, *once, f"train.output_dir={run}"])
            minutes = (time.perf_counter() - started) / 60
            *_, last = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            model = MinRNNForCausalLM.from_pretrained(run)
        report.add(
            preset=options.preset.stem,
            parameters=model.num_parameters(),
            cell_type=model.config.cell_type,
            max_timescale=model.config.max_timescale,
            initializer_range=model.config.initializer_range,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            held_out_loss=last["held_out_loss"],
            minutes=minutes,
        )
    report.print_table()


if __name__ == "__main__":
    main()
