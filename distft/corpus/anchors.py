"""Anchors: the words of an answer that somebody marked as the ones to be learned; objectives hold the rest (LAwF).

They stand in a JSONL file of their own (`data.train.anchors`), a line per row of the data, so that data need not be rewritten to be
annotated, and a teacher cache, which does not depend on them, outlives every annotation:

    {"row": 3, "anchors": [{"message": 2, "start": 10, "end": 14, "text": "1917"}]}

`row` and `message` count from 1 as in error messages; `file` names the row's file where the source has several. `start` and `end`
count characters of the message's content, of a completion, or of a text; without `start` an anchor begins there, without `end` it
goes on to the end of the turn or text, and takes the token that ends it along. `text`, where given, must be what stands there: an
annotation that belongs to other data is found out.

A token is an anchor when it holds at least one character of one, the rule by which it is supervised. Like supervision it leaves
token 0 out, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.corpus.files import READERS, Row
from distft.errors import DataError
from distft.progress import say
from distft.store.digest import files_sha256

Span = tuple[int, int]
"""Characters [start, end)."""

_LINE = {"row", "file", "anchors"}
_ANCHOR = {"message", "start", "end", "text"}
_MEND = 'A line is {"row": 3, "anchors": [{"message": 2, "start": 10, "end": 14, "text": "1917"}]}. Correct or remove it.'


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """Characters [start, end) of a content, or those from `start` on with what ends them. `message` counts from 1, in chats alone."""

    start: int
    end: int | None
    message: int | None
    text: str | None
    place: str
    """Where the annotation says so, for errors."""

    def within(self, content: str) -> Span:
        """Its characters, once they are known to be there and to be the right ones."""
        end = len(content) if self.end is None else self.end
        if not self.start < end <= len(content):
            raise self.refused(f"is at characters {self.start} to {end}, and what it is in has {len(content)}")
        found = content[self.start : end]
        if self.text is not None and found != self.text:
            raise self.refused(f"is said to be {self.text!r}, and at characters {self.start} to {end} stands {found!r}")
        return self.start, end

    def carried(self, content: str, kept: str) -> Span:
        """Its characters in what a chat template kept of the content: all of it, or its end, white space around it aside."""
        start, end = self.within(content)
        if kept.strip() == content.strip():
            offset = _left(kept) - _left(content)
        elif content.rstrip().endswith(kept.strip()):
            offset = _right(kept) - _right(content)
        else:
            raise self.refused("cannot be traced: the chat template rewrites what it is in")
        lost = content[start : min(end, max(start, _left(kept) - offset))].strip()
        if lost:
            raise self.refused(f"marks {lost!r}, which the chat template leaves out")
        return max(0, start + offset), min(len(kept), end + offset)

    def refused(self, problem: str, help: str = "Was it made for other data? Correct or remove it.") -> DataError:
        return DataError(f"the anchor {problem}", where=self.place, help=help)


@dataclass(frozen=True, slots=True)
class AnnotatedRow(Row):
    """A row of which somebody marked what is to be learned."""

    anchors: tuple[Anchor, ...]


def annotation_file(path: str) -> Path:
    """The file, once it is known to be one."""
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:  # ~someone who is not a user here
        raise DataError(str(error), where=path, help="Write the path out.") from error
    if found.suffix != ".jsonl":
        raise DataError("anchors are read from a .jsonl file", where=path, help=_MEND)
    if not found.is_file():
        raise DataError("no such file", where=path, help=f"Check data.train.anchors; it is seen from {Path.cwd()}.")
    return found


def annotation_identity(path: str, files: Sequence[Path]) -> dict[str, Any]:
    """What the anchors are, by content; of several data files it says by their names which it means, and so they are part of it."""
    file = annotation_file(path)
    names = {"files": [one.name for one in files]} if len(files) > 1 else {}
    return {"content": files_sha256([file])[file], **names}


class Annotation:
    """The anchors of a source's rows, by file and row."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._found: dict[tuple[str | None, int], list[Anchor]] = {}
        for line in READERS[".jsonl"](annotation_file(path), ()):
            key, anchors = _line(line)
            self._found.setdefault(key, []).extend(anchors)
        if not self._found:
            raise DataError("there are no anchors", where=path, help=_MEND)

    def mark(self, rows: Iterable[Row], *, names: Sequence[str], limit: int | None) -> Iterator[Row]:
        """The rows, each with its anchors, out of files that are called so, in their order. When they are over, an anchor whose row
        never came is an error, unless it lies behind the last row that `limit` lets in: what is not learned would be missed by
        nobody."""
        self._check_names(names)
        left = {key: tuple(anchors) for key, anchors in self._found.items()}
        count, last = 0, (0, 0)
        for row in rows:
            count, last = count + 1, (names.index(row.name), row.number)
            anchors = (*left.pop((None, row.number), ()), *left.pop((row.name, row.number), ()))
            yield AnnotatedRow(row.file, row.number, row.value, anchors) if anchors else row
        beyond = 0
        for (name, number), anchors in left.items():
            if count == limit and (0 if name is None else names.index(name), number) > last:
                beyond += 1
                continue
            raise DataError(
                f"there is no row {number}{f' of {name}' if name else ''} in data.train, which has {count} rows",
                where=_of(anchors[0]), help="Rows are counted by lines, blank ones included. Correct or remove the line.",
            )  # fmt: skip
        if beyond:
            say(f"data.train.limit={limit} leaves out {beyond} of the {len(self._found)} annotated rows")

    def _check_names(self, names: Sequence[str]) -> None:
        for (name, _), anchors in self._found.items():
            if name is None and len(names) > 1:
                raise DataError(f"the data has {len(names)} files, and the line does not say in which its row is",
                                where=_of(anchors[0]), help='Add "file": the name of the file, without its folders.')  # fmt: skip
            if name is not None and names.count(name) != 1:
                there = "no file" if name not in names else f"{names.count(name)} files"
                raise DataError(f"{there} of data.train {'are' if name in names else 'is'} called {name}", where=_of(anchors[0]),
                                help="Correct the name, or rename the data's files so that each has its own.")  # fmt: skip


