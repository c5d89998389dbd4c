"""Arrow IPC shards: how tables are written to a store, once, and read back without trust.

A shard is a file of record batches under a unique name. Its sha256 is taken while it is written; it counts only when a manifest
names it. Columns are plain: no extension types, which can run code or change meaning between versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self
from uuid import uuid4

import pyarrow as pa

from distft.errors import CorruptArtifactError
from distft.store.local import explained, write_all
from distft.store.location import Location
from distft.store.manifest import FileEntry

VERSION_KEY: Final = b"distft.shard"
VERSION: Final = b"1"

GATHER_BYTES: Final = 1 << 20

Compression = Literal["zstd", "lz4"] | None


class ShardWriter:
    """Writes one shard. After a clean exit `entry` describes it and it is in the store; after an exception nothing is."""

    entry: FileEntry

    def __init__(
        self,
        folder: Location,
        stem: str,
        schema: pa.Schema,
        *,
        metadata: dict[str, str] | None = None,
        compression: Compression = "zstd",
    ) -> None:
        foreign = _extension(schema)
        if foreign:
            raise TypeError(f"column {foreign} is an extension type; shards hold plain columns")
        kept = {**(schema.metadata or {}), **{k.encode(): v.encode() for k, v in (metadata or {}).items()}}
        self.schema = schema.with_metadata({**kept, VERSION_KEY: VERSION})
        self._folder = folder
        self._name = f"data/{stem}-{uuid4().hex}.arrow"
        self._options = pa.ipc.IpcWriteOptions(compression=compression)
        self._rows = self._batches = 0

    def __enter__(self) -> Self:
        self._path = self._folder.scratch(self._name)
        with explained("write", self._path):
            self._file = _HashedFile(self._path)
            try:
                self._sink = pa.PythonFile(self._file, mode="w")
                self._writer = pa.ipc.new_file(self._sink, self.schema, options=self._options)
            except BaseException:
                self._file.discard()
                raise
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds a batch, whose columns must be the schema's; batches are read back as they were written."""
        if not batch.schema.equals(self.schema, check_metadata=False):
            raise TypeError(f"a batch of {batch.schema} in a shard of {self.schema}")
        with explained("write", self._path):
            self._writer.write_batch(batch.replace_schema_metadata(self.schema.metadata))
        self._rows += batch.num_rows
        self._batches += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                with explained("write", self._path):
                    self._writer.close()
                    self._sink.close()
                self._folder.upload(self._name, self._path)
                self.entry = FileEntry(
                    name=self._name,
                    size=self._file.size,
                    sha256=self._file.digest.hexdigest(),
                    facts={"rows": self._rows, "batches": self._batches},
                )
        finally:
            self._file.discard()


class _HashedFile:
    """A new file for pyarrow to write to, hashed on its way; everything goes through os.write, so that a full disk says so."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._waiting = bytearray()
        self.digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        if self.closed:
            raise ValueError(f"{self._path} is closed")  # the descriptor's number may be another file's by now
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += view.nbytes
        # Arrow writes headers, columns and padding one by one: small pieces are put together.
        if view.nbytes < GATHER_BYTES:
            self._waiting += view
        if view.nbytes >= GATHER_BYTES or len(self._waiting) >= GATHER_BYTES:
            self.flush()
        if view.nbytes >= GATHER_BYTES:
            write_all(self._descriptor, view)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, bytearray()
        write_all(self._descriptor, memoryview(waiting))

    def close(self) -> None:
        if not self.closed:
            try:
                self.flush()
            finally:
                self._release()

    def discard(self) -> None:
        """Removes what is left under the temporary name; after an upload that is nothing, or a copy."""
        self._release()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _release(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)


def open_shard(path: Path) -> pa.ipc.RecordBatchFileReader:
    """A shard, memory-mapped, with its schema checked. Its bytes have been checked before: `path` comes from `manifest.fetch`."""
    with _sound(path):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        version = (reader.schema.metadata or {}).get(VERSION_KEY)
        if version != VERSION:
            raise CorruptArtifactError(
                f"{path} has shard version {version!r}; this distft reads {VERSION!r}",
                where=str(path),
                help="Upgrade distft here, or build the artifact again.",
            )
        foreign = _extension(reader.schema)
        if foreign:
            raise CorruptArtifactError(f"{path}: column {foreign} is an extension type, which is refused", where=str(path))
        return reader


def read_shard(path: Path) -> pa.Table:
    """A whole shard as a table, validated down to its last offset. Uncompressed columns stay on disk until touched."""
    reader = open_shard(path)
    with _sound(path):
        table = reader.read_all()
        table.validate(full=True)
    return table


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A shard's batches in order, each validated."""
    reader = open_shard(path)
    for index in range(reader.num_record_batches):
        with _sound(path):
            batch = reader.get_batch(index)
            batch.validate(full=True)
        yield batch


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    try:
        with explained("read", path):
            yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowSerializationError) as error:
        help = "Its bytes are those that were written: whoever wrote it was broken. Remove the artifact and make it again."
        raise CorruptArtifactError(f"{path} is not a sound Arrow file: {error}", where=str(path), help=help) from error


def _extension(schema: pa.Schema) -> str:
    """The first column that is, or contains, an extension type, also one that is not registered here; "" when none is."""

    def inside(column: pa.Field) -> bool:
        if isinstance(column.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (column.metadata or {}):
            return True
        if pa.types.is_dictionary(column.type):
            return inside(pa.field("", column.type.value_type))
        return any(inside(column.type.field(index)) for index in range(column.type.num_fields))

    return next((column.name for column in schema if inside(column)), "")
