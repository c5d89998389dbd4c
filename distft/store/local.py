"""A store on a local or mounted disk.

A file is written under a `.partial-` name beside its final one, fsynced, and given its name by `link`, which fails where the name is
taken; then the folder is fsynced. All writing goes through `os.*` calls, so that the fault tests can die at each of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from distft.errors import CorruptArtifactError, MissingArtifactError, StoreError
from distft.store.location import PARTIAL, Location, check_name, is_partial

COPY_BYTES = 16 << 20


class LocalLocation(Location):
    """A folder of this machine's file system."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        """`root` is the folder that was opened; nothing below it may lead out of it."""
        self.folder, self.root = folder, root or folder
        self.url = str(folder)

    def child(self, *names: str) -> LocalLocation:
        return LocalLocation(self.folder.joinpath(*(check_name(name, self.url) for name in names)), self.root)

    def __reduce__(self) -> tuple[object, ...]:
        return (LocalLocation, (self.folder, self.root))

    def exists(self, name: str) -> bool:
        with explained("look at", self._path(name)) as path:
            return path.is_file()

    def size(self, name: str) -> int:
        path = self._path(name)
        with explained("look at", path):
            if not path.is_file():
                raise _missing(path)
            return path.stat().st_size

    def age(self, name: str) -> float:
        path = self._path(name)
        with explained("look at", path):
            return _age(path)

    def read(self, name: str) -> bytes:
        with explained("read", self._path(name)) as path:
            return path.read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with explained("read", self._path(name)) as path, path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
            size = os.fstat(file.fileno()).st_size
        if len(data) != length:
            raise CorruptArtifactError(f"{path} ends at byte {size}, not {start + length}", where=str(path))
        return data

    def create(self, name: str, data: bytes) -> bool:
        path = self._path(name)
        with explained("write", path), self._partial(path) as partial:
            _write_file(partial, data)
            return _publish(partial, path)

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with explained("write", path), self._partial(path) as partial:
            _write_file(partial, data)
            os.replace(partial, path)
            sync_folder(path.parent)

    def upload(self, name: str, path: Path) -> None:
        final = self._path(name)
        with explained("write", final):
            _make_folder(final.parent)
            sync_file(path)
            try:
                published = _publish(path, final)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                with self._partial(final) as partial:
                    copy_file(path, partial)
                    published = _publish(partial, final)
            else:
                if published:
                    os.unlink(path)
        if not published:
            raise StoreError(f"{final} exists already, and files of an artifact are never overwritten", where=self.url)

    def download(self, name: str, path: Path) -> None:
        source = self._path(name)
        with explained("read", source):
            if not source.is_file():
                raise _missing(source)
        with explained("write", path):
            copy_file(source, path)

    def names(self, recursive: bool = False) -> list[str]:
        self._check_inside(self.folder)
        with explained("list", self.folder):
            found = sorted(self._files(recursive))
        return [name for name in found if not is_partial(name)]

    def folders(self) -> list[str]:
        self._check_inside(self.folder)
        with explained("list", self.folder):
            if not self.folder.is_dir():
                return []
            return sorted(entry.name for entry in self.folder.iterdir() if entry.is_dir() and not is_partial(entry.name))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with explained("delete", path), contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def local(self, name: str) -> Path | None:
        return self._path(name)

    def scratch(self, name: str) -> Path:
        path = self._path(name)
        with explained("write", path):
            _make_folder(path.parent)
        return _partial_name(path)

    def sweep(self, older_than_seconds: float = 86_400.0, *, dry_run: bool = False) -> list[str]:
        swept: list[str] = []
        self._check_inside(self.folder)
        with explained("clean", self.folder):
            for name in self._files(recursive=True):
                path = self.folder / name
                with contextlib.suppress(FileNotFoundError):
                    if is_partial(name) and _age(path) >= older_than_seconds:
                        if not dry_run:
                            os.unlink(path)
                        swept.append(name)
            if dry_run:
                return sorted(swept)
            for folder, _, _ in os.walk(self.folder, topdown=False):
                path = Path(folder)
                with contextlib.suppress(OSError):  # holds what is too young to go
                    if is_partial(path.relative_to(self.folder).as_posix()) and _age(path) >= older_than_seconds:
                        os.rmdir(path)
        return sorted(swept)

    def _probe(self) -> None:
        path = self.folder / "probe"
        with explained("write", self.folder), self._partial(path) as partial, self._partial(path) as second:
            _write_file(partial, b"distft")
            if not _publish(partial, second) or _publish(partial, second):
                raise StoreError(f"{self.folder} is on a file system that lets two files take one name", where=self.url)

    def _path(self, name: str) -> Path:
        path = self.folder / check_name(name, self.url)
        self._check_inside(path)
        return path

    def _check_inside(self, path: Path) -> None:
        """A link inside the store may not lead out of it, or a cleaner would clean there; the store's own folder may be a link."""
        try:
            inside = path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):  # links that lead in a circle
            inside = False
        if not inside:
            raise StoreError(
                f"{path} leads out of the store {self.root} by a link", where=self.url,
                help="Remove the link. To keep a store on another disk, make the store's own folder a link, or give its real path.",
            )  # fmt: skip

    @contextlib.contextmanager
    def _partial(self, path: Path) -> Iterator[Path]:
        _make_folder(path.parent)
        partial = _partial_name(path)
        try:
            yield partial
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)

    def _files(self, recursive: bool) -> Iterator[str]:
        if not recursive:
            if self.folder.is_dir():
                yield from (entry.name for entry in os.scandir(self.folder) if entry.is_file())
            return
        for folder, _, files in os.walk(self.folder):
            yield from ((Path(folder) / file).relative_to(self.folder).as_posix() for file in files)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes every byte: one `os.write` may take fewer than it is given."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; file systems that cannot (some network mounts) do so on their own or not at all."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def copy_file(source: Path, target: Path) -> None:
    """A durable copy under a name that must be free; nothing is left behind when it fails."""
    with new_file(target) as descriptor, source.open("rb") as file:
        while block := file.read(COPY_BYTES):
            write_all(descriptor, block)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """The descriptor of a file under a name that must be free. It is durable once the block ends; one that fails leaves nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the user's umask decides who else may read
    try:
        yield descriptor
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def _write_file(path: Path, data: bytes) -> None:
    with new_file(path) as descriptor:
        write_all(descriptor, data)


def _publish(source: Path, path: Path) -> bool:
    """Gives a finished file its name; False when the name is taken. `source` keeps its own name as well."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    sync_folder(path.parent)
    return True


