"""Documents, their split into training and held-out text, and the streams of tokens that batches are read from.

B batch (the rows of this process), T time. A batch (2, B, T) is inputs and targets. Documents are a data set with the
column "text"; end tokens separate them.
"""

import array
import glob
import hashlib
import json
import os
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, islice, repeat, tee
from multiprocessing.util import Finalize
from pathlib import Path
from signal import SIG_DFL, SIG_IGN, SIGINT, SIGTERM, alarm, signal
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    LargeList,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError
from torch.utils.data import DataLoader, get_worker_info
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .config import STDLIB, DataConfig, InputError, SourceConfig, one_line
from .files import TABLES, count_characters, names_files, read_blocks, table_kind, training_and_held_out

# The tests of the standard library are not installed everywhere, and some are deliberately not valid source.
NOT_STDLIB_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
# A tokenizer keeps some 200 bytes a character while it works: long documents are encoded in pieces, few at a time.
PIECE_CHARACTERS = 2**14
PIECES_AT_ONCE = 64
# Documents tokenised per call.
DOCUMENT_BATCH = 64
DIGESTED_AT_ONCE = 2**20  # tokens
READING = "data, while it is read"
IGNORED = -100  # a target that the loss leaves out, by torch's convention


def load_documents(config: DataConfig) -> tuple["Documents", "Documents"]:
    """The training and the held-out documents.

    Raises InputError for a missing file, a file that is not UTF-8 text, an unknown data set, split or column, and for
    a split without text.
    """
    if config.mixture:
        sources = [source_documents(source, config) for source in config.mixture]
        weights = [source.weight for source in config.mixture]
        training, held_out = (mixed(documents, weights) for documents in zip(*sources))
    else:
        training, held_out = source_documents(config, config)
    return as_stream(training) if config.streaming else training, held_out


def source_documents(source: SourceConfig, config: DataConfig) -> tuple["Documents", "Documents"]:
    if source.dataset == STDLIB:
        training, held_out = stdlib_documents(config.held_out_fraction)
    elif source.files or names_files(source.dataset):
        training, held_out = file_documents(source, config)
    else:
        training, held_out = dataset_documents(source, config)
    for name, documents in (("training", training), ("held-out", held_out)):
        if next(iter(documents), None) is None:
            raise InputError(f"data: the {name} split of {source.dataset or source.files} has no text")
    return training, held_out


def mixed(sources: tuple["Documents", ...], weights: list[float]) -> IterableDataset:
    """Documents drawn by weight, until each has been; those of short sources several times. The same at each call."""
    shares = [weight / sum(weights) for weight in weights]
    streams = [as_stream(documents) for documents in sources]
    return interleave_datasets(streams, shares, seed=0, stopping_strategy="all_exhausted")


def as_stream(documents: "Documents") -> IterableDataset:
    """With the column "text" alone: of a text file each piece is a document."""
    if isinstance(documents, Dataset):
        documents = documents.to_iterable_dataset()
    return documents.select_columns("text").cast(Features({"text": Value("string")}))


