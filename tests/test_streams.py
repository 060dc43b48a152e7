"""Runs that read on where they stopped (train.carry_state) and that differentiate in parts (train.chunk_length)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import TEXT, losses, write_config
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import train
from training.checkpoint import list_checkpoints
from training.config import InputError, load_config
from training.data import ParallelStreams, TokenStream, load_documents, token_stream
from training.tokenizers import byte_tokenizer

ROOT = Path(__file__).parent.parent
END = 256


@pytest.fixture
def documents(tmp_path):
    """Settings for a text of several documents, some shorter than a sequence; streams go round it more than once."""
    names = []
    for i, (start, stop) in enumerate(((0, 9), (9, 90), (90, 97), (97, 200))):
        names.append(str(tmp_path / f"document-{i}.txt"))
        Path(names[-1]).write_text(TEXT[start:stop])
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(TEXT[:60])
    return {"data.files": names, "data.held_out_files": [str(held_out)]}


CARRY = {"train.carry_state": True, "model.learned_initial_state": True}


# ---- The data


def test_every_row_reads_on_around_the_text_with_an_end_token_where_it_closes():
    stream = TokenStream([np.arange(10), np.arange(10, 23)])
    batches = ParallelStreams(stream, sequence_length=7, batch_size=3, end_token=END, rows=slice(None))
    circle = [*range(23), END]
    inputs, targets = [], []
    for n in range(11):
        read, predicted = next(batches)
        assert batches.window_starts == [(8 * row + 7 * n) % 24 for row in range(3)]
        inputs.append(read)
        targets.append(predicted)
    for row, (read, predicted) in enumerate(zip(torch.cat(inputs, 1).tolist(), torch.cat(targets, 1).tolist())):
        around = (circle * 6)[8 * row :]
        assert read == around[: len(read)]
        assert predicted == around[1 : len(predicted) + 1]


def test_processes_share_out_the_rows_and_resume_where_they_were():
    def streams(rows):
        return ParallelStreams(TokenStream([np.arange(50)]), 6, 4, END, rows)

    whole, parts = streams(slice(None)), [streams(slice(i, None, 2)) for i in range(2)]
    for _ in range(3):
        batch = next(whole)
        assert torch.equal(torch.stack([next(part) for part in parts], 2).flatten(1, 2), batch)
    resumed = streams(slice(None))
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert torch.equal(next(resumed), next(whole))


def test_a_sequence_longer_than_the_text_is_refused():
    with pytest.raises(InputError, match="^train.sequence_length is 16, .* has 16 tokens: must be at most 15$"):
        ParallelStreams(TokenStream([np.arange(16)]), 16, 2, END, slice(None))


# ---- train.carry_state


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_that_of_the_whole_text_with_each_document_read_alone(run, documents, accumulation):
    settings = documents | CARRY | {"train.gradient_accumulation_steps": accumulation}
    folder = run(**settings, **{"train.learning_rate": 1e-12})  # the model stays what it was
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    stream = token_stream(
        load_documents(load_config(str(folder.parent / "config.yaml"), []).data)[0], byte_tokenizer()
    )
    circle = [*stream.read(0, len(stream)).tolist(), END]
    expected = torch.zeros(8)  # by step
    for row in range(4):
        start = len(circle) * row // 4
        tokens = (circle * 9)[start : start + 8 * 16 + 1]
        # Documents one by one, from nothing: an end token is the first that one reads, and the last that it predicts.
        cuts = [0, *(i for i, token in enumerate(tokens[:-1]) if token == END and i > 0), len(tokens) - 1]
        assert len(cuts) > 2
        predicted = []
        with torch.no_grad():
            for begin, end in zip(cuts, cuts[1:]):
                document = torch.tensor(tokens[begin : end + 1])
                logits = model(document[None, :-1]).logits[0]
                predicted.append(cross_entropy(logits, document[1:], reduction="none"))
        expected += torch.cat(predicted).view(8, 16).mean(1) / 4
    assert losses(folder) == pytest.approx(expected.tolist(), rel=1e-5)


def test_the_held_out_loss_begins_anew_at_each_end_token():
    torch.manual_seed(0)
    config = train.MinRNNConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, learned_initial_state=True)
    model = train.MinRNNForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.rnn.initial_state.normal_()
    text = [5, 6, 7, END, 8, END, 9, 10, 11]
    total = 0.0
    for begin, end in ((0, 3), (3, 5), (5, 8)):
        document = torch.tensor(text[begin : end + 1])
        total += cross_entropy(model(document[None, :-1]).logits[0], document[1:], reduction="sum").item()
    stream = TokenStream([np.array(text)])
    for chunk_tokens in (1, 3, 100):
        assert train.evaluate(model, stream, chunk_tokens, end_token=END)[0] == pytest.approx(total / 8, rel=1e-5)
    assert train.evaluate(model, stream)[0] != pytest.approx(total / 8, rel=1e-3)


@pytest.mark.parametrize(("accumulation", "chunk_length"), [(1, None), (2, None), (2, 5)])
def test_a_resumed_run_has_every_bit_of_one_that_was_never_stopped(
    run, documents, tmp_path, accumulation, chunk_length
):
    settings = documents | CARRY | {"model.dropout": 0.1, "train.chunk_length": chunk_length}
    settings |= {"train.gradient_accumulation_steps": accumulation}
    whole, stopped = run(**settings), tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000008")
    resumed = run(**settings, **{"train.output_dir": str(stopped), "train.resume": True})
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "held_out_loss") == losses(whole, "held_out_loss")
    last, expected = list_checkpoints(resumed)[-1], list_checkpoints(whole)[-1]
    caches = [f"process_0.cache_{i}" for i in range(accumulation)]
    assert sorted(path.name for path in last.glob("*.cache_*")) == caches
    for name in ("model.safetensors", "optimizer.safetensors", "process_0.safetensors", *caches):
        actual, wanted = load_file(last / name), load_file(expected / name)
        assert actual.keys() == wanted.keys()
        assert all(torch.equal(actual[key], wanted[key]) for key in wanted), name


def test_a_checkpoint_without_a_state_is_not_resumed_with_one(run, documents):
    run(**documents)
    with pytest.raises(InputError, match="train.carry_state is True, but .*run.yaml has False"):
        run(**documents, **{"train.carry_state": True, "train.resume": True, "train.steps": 9})


def test_after_a_step_that_was_skipped_the_streams_begin_anew(run, documents, monkeypatch):
    norms = iter([False, True, False])
    original = train.gradient_norm

    def gradient_norm(model):
        return torch.tensor(float("inf")) if next(norms) else original(model)

    batches = []
    following = ParallelStreams.__next__
    monkeypatch.setattr(train, "gradient_norm", gradient_norm)
    monkeypatch.setattr(ParallelStreams, "__next__", lambda self: batches.append(following(self)) or batches[-1])
    settings = {"train.on_nonfinite": "skip", "train.steps": 3, "train.learning_rate": 1e-12}
    folder = run(**documents, **CARRY, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs, targets = batches[2]
        logits = model(inputs, reset_mask=inputs == END).logits
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert losses(folder, "skipped_steps") == [1]
    assert losses(folder)[-1] == pytest.approx(expected, rel=1e-6)


# ---- train.chunk_length


@pytest.mark.parametrize("chunk_length", [1, 5, 16, 100])
def test_training_in_chunks_is_training_on_the_whole_sequence(run, tmp_path, chunk_length):
    settings = {"train.gradient_accumulation_steps": 2, "model.learned_initial_state": True}
    whole = run(**settings)
    parts = run(**settings, **{"train.chunk_length": chunk_length, "train.output_dir": str(tmp_path / "parts")})
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(parts, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-4)


def test_training_in_chunks_in_bf16_follows_fp32_within_its_precision(run, tmp_path):
    full = run(**{"train.chunk_length": 5})
    half = run(**{"train.chunk_length": 5, "train.bf16": "force", "train.output_dir": str(tmp_path / "half")})
    assert losses(half) == pytest.approx(losses(full), rel=0.01)
    assert losses(half) != losses(full)


def test_two_processes_with_a_carried_state_in_chunks_train_like_one(documents, tmp_path, train_main):
    config = write_config(tmp_path, **documents, **CARRY, **{"train.chunk_length": 5, "train.steps": 4})
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2-processes.yaml"]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "--main_process_port",
            "0",
            "train.py",
            config,
            f"train.output_dir={tmp_path}/two",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert train_main(config) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    states = [load_file(list_checkpoints(tmp_path / "two")[-1] / f"process_{i}.cache_0") for i in range(2)]
    one = load_file(list_checkpoints(tmp_path / "run")[-1] / "process_0.cache_0")
    for name, rows in one.items():
        both = torch.stack([state[name] for state in states], 1).flatten(0, 1)
        torch.testing.assert_close(both, rows, rtol=1e-3, atol=1e-5)  # four steps of rounding by Adam


# ---- Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.chunk_length": 0}, "train.chunk_length is 0: must be at least 1"),
        (
            {
                "train.carry_state": True,
                "data": {"files": [], "dataset": "nothing", "streaming": True, "held_out_tokens": 9},
            },
            "train.carry_state reads a stored text on: not with data.streaming or data.task$",
        ),
        (
            {"train.carry_state": True, "train.context_parallel_size": 2},
            "train.context_parallel_size is 2: must be 1 with train.chunk_length and train.carry_state",
        ),
    ],
    ids=["chunk_length", "streaming", "context_parallel_size"],
)
def test_settings_that_cannot_be_are_refused(setting, train_main, changes, message):
    with pytest.raises(InputError, match=message):
        train_main(setting(**changes))
