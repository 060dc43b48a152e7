"""Write the cards of the models that the project has trained:  python -m model_cards.write

A card is made of a file in configs/ and of figures in benchmarks/results/; what was not measured there it leaves out.
"""

import json
from pathlib import Path

from huggingface_hub import ModelCard

from train import build_model
from training.config import RunConfig, load_config
from training.report import TrainedModel, model_card
from training.tokenizers import byte_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parent


def demo() -> ModelCard:
    """Its loss depends on the standard library that it finds; there is no committed figure."""
    config, settings = read_config("demo")
    model = build_model(config.model, byte_tokenizer())
    return model_card("demo", config, settings, TrainedModel(model.num_parameters(), command="make train"))


def shakespeare() -> ModelCard:
    config, settings = read_config("shakespeare-char-cpu")
    rows = map(json.loads, (ROOT / "benchmarks/results/quality.jsonl").read_text().splitlines())
    row = [row for row in rows if row["contender"] == "minrnn"][-1]
    trained = TrainedModel(
        parameters=row["parameters"],
        command="python train.py configs/shakespeare-char-cpu.yaml data.files=[input.txt]",
        commit=row["commit"] + ("-dirty" if row["dirty"] else ""),
        versions={"Python": row["python"]} | row["versions"],
        scores={"held_out_loss": row["held_out_loss"]["value"]},
    )
    return model_card("shakespeare-char-cpu", config, settings, trained)


def read_config(name: str) -> tuple[RunConfig, str]:
    path = ROOT / "configs" / f"{name}.yaml"
    return load_config(str(path), []), path.read_text()


CARDS = {"demo": demo, "shakespeare-char-cpu": shakespeare}

if __name__ == "__main__":
    for name, card in CARDS.items():
        card().save(HERE / f"{name}.md")
