"""A folder of a store, on a local disk or S3, behind one small interface.

Nothing is ever half there: a name either does not exist or holds all of its bytes. `create` is put-if-absent, the one primitive
that commits rest on; there are no locks. Locations cross process borders as their url; whatever they need to reach the store is
made lazily in the process that uses it, from the environment.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath

from distft.errors import ConfigError, CorruptArtifactError, StoreError

PARTIAL = ".partial-"
"""Begins the name of every file that is not finished; listings leave such files out."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")


class Location(ABC):
    """A folder that need not exist yet. Names are relative to it, with `/` between folders, and can never lead out of it."""

    url: str

    @abstractmethod
    def child(self, *names: str) -> Location:
        """The folder below this one."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; MissingArtifactError where there is none."""

    @abstractmethod
    def age(self, name: str) -> float:
        """Seconds since a file was written, on S3 by the server's clock alone; MissingArtifactError where there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file; MissingArtifactError where there is none."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Bytes [start, start + length) of a file, which must reach that far."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Puts a small file where there is none, whole, durable and once: False when the name was taken, whose bytes stay."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Puts a small file, over another if need be. For logs and pages; an artifact is never replaced."""

    @abstractmethod
    def upload(self, name: str, path: Path) -> None:
        """Puts a finished local file under a name that nothing else has. Durable on return; `path` may be gone (moved) then."""

    @abstractmethod
    def download(self, name: str, path: Path) -> None:
        """Copies a file to a local path, unverified: artifacts are read through `manifest.fetch`."""

    @abstractmethod
    def names(self, recursive: bool = False) -> list[str]:
        """Relative names of the files here (and below), sorted; unfinished files are left out. An absent folder has none."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders directly below, sorted."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file; an absent one is no error, so that two cleaners do not disturb each other."""

    @abstractmethod
    def local(self, name: str) -> Path | None:
        """The path that is the file itself; None where it must be fetched first."""

    @abstractmethod
    def scratch(self, name: str) -> Path:
        """A fresh path for writing what `upload(name, path)` will put, on the same file system where there is one."""

    @abstractmethod
    def sweep(self, older_than_seconds: float = 86_400.0, *, dry_run: bool = False) -> list[str]:
        """Removes what killed writers left unfinished, here and below; returns what it removed, or would have."""

    @abstractmethod
    def _probe(self) -> None:
        """Writes and removes a file."""

    def check_writable(self) -> None:
        """Proves, by writing, that artifacts can be committed here; StoreError says what stands in the way."""
        self._probe()

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"open_location({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[object, ...]:
        return (open_location, (self.url,))


def open_location(text: str) -> Location:
    """The location of a folder path or of s3://bucket/prefix. Endpoint and credentials come from the environment alone."""
    if text.startswith("s3://"):
        from distft.store.s3 import S3Location

        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        # The text is not repeated in these messages: what stands where a bucket should may be a secret.
        if "@" in bucket or ":" in bucket or "?" in text or "#" in text:
            raise ConfigError(
                "an s3:// address has a bucket and a prefix, and nothing else: no user, secret, port or query",
                help="Give s3://bucket/prefix; credentials belong in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance"
                " role), another endpoint in AWS_ENDPOINT_URL.",
            )
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError("an s3:// address without a valid bucket name", help="Give s3://bucket/prefix.")
        parts = [part for part in prefix.split("/") if part]
        if any(part in (".", "..") for part in parts):
            raise ConfigError(f"{text} has '.' or '..' in its prefix", help="S3 has no relative prefixes: write it out.")
        return S3Location(bucket, "/".join(parts))
    if "://" in text:
        scheme = text.partition("://")[0]
        raise ConfigError(f"no store speaks {scheme}://", help="Give a folder path or s3://bucket/prefix.")
    if not text or "\0" in text:
        raise ConfigError("an empty store path", help="Give a folder path or s3://bucket/prefix.")
    from distft.store.local import LocalLocation

    try:
        return LocalLocation(Path(text).expanduser().absolute())
    except RuntimeError as error:  # ~someone who is not a user here
        raise StoreError(f"{text}: {error}", help="Write the folder's path out.") from error


def check_name(name: str, where: str) -> str:
    """The name itself, when it stays below its folder. Names come out of files that others may have written."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or PurePosixPath(name).is_absolute() or any(p in ("", ".", "..") for p in parts):
        raise CorruptArtifactError(
            f"{name!r} is not a name inside a folder: relative, no '..', parts divided by single '/'",
            where=where,
            help="No part of distft writes such a name: the file that holds it was damaged or made by someone else.",
        )
    return name


def is_partial(name: str) -> bool:
    """Whether a file is one that its writer has not finished, or lies in such a folder."""
    return any(part.startswith(PARTIAL) for part in name.split("/"))
