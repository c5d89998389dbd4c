"""Weights as they come out of a checkpoint, rounded and written on: never more of them in memory than what is under way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.export.layout import Shard, Source
from distft.progress import Meter
from distft.store.local import explained, new_file, write_all
from distft.store.manifest import FileEntry

WRITE_BYTES = 16 << 20


def stored_bytes(found: Sequence[Source], weights: Iterable[tuple[str, Tensor]], whole: Any) -> Iterator[memoryview]:
    """The bytes of all stored tensors, one tensor after another. `weights` gives each parameter's elements in runs, in the order of
    the sources; it is read to its end, for that is when it is known to be sound. What is stored in other pieces than it is computed
    with is in memory as a whole, one parameter at a time."""
    by_name = {source.name: source for source in found if source.buffer is None}
    for source in found:
        if source.buffer is not None:
            yield from _bytes_of(source.buffer)
    for name, runs in groupby(weights, key=itemgetter(0)):
        source = by_name.get(name)
        if source is None:
            for _ in runs:
                continue
        elif source.plain:
            for _, run in runs:
                yield from _bytes_of(run.to(source.dtype))
        else:
            for tensor in _converted(source, (run for _, run in runs), whole):
                yield from _bytes_of(tensor)


def write_shards(
    files: Sequence[Shard], data: Iterator[memoryview], folder: Path, put: Callable[[FileEntry, Path], None], meter: Meter
) -> None:
    """Writes file by file into `folder` and gives each to `put`, which may take it away, when it is whole; the last one when `data`
    has ended as well."""
    for number, shard in enumerate(files, 1):
        path, digest = folder / shard.name, hashlib.sha256()
        with explained("write", path), new_file(path) as descriptor:
            head, left = shard.head(), shard.size
            write_all(descriptor, head)
            digest.update(head)
            while left > 0:
                piece = next(data, memoryview(b""))
                if not len(piece):
                    break
                write_all(descriptor, piece)
                digest.update(piece)
                left -= len(piece)
                meter.advance(len(piece), note=shard.name)
            if left or (number == len(files) and next(data, None) is not None):
                raise RuntimeError(f"{shard.name} is not what was to be written")
        put(FileEntry(name=shard.name, size=len(head) + shard.size, sha256=digest.hexdigest()), path)


def _converted(source: Source, runs: Iterable[Tensor], whole: Any) -> Iterator[Tensor]:
    """The tensors that transformers makes of a parameter when it stores it."""
    from transformers.core_model_loading import revert_weight_conversion

    parameter, place = torch.empty(source.shape, dtype=source.dtype), 0
    for run in runs:
        parameter.view(-1)[place : place + len(run)] = run
        place += len(run)
    made = revert_weight_conversion(whole, {source.name: parameter})
    del parameter
    for stored in source.stored:
        tensor = made.pop(stored.name)
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise RuntimeError(f"{stored.name} came out as {tensor.dtype} {list(tensor.shape)}")
        yield tensor


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """In pieces; nothing for a tensor without elements."""
    flat = tensor.contiguous().view(-1)
    if not len(flat):
        return
    data = flat.view(torch.uint8).numpy().data
    for start in range(0, len(data), WRITE_BYTES):
        yield data[start : start + WRITE_BYTES]
