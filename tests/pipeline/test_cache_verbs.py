"""`distft cache` as a user types it: figures, statuses, both voices, on a disk and on S3."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from distft.store.location import Location, open_location
from tests.helpers.caches import changed, only_cache, rewrite
from tests.helpers.runs import Bench, Done, distft, files
from tests.unit.test_cli import HEAVY, spied

DAY = 86_400


def cache(verb: str, *arguments: str, status: int = 0) -> Done:
    """`distft cache VERB ... --json`, and the same for a person: stdout is the program's alone, and nobody sees a traceback."""
    done = distft("cache", verb, *arguments, "--json")
    assert done.status == status, f"{done.err}\n{done.out}"
    assert "Traceback" not in done.err
    if status:
        assert done.json.keys() == {"error", "where", "help"}
        assert done.json["error"]
        assert done.json["help"]
        assert all(part in done.err for part in done.json.values())
    return done


def person(verb: str, *arguments: str) -> str:
    done = distft("cache", verb, *arguments)
    assert (done.status, done.out) == (0, ""), done.err
    assert max(len(line) for line in done.err.splitlines() if "/" not in line) <= 100
    return done.err


@pytest.fixture
def place(finished: Bench) -> str:
    return only_cache(open_location(str(finished.store))).url


@pytest.fixture
def on_s3(finished: Bench, s3_url: str, tmp_path: Path) -> Location:
    """The finished run's store without its checkpoints' bytes, on S3."""
    store = open_location(s3_url)
    for path in sorted(finished.store.rglob("*")):
        name = path.relative_to(finished.store).as_posix()
        if path.is_file() and (name.startswith(("teacher/", "corpus/")) or name.endswith(("MANIFEST.json", "config.yaml"))):
            store.replace(name, path.read_bytes())
    return store


def test_list(finished: Bench, place: str) -> None:
    found = cache("list", "--store", str(finished.store)).json
    [entry] = found["caches"]
    assert found["store"] == str(finished.store)
    assert (entry["cache"], entry["runs"], entry["documents"], entry["problem"]) == (place, ["first"], 30, None)
    score = finished.run("score").json
    assert entry["bytes_per_token"] == score["bytes_per_token"]
    text = person("list", "--store", str(finished.store))
    assert all(part in text for part in (entry["id"], "used by  first", "topk (k 128, min_prob 0.001), supervised", "float32"))
    assert cache("list", "--store", str(finished.folder / "nothing")).json["caches"] == []


