"""Which files a source of text names, and their text."""

import glob
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path

from .config import InputError, SourceConfig

# Files whose rows are documents, with the builder of datasets that reads them.
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# Bytes of a file that are read at once.
BLOCK_BYTES = 2**16


def names_files(dataset: str) -> bool:
    """Whether data.dataset is a glob, a text file or a folder with text files: load_dataset would read lines."""
    path = Path(dataset)
    if path.is_dir():
        return any(map(is_plain, files_of_folder(path)))
    return is_plain(path) if path.is_file() else glob.has_magic(dataset)


def is_plain(path: Path) -> bool:
    return path.suffix.lower() == ".txt"


def table_kind(path: Path) -> str | None:
    return TABLES.get(path.suffix.lower())


def training_and_held_out(source: SourceConfig) -> tuple[list[Path], list[Path]]:
    """What data.files and data.held_out_files name. What is held out is never trained on."""
    held_out = expand(source.held_out_files, "data.held_out_files")
    others = {path.resolve() for path in held_out}
    training = expand(source.files or [source.dataset], "data.files")
    return [path for path in training if path.resolve() not in others], held_out


def expand(patterns: list[str], key: str) -> list[Path]:
    """The files that paths, globs and folders name, each once, in the order of the patterns, matches sorted."""
    paths: dict[Path, None] = {}
    for pattern in patterns:
        if Path(pattern).is_dir():
            matches = [path for path in files_of_folder(Path(pattern)) if is_plain(path) or table_kind(path)]
            wanted = (
                f"holds no {', '.join(TABLES)} or .txt file: for others give a glob, {Path(pattern) / '**' / '*.md'}"
            )
        else:
            # A file may have brackets in its name.
            names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
            matches, wanted = [Path(name) for name in names if Path(name).is_file()], "matches no file"
        if not matches:
            raise InputError(f"{key}: {pattern} {wanted}")
        paths |= dict.fromkeys(matches)
    return [*paths]


def files_of_folder(folder: Path) -> list[Path]:
    """Those of its folders too, none that is hidden."""
    return [
        path
        for path in map(Path, sorted(glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)))
        if path.is_file()
    ]


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file, BLOCK_BYTES at a time. Raises InputError where it is not UTF-8 text."""
    decoder, start = getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
            yield decode(decoder, data, start, path)
            start += len(data)
    decode(decoder, b"", start, path)


def decode(decoder: IncrementalDecoder, data: bytes, start: int, path: Path) -> str:
    """The bytes of `path` from `start` on, and before them what is left of a character; b"" ends the file."""
    start_of_character = start - len(decoder.getstate()[0])
    try:
        text = decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        position, value = start_of_character + error.start, error.object[error.start]
        raise InputError(f"{path} is not UTF-8 text: byte {position} is 0x{value:02x}") from error
    if (position := data.find(0)) >= 0:
        raise InputError(f"{path} is not text: byte {start + position} is 0x00")
    return text


def count_characters(path: Path) -> int:
    return sum(map(len, read_blocks(path)))
