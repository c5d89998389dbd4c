"""Which rows a source has, and what it is by content."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from distft.config.schema import Source
from distft.corpus.files import BATCH_ROWS, READERS, Row, batch_rows, require
from distft.errors import DataError
from distft.store.digest import files_sha256

# What `datasets` writes beside its .arrow files; never rows.
_NOT_ROWS = {"dataset_info.json", "dataset_dict.json", "state.json"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
    try:
        path = Path(source.path).expanduser()
    except RuntimeError as error:  # ~someone who is not a user here
        raise DataError(str(error), where=source.path, help="Write the path out.") from error
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(child for child in path.iterdir() if child.suffix in READERS and child.name not in _NOT_ROWS)
        if not paths:
            raise DataError("the folder holds no data files", where=str(path), help=f"Rows come from {_suffixes()} files.")
    elif glob.has_magic(source.path):
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not paths:
            raise DataError("no file matches", where=source.path, help=f"Check the pattern; it is seen from {Path.cwd()}.")
    elif path.suffix in READERS or not _HUB_NAME.fullmatch(source.path):
        raise DataError("no such file or folder", where=source.path, help=f"Check `path`; it is seen from {Path.cwd()}.")
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
        if path.suffix not in READERS:
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
        for row in READERS[path.suffix](path, columns(source)):
            empty = False
            yield row
        if empty:
            raise DataError("the file is empty", where=str(path), help="Remove it, or restore it if a download was cut short.")


def _dataset_rows(source: Source) -> Iterator[Row]:
    yield from batch_rows(_dataset_batches(source), source.path)


def _dataset_batches(source: Source) -> Iterator[pa.RecordBatch]:
    dataset = _load_dataset(source.path, source.subset, source.split or "train", source.revision)
    require(columns(source), dataset.column_names, source.path)
    for table in dataset.select_columns(list(columns(source))).with_format("arrow").iter(BATCH_ROWS):
        yield from table.combine_chunks().to_batches()


@lru_cache(maxsize=4)  # the rows that are read are those that were digested, whatever the hub does meanwhile
def _load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name=subset, split=split, revision=revision)
    except Exception as error:  # whatever a loader raises, the user's way out is the same
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


def _suffixes() -> str:
    return ", ".join(READERS)
