"""Synthetic tasks with exact answers: what a recurrence can select, remember, compare and count.

A task is a question and its answer, one character a token. The model reads the question and then one MARK for each
token of the answer, and predicts the answer at the marks; nothing else is scored:

    read      a b b a b ? _ _      (parity; the row is filled up with padding)
    predict             1

B batch, T time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .config import InputError, RunConfig, nearest
from .data import IGNORED, position_of
from .tokenizers import character_tokenizer

MARK = "?"
HELD_OUT_LENGTHS = 16  # at most, evenly over data.held_out_lengths
HELD_OUT_ROWS = 128  # of each length
COPIED_TOKENS = 16
NOISE = "."
LETTERS = "abcdefghijklmn"
ALPHANUMERICS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
STEPS = {">": 1, "<": -1, "=": 0}
CYCLE = 5


@dataclass(frozen=True)
class Task:
    """symbols: all characters of questions and answers. question(generator, length) draws one, answer(question)."""

    symbols: str
    question: Callable[[np.random.Generator, int], str]
    answer: Callable[[str], str]
    shortest: int = 1  # question


def any_of(symbols: str) -> Callable[[np.random.Generator, int], str]:
    """Questions of independent uniform symbols."""
    return lambda generator, length: "".join(generator.choice(list(symbols), length))


def hidden_letters(generator: np.random.Generator, length: int) -> str:
    question = np.full(length, NOISE)
    places = generator.choice(length, COPIED_TOKENS, replace=False)
    question[places] = generator.choice(list(LETTERS), COPIED_TOKENS)
    return "".join(question)


def with_a_gap(generator: np.random.Generator, length: int) -> str:
    """A string and its copy, in which one symbol is replaced by "_"; a symbol shorter where `length` is odd."""
    half = length // 2
    string = any_of("ab")(generator, half)
    gap = half + generator.integers(half)
    return (string + string)[:gap] + "_" + (string + string)[gap + 1 :]


def most_frequent(question: str) -> tuple[str, int]:
    """The first symbol of the alphabet among those that occur most often, and how often."""
    counts = Counter(question)
    return max(sorted(counts.items()), key=lambda item: item[1])


def count_as_symbol(question: str) -> str:
    """A count beyond the alphabet is its first symbol."""
    count = most_frequent(question)[1]
    return ALPHANUMERICS[count if count < len(ALPHANUMERICS) else 0]


TASKS = {
    # Gu and Dao, arXiv 2312.00752: 16 letters at random places between noise, to be written in their order.
    "selective_copying": Task(
        LETTERS + NOISE, hidden_letters, lambda question: question.replace(NOISE, ""), shortest=COPIED_TOKENS
    ),
    # Delétang et al., arXiv 2207.02098; the two about majorities: Beck et al., arXiv 2405.04517.
    "bucket_sort": Task("abcde", any_of("abcde"), lambda question: "".join(sorted(question))),
    "missing_duplicate": Task(
        "ab_", with_a_gap, lambda question: question[question.index("_") - len(question) // 2], shortest=2
    ),
    "cycle_navigation": Task(
        "<>=01234", any_of("<>="), lambda question: str(sum(map(STEPS.__getitem__, question)) % CYCLE)
    ),
    "even_pairs": Task("ab01", any_of("ab"), lambda question: str(int(question[0] == question[-1]))),
    "majority": Task(ALPHANUMERICS, any_of(ALPHANUMERICS), lambda question: most_frequent(question)[0]),
    "majority_count": Task(ALPHANUMERICS, any_of(ALPHANUMERICS), count_as_symbol),
    "parity": Task("ab01", any_of("ab"), lambda question: str(question.count("b") % 2)),
}


class Questions:
    """Questions of one task as tensors, right-padded to T = sequence_length, at first what one of `longest` takes."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, longest: int):
        self.task, self.padding = task, tokenizer.pad_token_id
        self.ids = np.zeros(128, np.int64)  # of each character, which are ASCII
        for character in task.symbols + MARK:
            self.ids[ord(character)] = tokenizer.convert_tokens_to_ids(character)
        question = task.question(np.random.default_rng(0), longest)
        self.sequence_length = longest + len(task.answer(question))

    def rows(self, questions: list[str]) -> torch.Tensor:
        """Inputs and targets (2, B, T); targets are IGNORED where nothing is asked."""
        inputs = np.full((len(questions), self.sequence_length), self.padding)
        targets = np.full_like(inputs, IGNORED)
        for row, question in enumerate(questions):
            answer = self.task.answer(question)
            start, end = len(question), len(question) + len(answer)
            inputs[row, :end] = self.encode(question + MARK * len(answer))
            targets[row, start:end] = self.encode(answer)
        return torch.from_numpy(np.stack([inputs, targets]))

    def encode(self, text: str) -> np.ndarray:
        return self.ids[np.frombuffer(text.encode(), np.uint8)]


