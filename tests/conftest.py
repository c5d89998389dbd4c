"""Fixtures that every test may ask for."""

import pytest

pytest_plugins = ["tests.helpers.runs", "tests.helpers.s3", "tests.helpers.cluster"]

LONG = ("slow", "gpu", "s3real", "bench", "peers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The lanes that are asked for by name may take their time; pyproject's limit is for the tests of every change."""
    for item in items:
        if any(item.get_closest_marker(lane) for lane in LONG) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))