def stdlib_documents(held_out_fraction: float) -> tuple[Dataset, Dataset]:
    """The source files of the running Python's standard library, split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    splits = ([], [])
    for path in sorted(root.rglob("*.py")):
        if not NOT_STDLIB_SOURCE.intersection(path.relative_to(root).parts):
            with tokenize.open(path) as file:  # honours the encoding that a source file declares
                text = file.read()
            splits[is_held_out(text, held_out_fraction)].append(text)
    return in_memory(splits[False]), in_memory(splits[True])


def file_documents(source: SourceConfig, config: DataConfig) -> tuple["Documents", "Documents"]:
    """Rows of tables, and each text file as one document, with held-out files of their own or a part of every file."""
    training, held_out = training_and_held_out(source)
    if held_out:
        return tuple(split_files(paths, 0.0, source, config.streaming)[0] for paths in (training, held_out))
    return split_files(training, config.held_out_fraction, source, config.streaming)


def split_files(
    paths: list[Path], held_out_fraction: float, source: SourceConfig, streaming: bool
) -> tuple["Documents", "Documents"]:
    """Of each text file the last characters are held out, of tables the rows that `is_held_out` tells."""
    texts = [path for path in paths if not table_kind(path)]
    lengths = [count_characters(path) for path in texts]
    keeps = [int((1 - held_out_fraction) * length) for length in lengths]
    splits = ([text_documents(zip(texts, repeat(0), keeps))], [text_documents(zip(texts, keeps, lengths))])
    for kind in dict.fromkeys(TABLES.values()):
        files = [glob.escape(str(path)) for path in paths if table_kind(path) == kind]
        if files:
            rows = text_rows(
                f"data.files {source.files or source.dataset}", source.text_column,
                path=kind, data_files=files, split="train", streaming=streaming,
            )  # fmt: skip
            for documents, split in zip(splits, split_rows(rows, held_out_fraction)):
                documents.append(split)
    return tuple(map(joined, splits))


def joined(parts: list["Documents"]) -> "Documents":
    parts = [part for part in parts if isinstance(part, IterableDataset) or len(part)]
    if len(parts) < 2:
        return parts[0] if parts else in_memory([])
    return concatenate_datasets([as_stream(part) for part in parts])


def text_documents(stretches: Iterable[tuple[Path, int, int]]) -> "Documents":
    """Documents of which no file is ever in memory as a whole: one a file, its characters `first` to `last` - 1.

    Rows are pieces, {"text": a piece, "ends": whether it is the last of its document}.
    """
    stretches = [(str(path), first, last) for path, first, last in stretches if first < last]
    if not stretches:
        return in_memory([])
    features = Features({"text": Value("string"), "ends": Value("bool")})
    return IterableDataset.from_generator(pieces_of_files, features, {"stretches": stretches})


def pieces_of_files(stretches: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    for path, first, last in stretches:
        left = last - first
        for piece in cut(stretch(read_blocks(Path(path)), first, last)):
            left -= len(piece)
            yield {"text": piece, "ends": not left}


Documents = Dataset | IterableDataset


def in_memory(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": [text for text in texts if text]})


def stretch(blocks: Iterable[str], first: int, last: int) -> Iterator[str]:
    """Characters first to last - 1 of the text."""
    start = 0
    for block in blocks:
        yield block[max(0, first - start) : max(0, last - start)]
        start += len(block)


def dataset_documents(source: SourceConfig, config: DataConfig) -> tuple[Documents, Documents]:
    """A Hub data set or local folder; without a held-out split, documents go by a hash of their text."""
    training = load_split(source, source.split, config.streaming)
    if source.held_out_split:
        return training, load_split(source, source.held_out_split, config.streaming)
    return split_rows(training, config.held_out_fraction)


def split_rows(rows: Documents, held_out_fraction: float) -> tuple[Documents, Documents]:
    return tuple(
        rows.filter(partial(is_in_split, held_out_fraction, held_out), input_columns="text")
        for held_out in (False, True)
    )


@contextmanager
def readable(what: str) -> Iterator[None]:
    """What a broken file of a data set raises while it is read becomes one line about `what`."""
    try:
        yield
    except InputError:
        raise
    except (DatasetsError, OSError, ValueError, TypeError) as error:
        cause = error
        while cause.__cause__ is not None:  # the first one says what is wrong
            cause = cause.__cause__
        raise InputError(f"{what}: {one_line(cause)[:200]}") from error


def load_split(source: SourceConfig, split: str, streaming: bool) -> Documents:
    file = Path(source.dataset)
    where = {"path": str(file.parent), "data_files": file.name} if file.is_file() else {"path": source.dataset}
    where |= {"name": source.dataset_config, "split": split, "streaming": streaming}
    return text_rows(f"data.dataset {source.dataset!r}, split {split!r}", source.text_column, **where)


def text_rows(what: str, column: str, **where: Any) -> Documents:
    """What load_dataset(**where) gives, with `column` alone, as "text", and without the rows that have none."""
    with readable(what):
        documents = load_dataset(**where)
        first = next(iter(documents), {})
    columns = documents.column_names or list(first)
    if column not in columns:
        raise InputError(f"data.text_column {column!r} is not a column of {what}: {columns}")
    documents = documents.select_columns(column)
    if column != "text":
        documents = documents.rename_column(column, "text")
    return documents.filter(partial(has_text, column), input_columns="text")


def has_text(column: str, value: Any) -> bool:
    if not isinstance(value, str | None):
        raise InputError(f"data.text_column {column!r} holds {str(value)[:40]!r}: must hold text")
    return bool(value)


def is_held_out(text: str, fraction: float) -> bool:
    """A fixed pseudo-random choice by the text itself: a document and its exact duplicates land on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def is_in_split(fraction: float, held_out: bool, text: str) -> bool:
    """Of the module, not a lambda: workers get it by its name."""
    return is_held_out(text, fraction) == held_out


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    """Token ids of documents, piece by piece, after the last piece of each an end token."""
    return encode_pieces(chain.from_iterable(chain(cut([text]), [None]) for text in texts), tokenizer)


