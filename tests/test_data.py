"""Data: documents are split without a leak, tokens are stored without a loss, batches are reproducible."""

import atexit
import glob
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from training.config import STDLIB, DataConfig, InputError, MixedConfig
from training.data import (
    PIECE_CHARACTERS,
    RandomWindows,
    StoredTokens,
    StreamedWindows,
    TokenStream,
    WorkerWindows,
    counted_stream,
    cut,
    is_held_out,
    load_documents,
    streamed_windows,
    token_stream,
)
from training.tokenizers import byte_tokenizer, character_tokenizer

ROOT = Path(__file__).parent.parent
EOS = byte_tokenizer().eos_token_id


def texts(documents):
    return [document["text"] for document in documents]


def tokens(stream):
    return stream.read(0, len(stream)).tolist()


def pairs_tokenizer():
    """A byte tokenizer that takes "é" and the pair of them, and some numbers, as one token."""
    merges = [("Ã", "©"), ("Ã©", "Ã©"), ("1", "2"), ("Ġ", "Ã©")]
    vocabulary = {
        **{char: byte for byte, char in bytes_to_unicode().items()},
        **{a + b: 256 + i for i, (a, b) in enumerate(merges)},
    }
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def folder(tmp_path):
    """A local data set of 300 documents as JSON lines, each with its number and a tail of another length."""
    with (tmp_path / "train.jsonl").open("w") as file:
        for number in range(300):
            file.write(json.dumps({"body": f"{number} {'é' * (number % 40)}", "number": number}) + "\n")
    return tmp_path


# ---- Splits


def documents_of(rows):
    """The texts, of pieces put together."""
    texts = [""]
    for row in rows:
        texts[-1] += row["text"]
        texts += [""] * row["ends"]
    assert not texts.pop()
    return texts


@settings(max_examples=25)
@given(st.lists(st.text(min_size=1), min_size=1), st.floats(0.01, 0.99))
def test_every_file_is_split_at_a_character(tmp_path_factory, contents, fraction):
    folder = tmp_path_factory.mktemp("files")
    contents = [content.replace("\0", "0") for content in contents]
    for number, content in enumerate(contents):
        (folder / f"{number:03d}.txt").write_bytes(content.encode())
    expected = [[], []]
    for content in contents:
        keep = int((1 - fraction) * len(content))
        for texts, text in zip(expected, (content[:keep], content[keep:])):
            texts += [text] * bool(text)
    config = DataConfig(files=[str(folder / "*.txt")], held_out_fraction=fraction)
    if not all(expected):
        with pytest.raises(InputError, match="split of .* has no text"):
            load_documents(config)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.files.BLOCK_BYTES", 3)  # less than some characters have
        assert [documents_of(split) for split in load_documents(config)] == expected


def test_a_text_of_the_size_of_tiny_shakespeare_splits_like_everywhere(tmp_path):
    (tmp_path / "input.txt").write_text("x" * 1_115_394)
    training, held_out = load_documents(DataConfig(files=[str(tmp_path / "input.txt")]))
    assert [sum(map(len, texts(split))) for split in (training, held_out)] == [1_003_854, 111_540]


def test_held_out_files_are_taken_as_they_are_and_never_trained_on(tmp_path):
    for name in ("a", "b", "held"):
        (tmp_path / name).write_text(name * 3)
    config = DataConfig(files=[str(tmp_path / "*")], held_out_files=[str(tmp_path / "h*")])
    assert [texts(split) for split in load_documents(config)] == [["aaa", "bbb"], ["heldheldheld"]]


