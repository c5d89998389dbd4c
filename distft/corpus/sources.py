"""Rows of the user's data, one after another, and the identity of that data by its content.

Memory is constant: files are read line by line or batch by batch. Nothing is skipped but blank lines; whatever cannot be read stops the
reading with its file and row.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

from distft.config.schema import Source
from distft.errors import DataError
from distft.store.digest import files_sha256

BATCH_ROWS = 256
BLOCK_BYTES = 1 << 20

# What `datasets` writes beside its .arrow files; never rows.
_NOT_ROWS = {"dataset_info.json", "dataset_dict.json", "state.json"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the source holds it. `number` counts from 1: lines of a .jsonl file, rows of everything else."""

    file: str
    number: int
    value: dict[str, Any]

    @property
    def place(self) -> str:
        """Where an error says it is."""
        return f"{self.file}, row {self.number}"

    @property
    def name(self) -> str:
        """The file without its folders: paths of a machine stay out of artifacts."""
        return Path(self.file).name


def rows(source: Source) -> Iterator[Row]:
    """The rows of a source in order, each with at least the columns that its format reads. A source without rows is an error."""
    found = islice(_all_rows(source), source.limit)
    first = next(found, None)
    if first is None:
        raise DataError("there are no rows", where=source.path, help="Give a source that holds at least one document.")
    yield first
    yield from found


def source_identity(source: Source) -> dict[str, Any]:
    """What the rows are, by content: the bytes of the files in order, never their names. The rows of a `datasets` name are digested
    themselves, as its cache may hold more than the split that was asked for."""
    paths = source_files(source)
    if paths:
        digests = files_sha256(paths)
        content = [digests[path] for path in paths]
    else:
        content = [_rows_sha256(source)]
    return {"content": content, "format": source.format, "columns": list(columns(source)), "limit": source.limit}


def source_files(source: Source) -> list[Path]:
    """The files of a source in the order in which they are read; none for a `datasets` name."""
    path = Path(source.path).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(child for child in path.iterdir() if child.suffix in _READERS and child.name not in _NOT_ROWS)
        if not paths:
            raise DataError("the folder holds no data files", where=str(path), help=f"Rows come from {_suffixes()} files.")
    elif glob.has_magic(source.path):
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not paths:
            raise DataError("no file matches", where=source.path, help="Check the pattern; it is relative to this folder.")
    elif path.suffix in _READERS or not _HUB_NAME.fullmatch(source.path):
        raise DataError("no such file or folder", where=source.path, help="Check `path`; it is relative to this folder.")
    else:
        return []
    for option in ("subset", "split", "revision"):
        if getattr(source, option) is not None:
            raise DataError(
                f"`{option}: {getattr(source, option)}` is for a `datasets` name, and this is a path",
                where=source.path,
                help=f"Remove `{option}`, or give the data set's name as `path`.",
            )
    for path in paths:
        if path.suffix not in _READERS:
            raise DataError(f"no reader for {path.suffix or 'a file without suffix'}", where=str(path), help=_suffixes())
    return paths


def columns(source: Source) -> tuple[str, ...]:
    """The columns that the source's format reads."""
    match source.format:
        case "chat":
            return (source.messages,)
        case "prompt_completion":
            return (source.prompt, source.completion)
        case "text":
            return (source.text,)


def _all_rows(source: Source) -> Iterator[Row]:
    paths = source_files(source)
    if not paths:
        yield from _dataset_rows(source)
    for path in paths:
        empty = True
        for row in _READERS[path.suffix](path, columns(source)):
            empty = False
            yield row
        if empty:
            raise DataError("the file is empty", where=str(path), help="Remove it, or restore it if a download was cut short.")


