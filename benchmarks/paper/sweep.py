"""Which settings the presets of configs/presets should have: short runs of train.py, one row each.

    python -m benchmarks.paper.sweep 1m train.learning_rate=2e-3,4e-3 model.cell_type=mingru,minlstm \\
        train.steps=300 train.warmup_steps=15 train.batch_size=8

Overrides are those of train.py; values between commas are tried one by one, all combinations of them.

held_out_loss: nats per token over the whole held-out text after the last step. minutes: the whole of train.py.
"""

from benchmarks.harness import HERE, Report, combinations, parser, run_train
from modeling_minrnn import MinRNNConfig
from training.config import load_config


def main() -> None:
    flags = parser("paper_sweep", __doc__, rounds=1)
    flags.add_argument("preset", metavar="NAME")
    flags.add_argument("overrides", nargs="*", metavar="section.key=value[,value]")
    options = flags.parse_args()
    report = Report(options)
    for overrides in combinations(options.overrides):
        if not report.wants(" ".join([options.preset, *overrides])):
            continue
        config = load_config(str(HERE.parent / "configs" / "presets" / f"{options.preset}.yaml"), overrides)
        model, settings = MinRNNConfig(**config.model), config.train
        once = [f"train.{key}={settings.steps}" for key in ("eval_every_steps", "save_every_steps")]
        run = run_train(f"presets/{options.preset}.yaml", *overrides, *once, "train.sample_prompts=[]")
        report.add(
            preset=options.preset,
            parameters=run.parameters,
            cell_type=model.cell_type,
            max_timescale=model.max_timescale,
            initializer_range=model.initializer_range,
            learning_rate=settings.learning_rate,
            muon_learning_rate=settings.muon_learning_rate,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            held_out_loss=run.held_out_loss,
            minutes=run.seconds / 60,
        )
    report.print_table()


if __name__ == "__main__":
    main()
