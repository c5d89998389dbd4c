"""The connection to S3: whom requests go to, the filesystem that sends them, and the server's clock."""

from __future__ import annotations

import os
import threading
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from distft.errors import StoreError

if TYPE_CHECKING:
    from s3fs import S3FileSystem

TRANSFERS = 4
"""Requests that one upload or download has under way at once."""

_clients: dict[tuple[object, ...], S3FileSystem] = {}
_lock = threading.Lock()


def client() -> S3FileSystem:
    """This process's filesystem, made on first use: neither its event loop nor its connections survive a fork. It tries a request
    once, and so does botocore below it: `patiently` is the one policy."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        if "@" in urlsplit(os.environ.get(name, "")).netloc:
            help = "Give the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the address alone here."
            raise StoreError(f"{name} holds a user or a password, which S3 does not use", where=name, help=help)
    settings = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    with _lock:
        key = (os.getpid(), settings)
        if key not in _clients:
            from s3fs import S3FileSystem

            fs = S3FileSystem(
                anon=False,
                use_listings_cache=False,
                skip_instance_cache=True,
                config_kwargs={"retries": {"total_max_attempts": 1}, "read_timeout": 60, "max_pool_connections": 4 * TRANSFERS},
            )
            fs.retries = 1
            _clients[key] = fs
        return _clients[key]


def endpoint() -> str:
    """Whom requests go to, as host and port: an address in the environment might hold a password."""
    address = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    try:
        port = f":{address.port}" if address.port else ""
    except ValueError:
        port = ""
    return f"{address.hostname}{port}" if address.hostname else "AWS"


def server_time(reply: dict[str, Any]) -> float:
    """The server's clock: this machine's may be hours off, and a cleaner would take what is being written for old."""
    told = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return parsedate_to_datetime(told).timestamp()
    except ValueError:
        return time.time()
