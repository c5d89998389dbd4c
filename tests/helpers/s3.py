"""S3 servers over HTTP for tests, one of a kind per session, started on first use and ended by their own handles.

Moto's for every day; Ceph's gateway, which is a real one, for the lane `-m s3real`: there each test that uses S3 runs against it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from distft.store.location import Location, open_location
from tests.helpers.rgw import missing_binaries, running_rgw
from tests.helpers.serving import answers, free_ports

SERVERS = ["moto", pytest.param("rgw", marks=pytest.mark.s3real)]
BUCKET = "distft-tests"


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a process needs in its environment to use the server at `endpoint`, and nothing of this machine's own."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def set_s3_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    """Makes `values` all that the environment says about S3."""
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    for key, value in values.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(scope="session", params=SERVERS)
def s3_server(request: pytest.FixtureRequest) -> str:
    """The endpoint of a server that holds an empty bucket."""
    return request.getfixturevalue(f"_{request.param}")


@pytest.fixture(scope="session")
def _rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if missing := missing_binaries():
        pytest.skip(f"Ceph's gateway is not installed ({', '.join(missing)}): README, `s3real`")
    key = s3_environment("")
    given = {"key": key["AWS_ACCESS_KEY_ID"], "secret": key["AWS_SECRET_ACCESS_KEY"], "bucket": BUCKET}
    with running_rgw(tmp_path_factory.mktemp("rgw"), **given) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def _moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    [port] = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        if not answers(endpoint, [server], within=60):
            raise RuntimeError(f"moto did not start:\n{Path(log.name).read_text()}")
        # Not fs.mkdir: with a region it sends a LocationConstraint, which us-east-1 refuses, here as on AWS.
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")).close()
        yield endpoint
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty prefix of its own, with the environment that reaches it."""
    return empty_prefix(s3_server, monkeypatch)


@pytest.fixture(params=["local", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """An empty store, on the disk and on S3: what holds for one must hold for the other."""
    if request.param == "local":
        return open_location(str(tmp_path / "store"))
    return open_location(empty_prefix(request.getfixturevalue(f"_{request.param}"), monkeypatch))


def empty_prefix(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    set_s3_environment(monkeypatch, s3_environment(server))
    return f"s3://{BUCKET}/{uuid4().hex}"
