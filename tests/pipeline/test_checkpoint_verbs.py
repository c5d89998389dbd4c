"""`distft checkpoint`: a run's checkpoint goes out, comes back as another run's, and that one ends where the first did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.runs import Bench, Done, distft

SETTINGS = ("train.checkpoint.every_steps=5", "train.checkpoint.keep=9")


def checkpoint(bench: Bench, verb: str, folder: Path | str, *rest: str, status: int = 0) -> Done:
    done = distft("checkpoint", verb, str(bench.file), str(folder), *rest, "--json")
    assert done.status == status, f"{done.status}\n{done.err}\n{done.out}"
    assert "Traceback" not in done.err
    return done


def newest(bench: Bench, name: str) -> dict[str, Any]:
    path = sorted((bench.store / "runs" / name / "checkpoints").glob("step-*/MANIFEST.json"))[-1]
    return json.loads(path.read_text())


def test_out_and_in_again_a_run_ends_where_the_first_did(bench: Bench, tmp_path: Path) -> None:
    for verb in ("tokenize", "score", "train"):
        bench.run(verb, *SETTINGS)
    there = tmp_path / "there"
    out = checkpoint(bench, "export", there, *SETTINGS, "--step", "5").json
    assert (out["folder"], out["step"]) == (str(there), 5)

    back = checkpoint(bench, "import", there, *SETTINGS, "name=second").json
    assert (back["step"], back["imported"]["from"]) == (5, "there")
    assert bench.plan(*SETTINGS, "name=second")["checkpoints"] == "partial"
    bench.run("report", *SETTINGS, "name=second")  # of a run with a checkpoint and no log
    first, done = newest(bench, "first"), bench.run("train", *SETTINGS, "name=second").json
    assert (done["resumed_from"], done["steps"]) == (5, first["identity"]["step"])
    second = newest(bench, "second")
    assert first["files"][0]["sha256"] == second["files"][0]["sha256"], "bit for bit"
    assert second["facts"]["imported"] == back["imported"]
    bench.run("export", *SETTINGS, "name=second")
    bench.run("report", *SETTINGS, "name=second")

    told = checkpoint(bench, "import", there, *SETTINGS, "name=second", status=3).json
    assert "has begun" in told["error"]
    assert "another `name`" in told["help"]


def test_a_folder_of_this_machine_is_asked_for(bench: Bench) -> None:
    for text in ("name=second", "s3://bucket/prefix"):
        for verb in ("export", "import"):
            told = checkpoint(bench, verb, text, status=2).json
            assert f"FOLDER is '{text}'" in told["error"]
            assert "before any override" in told["help"]
