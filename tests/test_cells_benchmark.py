"""benchmarks/paper/cells.py trains every cell on tasks with the answers that it says, at equal size."""

import itertools
import json
import sys

import pytest
import torch

from benchmarks.paper import cells, long_context
from benchmarks.paper.models import CELL_TYPES, Family, parameters
from benchmarks.paper.render import CELL_FIGURES
from training.data import IGNORED

TEXT = "".join(f"{a} times {b} is {a * b}.\n" for a in range(30) for b in range(12))


def rows_of(monkeypatch, tmp_path, task, *flags):
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["cells", task, *flags, "--output", str(output)])
    cells.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("task", [name for name in cells.EXPERIMENTS if name != "s5"])  # s3 with more things
def test_every_task_is_trained_and_gives_the_figure_of_the_table(tmp_path, monkeypatch, task):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    monkeypatch.setattr(cells, "WORD_LENGTHS", (16, 128))
    names = ["gated DeltaNet, 2 keys", "gated DeltaNet, 4 keys", "HGRN2"] if task in cells.BEYOND else ["LRU"]
    flags = ["--text", str(text), "--steps", "1", "--seeds", "3", "--only", *names, "--learning-rates", "1e-2"]
    rows = rows_of(monkeypatch, tmp_path, task, *flags)
    found = [name for name in cells.EXPERIMENTS[task](*[text][: task == "shakespeare"]).contenders
             if any(each in f"{task} {name}" for each in names)]  # fmt: skip
    assert found and [(row["contender"], row["seed"], row["sweep"]) for row in rows] == [(n, 3, False) for n in found]
    assert all(row[cells.MEASURED[task]] >= 0 for row in rows)
    assert all(row["step_error"] < 1e-5 if task in cells.BEYOND else row[CELL_FIGURES[task][1]] >= 0 for row in rows)


@pytest.mark.parametrize(("task", "best"), [("parity", 3e-3), ("shakespeare", 1e-3)])
def test_a_rate_is_chosen_by_runs_with_a_seed_of_their_own(tmp_path, monkeypatch, task, best):
    figures = {1e-2: 0.4, 3e-3: 0.6, 1e-3: 0.2}  # accuracies, or losses

    def run(experiment, contender, seed, rate, steps):
        return {"seed": seed, "learning_rate": rate, "steps": steps, cells.MEASURED[task]: figures[rate]}

    monkeypatch.setattr(cells, "run", run)
    monkeypatch.setitem(cells.EXPERIMENTS, task, lambda *text: cells.counting(cells.odd_ones))
    flags = ["--text", "text.txt", "--only", "Aaren", "--seeds", "0", "1", "--learning-rates", *map(str, figures)]
    rows = rows_of(monkeypatch, tmp_path, task, *flags)
    swept, reported = rows[:3], rows[3:]
    assert [row["learning_rate"] for row in swept] == list(figures) and all(row["sweep"] for row in swept)
    assert {(row["seed"], row["steps"]) for row in swept} == {(cells.SWEEP_SEED, cells.SWEEP_STEPS[task])}
    assert [(row["seed"], row["learning_rate"], row["steps"]) for row in reported] == [
        (seed, best, cells.STEPS[task]) for seed in (0, 1)
    ]


def test_a_run_is_repeated_by_its_seed():
    experiment = cells.EXPERIMENTS["parity"]()
    first, again, other = (cells.run(experiment, "signed minGRU", seed, 1e-2, 5) for seed in (0, 0, 1))
    assert first["accuracy_64"] == again["accuracy_64"] and first["last_1024"] == again["last_1024"]
    assert any(first[f"accuracy_{length}"] != other[f"accuracy_{length}"] for length in cells.LENGTHS)


@pytest.mark.parametrize("task", ["parity", "majority"])
def test_answers_are_those_of_a_count(task):
    [tokens, targets] = next(cells.EXPERIMENTS[task]().batches(0))
    for row, answers in zip(tokens.tolist(), targets.tolist()):
        for length, answer in enumerate(answers, 1):
            ones = sum(row[:length])
            assert answer == (ones % 2 if task == "parity" else ones > length - ones)


@pytest.mark.parametrize("name", cells.CONTENDERS)
def test_where_sizes_are_to_be_equal_they_are(name):
    experiment = cells.EXPERIMENTS["recall"]()
    sizes = {}
    for contender in ("minGRU", name):
        config = experiment.config(contender, experiment.state_of(contender))
        sizes[contender] = cells.MinRNNForCausalLM(config).num_parameters()
    assert abs(sizes[name] / sizes["minGRU"] - 1) < 0.03  # half a step of 16 states of up to 5 x 64 parameters a layer
    assert cells.EXPERIMENTS["parity"]().state_of(name) == 64


def test_every_cell_is_said_to_be_for_something():
    assert set(cells.GOOD_FOR) == set(cells.CONTENDERS)
    assert {model["cell_type"] for model in cells.CONTENDERS.values()} == set(CELL_TYPES.values())


@pytest.mark.parametrize("name", CELL_TYPES)
def test_every_cell_is_a_contender_past_the_training_length(name):
    torch.manual_seed(0)
    model = long_context.contenders("text")[name]().eval()
    minimal = Family(long_context.VOCABULARY, long_context.LAYERS, 64).build("minGRU", long_context.WIDTH)
    assert abs(parameters(model) / parameters(minimal) - 1) < 0.2
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(tokens).shape == (2, 12, long_context.VOCABULARY)
        assert long_context.states(model, tokens).isfinite().all()


@pytest.mark.parametrize("things", [3, 5])
def test_words_are_answered_by_moving_things(things):
    [tokens, targets] = next(cells.words(things).batches(0))
    moves = list(itertools.permutations(range(things)))
    for row, answers in zip(tokens[:9].tolist(), targets.tolist()):
        places = list(range(things))  # of each thing
        for token, answer in zip(row, answers):
            places = [moves[token][place] for place in places]
            assert moves[answer] == tuple(places)
    assert len(set(tokens.flatten().tolist())) > 0.9 * len(moves)
    lengths = [next(batch)[0].shape[1] for batch in [cells.words(3).batches(0)] for _ in range(201)]
    assert lengths == [8] * 100 + [16] * 100 + [64]


def test_a_key_is_answered_by_the_value_that_came_with_it():
    tokens, targets = cells.keys_and_values(20, torch.Generator().manual_seed(0))
    for row, answers in zip(tokens.tolist(), targets.tolist()):
        values = dict(zip(row[: 2 * cells.PAIRS : 2], row[1 : 2 * cells.PAIRS : 2]))
        asked = [(place, token) for place, token in enumerate(row) if place >= 2 * cells.PAIRS and token in values]
        assert sorted(token for _, token in asked) == sorted(values) and len(values) == cells.PAIRS
        right = {place: values[token] for place, token in asked}
        assert answers == [right.get(place, IGNORED) for place in range(len(row))]
