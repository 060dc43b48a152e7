"""Synthetic tasks: the answers are right, only they are scored, and train.py learns from them."""

import json
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from small_runs import losses
from transformers import pipeline

from training.config import InputError, RunConfig
from training.data import IGNORED
from training.tasks import ALPHANUMERICS, HELD_OUT_ROWS, LETTERS, MARK, TASKS, load_task

# What each answer is, said in another way.
ORACLES = {
    "selective_copying": lambda question: "".join(symbol for symbol in question if symbol in LETTERS),
    "bucket_sort": lambda question: "".join(symbol * question.count(symbol) for symbol in "abcde"),
    "missing_duplicate": lambda question: dict(zip(question[len(question) // 2 :], question))["_"],
    "cycle_navigation": lambda question: "01234"[(question.count(">") - question.count("<")) % 5],
    "even_pairs": lambda question: "10"[(len(list(groupby(question))) - 1) % 2],  # a run's end is an ab or a ba
    "majority": lambda question: min(set(question), key=lambda symbol: (-question.count(symbol), symbol)),
    "majority_count": lambda question: (ALPHANUMERICS + ALPHANUMERICS[0] * 300)[max(Counter(question).values())],
    "parity": lambda question: "01"[sum(symbol == "b" for symbol in question) % 2],
}


def run_config(name, lengths=(20, 33), held_out=(40, 64), **train):
    longest = 2 * lengths[1] if name == "bucket_sort" else lengths[1] + (16 if name == "selective_copying" else 1)
    settings = {"sequence_length": longest, "batch_size": 6} | train
    config = OmegaConf.structured(RunConfig)
    OmegaConf.update(config, "data", {"task": name, "task_lengths": list(lengths), "held_out_lengths": list(held_out)})
    OmegaConf.update(config, "train", settings)
    return OmegaConf.to_object(OmegaConf.merge(config, {"train": {
        "steps": 1, "learning_rate": 1, "output_dir": "", "eval_every_steps": 1, "save_every_steps": 1}}))  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
@given(length=st.integers(16, 300), seed=st.integers(0, 10**6))
def test_questions_have_their_length_and_answers_are_right(name, length, seed):
    task = TASKS[name]
    question = task.question(np.random.default_rng(seed), length)
    assert len(question) == (length // 2 * 2 if name == "missing_duplicate" else length)
    assert task.answer(question) == ORACLES[name](question)
    assert set(question + task.answer(question)) <= set(task.symbols) and MARK not in task.symbols


def test_the_questions_of_a_task_differ_in_all_that_they_may():
    generator = np.random.default_rng(0)
    for name, task in TASKS.items():
        answers = Counter(task.answer(task.question(generator, 40)) for _ in range(500))
        assert len(answers) > 1 and max(answers.values()) < 400, name
    gaps = {TASKS["missing_duplicate"].question(generator, 9).index("_") for _ in range(200)}
    assert gaps == {4, 5, 6, 7}
    copying = TASKS["selective_copying"]
    places = {i for _ in range(200) for i, symbol in enumerate(copying.question(generator, 20)) if symbol in LETTERS}
    assert len(places) == 20


@pytest.mark.parametrize("name", TASKS)
def test_a_row_is_the_question_and_marks_and_only_the_answer_is_scored(name):
    tokenizer, batches, held_out = load_task(run_config(name), slice(None))
    for inputs, targets in [next(batches), *held_out.batches(1000)]:
        for read, asked in zip(inputs, targets):
            text = "".join(tokenizer.convert_ids_to_tokens(read[read != tokenizer.pad_token_id]))
            question = text.rstrip(MARK)
            answer = "".join(tokenizer.convert_ids_to_tokens(asked[asked != -100]))
            assert text == question + MARK * len(answer)
            assert answer == ORACLES[name](question)
            assert (asked != -100).nonzero().flatten().tolist() == [*range(len(question), len(text))]
            assert (read[len(text) :] == tokenizer.pad_token_id).all()


def test_batches_depend_on_the_seed_and_the_position_alone_and_processes_share_their_rows():
    def batches(seed=0, rows=slice(None)):
        return load_task(run_config("parity", seed=seed), rows)[1]

    whole, other = batches(), batches(seed=1)
    seen = [next(whole) for _ in range(9)]
    assert len({int((batch[1] != -100).nonzero()[0, 1]) for batch in seen}) > 1  # lengths
    assert not torch.equal(next(other), seen[0])
    resumed = batches()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert torch.equal(next(resumed), next(whole))
    parts = [batches(rows=slice(process, None, 3)) for process in range(3)]
    for batch in seen:
        assert torch.equal(torch.stack([next(part) for part in parts], 2).flatten(1, 2), batch)
    assert parts[1].window_starts == [8 * 6 + 1, 8 * 6 + 4]


def test_held_out_questions_cover_the_lengths_and_do_not_depend_on_the_seed():
    one, two = (load_task(run_config("majority", seed=seed), slice(None))[2] for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(one.batches(999), two.batches(999), strict=True))
    lengths = Counter(int(length) for batch in one.batches(999) for length in (batch[1] != -100).int().argmax(1))
    assert (min(lengths), max(lengths), len(lengths)) == (40, 64, 16) and set(lengths.values()) == {HELD_OUT_ROWS}
    assert one.lengths.tolist() == sorted(lengths)
    two.draw = 2  # others, of the same lengths
    assert not any(torch.equal(*pair) for pair in zip(one.batches(999), two.batches(999), strict=True))


def test_train_learns_a_task_and_leaves_a_model_that_answers(run):
    folder = run(
        **{
            "data.files": [], "data.task": "bucket_sort", "data.task_lengths": [1, 2], "data.held_out_lengths": [1, 2],
            "train.sequence_length": 4, "train.steps": 200, "train.batch_size": 32, "train.eval_every_steps": 100,
        }
    )  # fmt: skip
    assert losses(folder, "held_out_accuracy")[-1] > 0.95
    card = (folder / "README.md").read_text()
    assert "questions of 1 to 2 tokens" in card and "Held-out accuracy" in card and "bytes" not in card
    read = pipeline("text-generation", str(folder))
    question = read.tokenizer("db??", return_tensors="pt")
    answer = read.model(**question).logits[0, 2:].argmax(-1)
    assert read.tokenizer.decode(answer) == "bd"


def test_a_longer_sequence_is_filled_up_with_padding():
    (tokenizer, short, _), (_, long, _) = (
        load_task(run_config("parity", sequence_length=T), slice(None)) for T in (34, 50)
    )
    for _ in range(3):
        batch, padded = next(short), next(long)
        assert padded.shape[-1] == 50 and torch.equal(padded[..., :34], batch)
        assert (padded[1, :, 34:] == IGNORED).all() and (padded[0, :, 34:] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "paritty"}, "^unknown data.task paritty; the nearest known one is parity$"),
        ({"lengths": (9, 8)}, r"^data.task_lengths is \[9, 8\]: must be the shortest question, at least 1, and the"),
        ({"name": "selective_copying", "lengths": (15, 20)}, r"^data.task_lengths is \[15, 20\]: .*at least 16, and"),
        ({"held_out": (0, 8)}, r"^data.held_out_lengths is \[0, 8\]"),
        (
            {"name": "bucket_sort", "sequence_length": 40},
            "^train.sequence_length is 40: questions of up to 33 tokens and their answers take 66$",
        ),
    ],
)
def test_a_task_that_does_not_exist_or_does_not_fit_is_one_line(changes, message):
    with pytest.raises(InputError, match=message):
        load_task(run_config(**{"name": "parity"} | changes), slice(None))


def test_a_task_has_no_other_data(tmp_path, setting, train_main):
    with pytest.raises(InputError, match="set one of data.dataset .*, data.files, data.mixture and data.task"):
        train_main(setting(**{"data.task": "parity"}))