def encode_pieces(pieces: Iterable[str | None], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    """Token ids of each piece of a document; of None, which stands after the last piece, an end token."""
    pieces = iter(pieces)
    if gives_bytes(tokenizer):  # the text itself, without asking the tokenizer
        end = [tokenizer.eos_token_id]
        yield from (end if piece is None else np.frombuffer(piece.encode(), np.uint8) for piece in pieces)
    while batch := list(islice(pieces, PIECES_AT_ONCE)):
        texts = [piece for piece in batch if piece is not None]
        # split_special_tokens: text that spells a special token is text, not an end of document.
        ids = (
            texts
            and tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        )
        ids = iter(ids)
        yield from ([tokenizer.eos_token_id] if piece is None else next(ids) for piece in batch)


def gives_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is `byte_tokenizer()`, in all that decides about tokens."""
    from .tokenizers import byte_tokenizer  # which reads text by `cut`

    return tokenizer.is_fast and tokenizer.backend_tokenizer.to_str() == byte_tokenizer().backend_tokenizer.to_str()


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """Pieces of at most PIECE_CHARACTERS, cut after a line where possible: no cut inside a word changes its tokens.

    blocks: the text, in parts; the pieces do not depend on where one ends.
    """
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while (end := start + PIECE_CHARACTERS) < len(text):
            end = text.rfind("\n", start, end) + 1 or end
            yield text[start:end]
            start = end
        text = text[start:]
    if text:
        yield text


class StoredTokens:
    """Token ids in a file without a name, which goes with them. A slice is read when it is asked for.

    A memory map would do as much, but what it has read once counts as memory of the process.
    """

    def __init__(self, dtype: np.dtype):
        self.file, self.dtype, self.count = TemporaryFile(), dtype, 0

    def __del__(self) -> None:
        self.file.close()

    def append(self, ids: Sequence[int]) -> None:
        self.file.write(np.array(ids, dtype=self.dtype).data)
        self.count += len(ids)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last, _ = part.indices(self.count)
        self.file.seek(first * self.dtype.itemsize)
        return np.fromfile(self.file, self.dtype, max(0, last - first))


class TokenStream:
    """A sequence of token ids over arrays that stay where they are, on disk where the text or the data set is.

    predicted_bytes: UTF-8 bytes of the text of all tokens but the first, which nothing predicts; None if not counted.
    """

    is_one_text = True

    def __init__(self, arrays: list[np.ndarray | StoredTokens], predicted_bytes: int | None = None):
        self.arrays, self.predicted_bytes = arrays, predicted_bytes
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """SHA-256 of the tokens."""
        digest = hashlib.sha256()
        for tokens in self.arrays:
            for start in range(0, len(tokens), DIGESTED_AT_ONCE):
                digest.update(np.ascontiguousarray(tokens[start : start + DIGESTED_AT_ONCE]))
        return digest.hexdigest()

    def batches(self, chunk_tokens: int) -> Iterator[torch.Tensor]:
        """One chunk after the other as inputs and targets (2, 1, T); every token but the first is a target once."""
        for start in range(0, len(self) - 1, chunk_tokens):
            yield inputs_and_targets(self.read(start, start + chunk_tokens + 1)[None])

    def windows(self, length: int, chunk_tokens: int) -> Iterator[torch.Tensor]:
        """The targets of `batches` in rows of `length`, several at once (2, B, T); what is left is a row alone."""
        whole, at_once = (len(self) - 1) // length, max(1, chunk_tokens // length)
        for row in range(0, whole, at_once):
            tokens = self.read(row * length, min(row + at_once, whole) * length + 1)
            yield inputs_and_targets(tokens.unfold(0, length + 1, length))
        if whole * length < len(self) - 1:
            yield inputs_and_targets(self.read(whole * length, len(self))[None])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Tokens start to stop - 1 as int64 (stop - start,), fewer past the end."""
        first, last = np.searchsorted(self.starts, (start, stop), side="right") - 1
        parts = [
            tokens[max(0, start - offset) : stop - offset]
            for tokens, offset in zip(self.arrays[first : last + 1], self.starts[first : last + 1])
        ]
        return torch.from_numpy(np.concatenate(parts, dtype=np.int64))


def token_stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> TokenStream:
    """All documents, or the first `max_tokens` tokens of them, as one stream. Raises InputError below two tokens."""
    if max_tokens or not isinstance(documents, Dataset):
        return counted_stream(documents, tokenizer, max_tokens)
    dtype = id_type(tokenizer)
    tokens = documents.map(
        lambda batch: {"input_ids": [np.array(ids, dtype) for ids in encode(batch["text"], tokenizer)]},
        batched=True,
        batch_size=DOCUMENT_BATCH,
        remove_columns="text",
        features=Features({"input_ids": LargeList(Value(dtype.name))}),  # a row a piece: see PIECE_CHARACTERS
        desc="Tokenising",
    )
    arrays = [chunk.flatten().to_numpy() for chunk in tokens.data.column("input_ids").chunks]
    arrays[-1] = arrays[-1][:-1]  # end tokens separate documents: none after the last
    return at_least_two(TokenStream(arrays))


def counted_stream(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> TokenStream:
    """A token_stream that knows its `predicted_bytes`, of StoredTokens."""
    pieces, texts = tee(
        piece
        for document in documents
        for piece in (*cut([document["text"]]), *([None] if document.get("ends", True) else []))
    )
    tokens, predicted_bytes = StoredTokens(id_type(tokenizer)), 0
    with readable(READING), tqdm(desc="Tokenising", unit=" tokens", unit_scale=True) as bar:
        for text, ids in zip(texts, encode_pieces(pieces, tokenizer)):
            before = len(tokens)
            tokens.append(ids)
            bar.update(len(ids))
            if text is not None:
                within = max_tokens - before if max_tokens and len(tokens) > max_tokens else None
                predicted_bytes += bytes_of_tokens(text, tokenizer, within)
                predicted_bytes -= bytes_of_tokens(text, tokenizer, 1) if len(ids) and not before else 0
            if max_tokens and len(tokens) > max_tokens:
                break
    # End tokens separate documents: none after the last.
    tokens.count = min(len(tokens) - 1, max_tokens or len(tokens))
    return at_least_two(TokenStream([tokens], predicted_bytes))


def bytes_of_tokens(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> int:
    """UTF-8 bytes of the text that its first so many tokens stand for, in whole characters; None: of all the text."""
    if tokens is None:
        return len(text.encode())
    settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    if not tokenizer.is_fast:  # these do not know where in the text a token is
        return len(tokenizer.decode(tokenizer(text, **settings)["input_ids"][:tokens]).encode())
    places = tokenizer(text, return_offsets_mapping=True, **settings)["offset_mapping"][:tokens]
    return len(text[: max((end for _, end in places), default=0)].encode())


def id_type(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    return np.dtype("uint16" if len(tokenizer) <= 2**16 else "uint32")


def at_least_two(stream: TokenStream) -> TokenStream:
    if len(stream) < 2:
        raise InputError("data: a split of a single token leaves nothing to predict")
    return stream


def token_digests(tokenizer: PreTrainedTokenizerBase, streams: dict[str, TokenStream]) -> dict[str, str]:
    """SHA-256 of each stream and of the vocabulary: by these a text and its tokenizer are known wherever they lie."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    digests = {name: stream.digest() for name, stream in streams.items()}
    return digests | {"vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()}


def position_of(value: Any) -> int:
    """`value`, from a checkpoint, if it can be a position. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no position in the data")
    return value


def inputs_and_targets(windows: torch.Tensor) -> torch.Tensor:
    """Of windows (B, T + 1): all tokens but the last, and the next of each (2, B, T)."""
    return torch.stack([windows[:, :-1], windows[:, 1:]])


class Windows(ABC):
    """Endless batches (2, B, T), inputs and targets, of windows of a stream.

    A batch is a function of its number: that is all there is to resume, and any number of processes that each take
    their `rows` of the same batch train on the same data.

    sequence_length: T, predictions per window. batch_size: windows over all processes.
    Raises InputError if the stream is shorter than one window.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, batch_size: int, rows: slice):
        if len(stream) <= sequence_length:
            raise InputError(
                f"train.sequence_length is {sequence_length}, but the training split has {len(stream)} tokens: "
                f"must be at most {len(stream) - 1}"
            )
        self.stream, self.sequence_length, self.batch_size = stream, sequence_length, batch_size
        self.rows, self.position = rows, 0
        self.window_starts: list[int] = []  # of the last batch, in the stream

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self.window_starts = self.starts(self.position)[self.rows].tolist()
        self.position += 1
        windows = [self.stream.read(start, start + self.sequence_length + 1) for start in self.window_starts]
        return inputs_and_targets(torch.stack(windows))

    @abstractmethod
    def starts(self, position: int) -> np.ndarray:
        """Where the windows (batch_size,) of the batch of this number start."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = position_of(state["position"])


class RandomWindows(Windows):
    """Windows in random order, without replacement: each round over them reads every token of the stream.

    A round cuts the stream at every T-th token, from a random one on. Windows drawn one by one would have left out an
    eighth of the text after as many tokens as are in it twice.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, batch_size: int, seed: int, rows: slice):
        super().__init__(stream, sequence_length, batch_size, rows)
        self.seed = seed
        self.round_windows = (len(stream) - 1) // sequence_length + 2
        self.round = lru_cache(maxsize=1)(self.starts_of_round)

    def starts_of_round(self, number: int) -> np.ndarray:
        generator, T = np.random.default_rng((self.seed, number)), self.sequence_length
        starts = np.arange(self.round_windows) * T - generator.integers(T + 1)
        # Those that would hang over an end of the stream are moved into it.
        return generator.permutation(starts.clip(0, len(self.stream) - 1 - T))

    def starts(self, position: int) -> np.ndarray:
        numbers = position * self.batch_size + np.arange(self.batch_size)
        return np.array([self.round(number)[window] for number, window in zip(*divmod(numbers, self.round_windows))])


class ParallelStreams(Windows):
    """Windows that go on where those of the batch before stopped: each starts at the last target of the one before.

    The rows begin at equal distances and go round the same stream, an end token between its end and its start.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, batch_size: int, end_token: int, rows: slice):
        super().__init__(stream, sequence_length, batch_size, rows)
        self.round_tokens = len(stream) + 1
        self.stream = TokenStream([*stream.arrays, np.array([end_token]), *stream.arrays])  # what runs over the end

    def starts(self, position: int) -> np.ndarray:
        first = np.arange(self.batch_size) * self.round_tokens // self.batch_size
        return (first + position * self.sequence_length) % self.round_tokens


class StreamedWindows:
    """Endless batches (2, rows, T), inputs and targets, of windows that each read on where the one before ended.

    `documents` is the part of the data set that this process reads, in order, and again from the start when it ends.
    """

    def __init__(
        self, documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, rows: int
    ):
        self.documents, self.tokenizer = documents, tokenizer
        self.sequence_length, self.rows = sequence_length, rows
        self.batches: Iterator[list[str]] | None = None  # begun by the process that reads them
        self.position: dict[str, Any] | None = None  # in the documents; None: nothing is read yet
        # The tokens of whole batches of documents, each with the position before it and its length; how many are used.
        self.tokens = array.array("I")
        self.origins: deque[tuple[dict[str, Any] | None, int]] = deque()
        self.used = 0
        self.read_tokens = 0

    def document_batches(self) -> Iterator[list[str]]:
        while True:
            with readable(READING):
                for batch in self.documents.iter(batch_size=DOCUMENT_BATCH):
                    self.position = self.documents.state_dict()  # which tells no loaded position before it is read
                    yield batch["text"]
            self.documents.set_epoch(self.documents.epoch + 1)  # a loaded position holds for one epoch only

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self.batches = self.batches or self.document_batches()
        start, stop = self.used, self.used + self.rows * self.sequence_length
        while len(self.tokens) <= stop:
            position, before = self.position, len(self.tokens)
            for ids in encode(next(self.batches), self.tokenizer):
                self.tokens.extend(ids)
            self.origins.append((position, len(self.tokens) - before))
        tokens = torch.from_numpy(np.array(self.tokens[start : stop + 1], dtype=np.int64))
        windows = tokens.unfold(0, self.sequence_length + 1, self.sequence_length)
        self.used = stop
        self.read_tokens += stop - start
        while self.used >= self.origins[0][1]:
            _, length = self.origins.popleft()
            del self.tokens[:length]
            self.used -= length
        return inputs_and_targets(windows)

    @property
    def window_starts(self) -> list[int]:
        """Of the last batch, in all that this process has read."""
        return [self.read_tokens - left * self.sequence_length for left in range(self.rows, 0, -1)]

    def state_dict(self) -> dict[str, Any]:
        """A position in the documents and how many tokens after it are used: the tokens themselves would be many."""
        position = self.origins[0][0] if self.origins else self.position
        return {"position": position, "used": self.used, "read_tokens": self.read_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["position"]:
            self.documents.set_epoch(state["position"]["epoch"])
            self.documents.load_state_dict(state["position"])
        self.follow(state)

    def follow(self, state: dict[str, Any]) -> None:
        """Take over the state of a worker, in the process that does not read."""
        self.position = state["position"]
        self.used, self.read_tokens = position_of(state["used"]), position_of(state["read_tokens"])


class WorkerWindows:
    """The batches of several readers in turn, each made ahead of time in a process of its own.

    With each batch comes the state of its reader, so that what was read ahead is read again after a resume.
    """

    def __init__(self, readers: list[StreamedWindows]):
        self.readers, self.turn = readers, 0  # whose batch is next
        self.batches: Iterator[tuple[torch.Tensor, dict[str, Any]]] | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self.batches is None:
            loader = DataLoader(
                ReaderOfWorker(self.readers[self.turn :] + self.readers[: self.turn]),
                batch_size=None,
                num_workers=len(self.readers),
                collate_fn=unchanged,
                worker_init_fn=begin_worker,
                generator=torch.Generator(),  # or it would draw from the random state of training
                # A fork would copy threads and signal handlers; what a forkserver starts outlives a training process
                # that is killed.
                multiprocessing_context="spawn",
            )
            self.batches = iter(loader)
        try:
            batch, state = next(self.batches)
        except InputError as error:  # with the traceback of the worker, whose last line it is
            raise InputError(str(error).splitlines()[-1].partition(": ")[2]) from error
        self.readers[self.turn].follow(state)
        self.turn = (self.turn + 1) % len(self.readers)
        return batch

    @property
    def window_starts(self) -> list[list[int]]:
        """Of the last batch: the number of its reader, and the window in all that this one has read."""
        last = (self.turn - 1) % len(self.readers)
        return [[last, start] for start in self.readers[last].window_starts]

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn, "readers": [reader.state_dict() for reader in self.readers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn = position_of(state["turn"]) % len(self.readers)
        for reader, of_reader in zip(self.readers, state["readers"], strict=True):
            reader.load_state_dict(of_reader)


class ReaderOfWorker(torch.utils.data.IterableDataset):
    """What a DataLoader asks each of its workers for: the batches of one reader, with its state after each."""

    def __init__(self, readers: list[StreamedWindows]):
        self.readers = readers

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        reader = self.readers[get_worker_info().id]
        return ((batch, reader.state_dict()) for batch in reader)


def unchanged(batch: Any) -> Any:
    return batch


def begin_worker(worker: int) -> None:
    """Ctrl-C and the end of a batch job reach all processes; training, which saves then, has to find its workers."""
    signal(SIGINT, SIG_IGN)
    signal(SIGTERM, end_soon)
    # At its end, last of all: a worker has nothing to save, and what libraries do at the exit of a process is now and
    # then an abort, of which the DataLoader makes an exception in the midst of training.
    Finalize(None, os._exit, args=(0,), exitpriority=-1000)


def end_soon(number: int, frame: Any) -> None:
    """In the 30 s that a launcher gives, or at the next SIGTERM: a training process that fails waits for this."""
    signal(SIGTERM, SIG_DFL)
    alarm(30)


def streamed_windows(
    documents: IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    rows: int,
    *,
    process: int,
    processes: int,
    workers: int,
) -> StreamedWindows | WorkerWindows:
    """Batches (2, rows, T) of one of several processes, read by itself or by its workers, each of other documents.

    Batch n is that of worker n modulo `workers`: their number decides about the data, as that of the processes does.
    """
    count = max(workers, 1)
    readers = [
        StreamedWindows(
            split_dataset_by_node(documents, process * count + worker, processes * count),
            tokenizer,
            sequence_length,
            rows,
        )
        for worker in range(count)
    ]
    return WorkerWindows(readers) if workers else readers[0]