@pytest.fixture
def mixed_folder(tmp_path_factory):
    """Files of every kind, with 40 documents a table, and names that a glob would misread."""
    folder = tmp_path_factory.mktemp("mixed") / "corpus [1]"
    (folder / "more").mkdir(parents=True)
    rows = {kind: [f"{kind} {i}" for i in range(40)] for kind in ("jsonl", "parquet", "csv")}
    (folder / "a.txt").write_text("a" * 40)
    (folder / "more" / "b.txt").write_text("b" * 40)
    (folder / "c[2].jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows["jsonl"]))
    (folder / "d.csv").write_text("n,text\n" + "\n".join(f"1,{text}" for text in rows["csv"]))
    Dataset.from_dict({"text": rows["parquet"]}).to_parquet(folder / "e.parquet")
    (folder / "notes.md").write_text("not of the corpus")
    return folder, rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("key", ["dataset", "files"])
def test_a_folder_is_read_as_what_its_files_look_like_and_each_gives_held_out_text(mixed_folder, key, streaming):
    folder, rows = mixed_folder
    if streaming:  # datasets leaves the file of a CSV stream open
        (folder / "d.csv").unlink()
        del rows["csv"]
    source = {"dataset": str(folder), "files": [str(folder)]}[key]
    training, held_out = map(
        texts, load_documents(DataConfig(**{key: source}, streaming=streaming, held_out_tokens=9))
    )
    assert training[:2] == ["a" * 36, "b" * 36] and held_out[:2] == ["a" * 4, "b" * 4]
    assert sorted(training[2:] + held_out[2:]) == sorted(sum(rows.values(), []))
    assert {text.split()[0] for text in held_out[2:]} == {*rows}


def test_a_glob_of_tables_is_rows_also_as_data_dataset(mixed_folder):
    folder, rows = mixed_folder
    pattern = f"{glob.escape(str(folder))}/*.csv"
    splits = [load_documents(config) for config in (DataConfig(files=[pattern]), DataConfig(dataset=pattern))]
    for training, held_out in splits:
        assert texts(training) == [text for text in rows["csv"] if not is_held_out(text, 0.1)]
        assert texts(held_out) == [text for text in rows["csv"] if is_held_out(text, 0.1)]
    with pytest.raises(
        InputError, match=r"more holds no .jsonl, .* or .txt file: for others give a glob, .*/\*\*/\*.md$"
    ):
        (folder / "more" / "b.txt").unlink()
        load_documents(DataConfig(files=[str(folder / "more")]))


def mixture(folder, **settings):
    sources = [MixedConfig(files=[str(folder / "a.txt")]), MixedConfig(files=[str(folder / "*.jsonl")], weight=3.0)]
    return DataConfig(mixture=sources, held_out_tokens=50, **settings)


def test_a_mixture_draws_from_each_source_by_its_weight_and_holds_out_of_each(mixed_folder):
    folder, rows = mixed_folder
    (folder / "a.txt").write_text("".join(f"{i:04d}\n" for i in range(500)))
    folder = Path(glob.escape(str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.PIECE_CHARACTERS", 5)
        training, held_out = map(texts, load_documents(mixture(folder)))
        streamed_training, _ = map(texts, load_documents(mixture(folder, streaming=True)))
    assert streamed_training == training
    assert not {*training} & {*held_out}
    plain = [text for text in training if "jsonl" not in text]
    assert plain[:450] == [f"{i:04d}\n" for i in range(450)]  # until each has been
    assert {*training} - {*plain} == {text for text in rows["jsonl"] if not is_held_out(text, 0.1)}
    assert len(plain) / len(training) == pytest.approx(0.25, abs=0.04)
    assert any("jsonl" in text for text in held_out) and any("jsonl" not in text for text in held_out)


def test_the_standard_library_splits_by_file_and_the_same_in_every_process():
    here = [texts(split) for split in load_documents(DataConfig(dataset=STDLIB))]
    program = (
        "from training.data import *\n"
        f"for split in load_documents(DataConfig(dataset={STDLIB!r})): print(*(len(d['text']) for d in split))"
    )
    elsewhere = subprocess.check_output(
        [sys.executable, "-c", program], text=True, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"}
    )
    assert [[len(text) for text in split] for split in here] == [
        [int(length) for length in line.split()] for line in elsewhere.splitlines()
    ]
    training, held_out = map(set, here)
    assert not training & held_out
    assert 7 < len(training) / len(held_out) < 12  # 9 expected
    assert any("class Counter(dict):" in text for text in training | held_out)


def test_documents_of_a_data_set_go_to_one_side_by_their_text(folder):
    duplicates = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(duplicates * 2)
    training, held_out = map(texts, load_documents(DataConfig(dataset=str(folder), text_column="body")))
    assert len(training) + len(held_out) == 600
    assert not set(training) & set(held_out)
    assert 30 <= len(held_out) <= 90  # 60 expected


@given(st.floats(0.001, 0.999))
def test_the_share_of_held_out_keys_is_the_fraction(fraction):
    share = sum(is_held_out(str(number), fraction) for number in range(4000)) / 4000
    assert abs(share - fraction) < 0.04  # five standard deviations


def test_a_split_of_its_own_is_taken_whole(folder):
    Dataset.from_dict({"body": ["held out"]}).to_parquet(folder / "test.parquet")
    Dataset.from_dict({"body": ["one", "", "two"]}).to_parquet(folder / "train.parquet")
    (folder / "train.jsonl").unlink()
    config = DataConfig(dataset=str(folder), held_out_split="test", text_column="body")
    assert [texts(split) for split in load_documents(config)] == [["one", "two"], ["held out"]]


# ---- Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\xff\xfe", r"is not UTF-8 text: byte 4 is 0xff"),
        (b"ab\xc3", r"is not UTF-8 text: byte 2 is 0xc3"),
        (b"\xc3\xa9ab\0c", r"is not text: byte 4 is 0x00"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_the_byte(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr("training.files.BLOCK_BYTES", 3)
    path = tmp_path / "binary"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path} {message}$"):
        load_documents(DataConfig(files=[str(path)]))


def test_a_pattern_without_a_match_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^data.files: .*/\*\.txt matches no file$"):
        load_documents(DataConfig(files=[f"{tmp_path}/*.txt"]))


def test_an_empty_corpus_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"^data: the training split of .*empty\.txt'\] has no text$"):
        load_documents(DataConfig(files=[str(tmp_path / "empty.txt")]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "absent/absent"}, r"^data\.dataset 'absent/absent', split 'train': Couldn't reach"),
        ({"split": "valid"}, r"split 'valid': Unknown split \"valid\"\. Should be one of \['train'\]"),
        ({}, r"^data\.text_column 'text' is not a column of .*: \['body', 'number'\]$"),
    ],
)
def test_a_data_set_that_is_not_there_is_named(folder, settings, message):
    with pytest.raises(InputError, match=message):
        load_documents(DataConfig(**{"dataset": str(folder)} | settings))


# ---- Tokens


@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 30))
def test_pieces_of_a_text_are_bounded_and_lose_nothing(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.data.PIECE_CHARACTERS", size)
        pieces = list(cut([text]))
        assert list(cut(text)) == pieces  # character by character
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)
    assert all(piece.endswith("\n") or "\n" not in piece for piece in pieces[:-1])


