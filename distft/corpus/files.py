"""Rows out of one file: .jsonl, .json, .parquet or .arrow.

Memory is constant: files are read line by line or batch by batch. Nothing is skipped but blank lines; whatever cannot be read stops
the reading with its file and row.
"""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow as pa

from distft.errors import DataError

BATCH_ROWS = 256
BLOCK_BYTES = 1 << 20

_DECODER = json.JSONDecoder()
_MEND = "Correct or remove the row."


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
        require(wanted, file.schema_arrow.names, str(path))
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=list(wanted))
        yield from batch_rows(batches, str(path))


def _arrow(path: Path, wanted: tuple[str, ...]) -> Iterator[Row]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                require(wanted, reader.schema.names, str(path))
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:  # what `datasets` writes
                stream = pa.ipc.open_stream(file)
                require(wanted, stream.schema.names, str(path))
                yield from stream

    def narrow() -> Iterator[pa.RecordBatch]:
        for batch in batches():
            chosen = batch.select(list(wanted))
            yield from (chosen.slice(start, BATCH_ROWS) for start in range(0, len(chosen), BATCH_ROWS))

    yield from batch_rows(narrow(), str(path))


def batch_rows(batches: Iterator[pa.RecordBatch], file: str) -> Iterator[Row]:
    """The rows of record batches, numbered from 1."""
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
    except (ValueError, RecursionError) as error:  # not JSON, or a number of too many digits
        raise _bad_json(str(error), path, number) from error


def _checked(row: Row, wanted: tuple[str, ...]) -> Row:
    if not isinstance(row.value, dict):
        raise DataError(f"a row must be a JSON object, not {type(row.value).__name__}", where=row.place, help=_MEND)
    require(wanted, list(row.value), row.place)
    return row


def require(wanted: tuple[str, ...], present: list[str], where: str) -> None:
    """Refuses a row or file that lacks a column."""
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
    return DataError(f"not JSON: {problem}", where=f"{path}, row {number}", help=_MEND)


READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