def _left(text: str) -> int:
    return len(text) - len(text.lstrip())


def _right(text: str) -> int:
    return len(text.rstrip())


def _of(anchor: Anchor) -> str:
    return anchor.place.rpartition(", anchor ")[0]


def _line(line: Row) -> tuple[tuple[str | None, int], tuple[Anchor, ...]]:
    value, where = line.value, f"{line.file}, line {line.number}"
    for key in ("row", "anchors"):
        if key not in value:
            raise DataError(f"the line has no {key!r}", where=where, help=_MEND)
    _only(value, _LINE, "a line", where)
    name = value.get("file")
    if name is not None and (not isinstance(name, str) or not name or Path(name).name != name):
        raise DataError(f"`file` is {name!r}; the name of a data file without its folders is wanted", where=where, help=_MEND)
    row = _number(value["row"], "row", 1, where)
    if not isinstance(value["anchors"], list) or not value["anchors"]:
        raise DataError("`anchors` is no list of at least one anchor", where=where, help=_MEND)
    return (name, row), tuple(_anchor(one, f"{where} (row {row}), anchor {n}") for n, one in enumerate(value["anchors"], start=1))


def _anchor(value: Any, where: str) -> Anchor:
    if not isinstance(value, dict):
        raise DataError(f"an anchor must be an object, not {type(value).__name__}", where=where, help=_MEND)
    _only(value, _ANCHOR, "an anchor", where)
    start = _number(value.get("start", 0), "start", 0, where)
    end = None if value.get("end") is None else _number(value["end"], "end", 0, where)
    if end is not None and end <= start:
        raise DataError(f"the anchor ends at character {end} and starts at {start}", where=where, help="`end` is not part of it.")
    message = None if value.get("message") is None else _number(value["message"], "message", 1, where)
    if not isinstance(value.get("text"), str | None):
        raise DataError(f"`text` is {value['text']!r}; a string is wanted", where=where, help=_MEND)
    return Anchor(start=start, end=end, message=message, text=value.get("text"), place=where)


def _number(value: Any, name: str, least: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"`{name}` is {value!r}; a whole number from {least} on is wanted", where=where, help=_MEND)
    return value


def _only(value: dict[str, Any], known: set[str], what: str, where: str) -> None:
    unknown = sorted(set(value) - known)
    if unknown:
        raise DataError(f"{what} has {unknown[0]!r}; known are {', '.join(sorted(known))}", where=where, help=_MEND)
