"""States of what was read before, so that a prompt that begins the same is read from there on.

A state is a few kilobytes whatever its length, so one is kept for each turn and for borders within long prompts. It is
found by a SHA-256 of the tokens that it stands for. Least recently used states are dropped first.
"""

import hashlib
import mmap
import os
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .modeling_minrnn import MinRNNPreTrainedModel
from .state_file import load_state, model_hash, save_state

FINE_TOKENS, COARSE_TOKENS = 256, 4096  # between kept states, in the first COARSE_TOKENS of a prompt and after

SLAB_BYTES = 2**20

logger = logging.get_logger(__name__)


def next_border(length: int) -> int:
    """The first length above this one at which the state of a prompt is kept."""
    step = FINE_TOKENS if length < COARSE_TOKENS else COARSE_TOKENS
    return (length // step + 1) * step


class Digest:
    """A hash of the tokens given so far, and their number."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self.length = 0

    def update(self, tokens: Sequence[int]) -> None:
        self._sha.update(tokens if isinstance(tokens, memoryview) else array("q", tokens))
        self.length += len(tokens)

    def name(self) -> str:
        return f"{self.length}-{self._sha.hexdigest()}"

    def copy(self) -> "Digest":
        other = Digest()
        other._sha, other.length = self._sha.copy(), self.length
        return other


@dataclass
class Entry:
    nbytes: int
    layers: list[tuple[Tensor, Tensor]] | None  # (state, window) of one row; None while only the file has them


class PrefixStore:
    """States by the hash of their tokens, in at most `max_bytes`.

    Args:
        max_bytes: of tensors; 0 to keep nothing.
        folder: None, or where the states are written as files of `state_file`, to be found again after a restart; in a
            subfolder for each model, named by its hash. A damaged file is passed over, with a warning.

    Attributes:
        hits, misses: prompts that went on from a state, and that were read from the start.
        reused_tokens: tokens that were not read again.
        evicted: states dropped for want of room.
    """

    def __init__(self, model: MinRNNPreTrainedModel, max_bytes: int, folder: str | os.PathLike | None = None):
        self.model, self.max_bytes = model, max_bytes
        self.hits = self.misses = self.reused_tokens = self.evicted = self.nbytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._room = torch.empty(0, dtype=torch.uint8)  # of the latest slab
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="minrnn-prefixes")  # in order, beside the decoding
        self._root, self._folder = folder, self._open_folder(folder)

    def find(self, tokens: Sequence[int]) -> tuple[DynamicCache, Digest]:
        """What to read the rest of a prompt from: the longest state that leaves a token to read, or nothing yet."""
        digest, found, ids = Digest(), Digest(), memoryview(array("q", tokens))
        with self._lock:
            for length in sorted(self._lengths):
                if length >= len(tokens):
                    break
                digest.update(ids[digest.length : length])
                if digest.name() in self._entries:
                    found = digest.copy()
        cache = self._load(found) if found.length else None
        with self._lock:
            self.hits += cache is not None
            self.misses += cache is None
            self.reused_tokens += 0 if cache is None else found.length
        return (DynamicCache(config=self.model.config), Digest()) if cache is None else (cache, found)

    def put(self, digest: Digest, cache: DynamicCache, row: int = 0) -> None:
        """Keep a row of a cache that has read the tokens of `digest`."""
        name = digest.name()
        with self._lock:
            if name in self._entries:
                self._entries.move_to_end(name)
                return
        layers = [(self._copy(x.keys[row : row + 1]), self._copy(x.values[row : row + 1])) for x in cache.layers]
        entry = Entry(sum(state.nbytes + window.nbytes for state, window in layers), layers)
        if entry.nbytes <= self.max_bytes:
            self._add(name, entry)
            if self._folder is not None:
                self._writer.submit(self._write, name, entry)

    def clear(self) -> None:
        """Forget everything, as the weights have changed."""
        self.flush()  # or states of the old ones would be written as of the new
        with self._lock:
            while self._entries:
                self._pop(next(iter(self._entries)))
        self._folder = self._open_folder(self._root)

    def flush(self) -> None:
        """Wait for what is being written."""
        self._writer.submit(lambda: None).result()

    def counters(self) -> dict[str, int]:
        names = ("hits", "misses", "reused_tokens", "evicted", "nbytes")
        return {name: getattr(self, name) for name in names} | {"states": len(self._entries)}

    def _copy(self, tensor: Tensor) -> Tensor:
        """In a slab of main memory outside the heap of the C library, which goes with the last of its tensors.

        In the heap they would lie between the large tensors that come and go with a chunk of a prompt, whose room
        could then not be used again: a state of 37 kB would cost 3 MB.
        """
        with self._lock:
            size = -(-tensor.nbytes // 8) * 8
            if size > len(self._room):
                self._room = torch.frombuffer(mmap.mmap(-1, max(size, SLAB_BYTES)), dtype=torch.uint8)
            part, self._room = self._room[: tensor.nbytes], self._room[size:]
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _open_folder(self, root: str | os.PathLike | None) -> Path | None:
        if root is None:
            return None
        self._hash = model_hash(self.model)
        folder = Path(root, self._hash)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*-*.safetensors"), key=os.path.getmtime):
            self._add(path.stem, Entry(path.stat().st_size, None))
        return folder

    def _add(self, name: str, entry: Entry) -> None:
        with self._lock:
            self._pop(name, is_dropped=False)  # of another thread that read the same
            self._entries[name] = entry
            self._lengths[_length(name)] += 1
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                self._pop(next(iter(self._entries)))
                self.evicted += 1

    def _pop(self, name: str, is_dropped: bool = True) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        self.nbytes -= entry.nbytes
        length = _length(name)
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
        if is_dropped and self._folder is not None:
            self._writer.submit(self._path(name).unlink, missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"

    def _load(self, digest: Digest) -> DynamicCache | None:
        name = digest.name()
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return None
            self._entries.move_to_end(name)
        if self._folder is not None:
            self._writer.submit(os.utime, self._path(name))  # the order of use, for after a restart
        if entry.layers is None:
            try:
                cache = load_state(self._path(name), self.model, known_hash=self._hash)
                if cache.get_seq_length() != digest.length:
                    raise ValueError(f"{self._path(name)} holds {cache.get_seq_length()} tokens, not {digest.length}")
            except (OSError, ValueError) as error:
                logger.warning(f"a kept state is passed over: {error}")
                with self._lock:
                    self._pop(name)
                return None
            entry.layers = [(self._copy(layer.keys), self._copy(layer.values)) for layer in cache.layers]
            return cache
        return cache_of(self.model, entry.layers, digest.length)

    def _write(self, name: str, entry: Entry) -> None:
        try:
            cache = cache_of(self.model, entry.layers or [], _length(name))
            save_state(cache, self._path(name), self.model, overwrite=True, known_hash=self._hash)
        except OSError as error:
            logger.warning_once(f"states are not kept in {self._folder}: {error}")


def cache_of(model: MinRNNPreTrainedModel, layers: Sequence[tuple[Tensor, Tensor]], length: int) -> DynamicCache:
    """A cache that has read so many tokens, of a (state, window) for each layer."""
    cache = DynamicCache(config=model.config)
    for i, (state, window) in enumerate(layers):
        cache.update(state.to(model.device), window.to(model.device), i, num_tokens=length)
    return cache


def _length(name: str) -> int:
    return int(name.partition("-")[0])
