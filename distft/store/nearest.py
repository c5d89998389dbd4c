"""The artifact that is most like the one asked for: what an error or a plan compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distft.store.location import Location
from distft.store.manifest import Difference, describe, differences, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """An artifact of the same kind and the fields in which it differs from the one asked for."""

    folder: Location
    fields: list[Difference]

    def __str__(self) -> str:
        return f"The nearest there is, {self.folder.url}, differs in:\n{describe(self.fields)}"


def nearest(folder: Location, identity: dict[str, Any], name: str = "MANIFEST.json") -> Neighbour | None:
    """Among the artifacts directly below `folder`, the one with the fewest differing fields; None where there are none."""
    found = []
    for child in folder.folders():
        manifest = read_manifest(folder.child(child), name)
        if manifest is not None:
            found.append(Neighbour(folder=folder.child(child), fields=differences(manifest.identity, identity)))
    return min(found, key=lambda n: (len(n.fields), n.folder.url), default=None)
