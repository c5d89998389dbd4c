"""What tests of S3 on a bad day share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distft.store import patience
from tests.helpers.proxy import Proxy, proxied
from tests.helpers.s3 import s3_environment, set_s3_environment


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as ever, without the wait between them."""
    monkeypatch.setattr(patience, "PAUSES", (0.001,) * len(patience.PAUSES))


@pytest.fixture
def proxy(s3_server: str, no_pauses: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the test and its server: all requests go through it."""
    with proxied(s3_server) as proxy:
        set_s3_environment(monkeypatch, s3_environment(proxy.endpoint))
        yield proxy
