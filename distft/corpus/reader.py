"""Reads CORPUS: documents in order or by number, straight out of memory-mapped files."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distft.corpus.build import KIND
from distft.corpus.tabulate import ANCHOR, SCHEMA, SUPERVISED
from distft.errors import ConfigError, CorruptArtifactError, DataError, MissingArtifactError
from distft.store.location import Location
from distft.store.manifest import Manifest, fetch, read_manifest
from distft.store.shards import read_shard

NEAR_DIGITS = 4
"""A name that shares fewer first digits with a digest is not one of it that was mistyped."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `supervised[t]` belongs to token t, which is predicted from those before it; `supervised[0]` is False. Anchors are
    supervised tokens; none in a corpus without annotation. `tokens` is a view of the file."""

    digest: str
    tokens: npt.NDArray[np.uint32]
    supervised: npt.NDArray[np.bool_]
    anchors: npt.NDArray[np.bool_]
    file: str
    row: int

    def __len__(self) -> int:
        return len(self.tokens)


class Corpus:
    """A committed corpus, without the documents that are left out by name. A split's files are fetched and checked when it is first
    asked for."""

    def __init__(self, folder: Location, manifest: Manifest, staging: Path, exclude: Sequence[str] = ()) -> None:
        self.folder, self.manifest, self.staging, self.exclude = folder, manifest, staging, tuple(exclude)
        self._splits: dict[str, _Split] = {}
        if exclude:
            self._leave_out(exclude)

    @classmethod
    def open(cls, folder: Location, staging: Path, exclude: Sequence[str] = ()) -> Corpus:
        """The corpus in `folder`; `staging` is where files of a remote store are kept. `exclude` (the run file's `data.exclude`) names
        documents, by digest or how it begins: counts, order and numbers are as if no row had ever made them."""
        manifest = read_manifest(folder)
        if manifest is None:
            raise MissingArtifactError("no corpus is committed here", where=folder.url, help="Run `distft tokenize CONFIG`.")
        if manifest.kind != KIND:
            raise CorruptArtifactError(f"a {manifest.kind} where a corpus should be", where=folder.url)
        return cls(folder, manifest, staging, exclude)

    @property
    def splits(self) -> tuple[str, ...]:
        """`train`, and `heldout` where the data has one."""
        return tuple(self.manifest.facts)

    def count(self, split: str) -> int:
        """Documents of a split."""
        return len(self._split(split))

    def document(self, split: str, index: int) -> Document:
        """The document with this number, in the order of the rows."""
        return self._split(split).document(index)

    def documents(self, split: str) -> Iterator[Document]:
        """All documents in the order of the rows."""
        found = self._split(split)
        return (found.document(index) for index in range(len(found)))

    def digests(self, split: str) -> list[str]:
        """The documents' names, in their order; a row that occurs twice does so here."""
        return self._split(split).digests

    def lengths(self, split: str) -> npt.NDArray[np.int64]:
        """Tokens of each document, in their order."""
        return self._split(split).lengths

    def supervised_counts(self, split: str) -> npt.NDArray[np.int64]:
        """Supervised tokens of each document, in their order."""
        return self._split(split).supervised_counts

    def refuse_overlap(self) -> None:
        """Held-out documents that are trained on would measure memory, not drift."""
        if "heldout" not in self.splits:
            return
        trained = set(self.digests("train"))
        shared = [row for row, digest in enumerate(self.digests("heldout")) if digest in trained]
        if shared:
            first = self.document("heldout", shared[0])
            raise DataError(
                f"{len(shared)} of the {self.count('heldout')} held-out documents are in the training data too.",
                where=f"{first.file}:{first.row}",
                help="Drift is measured on what is never trained on: remove them from data.heldout.",
            )

    def _leave_out(self, exclude: Sequence[str]) -> None:
        dropped = named_documents({digest for split in self.splits for digest in self.digests(split)}, exclude)
        for split in self.splits:
            self._splits[split] = _Split(self._splits[split].batches, dropped)
            if not len(self._splits[split]):
                raise ConfigError(f"data.exclude leaves no document of data.{split}.", where="data.exclude",
                                  help="Exclude fewer, or give other data; data.heldout=null turns the drift meter off.")  # fmt: skip

    def _split(self, split: str) -> _Split:
        if split not in self._splits:
            if split not in self.splits:
                raise MissingArtifactError(
                    f"this corpus has no split {split!r}; it has {', '.join(self.splits)}",
                    where=self.folder.url,
                    help=f"Give `data.{split}` in the run file, and run `distft tokenize CONFIG`.",
                )
            entries = [entry for entry in self.manifest.files if entry.facts.get("split") == split]
            tables = [_sound(read_shard(fetch(self.folder, entry, self.staging)), entry.name) for entry in entries]
            self._splits[split] = _Split([_Batch(batch) for table in tables for batch in table.to_batches() if len(batch)])
        return self._splits[split]


def named_documents(digests: Set[str], names: Sequence[str]) -> set[str]:
    """The documents that `names` mean, each a digest or what one digest alone begins with. All names that mean none, or several,
    are told in one error."""
    ordered = sorted(digests)
    found: set[str] = set()
    problems = []
    for name in names:
        place = bisect_left(ordered, name)
        fitting = [digest for digest in ordered[place : place + 2] if digest.startswith(name)]
        if len(fitting) == 1:
            found.add(fitting[0])
        elif fitting:
            problems.append(
                f"{name}: {len(fitting)} documents or more begin with it, {fitting[0]} and {fitting[1]}; give more digits"
            )
        else:
            near = max(ordered[max(0, place - 1) : place + 1], key=lambda digest: _shared(digest, name), default="")
            same = _shared(near, name)
            told = f"nearest is {near}, in its first {same} digits" if same >= NEAR_DIGITS else "and none that is nearly so"
            problems.append(f"{name}: no document is called so; {told}")
    if problems:
        head = f"{len(problems)} of the {len(names)} documents to leave out cannot be found in the corpus:"
        raise ConfigError("\n".join([head, *(f"  {problem}" for problem in problems)]), where="data.exclude",
                          help="Correct or remove them; `distft score --json` names those that were not read.")  # fmt: skip
    return found


def _shared(one: str, other: str) -> int:
    """How many of the first digits are the same."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Batch:
    """A record batch as arrays that share its memory."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        tokens, flags = batch.column("tokens"), batch.column("flags")
        self.digest, self.file, self.row = batch.column("digest"), batch.column("file"), batch.column("row")
        self.offsets = tokens.offsets.to_numpy()
        self.tokens = tokens.values.to_numpy()
        self.flags = flags.values.to_numpy()
        if len(self.tokens) != len(self.flags) or not np.array_equal(self.offsets, flags.offsets.to_numpy()):
            raise CorruptArtifactError("a corpus batch whose tokens and flags differ in number")


class _Split:
    """A split's batches, and which of their documents count; `dropped` ones do not."""

    def __init__(self, batches: list[_Batch], dropped: Set[str] = frozenset()) -> None:
        self.batches = batches
        self.starts = np.cumsum([0, *(len(batch.row) for batch in batches)])
        every = (digest for batch in batches for digest in batch.digest.to_pylist())
        self.kept = np.flatnonzero([digest not in dropped for digest in every]) if dropped else np.arange(self.starts[-1])

    def __len__(self) -> int:
        return len(self.kept)

    def document(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index = int(self.kept[index])
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        batch, place = self.batches[number], index - int(self.starts[number])
        start, end = batch.offsets[place], batch.offsets[place + 1]
        flags = batch.flags[start:end]
        return Document(
            digest=batch.digest[place].as_py(),
            tokens=batch.tokens[start:end],
            supervised=(flags & SUPERVISED) != 0,
            anchors=(flags & ANCHOR) != 0,
            file=batch.file[place].as_py(),
            row=batch.row[place].as_py(),
        )

    @cached_property
    def digests(self) -> list[str]:
        every = [digest for batch in self.batches for digest in batch.digest.to_pylist()]
        return every if len(self) == len(every) else [every[index] for index in self.kept]

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        every = np.concatenate([np.empty(0, np.int64), *(np.diff(batch.offsets) for batch in self.batches)]).astype(np.int64)
        return every[self.kept]

    @cached_property
    def supervised_counts(self) -> npt.NDArray[np.int64]:
        # No document is empty, so each offset but the last begins a sum.
        sums = [np.add.reduceat(batch.flags & SUPERVISED, batch.offsets[:-1], dtype=np.int64) for batch in self.batches]
        return np.concatenate([np.empty(0, np.int64), *sums])[self.kept]


def _sound(table: pa.Table, name: str) -> pa.Table:
    if not table.schema.equals(SCHEMA, check_metadata=False):
        raise CorruptArtifactError(f"{name} has other columns than a corpus", where=name, help="Run `distft tokenize CONFIG`.")
    if any(column.null_count for column in table.columns):
        raise CorruptArtifactError(f"{name} has values that are missing", where=name, help="Run `distft tokenize CONFIG`.")
    return table
