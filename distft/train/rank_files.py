"""A checkpoint's numbers: a file per rank, written without waiting for others, and read back by any number of ranks.

A file is safetensors, of three flat float32 vectors (`weight`, `exp_avg`, `exp_avg_sq`). Each is what its rank owns of every
parameter, one after another in the order that the manifest gives. What a rank owns follows from numbers alone (`engine.base.share`):
whoever wants some elements of a parameter knows which bytes of which files to read. They are verified by block (store/blocks.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from distft.engine.base import Slice, Wanted, share
from distft.errors import CorruptArtifactError
from distft.store.blocks import AHEAD, BlockWriter, Span, read_spans
from distft.store.location import Location
from distft.store.manifest import FileEntry, Manifest
from distft.store.passing import Passing
from distft.store.put import Written, put_hashed

Part = Literal["weight", "exp_avg", "exp_avg_sq"]
PARTS: tuple[Part, ...] = get_args(Part)
ALIGNED = 8
PIECE_BYTES = (64 << 10, 16 << 20)
"""The least and the most that is asked for at once of a file that is read from front to back; a multiple of the least."""

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
    """What a rank holds at the end of a step, in memory that nothing else is written to before it is given back: training may go on
    while it is written. Without vectors afterwards."""

    parameters: Parameters
    vectors: dict[Part, Tensor]


class Memory:
    """The room for snapshots, taken once, and lent to one at a time."""

    def __init__(self) -> None:
        self._vectors: dict[Part, Tensor] = {}
        self._lent: Snapshot | None = None

    def copy(self, slices: Iterable[Slice]) -> Snapshot:
        """A copy of the slices, which are the whole of what this rank owns, until it is given back. Where they are on a GPU, all
        copies are under way at once, and over when this returns."""
        if self._lent is not None:
            raise RuntimeError("the snapshot before this one is still in use")
        pieces = list(slices)
        length = sum(len(piece.weight) for piece in pieces)
        pinned = any(piece.weight.is_cuda for piece in pieces)
        if not self._vectors or len(self._vectors["weight"]) != length:
            self._vectors = {part: torch.empty(length, dtype=torch.float32, pin_memory=pinned) for part in PARTS}
        place = 0
        for piece in pieces:
            for part, vector in self._vectors.items():
                _copy(vector[place : place + len(piece.weight)], getattr(piece, part).detach())
            place += len(piece.weight)
        if pinned:
            torch.cuda.synchronize()
        self._lent = Snapshot([(piece.name, piece.shape) for piece in pieces], dict(self._vectors))
        return self._lent

    def give_back(self, snapshot: Snapshot) -> None:
        """The room is free for the next one."""
        if snapshot is not self._lent:
            raise RuntimeError("this snapshot is not the one that is lent")
        snapshot.vectors.clear()
        self._lent = None


def put_rank_file(folder: Location, snapshot: Snapshot, rank: int) -> FileEntry:
    """Writes a rank's file; it counts once a manifest names it."""
    return put_numbers(folder, len(snapshot.vectors["weight"]), lambda part: [snapshot.vectors[part]], rank)


def put_numbers(folder: Location, elements: int, numbers: Callable[[Part], Iterable[Tensor]], rank: int) -> FileEntry:
    """The same of vectors of so many elements that come in pieces, of which none is kept."""
    return put_hashed(folder, f"rank-{rank:05d}", "safetensors", lambda path: _write(path, elements, numbers, rank))


def manifest_facts(parameters: Parameters) -> dict[str, Any]:
    """What a manifest must say for its files to be understood."""
    return {"parameters": [[name, list(shape)] for name, shape in parameters]}


def parameters_of(where: Location, manifest: Manifest) -> Parameters:
    """What the files hold, in their order."""
    return _understood(where, manifest)[0]


def read_slices(where: Location, manifest: Manifest, wanted: Iterable[Wanted], parts: Sequence[Part] = PARTS) -> Iterator[Slice]:
    """What is wanted, cut as the files were and in their order, file by file; parts that are not asked for are zeros without memory.
    Of each file that has some of it, the blocks of its header and those that hold what is wanted are read, each once."""
    parameters, files = _understood(where, manifest)
    layout = Layout(parameters, len(files))
    spans: list[Span] = []
    pieces = _pieces(where, layout, wanted)
    for rank, mine in pieces.items():
        entry, elements = files[rank], layout.elements(rank)
        head = len(_head_of(elements))
        _check_size(where, entry, elements)
        spans.append(Span(entry, 0, head))
        for piece in mine:
            for number, part in enumerate(PARTS):
                if part in parts:
                    spans.append(Span(entry, head + 4 * (number * elements + piece.place), 4 * piece.length))
    with closing(read_spans(where, spans)) as found:
        for rank, mine in pieces.items():
            if next(found).tobytes() != _head_of(layout.elements(rank)):
                raise _not_as_said(where, files[rank], layout.elements(rank))
            for piece in mine:
                vectors: dict[str, Tensor] = {}
                for part in PARTS:
                    read = part in parts
                    vectors[part] = torch.from_numpy(next(found).view("<f4")) if read else torch.zeros(1).expand(piece.length)
                yield Slice(name=piece.name, shape=piece.shape, start=piece.start, **vectors)


