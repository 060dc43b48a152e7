"""What examples/forecast.py and examples/policy.py find, over seeds, on one CPU thread; --rounds: how many seeds.

forecast: the error ahead at each mean gap between samples, as a share of the angle; seconds of training.
policy: steps of an episode at last, of 500, and the seconds of acting and of learning. minGRU's learning is to take at
most half of nn.GRU's.

With --plots FOLDER the pictures of the first seed are drawn there. mingru-scans takes part where it is installed.

    python -m benchmarks.layer_examples [--only policy] [--plots docs/plots]
"""

from pathlib import Path

from benchmarks.harness import Bound, Report, parser
from examples import forecast, policy

STEPS, ROUNDS = 1000, 50  # the examples' own


def measure_forecast(report: Report, seeds: int, plots: Path | None) -> None:
    for seed in range(seeds):
        models, errors = {}, {}
        for name in forecast.CONTENDERS:
            models[name], errors[name], seconds = forecast.run(name, STEPS, seed)
            report.add(
                example="forecast",
                contender=name,
                seed=seed,
                parameters=sum(p.numel() for p in models[name].parameters()),
                mean_gap_s=forecast.MEAN_GAP,
                error_at_gap=dict(zip(map(str, forecast.TEST_GAPS), errors[name])),
                training_s=seconds,
            )
        if plots and seed == 0:
            forecast.draw(models, errors, str(plots / "forecast.png"))


def measure_policy(report: Report, seeds: int, plots: Path | None) -> None:
    for seed in range(seeds):
        runs = {name: policy.run(name, ROUNDS, policy.ROW, seed) for name in policy.MEMORIES}
        curves = {name: curve for name, (_, curve) in runs.items()}
        for name, (model, curve) in runs.items():
            share = curve.learning_s / curves["nn.GRU"].learning_s
            report.add(
                example="policy",
                contender=name,
                seed=seed,
                parameters=sum(p.numel() for p in model.parameters()),
                environment_steps=ROUNDS * policy.ROW * policy.ENVIRONMENTS,
                episode_at_last=curve.at_last,
                acting_s=curve.acting_s,
                learning_s=curve.learning_s,
                learning_over_gru=Bound(share, at_most=0.5 if name == "minGRU" else None),
            )
        if plots and seed == 0:
            policy.draw(curves, str(plots / "policy.png"))


def main() -> None:
    flags = parser("layer_examples", __doc__, rounds=3)
    flags.add_argument("--plots", type=Path, metavar="FOLDER")
    report = Report(flags.parse_args())
    for name, measure in (("policy", measure_policy), ("forecast", measure_forecast)):
        if report.wants(name):
            measure(report, report.options.rounds, report.options.plots)
    report.print_table()


if __name__ == "__main__":
    main()