class TaskBatches:
    """Endless batches (2, B, T), inputs and targets, of questions.

    Batch n is a function of (seed, n) alone, as with RandomWindows. All its questions have one length, uniform over
    `lengths` (shortest and longest), so that every row counts as many scored tokens.
    """

    def __init__(self, questions: Questions, lengths: tuple[int, int], batch_size: int, seed: int, rows: slice):
        self.questions, self.lengths, self.batch_size = questions, lengths, batch_size
        self.seed, self.own_rows, self.position = seed, rows, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        generator = np.random.default_rng((self.seed, self.position))
        length = generator.integers(self.lengths[0], self.lengths[1] + 1)
        drawn = [self.questions.task.question(generator, length) for _ in range(self.batch_size)]
        self.position += 1
        return self.questions.rows(drawn[self.own_rows])

    @property
    def window_starts(self) -> list[int]:
        """Of the last batch: the numbers of its rows since the start of training."""
        first = (self.position - 1) * self.batch_size
        return [*range(first, first + self.batch_size)][self.own_rows]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = position_of(state["position"])


class HeldOutQuestions:
    """HELD_OUT_ROWS questions of each of up to HELD_OUT_LENGTHS lengths, the same for every run.

    draw: any number >= 1; of another one the questions are others.
    """

    is_one_text = False
    predicted_bytes = None  # what is asked has no bytes

    def __init__(self, questions: Questions, lengths: tuple[int, int], draw: int = 1):
        self.questions, self.draw = questions, draw
        self.lengths = np.unique(np.linspace(*lengths, HELD_OUT_LENGTHS).round().astype(int))

    def __len__(self) -> int:
        return len(self.lengths) * HELD_OUT_ROWS * self.questions.sequence_length

    def batches(self, chunk_tokens: int) -> Iterator[torch.Tensor]:
        at_once = max(1, chunk_tokens // self.questions.sequence_length)
        for length in self.lengths:
            generator = np.random.default_rng((length, 0, self.draw))  # no (seed, n) of training gives the same
            drawn = [self.questions.task.question(generator, length) for _ in range(HELD_OUT_ROWS)]
            for start in range(0, HELD_OUT_ROWS, at_once):
                yield self.questions.rows(drawn[start : start + at_once])


def load_task(config: RunConfig, rows: slice) -> tuple[PreTrainedTokenizerBase, TaskBatches, HeldOutQuestions]:
    """Tokenizer, training batches (this process takes `rows` of each) and held-out questions of data.task.

    Raises InputError for an unknown task and for a length that it does not have.
    """
    data, train = config.data, config.train
    if data.task not in TASKS:
        raise InputError(f"unknown data.task {data.task}; the nearest known one is {nearest(data.task, TASKS)}")
    task = TASKS[data.task]
    for key in ("task_lengths", "held_out_lengths"):
        shortest, longest = getattr(data, key)
        if not task.shortest <= shortest <= longest:
            raise InputError(
                f"data.{key} is [{shortest}, {longest}]: must be the shortest question, at least {task.shortest}, "
                "and the longest"
            )
    tokenizer = character_tokenizer([task.symbols, MARK])
    questions = Questions(task, tokenizer, data.task_lengths[1])
    if questions.sequence_length > train.sequence_length:
        raise InputError(
            f"train.sequence_length is {train.sequence_length}: questions of up to {data.task_lengths[1]} tokens "
            f"and their answers take {questions.sequence_length}"
        )
    questions.sequence_length = train.sequence_length
    batches = TaskBatches(questions, data.task_lengths, train.batch_size, train.seed, rows)
    held_out = HeldOutQuestions(Questions(task, tokenizer, data.held_out_lengths[1]), data.held_out_lengths)
    return tokenizer, batches, held_out
