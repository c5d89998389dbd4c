"""Ceph's object gateway, a real S3 server, on loopback with everything in memory: one monitor, one store, one gateway.

They come from a distribution's packages (Debian: radosgw, ceph-mon, ceph-osd, ceph-common) and run as whoever runs the tests, out of
a temporary folder, beside any Ceph that this machine may have.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from tests.helpers.serving import answers, free_ports

BINARIES = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PATIENCE = 120.0

CONFIG = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon}]
ms bind msgr2 = false
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
mon allow pool size one = true
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon max pg per osd = 2000
mon data avail warn = 1
mon data avail crit = 0
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
osd class load list = *
osd class default list = *
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file =
keyring = {folder}/keyring
[osd.0]
osd objectstore = memstore
memstore device bytes = 2147483648
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{rgw}
rgw dynamic resharding = false
rgw run sync thread = false
"""


def missing_binaries() -> list[str]:
    return [name for name in BINARIES if shutil.which(name) is None]


@contextlib.contextmanager
def running_rgw(folder: Path, *, key: str, secret: str, bucket: str) -> Iterator[str]:
    """The endpoint of a gateway with one user and one bucket. Its processes end with the block."""
    mon, rgw = free_ports(2)
    fsid, osd = str(uuid4()), str(uuid4())
    for name in ("mon", "osd"):
        (folder / name).mkdir()
    config = folder / "ceph.conf"
    config.write_text(CONFIG.format(fsid=fsid, folder=folder, mon=mon, rgw=rgw))
    servers: list[subprocess.Popen[bytes]] = []

    def ceph(*command: str) -> str:
        done = subprocess.run([command[0], "-c", str(config), *command[1:]], capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout.strip()

    def start(*command: str) -> None:
        log = (folder / f"{command[0]}.out").open("wb")
        servers.append(subprocess.Popen([command[0], "-c", str(config), "-f", *command[1:]], stdout=log, stderr=log))

    try:
        monmap = str(folder / "monmap")
        ceph("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon}]", monmap)
        ceph("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        start("ceph-mon", "-i", "a")
        number = ceph("ceph", "--connect-timeout", "60", "osd", "new", osd)
        ceph("ceph-osd", "-i", number, "--mkfs", "--osd-uuid", osd)
        ceph("ceph", "osd", "crush", "add", number, "1.0", "host=lo", "root=default")
        start("ceph-osd", "-i", number)
        user = "--uid=distft", "--display-name=distft", f"--access-key={key}", f"--secret={secret}"
        ceph("radosgw-admin", "user", "create", *user)
        start("radosgw", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{rgw}"
        _await(servers, endpoint, folder)
        _make_bucket(endpoint, key, secret, bucket)
        yield endpoint
    finally:
        # The gateway first: one that has lost its store waits for it, and not for signals.
        for server in reversed(servers):
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _await(servers: list[subprocess.Popen[bytes]], endpoint: str, folder: Path) -> None:
    if not answers(endpoint, servers, within=PATIENCE):
        told = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*.out")))
        raise RuntimeError(f"the gateway did not start:\n{told}")


def _make_bucket(endpoint: str, key: str, secret: str, bucket: str) -> None:
    from s3fs import S3FileSystem

    # Region and profile files of this machine stay out of it.
    client = S3FileSystem(
        key=key, secret=secret, endpoint_url=endpoint, client_kwargs={"region_name": "us-east-1"}, skip_instance_cache=True
    )
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    try:
        client.call_s3("create_bucket", Bucket=bucket)
    finally:
        os.environ.update(before)
