"""What a run has left behind, for whoever reads it: its log and its newest checkpoint. Torch-free, for plans and pages."""

from __future__ import annotations

import json
import re
from typing import Any

from distft.errors import CorruptArtifactError
from distft.store.location import Location
from distft.store.manifest import Manifest, read_manifest

METRICS = "metrics.jsonl"
_STEP = re.compile(r"step-(\d{8})")


def step_folder(checkpoints: Location, step: int) -> Location:
    return checkpoints.child(f"step-{step:08d}")


def committed_steps(checkpoints: Location) -> list[int]:
    """Steps with a committed checkpoint, oldest first."""
    found = (_STEP.fullmatch(name) for name in checkpoints.folders())
    return [n for n in sorted(int(match[1]) for match in found if match) if step_folder(checkpoints, n).exists("MANIFEST.json")]


def newest_checkpoint(checkpoints: Location) -> tuple[Location, Manifest] | None:
    """The newest committed checkpoint's folder and manifest, its files unread."""
    for step in reversed(committed_steps(checkpoints)):
        where = step_folder(checkpoints, step)
        manifest = read_manifest(where)
        if manifest is not None:  # else it was removed meanwhile
            return where, manifest
    return None


def read_metrics(run: Location) -> list[dict[str, Any]]:
    """The log's lines, each with step and tokens; a last line that was cut off by a kill is left out."""
    if not run.exists(METRICS):
        return []
    text = run.read(METRICS).decode(errors="replace")
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        for line in lines:
            if not (isinstance(line["step"], int) and isinstance(line["tokens"], int)):
                raise TypeError("step and tokens are numbers")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptArtifactError(
            f"{METRICS} cannot be read: {type(error).__name__}: {error}"[:300], where=f"{run.url}/{METRICS}",
            help="It is a log, and no training is computed from it: move it away, and run the command again.",
        ) from error  # fmt: skip
    return lines
