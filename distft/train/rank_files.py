"""A checkpoint's numbers: a file per rank, written without waiting for others, and read back by any number of ranks.

A file is safetensors, of three flat float32 vectors (`weight`, `exp_avg`, `exp_avg_sq`). Each is what its rank owns of every
parameter, one after another in the order that the manifest gives. What a rank owns follows from numbers alone (`engine.base.share`), so
that whoever wants some elements of a parameter knows which bytes of which files to read. They are verified by block (store/blocks.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distft.engine.base import Slice, Wanted, share
from distft.errors import CorruptArtifactError
from distft.store.blocks import BlockReader, BlockWriter
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest
from distft.store.put import put_file

Part = Literal["weight", "exp_avg", "exp_avg_sq"]
PARTS: tuple[Part, ...] = get_args(Part)
ALIGNED = 8

Parameters = Sequence[tuple[str, tuple[int, ...]]]
"""Names and shapes, in the order in which they lie in the files."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rank's file holds which elements, and where in its vectors."""

    parameters: Parameters
    ranks: int

    def elements(self, rank: int) -> int:
        """The length of the rank's vectors."""
        return sum(stop - start for start, stop in self._shares(rank))

    def places(self, rank: int) -> dict[str, tuple[int, int, int]]:
        """Of each parameter: start and stop of the elements that the rank owns, and where in its vectors they begin."""
        shares = self._shares(rank)
        offsets = accumulate((stop - start for start, stop in shares), initial=0)
        return {name: (*owned, offset) for (name, _), owned, offset in zip(self.parameters, shares, offsets, strict=False)}

    def _shares(self, rank: int) -> list[tuple[int, int]]:
        return [share(math.prod(shape), rank, self.ranks) for _, shape in self.parameters]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a rank holds at the end of a step, in memory of its own: training may go on while it is written."""

    parameters: Parameters
    vectors: dict[Part, Tensor]


class Memory:
    """The room for snapshots, taken once: one at a time."""

    def __init__(self) -> None:
        self._vectors: dict[Part, Tensor] = {}

    def copy(self, slices: Iterable[Slice]) -> Snapshot:
        """A copy of the slices, which are the whole of what this rank owns. Where they are on a GPU, all copies are under way at once,
        and over when this returns."""
        pieces = list(slices)
        length = sum(len(piece.weight) for piece in pieces)
        pinned = any(piece.weight.is_cuda for piece in pieces)
        if not self._vectors or len(self._vectors["weight"]) != length:
            self._vectors = {part: torch.empty(length, dtype=torch.float32, pin_memory=pinned) for part in PARTS}
        place = 0
        for piece in pieces:
            for part, vector in self._vectors.items():
                vector[place : place + len(piece.weight)].copy_(getattr(piece, part).detach(), non_blocking=pinned)
            place += len(piece.weight)
        if pinned:
            torch.cuda.synchronize()
        return Snapshot([(piece.name, piece.shape) for piece in pieces], self._vectors)


def put_rank_file(folder: Location, snapshot: Snapshot, rank: int) -> FileEntry:
    """Writes a rank's file; it counts once a manifest names it."""
    facts: dict[str, Any] = {"rank": rank}
    entry = put_file(folder, f"rank-{rank:05d}", "safetensors", lambda path: facts.update(_write(path, snapshot.vectors)))
    return replace(entry, facts=facts)


def manifest_facts(parameters: Parameters) -> dict[str, Any]:
    """What a manifest must say for its files to be understood."""
    return {"parameters": [[name, list(shape)] for name, shape in parameters]}