def pass_weights(where: Location, manifest: Manifest, *, memory: int) -> Generator[tuple[str, Tensor], None, None]:
    """All weights in the manifest's order, each as runs of its elements, one after another, of which the caller may keep none; in
    `memory` bytes as far as PIECE_BYTES allow it. They are verified once the last is behind: what was made of them before that may
    be of damaged bytes."""
    parameters, files = _understood(where, manifest)
    layout, ahead = Layout(parameters, len(files)), -(-AHEAD // len(files))
    room = memory // (len(files) * (ahead + 1) + 2)  # of each file what is coming and what is left of one; and two in the making
    least, most = PIECE_BYTES
    piece_bytes = max(least, min(most, room)) // least * least
    pool = ThreadPoolExecutor(AHEAD + 1, "weights")
    try:
        passing: list[Passing] = []
        for rank, entry in enumerate(files):
            _check_size(where, entry, layout.elements(rank))
            passing.append(Passing(where, entry, pool, piece_bytes=piece_bytes, ahead=ahead))
        for rank, file in enumerate(passing):
            head = _head_of(layout.elements(rank))
            if b"".join(file.take(len(head))) != head:
                file.finish()  # says so where the bytes are damaged
                raise _not_as_said(where, file.entry, layout.elements(rank))
        for name, shape in parameters:
            for rank, file in enumerate(passing):
                start, stop = share(math.prod(shape), rank, len(files))
                for piece in file.take(4 * (stop - start)):
                    yield name, torch.from_numpy(np.frombuffer(piece, "<f4").astype(np.float32))
        for file in passing:
            file.finish()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_weights(where: Location, manifest: Manifest) -> dict[str, Tensor]:
    """All weights, whole, in float32."""
    parameters, _ = _understood(where, manifest)
    whole = {name: torch.empty(shape) for name, shape in parameters}
    wanted = [Wanted(name, shape, 0, math.prod(shape)) for name, shape in parameters]
    for piece in read_slices(where, manifest, wanted, ("weight",)):
        whole[piece.name].view(-1)[piece.start : piece.stop] = piece.weight
    return whole


def _copy(into: Tensor, numbers: Tensor) -> None:
    """From a GPU it may still be under way afterwards."""
    if numbers.is_cuda:
        into.copy_(numbers, non_blocking=True)
    else:
        # One thread does as well as torch's, which share the memory's speed, and wait for each other wherever cores are busy.
        np.copyto(into.numpy(), numbers.numpy())


class _Piece(NamedTuple):
    """What one rank's file has of something that is wanted."""

    place: int
    """Where in the rank's vectors it begins."""
    name: str
    shape: tuple[int, ...]
    start: int
    length: int


def _pieces(where: Location, layout: Layout, wanted: Iterable[Wanted]) -> dict[int, list[_Piece]]:
    """The pieces of all that is wanted, by rank. Those of a rank are in their file's order, in which few blocks have to be kept."""
    shapes, places = dict(layout.parameters), dict[int, dict[str, tuple[int, int, int]]]()
    found: dict[int, list[_Piece]] = {}
    for one in wanted:
        if shapes.get(one.name) != one.shape:
            there = f"has the shape {list(shapes[one.name])}" if one.name in shapes else "is not in it"
            raise CorruptArtifactError(
                f"the checkpoint is not of this model: {one.name}, of the shape {list(one.shape)}, {there}", where=where.url
            )
        for rank in _holders(one, layout.ranks):
            if rank not in places:
                places[rank] = layout.places(rank)
            owned, end, offset = places[rank][one.name]
            start, stop = max(one.start, owned), min(one.stop, end)
            found.setdefault(rank, []).append(_Piece(offset + start - owned, one.name, one.shape, start, stop - start))
    return {rank: sorted(found[rank]) for rank in sorted(found)}


def _holders(one: Wanted, ranks: int) -> range:
    """The ranks that own some of what is wanted."""
    if one.stop <= one.start:
        return range(0)
    run = math.ceil(math.prod(one.shape) / ranks)
    return range(one.start // run, (one.stop - 1) // run + 1)


def _check_size(where: Location, entry: FileEntry, elements: int) -> None:
    if entry.size != len(_head_of(elements)) + 4 * len(PARTS) * elements:
        raise _not_as_said(where, entry, elements)


def _not_as_said(where: Location, entry: FileEntry, elements: int) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{entry.name} does not hold {elements} weights and their moments, as its manifest says", where=where.url
    )


def _head_of(elements: int) -> bytes:
    """All that comes before the numbers in a safetensors file of these vectors, one after another."""
    told = {
        part: {"dtype": "F32", "shape": [elements], "data_offsets": [4 * elements * n, 4 * elements * (n + 1)]}
        for n, part in enumerate(PARTS)
    }
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, elements: int, numbers: Callable[[Part], Iterable[Tensor]], rank: int) -> Written:
    """By hand, so that bytes are hashed as they pass and nothing is copied once more."""
    with path.open("wb") as file:
        writer = BlockWriter(file)
        writer.write(memoryview(_head_of(elements)))
        for part in PARTS:
            left = elements
            for piece in numbers(part):
                writer.write(piece.numpy().astype("<f4", copy=False).data)
                left -= len(piece)
            if left:
                raise RuntimeError(f"{left} elements of {part} did not come")
    return Written(sha256=writer.sha256(), facts={"rank": rank, **writer.facts()})


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
