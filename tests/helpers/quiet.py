"""Fixtures for tests that run models: nothing is remembered outside the test, and one thread does the work."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def no_memo(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