def read_slices(where: Location, manifest: Manifest, wanted: Iterable[Wanted], parts: Sequence[Part] = PARTS) -> Iterator[Slice]:
    """What is wanted, cut as the files were; parts that are not asked for are zeros without memory. Only the blocks that hold it are
    read, each once where elements are wanted in the files' order."""
    parameters, files = _understood(where, manifest)
    layout, shapes = Layout(parameters, len(files)), dict(parameters)
    with ExitStack() as stack:
        readers: dict[int, _RankReader] = {}
        places: dict[int, dict[str, tuple[int, int, int]]] = {}
        for one in wanted:
            if shapes.get(one.name) != one.shape:
                there = f"has the shape {list(shapes[one.name])}" if one.name in shapes else "is not in it"
                raise CorruptArtifactError(
                    f"the checkpoint is not of this model: {one.name}, of the shape {list(one.shape)}, {there}", where=where.url
                )
            for rank in _holders(one, len(files)):
                if rank not in readers:
                    readers[rank] = stack.enter_context(_RankReader(where, files[rank], layout.elements(rank)))
                    places[rank] = layout.places(rank)
                owned, end, offset = places[rank][one.name]
                start, stop = max(one.start, owned), min(one.stop, end)
                vectors: dict[str, Tensor] = {}
                for part in PARTS:
                    read = part in parts
                    vectors[part] = (
                        readers[rank].read(part, offset + start - owned, stop - start)
                        if read
                        else torch.zeros(1).expand(stop - start)
                    )
                yield Slice(name=one.name, shape=one.shape, start=start, **vectors)


def _holders(one: Wanted, ranks: int) -> range:
    """The ranks that own some of what is wanted."""
    if one.stop <= one.start:
        return range(0)
    run = math.ceil(math.prod(one.shape) / ranks)
    return range(one.start // run, (one.stop - 1) // run + 1)


class _RankReader(BlockReader):
    """One rank's file; its header is believed as far as it agrees with the manifest."""

    def __init__(self, where: Location, entry: FileEntry, elements: int) -> None:
        super().__init__(where, entry)
        try:
            self.starts = self._header(elements)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def read(self, part: Part, start: int, elements: int) -> Tensor:
        found: npt.NDArray[np.float32] = np.empty(elements, "<f4")
        self.read_into(self.starts[part] + 4 * start, found.data)
        return torch.from_numpy(found)

    def _header(self, elements: int) -> dict[str, int]:
        """Where each part's numbers begin."""
        length = np.empty(1, "<u8")
        self.read_into(0, length.data)
        text = bytearray(min(int(length[0]), self.entry.size))
        self.read_into(8, memoryview(text))
        expected = _header_of(elements)
        if bytes(text) != expected or self.entry.size != 8 + len(expected) + 4 * len(PARTS) * elements:
            raise CorruptArtifactError(
                f"{self.entry.name} does not hold {elements} weights and their moments, as its manifest says",
                where=self.folder.url,
            )
        return {part: 8 + len(expected) + 4 * elements * number for number, part in enumerate(PARTS)}


def _header_of(elements: int) -> bytes:
    """The header of a safetensors file of these vectors, one after another."""
    told = {
        part: {"dtype": "F32", "shape": [elements], "data_offsets": [4 * elements * n, 4 * elements * (n + 1)]}
        for n, part in enumerate(PARTS)
    }
    text = json.dumps(told, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNED)


def _write(path: Path, vectors: dict[Part, Tensor]) -> dict[str, object]:
    """By hand, so that bytes are hashed as they pass and nothing is copied once more."""
    header = _header_of(len(vectors["weight"]))
    with path.open("wb") as file:
        writer = BlockWriter(file)
        writer.write(memoryview(len(header).to_bytes(8, "little") + header))
        for part in PARTS:
            writer.write(vectors[part].numpy().astype("<f4", copy=False).data)
    return writer.facts()


def _understood(where: Location, manifest: Manifest) -> tuple[Parameters, list[FileEntry]]:
    """The parameters, and the files in the order of their ranks."""
    try:
        parameters = [(str(name), tuple(int(n) for n in shape)) for name, shape in manifest.facts["parameters"]]
        files = sorted(manifest.files, key=lambda entry: int(entry.facts["rank"]))
        if [entry.facts["rank"] for entry in files] != list(range(len(files))) or not files:
            raise ValueError("the ranks of its files have a gap")
        if any(n < 0 for _, shape in parameters for n in shape) or len(dict(parameters)) != len(parameters):
            raise ValueError("its parameters make no sense")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(
            f"the checkpoint's manifest cannot be understood: {type(error).__name__}: {error}", where=where.url,
            help="It may be another version's. Train under another name, or remove that folder.",
        ) from error  # fmt: skip
    return parameters, files