def test_a_stream_is_all_documents_with_an_end_token_between_them():
    documents = ["one", "é" * (2 * PIECE_CHARACTERS + 5), "<eos>", "four"]
    stream = token_stream(Dataset.from_dict({"text": documents}), byte_tokenizer())
    expected = [[*text.encode(), EOS] for text in documents]
    assert tokens(stream) == sum(expected, [])[:-1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.data())
def test_reading_a_stream_equals_slicing_the_joined_arrays(lengths, data):
    start, length = data.draw(st.integers(0, sum(lengths) - 1)), data.draw(st.integers(1, 60))
    arrays = [np.arange(100 * i, 100 * i + length, dtype=np.uint16) for i, length in enumerate(lengths)]
    joined = np.concatenate(arrays).astype(np.int64)
    stream = TokenStream(arrays)
    assert len(stream) == len(joined)
    np.testing.assert_array_equal(stream.read(start, start + length).numpy(), joined[start : start + length])


def test_a_vocabulary_beyond_16_bits_keeps_its_ids():
    alphabet = [chr(0x10000 + index) for index in range(2**16 + 1)]
    stream = token_stream(Dataset.from_dict({"text": [alphabet[-1] + alphabet[0]]}), character_tokenizer(alphabet))
    assert tokens(stream) == [2**16, 0]


@pytest.fixture
def small_pieces(monkeypatch):
    sizes = {"files.BLOCK_BYTES": 2**12, "data.PIECE_CHARACTERS": 2**10, "data.PIECES_AT_ONCE": 4}
    for name, value in {**sizes, "data.DIGESTED_AT_ONCE": 2**12}.items():
        monkeypatch.setattr(f"training.{name}", value)


def traced_stream(documents, tokenizer=None):
    """By default of bytes, and how much memory it took to make it and its digest."""
    tracemalloc.start()
    stream = token_stream(documents, tokenizer or byte_tokenizer())
    stream.digest()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return tokens(stream), peak_bytes


LONG_TEXT = "a line of some length, é\n" * 20_000  # 0.5 MB, tokens of 1 MB


