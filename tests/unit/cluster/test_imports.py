"""When ray is imported, and by whom what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_layers import PACKAGE, Import, imports

TESTS = Path(__file__).parents[2]


def early(source: str) -> list[Import]:
    """What has ray imported while tests are collected: it reads its environment then, before a session has closed its doors."""
    modules = ("ray", "distft.cluster.elastic", "distft.cluster.rank")
    return [
        one for one in imports(source, "") if one.top and f"{one.imported}.".startswith(tuple(f"{name}." for name in modules))
    ]


def test_no_test_file_imports_ray_when_it_is_collected() -> None:
    found = {path.name: problems for path in TESTS.rglob("*.py") if (problems := early(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["import ray", "from ray.train import ScalingConfig", "from distft.cluster import rank", "import distft.cluster.elastic"],
)
def test_each_early_import_is_caught(source: str) -> None:
    assert early(source)
    assert not early(f"import rayon\nfrom distft.cluster import desk\ndef test() -> None:\n    {source}")


def test_ranks_do_without_what_ray_keeps_to_itself() -> None:
    """Only a group whose size may change stands on it."""
    found = [one.imported for one in imports((PACKAGE / "cluster/rank.py").read_text(), "cluster.rank") if one.top]
    assert "ray.train" in found
    assert not [name for name in found if "._" in name or name == "distft.cluster.elastic"]
