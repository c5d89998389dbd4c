"""A store on S3 or a server that speaks it: each operation on files as requests, which go through one client (`s3_client`) and are
tried again while that may help (`patience`)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from distft.errors import CorruptArtifactError, DistftError, MissingArtifactError, StoreError
from distft.store.location import PARTIAL, Location, check_name, is_partial
from distft.store.patience import patiently
from distft.store.s3_client import TRANSFERS, client, endpoint, server_time
from distft.store.trouble import Trouble, WrongBytesError, understand

T = TypeVar("T")

PART_BYTES = 32 << 20
MAX_PARTS = 10_000
WRITER = "distft-writer"
"""The metadata key under which `create` signs a file."""

SCRATCH = "distft-scratch-"
SCRATCH_SECONDS = 86_400.0
"""So long after the last write to it a scratch file is one that its writer, killed since, has left."""

_found: set[str] = set()
"""Buckets that this process has seen to be there, each with its endpoint."""


class S3Location(Location):
    """A prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def child(self, *names: str) -> S3Location:
        parts = [check_name(name, self.url) for name in names]
        return S3Location(self.bucket, "/".join([self.prefix, *parts] if self.prefix else parts))

    def exists(self, name: str) -> bool:
        return self._head(name) is not None

    def size(self, name: str) -> int:
        head = self._head(name)
        if head is None:
            raise self._missing(name)
        return int(head["ContentLength"])

    def age(self, name: str) -> float:
        head = self._head(name)
        if head is None:
            raise self._missing(name)
        return max(0.0, server_time(head) - head["LastModified"].timestamp())  # the server tells its time to the second

    def read(self, name: str) -> bytes:
        return self._get(name)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._get(name, Range=f"bytes={start}-{start + length - 1}")
        if len(data) != length:
            raise CorruptArtifactError(f"{self._of(name)} ends at byte {start + len(data)}, not {start + length}", where=self.url)
        return data

    def create(self, name: str, data: bytes) -> bool:
        # A reply can be lost and the request sent again, by aiohttp too, unseen from here; it then finds the name taken by
        # itself. The mark tells whose file that is, also from another writer's with equal bytes.
        mark = uuid.uuid4().hex
        condition: dict[str, Any] = {"IfNoneMatch": "*"}

        def put() -> bool:
            try:
                self._put(name, data, Metadata={WRITER: mark}, **condition)
            except WrongBytesError:
                condition.clear()  # the name is ours, and so is what is wrong there: now it is put right
                raise
            except Exception as error:
                if understand(error) is not Trouble.TAKEN:
                    raise
                found = self._head(name)
                return found is not None and found.get("Metadata", {}).get(WRITER) == mark
            return True

        return self._patiently(put, "write", name)

    def replace(self, name: str, data: bytes) -> None:
        self._patiently(lambda: self._put(name, data), "write", name)

    def upload(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        if size <= PART_BYTES:
            self.replace(name, path.read_bytes())
            return
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        started = self._patiently(lambda: self._call("create_multipart_upload", Key=self._key(name)), "write", name)
        upload: dict[str, Any] = {"Key": self._key(name), "UploadId": started["UploadId"]}

        def put_part(index: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek(index * part_bytes)
                data = file.read(part_bytes)
            number = index + 1
            done = self._patiently(lambda: self._call("upload_part", PartNumber=number, Body=data, **upload), "write", name)
            sums = {key: value for key, value in done.items() if key.startswith("Checksum") and key != "ChecksumType"}
            return {"PartNumber": number, "ETag": done["ETag"], **sums}

        def complete() -> None:
            try:
                self._call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
            except Exception as error:
                # When the reply to an earlier try was lost, the upload is gone because it is done.
                if understand(error) is not Trouble.ABSENT or (self._head(name) or {}).get("ContentLength") != size:
                    raise

        try:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                parts = list(pool.map(put_part, range(-(-size // part_bytes))))
            self._patiently(complete, "write", name)
        except BaseException:
            with contextlib.suppress(Exception):  # best effort: the first error is the one to tell
                self._call("abort_multipart_upload", **upload)
            raise

    def download(self, name: str, path: Path) -> None:
        from distft.store.local import explained, new_file

        size = self.size(name)
        with explained("write", path), new_file(path) as descriptor:

            def get_part(start: int) -> None:
                data = self.read_range(name, start, min(PART_BYTES, size - start))
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, memoryview(data)[written:], start + written)

            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(get_part, range(0, size, PART_BYTES)))

    def names(self, recursive: bool = False) -> list[str]:
        found = (page.get("Contents", ()) for page in self._pages("list_objects_v2", "" if recursive else "/"))
        names = (item["Key"].removeprefix(self._below) for page in found for item in page)
        # A key that ends with "/" is a console's idea of a folder.
        return sorted(name for name in names if not name.endswith("/") and name and not is_partial(name))

    def folders(self) -> list[str]:
        found = (page.get("CommonPrefixes", ()) for page in self._pages("list_objects_v2", "/"))
        return sorted(item["Prefix"].removeprefix(self._below).rstrip("/") for page in found for item in page)

    def delete(self, name: str) -> None:
        with contextlib.suppress(MissingArtifactError):
            self._patiently(lambda: self._call("delete_object", Key=self._key(name)), "delete", name)

    def local(self, name: str) -> Path | None:
        check_name(name, self.url)
        return None

    def scratch(self, name: str) -> Path:
        check_name(name, self.url)
        folder = Path(tempfile.gettempdir())
        _clean(folder)
        return folder / f"{SCRATCH}{uuid.uuid4().hex}"

    def sweep(self, older_than_seconds: float = 86_400.0, *, dry_run: bool = False) -> list[str]:
        swept: list[str] = []
        for page in self._pages("list_multipart_uploads", ""):
            for upload in page.get("Uploads", ()):
                if max(0.0, server_time(page) - upload["Initiated"].timestamp()) >= older_than_seconds:
                    name = upload["Key"].removeprefix(self._below)
                    with contextlib.suppress(MissingArtifactError):  # done by now, or swept by another
                        if not dry_run:
                            self._abort(upload["Key"], upload["UploadId"], name)
                        swept.append(name)
        return sorted(swept)

    def _abort(self, key: str, upload: str, name: str) -> None:
        self._patiently(lambda: self._call("abort_multipart_upload", Key=key, UploadId=upload), "delete", name)

    def _probe(self) -> None:
        name = f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            if not self.create(name, b"distft") or self.create(name, b"another"):
                raise StoreError(
                    f"the S3 server of {self.url} ignores If-None-Match, so that two writers could overwrite each other",
                    where=self.url,
                    help="Use a server with conditional writes (AWS S3, Ceph, MinIO, Cloudflare R2), or a shared file system.",
                )
        finally:
            with contextlib.suppress(StoreError):  # a role that may write and not delete is enough
                self.delete(name)

    @property
    def _below(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _key(self, name: str) -> str:
        return self._below + check_name(name, self.url)

    def _of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _call(self, method: str, **request: Any) -> dict[str, Any]:
        fs: Any = client()  # s3fs does not declare what its synchronous methods return
        return fs.call_s3(method, Bucket=self.bucket, **request)

    def _put(self, name: str, data: bytes, **request: Any) -> None:
        """One request; WrongBytesError where other bytes arrived. An ETag is most servers' MD5 of what they stored, and no promise:
        one that differs is a reason to look."""
        reply = self._call("put_object", Key=self._key(name), Body=data, **request)
        encrypted = str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply
        told = str(reply.get("ETag", "")).strip('"')
        if encrypted or told == hashlib.md5(data, usedforsecurity=False).hexdigest():
            return
        with contextlib.suppress(CorruptArtifactError):
            if self._get(name) == data:
                return
        raise WrongBytesError(f"{self._of(name)} was stored with other bytes")

    def _head(self, name: str) -> dict[str, Any] | None:
        try:
            return self._patiently(lambda: self._call("head_object", Key=self._key(name)), "look at", name)
        except MissingArtifactError:
            self._check_bucket()
            return None

    def _check_bucket(self) -> None:
        # The answer to HEAD of a key does not tell an absent file from an absent bucket, which would look like an empty store.
        known = f"bucket {self.bucket} of {endpoint()}"
        if known not in _found:
            try:
                self._patiently(lambda: self._call("head_bucket"), "look at", "")
            except MissingArtifactError as error:
                raise self._told(Trouble.NO_BUCKET, "look at", "") from error
            _found.add(known)

    def _get(self, name: str, **request: Any) -> bytes:
        from fsspec.asyn import sync

        fs: Any = client()

        async def whole() -> bytes:
            reply = await fs._call_s3("get_object", Bucket=self.bucket, Key=self._key(name), **request)
            async with reply["Body"] as stream:
                data = await stream.read()
            if len(data) != reply["ContentLength"]:
                raise ConnectionError(f"{len(data)} of {reply['ContentLength']} bytes came")
            return data

        def get() -> bytes:
            data: Any = sync(fs.loop, whole)
            return data

        return self._patiently(get, "read", name)

    def _pages(self, method: str, delimiter: str) -> Iterator[dict[str, Any]]:
        """The replies to a listing. A prefix without a delimiter lists everything below."""
        request: dict[str, Any] = {"Prefix": self._below, **({"Delimiter": delimiter} if delimiter else {})}
        while True:
            asked = dict(request)
            page = self._patiently(lambda asked=asked: self._call(method, **asked), "list", "")
            yield page
            if not page.get("IsTruncated"):
                return
            if method == "list_multipart_uploads":
                request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
            else:
                request["ContinuationToken"] = page["NextContinuationToken"]

    def _patiently(self, attempt: Callable[[], T], verb: str, name: str) -> T:
        return patiently(
            attempt, endpoint=endpoint(), bucket=self.bucket, tell=lambda trouble, error: self._told(trouble, verb, name, error)
        )

    def _missing(self, name: str) -> MissingArtifactError:
        return MissingArtifactError(f"no file {self._of(name)}", where=self.url)

    def _told(self, trouble: Trouble, verb: str, name: str, error: Exception | None = None) -> DistftError:
        if trouble is Trouble.ABSENT and verb not in ("write", "list"):
            return self._missing(name)
        kind = CorruptArtifactError if trouble in (Trouble.GARBLED, Trouble.BEYOND) else StoreError
        what, help = trouble.explain(endpoint=endpoint(), bucket=self.bucket, error=error)
        return kind(f"cannot {verb} {self._of(name)}: {what}", where=self.url, help=help)


def _clean(folder: Path) -> None:
    """Removes scratch files that killed writers left: no other cleaner looks at this machine's own disk."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{SCRATCH}*"):
            with contextlib.suppress(OSError):  # another user's, or gone
                if time.time() - path.stat().st_mtime >= SCRATCH_SECONDS:
                    path.unlink()