def _json_lines(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = _utf8(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number)
            if text and not text.isspace():
                yield _checked(Row(str(path), number, _json(text, path, number)), wanted)


def _json_file(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    """A .json file: one array of objects, or an object per line."""
    with _opened(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return _json_array(path, wanted) if start.startswith(b"[") else _json_lines(path, wanted)


def _json_array(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    with _opened(path) as file:
        window = _Window(file, path)
        window.take("[")
        while window.peek() != "]" or window.number:
            value = window.value()
            yield _checked(Row(str(path), window.number, value), wanted)
            if window.peek() == "]":
                break
            window.take(",")
        window.take("]")
        window.take("")


class _Window:
    """A part of a long JSON array, moved along and grown until it holds the row that is wanted whole."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.number = "", 0, 0

    def peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            while self.text[self.at : self.at + 1].isspace():
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            told = [repr(sign) if sign else "the end of the file" for sign in (wanted, found)]
            raise _bad_json(f"expected {told[0]}, found {told[1]}", self.path, self.number + 1)
        self.at += len(wanted)

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
            except (json.JSONDecodeError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos > len(self.text) - 16
                )
                if not (cut and self.grow()):
                    raise _bad_json(str(error), self.path, self.number + 1) from error
            else:
                self.number += 1
                return value

    def grow(self) -> bool:
        """Drops what was read and adds the next block, at least doubling what is left, so that long rows stay linear."""
        self.text, self.at = self.text[self.at :], 0
        block = self.file.read(max(BLOCK_BYTES, len(self.text)))
        try:
            self.text += self.decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            _not_utf8(error, self.path, self.number + 1)
        return bool(block)


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with _arrow_errors(path):
        file = pq.ParquetFile(path)
    with file:
        _require(wanted, file.schema_arrow.names, str(path))
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted))
        yield from _batch_rows(batches, str(path))


def _arrow(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                _require(wanted, reader.schema.names, str(path))
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:  # what `datasets` writes
                stream = pa.ipc.open_stream(file)
                _require(wanted, stream.schema.names, str(path))
                yield from stream

    def narrow() -> Iterator[pa.RecordBatch]:
        for batch in batches():
            chosen = batch.select(list(wanted))
            yield from (chosen.slice(start, BATCH_ROWS) for start in range(0, len(chosen), BATCH_ROWS))

    yield from _batch_rows(narrow(), str(path))


def _dataset_rows(source: Source) -> Iterator[Row]:
    yield from _batch_rows(_dataset_batches(source), source.path)


def _dataset_batches(source: Source) -> Iterator[pa.RecordBatch]:
    dataset = _load_dataset(source.path, source.subset, source.split or "train", source.revision)
    _require(columns(source), dataset.column_names, source.path)
    for table in dataset.select_columns(list(columns(source))).with_format("arrow").iter(BATCH_ROWS):
        yield from table.combine_chunks().to_batches()


@lru_cache(maxsize=4)  # the rows that are read are those that were digested, whatever the hub does meanwhile
def _load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # noqa: BLE001 - whatever a data set's loader raises, the user's way out is the same
        raise DataError(
            f"no such file, and no data set of that name could be loaded: {type(error).__name__}: {error}",
            where=source_name(path, subset, split),
            help="Check the name, the subset, the split and the network; or download it and give the path.",
        ) from error


def source_name(path: str, subset: str | None, split: str) -> str:
    return f"{path}{f' ({subset})' if subset else ''}, split {split}"


def _rows_sha256(source: Source) -> str:
    """Digest of the rows' values, in batches of a fixed size: how the cache's files are cut does not matter."""
    digest = hashlib.sha256()
    for batch in _dataset_batches(source):
        for row in batch.to_pylist():
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _batch_rows(batches: Iterator[pa.RecordBatch], file: str) -> Iterator[Row]:
    number = 0
    while True:
        with _arrow_errors(file):
            batch = next(batches, None)
            values = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for value in values:
            number += 1
            yield Row(file, number, value)


class _arrow_errors:  # noqa: N801 - reads as a statement
    """Says of which file it was that Arrow complained."""

    def __init__(self, file: Path | str) -> None:
        self.file = str(file)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError):
            raise DataError(f"cannot be read: {error}", where=self.file, help="Check that the file is whole.") from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), help="Check its permissions.") from error


def _utf8(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        _not_utf8(error, path, number)


def _json(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _bad_json(str(error), path, number) from error


def _checked(row: Row, wanted: tuple[str, ...]) -> Row:
    if not isinstance(row.value, dict):
        raise DataError(f"a row must be a JSON object, not {type(row.value).__name__}", where=row.place)
    _require(wanted, list(row.value), row.place)
    return row


def _require(wanted: tuple[str, ...], present: list[str], where: str) -> None:
    for column in wanted:
        if column not in present:
            close = difflib.get_close_matches(column, present, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"no column {column!r}; there are: {', '.join(map(repr, present)) or 'none'}",
                where=where,
                help=f"{hint}Name the columns in the source (`messages`, `prompt`, `completion`, `text`), or change `format`.",
            )


def _not_utf8(error: UnicodeDecodeError, path: Path, number: int) -> NoReturn:
    raise DataError(
        f"not UTF-8: byte 0x{error.object[error.start]:02x}",
        where=f"{path}, row {number}",
        help="Save the file as UTF-8.",
    ) from error


def _bad_json(problem: str, path: Path, number: int) -> DataError:
    return DataError(f"not JSON: {problem}", where=f"{path}, row {number}", help="Correct or remove the row.")


def _suffixes() -> str:
    return ", ".join(_READERS)


_READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