def longer_byte_tokenizer():
    """Ids as those of `byte_tokenizer`, as long as no text has the token that this one has more."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["a line of another length"])
    return tokenizer


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), longer_byte_tokenizer()], ids=["bytes", "by the tokenizer"])
def test_a_file_is_tokenised_in_a_fraction_of_its_size(tmp_path, small_pieces, tokenizer):
    (tmp_path / "input.txt").write_text(LONG_TEXT)
    training, _ = load_documents(DataConfig(files=[str(tmp_path / "input.txt")]))
    ids, peak_bytes = traced_stream(training, tokenizer)
    assert ids == list(LONG_TEXT[: int(0.9 * len(LONG_TEXT))].encode())
    assert peak_bytes < 0.4e6


def test_what_is_read_of_stored_tokens_does_not_stay_in_memory():
    def resident_kb():
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    stored = StoredTokens(np.dtype("uint16"))
    for _ in range(64):
        stored.append(np.zeros(2**19, np.uint16))  # 64 MB
    stream = TokenStream([stored])
    before = resident_kb()
    stream.digest()
    assert resident_kb() < before + 2**14
    np.testing.assert_array_equal(stored[-3:], [0, 0, 0])


def test_a_document_of_a_data_set_is_never_a_list_of_its_tokens(small_pieces):
    """Which is 8 bytes a token and more; as an array they are 2."""
    ids, peak_bytes = traced_stream(Dataset.from_dict({"text": [LONG_TEXT, "end"]}))
    assert ids == [*LONG_TEXT.encode(), EOS, *b"end"]
    assert peak_bytes < 6 * len(ids)


@pytest.mark.parametrize("limit", [2, 50, 10**6])
def test_streaming_reads_the_same_held_out_tokens_as_the_stored_data_set(folder, limit):
    streams = []
    for streaming in (False, True):
        config = DataConfig(dataset=str(folder), text_column="body", streaming=streaming, held_out_tokens=limit)
        streams.append(tokens(token_stream(load_documents(config)[1], byte_tokenizer(), limit)))
    assert streams[0] == streams[1]
    assert len(streams[0]) == limit or limit == 10**6


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), character_tokenizer(["0123456789 é"]), pairs_tokenizer()])
def test_bytes_of_what_is_predicted_are_counted_for_any_tokenizer_and_limit(folder, tokenizer):
    """The oracle: tokens of a text without end tokens, decoded, are that text."""
    documents = load_documents(DataConfig(dataset=str(folder), text_column="body"))[1]
    ids = tokens(counted_stream(documents, tokenizer))
    for limit in (2, 9, 50, 301, None):
        stream = counted_stream(documents, tokenizer, limit)
        assert tokens(stream) == ids[:limit]
        predicted = [token for token in ids[1:limit] if token != tokenizer.eos_token_id]
        cut = tokenizer.decode(predicted).encode()  # of a byte tokenizer maybe half a character, which counts whole
        assert stream.predicted_bytes == len(cut.replace("\ufffd".encode(), "é".encode()))


def test_stored_tokens_are_read_from_the_disk(folder):
    documents, _ = load_documents(DataConfig(dataset=str(folder), text_column="body"))
    stream = token_stream(documents, byte_tokenizer())
    owner = stream.arrays[0]
    assert not owner.flags.owndata and not owner.flags.writeable


def test_a_split_of_one_token_is_refused():
    with pytest.raises(InputError, match="nothing to predict"):
        token_stream(Dataset.from_dict({"text": ["a"]}), byte_tokenizer())


# ---- Batches


def windows(length=1000, seed=0, rows=slice(None), sequence_length=16, batch_size=6):
    return RandomWindows(TokenStream([np.arange(length)]), sequence_length, batch_size, seed, rows)


@given(st.integers(2, 40), st.data())
def test_windows_are_stretches_of_the_stream_and_reach_both_of_its_ends(length, data):
    sequence_length = data.draw(st.integers(1, length - 1))
    batches = windows(length, sequence_length=sequence_length, batch_size=600)
    inputs, targets = next(batches)
    assert (inputs == inputs[:, :1] + torch.arange(sequence_length)).all() and (targets == inputs + 1).all()
    assert (inputs.min(), targets.max()) == (0, length - 1)


@given(st.integers(2, 60), st.integers(1, 7), st.data())
def test_windows_of_a_round_read_every_token(length, batch_size, data):
    T = data.draw(st.integers(1, length - 1))
    count = (length - 1) // T + 2
    batches = windows(length, sequence_length=T, batch_size=batch_size)
    read = torch.cat([next(batches)[1] for _ in range(-(-2 * count // batch_size))])  # targets
    for number in range(2):
        assert read[number * count : (number + 1) * count].unique().tolist() == [*range(1, length)]


def test_batches_depend_on_the_seed_and_the_position_alone():
    first = [next(windows()) for _ in range(2)]
    assert torch.equal(*first)
    assert not torch.equal(next(windows(seed=1)), first[0])
    batches, resumed = windows(), windows()
    seen = [next(batches) for _ in range(3)]
    assert not torch.equal(seen[0], seen[1])
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert torch.equal(next(resumed), next(batches))


def test_processes_share_out_the_rows_of_one_batch():
    whole = next(windows())
    parts = [next(windows(rows=slice(process, None, 3))) for process in range(3)]
    assert torch.equal(torch.stack(parts, 2).flatten(1, 2), whole)


def test_a_sequence_longer_than_the_corpus_is_refused():
    windows(17)
    with pytest.raises(InputError, match="^train.sequence_length is 16, .* has 16 tokens: must be at most 15$"):
        windows(16)


def streamed(folder, sequence_length=7, rows=3, config=None):
    config = config or DataConfig(dataset=str(folder), text_column="body", streaming=True, held_out_tokens=50)
    documents = load_documents(config)[0]
    return documents, StreamedWindows(documents, byte_tokenizer(), sequence_length, rows)


def test_streamed_windows_predict_every_token_once_and_start_over_at_the_end(folder):
    documents, batches = streamed(folder)
    epoch = [token for text in texts(documents) for token in (*text.encode(), EOS)]
    predicted = torch.cat([next(batches)[1].flatten() for _ in range(2 * len(epoch) // 21 + 1)]).tolist()
    assert predicted == (epoch * 3)[1 : len(predicted) + 1]


@pytest.mark.parametrize("of_mixture", [False, True])
def test_streamed_windows_resume_where_they_were_also_in_a_second_pass(folder, mixed_folder, of_mixture):
    config = mixture(Path(glob.escape(str(mixed_folder[0]))), streaming=True) if of_mixture else None
    for position in (1, 5, 400):
        _, batches = streamed(folder, config=config)
        for _ in range(position):
            next(batches)
        resumed = batches
        for _ in range(3):  # stopped again before it has read another document
            state = json.loads(json.dumps(resumed.state_dict()))
            _, resumed = streamed(folder, config=config)
            resumed.load_state_dict(state)
        assert all(torch.equal(next(resumed), next(batches)) for _ in range(400))


# ---- Workers


def worker_windows(folder, workers, process=0, processes=1):
    config = DataConfig(dataset=str(folder), text_column="body", streaming=True, held_out_tokens=50)
    documents = load_documents(config)[0]
    return streamed_windows(documents, byte_tokenizer(), 7, 3, process=process, processes=processes, workers=workers)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this process has cores
def test_workers_make_the_batches_of_their_readers_in_turn_and_resume_after_any_of_them(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import from there what they are given
    random_state = torch.get_rng_state()
    readers = [worker_windows(folder, 0, reader, 2) for reader in range(2)]
    expected = [next(readers[number % 2]) for number in range(700)]  # each reader reads its half more than once
    batches, start = worker_windows(folder, 2), 0
    for stop in (0, 5, 700):  # some readers are stopped again before they have made a batch
        state = json.loads(json.dumps(batches.state_dict()))
        batches = worker_windows(folder, 2)
        batches.load_state_dict(state)
        for number in range(start, stop):
            assert torch.equal(next(batches), expected[number])
        start = stop
    last = batches.readers[1]
    assert batches.window_starts == [[1, window] for window in last.window_starts]
    assert last.window_starts[-1] == 350 * 3 * 7 - 7
    assert torch.equal(torch.get_rng_state(), random_state)


class AbortsAtExit:
    """A reader in whose process a library aborts at the exit."""

    def __iter__(self):
        atexit.register(os.abort)
        return self

    def __next__(self):
        return torch.zeros(2, 1, 1)

    def state_dict(self):
        return {}

    def follow(self, state):
        pass


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_end_well_whatever_libraries_do_at_the_exit_of_a_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    batches = WorkerWindows([AbortsAtExit(), AbortsAtExit()])
    next(batches), next(batches)
    workers = batches.batches._workers
    batches.batches._shutdown_workers()
    assert [worker.exitcode for worker in workers] == [0, 0]


ORPHANS = """
import os, signal, sys
sys.path += ["tests", "."]
from pathlib import Path
import test_data

if __name__ == "__main__":
    batches = test_data.worker_windows(Path(sys.argv[1]), 1)
    next(batches)  # the worker has begun
    [worker] = batches.batches._workers
    print(worker.pid, flush=True)
    os.kill(worker.pid, signal.SIGTERM)  # as at the end of a batch job
    for _ in range(20):
        next(batches)
    if sys.argv[2] == "fails":
        raise RuntimeError("this device is gone")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_outlives_the_signals_that_training_saves_after_and_ends_with_it(folder, tmp_path):
    """Where the process is killed, and where it fails."""
    (tmp_path / "script.py").write_text(ORPHANS)
    codes = {"killed": -signal.SIGKILL, "fails": 1}
    command = [sys.executable, tmp_path / "script.py", folder]
    outputs = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = {end: subprocess.Popen([*command, end], **outputs) for end in codes}
    workers = []
    for end, process in processes.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode == codes[end], errors
        workers.append(Path("/proc", str(int(output))))
    deadline = time.monotonic() + 120  # it looks every 5 s
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)