def test_show(finished: Bench, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(finished.store)
    found = cache("show", place, "--tau", "300").json
    documents = [cache("show", place, "--document", one).json for one in found["document_ids"]]
    labels = [x for one in documents for x in one["label_logprob"]]
    assert (found["documents"], found["scored_tokens"]) == (len(documents), len(labels)) == (30, found["scored_tokens"])
    assert found["tokens"] == sum(len(one["tokens"]) for one in documents)
    assert found["share_above_tau"] == pytest.approx(sum(math.exp(-x) > 300 for x in labels) / len(labels))
    assert 0 < found["share_above_tau"] < 1
    assert sum(found["perplexity"]["counts"]) == sum(found["entropy"]["counts"]) == len(labels)
    assert found["mean_entropy"] == pytest.approx(np.mean([x for one in documents for x in one["entropy"]]))
    assert found["mass_kept"]["mean"] == pytest.approx(1 - np.mean([x for one in documents for x in one["tail"]]))
    monkeypatch.chdir(finished.folder)
    assert cache("show", found["id"][:5]).json["tau"] == 2.5, "an id is looked for in ./store"
    text = person("show", place)
    assert all(part in text for part in ("perplexity of the label", "mass kept, mean", "perplexity above 2.5", "####"))
    assert files(finished.store) == before


def test_what_reads_a_cache_and_runs_no_model_needs_no_torch(finished: Bench, place: str, tmp_path: Path) -> None:
    """`list` and `prune` are in tests/unit/test_cli.py."""
    [one, *_] = cache("show", place).json["document_ids"]
    for verb in (("show", place), ("show", place, "--document", one), ("verify", place)):
        done, loaded = spied(tmp_path, "cache", *verb, "--json")
        assert done.status == 0, done.err
        assert loaded & HEAVY == set()
    _, loaded = spied(tmp_path, "cache", "verify", place, "--probe", "1", "--model", str(finished.model))
    assert "torch" in loaded, "the spy is blind"


def test_one_document_is_what_the_model_says_of_its_tokens(finished: Bench, place: str) -> None:
    """By transformers' own forward, and nothing of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    digest = cache("show", place).json["document_ids"][4]
    one = cache("show", place, "--document", digest[:10]).json
    assert one["document"] == digest
    with torch.no_grad():
        logits: Any = AutoModelForCausalLM.from_pretrained(finished.model)(torch.tensor([one["tokens"]])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    for n, position in enumerate(one["positions"]):
        row = logprobs[position - 1]
        label = row[one["tokens"][position]]
        assert one["label_logprob"][n] == pytest.approx(float(label), abs=1e-4)
        assert one["entropy"][n] == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-4)
        assert one["rank"][n] == int((row > label).sum())
        assert one["logprobs"][n] == pytest.approx(row[one["ids"][n]].tolist(), rel=2**-10)
        assert one["tail"][n] == pytest.approx(1 - float(row[one["ids"][n]].exp().sum()), abs=1e-4)
    assert "position" in person("show", place, "--document", digest)


def test_verify_and_probe(finished: Bench, place: str) -> None:
    before = files(finished.store)
    found = cache("verify", place, "--probe", "5", "--model", str(finished.model)).json
    assert (found["documents"], found["compared_with_corpus"], found["corpora_covered"]) == (30, 30, 1)
    assert (found["probe"]["documents"], found["probe"]["tolerance"]) == (5, 1e-3)
    assert found["probe"]["max_label_gap"] <= 1e-3
    assert found["probe"]["argmax_agreement"] == found["probe"]["rank_agreement"] == 1
    assert cache("verify", place).json["probe"] is None
    assert "is sound" in person("verify", place)
    assert files(finished.store) == before


def test_damage_is_named(finished: Bench, place: str) -> None:
    flipped, missing = sorted((Path(place) / "data").iterdir())[:2]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    missing.unlink()
    told = cache("verify", place, status=3).json["error"]
    assert f"data/{flipped.name}: sha256 " in told
    assert f"data/{missing.name}: missing" in told
    assert told.startswith("2 problems")
    cache("show", place, status=3)


def test_a_row_of_another_document_is_named(finished: Bench, place: str) -> None:
    from dataclasses import replace

    name = rewrite(open_location(place), finished.folder / "staging", lambda row: replace(row, digest="f" * 32))
    told = cache("verify", place, status=3).json["error"]
    assert name in told
    assert "f" * 32 in told


def test_a_shift_by_one_that_every_byte_hides_is_found_by_the_probe(finished: Bench, place: str) -> None:
    shift = changed(entropy=lambda x: np.roll(x, 1), tail=lambda x: x, rank=lambda x: np.roll(x, 1))
    rewrite(open_location(place), finished.folder / "staging", shift, every=True)
    cache("verify", place)
    told = cache("verify", place, "--probe", "3", "--model", str(finished.model), status=3).json
    assert "differ by more than the 0.001 nats" in told["error"]


def test_the_probe_refuses_another_model(finished: Bench, place: str) -> None:
    path = finished.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    told = cache("verify", place, "--probe", "3", "--model", str(finished.model), status=3).json
    assert "weights.files.model.safetensors: " in told["error"]
    assert told["where"] == str(finished.model)
    cache("verify", place, "--probe", "3", "--model", str(finished.folder / "nothing"), status=2)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("show", "PLACE", "--tau", "1"), 2),
        (("verify", "PLACE", "--probe", "3"), 2),
        (("verify", "PLACE", "--model", "."), 2),
        (("show", "s3://user:hunter2@bucket/teacher/x"), 2),
        (("show", "/nowhere/teacher/0000"), 3),
        (("show", "PLACE", "--document", "zz"), 3),
        (("verify", "0123", "--store", "/nowhere"), 3),
        (("prune", "0123", "--store", "/nowhere"), 3),
    ],
)
def test_what_is_asked_wrongly_is_told_readably(place: str, arguments: tuple[str, ...], status: int) -> None:
    done = cache(*(place if one == "PLACE" else one for one in arguments), status=status)
    assert "hunter2" not in done.out + done.err


def test_prune(finished: Bench, place: str) -> None:
    data, store = Path(place) / "data", ("--store", str(finished.store))
    old, young, torn = (data / name for name in ("part-old.arrow", "part-young.arrow", ".partial-torn"))
    for path in (old, young, torn):
        path.write_bytes(b"123")
    for path in (old, torn, *(p for p in Path(place).rglob("*") if p.is_file() and p != young)):
        os.utime(path, (time.time() - 2 * DAY, time.time() - 2 * DAY))
    before = files(finished.store)
    told = cache("prune", "--dry-run", *store).json
    assert files(finished.store) == before
    assert (told["dry_run"], told["files_removed"], told["bytes_removed"]) == (True, 1, 3)
    [entry] = told["caches"]
    assert entry == {"cache": place, "files": {f"data/{old.name}": 3}, "unfinished": [f"data/{torn.name}"],
                     "young": {f"data/{young.name}": 3}}  # fmt: skip
    assert f"would remove data/{old.name}, 3 B" in person("prune", "--dry-run", place)
    done = cache("prune", place).json
    assert done["caches"] == told["caches"]
    gone = before.keys() - files(finished.store).keys()
    assert gone == {str(path.relative_to(finished.store)) for path in (old, torn)}
    assert cache("prune", *store).json["files_removed"] == 0
    assert cache("prune", "--grace-hours", "72", *store).json["files_removed"] == 0
    assert distft("cache", "prune", "--grace-hours", "0", *store).status == 2, "it could race a build"
    assert finished.run("score").json["documents_scored"] == 0


def test_all_of_it_on_s3(finished: Bench, on_s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = only_cache(on_s3)
    [entry] = cache("list", "--store", on_s3.url).json["caches"]
    assert (entry["cache"], entry["runs"], entry["documents"]) == (folder.url, ["first"], 30)
    found = cache("verify", folder.url, "--probe", "2", "--model", str(finished.model)).json
    assert (found["documents"], found["compared_with_corpus"], found["probe"]["documents"]) == (30, 30, 2)
    local = only_cache(open_location(str(finished.store))).url
    both = [json.loads(cache("show", where).out) for where in (folder.url, local)]
    assert both[0] | {"cache": ""} == both[1] | {"cache": ""}

    folder.replace("data/left.arrow", b"12")
    assert cache("prune", entry["id"], "--store", on_s3.url).json["files_removed"] == 0
    monkeypatch.setattr(type(folder), "age", lambda *_: 2.0 * DAY)
    before = set(on_s3.names(recursive=True))
    assert cache("prune", "--dry-run", "--store", on_s3.url).json["caches"][0]["files"] == {"data/left.arrow": 2}
    assert cache("prune", "--store", on_s3.url).json["bytes_removed"] == 2
    assert before - set(on_s3.names(recursive=True)) == {f"teacher/{entry['id']}/data/left.arrow"}

    name = next(name for name in folder.names(recursive=True) if name.startswith("data/"))
    data = bytearray(folder.read(name))
    data[len(data) // 2] ^= 1
    folder.replace(name, bytes(data))
    assert f"{name}: sha256 " in cache("verify", folder.url, status=3).json["error"], "not what was fetched before"