def _make_folder(folder: Path) -> None:
    """mkdir -p, durable: each new folder's name is fsynced in its parent."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _partial_name(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def _missing(path: Path) -> MissingArtifactError:
    return MissingArtifactError(f"no file {path.name} in {path.parent}", where=str(path))


_HELP = {
    errno.ENOSPC: ("no space left on the device", "Free some space there, or give another `store`."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space there, or give another `store`."),
    errno.EROFS: ("the file system is read-only", "Give a `store` that can be written."),
    errno.EACCES: ("permission denied", "Give a `store` that this user may read and write, or change its permissions."),
    errno.EPERM: (
        "not permitted",
        "Give a `store` that this user may write, on a file system with hard links (not FAT or some network mounts).",
    ),
    errno.ENOTSUP: ("not supported by the file system", "Give a `store` on a file system with hard links."),
    errno.ENOTDIR: ("a file stands where a folder should be", "Give another `store`, or move that file away."),
    errno.EEXIST: ("a file stands where a folder should be", "Give another `store`, or move that file away."),
    errno.ENAMETOOLONG: ("the name is too long", "Give a shorter `name` or `store`."),
    errno.EIO: ("the disk reports an input/output error", "Check the disk; the store's other files may be damaged too."),
    errno.ESTALE: ("the network file system lost the file", "Run the command again; if it stays, mount the share anew."),
}


@contextlib.contextmanager
def explained(verb: str, path: Path) -> Iterator[Path]:
    """Turns what the operating system says into an error that a user can act on."""
    try:
        yield path
    except FileNotFoundError as error:
        if verb in ("read", "look at"):
            raise _missing(path) from error
        raise StoreError(f"cannot {verb} {path}: its folder is not there and cannot be made", where=str(path),
                         help="Give another `store`; if somebody removed a folder just now, run it again.") from error  # fmt: skip
    except IsADirectoryError as error:
        raise StoreError(f"cannot {verb} {path}: it is a folder", where=str(path), help="Move that folder away.") from error
    except NotADirectoryError as error:
        if verb in ("read", "look at"):
            raise _missing(path) from error
        raise _store_error(verb, path, error) from error
    except OSError as error:
        raise _store_error(verb, path, error) from error


def _store_error(verb: str, path: Path, error: OSError) -> StoreError:
    what, help = _HELP.get(error.errno or 0, (error.strerror or str(error), "Check the store's disk and its permissions."))
    return StoreError(f"cannot {verb} {path}: {what}", where=str(path), help=help)
