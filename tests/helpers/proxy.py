"""An HTTP proxy between a test and its S3 server: one kind of trouble at a time, or all at random."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[
    "lose_reply", "drop_request", "truncate", "flip", "flip_request", "500", "503", "done_500",
    "403", "404", "409", "412", "507", "done_404",
]  # fmt: skip
"""`lose_reply` and `done_*`: the server did what was asked. `flip*`: a bit of the body is another, and nothing else tells of it."""


@dataclass
class Trouble:
    """The next `times` requests of `method` whose path has `part` in it suffer `fault`."""

    method: str
    fault: Fault
    times: int = 1
    part: str = ""
    seen: int = 0


class Weather:
    """Random trouble, the same for the same seed and order of requests: a twentieth of all requests gets a 5xx, half of them after the
    server did what was asked; a fiftieth loses its connection, before or after; of GETs a fiftieth is cut in its body, and of PUTs a
    fiftieth loses its reply."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.made: list[tuple[Fault, str]] = []
        """What was done, and to which request."""

    def __call__(self, method: str, path: str) -> Fault | None:
        dice = self.random.random()
        shares: list[tuple[float, Fault]] = [
            (0.025, self.random.choice(("500", "503"))), (0.025, "done_500"), (0.01, "drop_request"), (0.01, "lose_reply"),
            (0.02, "truncate" if method == "GET" else "lose_reply" if method == "PUT" else "drop_request"),
        ]  # fmt: skip
        for share, fault in shares:
            dice -= share
            if dice < 0:
                self.made.append((fault, f"{method} {path}"))
                return fault
        return None


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `trouble` says which it spoils, or else `weather`."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.trouble: Trouble | None = None
        self.weather: Callable[[str, str], Fault | None] | None = None
        self.bits = random.Random(0)
        """Chooses the bit of a body that `flip` changes."""
        self.hides_checksums = True
        """Whether replies lose the server's own checksum, by which a client would notice other bytes."""
        self.strip: set[str] = set()
        """Request headers, in lower case, that are not passed on."""
        self.asked: list[str] = []
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.asked.append(f"{method} {path}")
            trouble = self.trouble
            if trouble is None or trouble.method != method or trouble.part not in path or trouble.seen >= trouble.times:
                return self.weather(method, path) if self.weather else None
            trouble.seen += 1
            return trouble.fault

    def flipped(self, data: bytes) -> bytes:
        with self._lock:
            bit = self.bits.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    def requests(self, method: str, part: str = "") -> list[str]:
        """Paths of the requests so far."""
        found = (asked.split(" ", 1) for asked in self.asked)
        return [path for asked, path in found if asked == method and part in path]

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply waits 40 ms for the client's delayed acknowledgement
    wbufsize = 1 << 16
    server: Proxy  # pyright: ignore[reportIncompatibleVariableOverride]  it is made by no other

    def do(self) -> None:
        body = self._body()
        fault = self.server.fault_for(self.command, self.path)
        if fault == "drop_request":
            self._hang_up()
        elif fault is not None and fault.isdigit():
            self._answer(int(fault), {"Content-Type": "application/xml"}, b"<Error><Message>made up</Message></Error>", 0)
        else:
            if fault == "flip_request" and body:
                body = self.server.flipped(body)
            upstream = http.client.HTTPConnection(self.server.upstream.hostname or "", self.server.upstream.port)
            dropped = {"transfer-encoding", "content-length", *self.server.strip}
            headers = {key: value for key, value in self.headers.items() if key.lower() not in dropped}
            upstream.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            reply = upstream.getresponse()
            data = reply.read()
            if fault == "lose_reply":
                self._hang_up()
                return
            if fault == "done_500":
                self._answer(500, {"Content-Type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>", 0)
                return
            if fault == "done_404":
                self._answer(404, {"Content-Type": "application/xml"}, b"<Error><Code>NoSuchUpload</Code></Error>", 0)
                return
            cut = 0
            if fault == "truncate":
                cut = max(1, len(data) // 2)
            if fault == "flip" and data:
                data = self.server.flipped(data)
            dropped = {"transfer-encoding", "connection"}
            if self.server.hides_checksums:
                dropped |= {"x-amz-checksum-crc32", "x-amz-checksum-crc64nvme"}
            headers = {key: value for key, value in reply.getheaders() if key.lower() not in dropped}
            self._answer(reply.status, headers, data, cut)
            upstream.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do

    def log_message(self, format: str, *args: object) -> None: ...

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()  # the body comes after it
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            blocks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                blocks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(blocks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: int) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() != "content-length" or self.command == "HEAD":
                self.send_header(key, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) - cut])
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    """A running proxy."""
    proxy = Proxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
