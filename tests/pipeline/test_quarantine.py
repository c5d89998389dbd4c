"""A document that the teacher cannot read, from `score` to a trained model, as a user meets it; and a trial of scoring."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.helpers.models import tiny_model_folder
from tests.helpers.runs import Bench, distft, files

SICK = "~"
"""A character whose token has an embedding that is no number."""
REASON = "the teacher's distribution over it is not finite"


@pytest.fixture
def spoilt(bench: Bench) -> Bench:
    """A bench of which the documents 3 and 20 of the training split cannot be read; the model itself is sound on all others."""
    tiny_model_folder(bench.model, hidden=32, vocabulary=300, initializer_range=0.1, tied=False)
    [token] = AutoTokenizer.from_pretrained(bench.model).encode(SICK, add_special_tokens=False)
    file = bench.model / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    rows = bench.rows()
    for number in (3, 20):
        rows[number - 1]["messages"][0]["content"] += SICK
    bench.write_rows(rows)
    bench.run("tokenize")
    return bench


def test_from_score_to_a_trained_model(spoilt: Bench) -> None:
    done = spoilt.run("score")
    told = done.json
    coverage = told["coverage"]
    sick = coverage.pop("quarantined")
    assert [(Path(one["file"]).name, one["row"], one["reason"]) for one in sick] == [
        ("train.jsonl", 3, REASON),
        ("train.jsonl", 20, REASON),
    ]
    held = told["documents"] - 2
    assert (coverage["documents"], coverage["held"], coverage["missing"]) == (told["documents"], held, 0)
    assert (coverage["complete"], coverage["scored_tokens"]) == (False, told["tokens_scored"])
    assert coverage["bytes"] > 0
    assert told["documents_scored"] == held
    names = [one["document"] for one in sick]
    for one in sick:
        assert f"{one['document']}  {one['file']}:{one['row']}: {REASON}" in done.err
    cure = f"data.exclude=[{','.join(names)}]"
    assert cure in done.err
    for verb in ("train", "evaluate", "run"):
        refused = spoilt.refused(
            verb, status=3, says=f"The teacher could not read 2 of the corpus's {told['documents']} documents"
        )
        assert all(name in refused.json["error"] for name in names)
        assert cure in refused.json["help"]
    assert not list(spoilt.store.glob("runs/*/checkpoints/step-*"))

    spoilt.refused("train", cure, status=3, says=f"holds all {held} documents of the corpus")
    again = spoilt.run("run", cure).json
    assert again["score"]["documents_scored"] == 0
    assert (again["score"]["coverage"]["complete"], again["score"]["coverage"]["quarantined"]) == (True, [])
    assert again["train"]["steps"] > 0
    assert set(spoilt.plan(cure).values()) == {"have"}
    short = f"data.exclude=[{','.join(name[:12] for name in reversed(names))}]"
    assert spoilt.run("train", short).json["resumed_from"] == again["train"]["steps"], "the same run"


def test_what_is_left_out_is_part_of_what_a_run_is(finished: Bench) -> None:
    told = finished.run("score").json
    assert (told["coverage"]["complete"], told["coverage"]["missing"], told["coverage"]["quarantined"]) == (True, 0, [])
    one = distft("cache", "show", told["teacher"], "--json").json["document_ids"][0]
    assert finished.run("score", f"data.exclude=[{one}]").json["documents_scored"] == 0
    finished.refused("train", f"data.exclude=[{one}]", status=3, says=f'exclude: (absent) -> ["{one[:12]}"]')
    assert finished.run("train", "data.exclude=[]").json["resumed_from"] == 12


@pytest.mark.parametrize("verb", ["score", "train", "plan", "run"])
def test_a_name_that_is_no_document(finished: Bench, verb: str) -> None:
    said = finished.refused(verb, "data.exclude=[0123456789ab]", status=2, says="0123456789ab: no document is called so")
    assert said.json["where"] == "data.exclude"


def test_cache_verbs_tell_of_them(spoilt: Bench) -> None:
    place = spoilt.run("score").json["teacher"]
    [entry] = distft("cache", "list", "--store", str(spoilt.store), "--json").json["caches"]
    shown = distft("cache", "show", place, "--json").json
    assert (entry["quarantined"], list(shown["quarantined"].values())) == (2, [REASON, REASON])
    assert "2 documents that the teacher could not read" in distft("cache", "show", place).err
    assert "2 documents that the teacher could not read" in distft("cache", "list", "--store", str(spoilt.store)).err
    verified = distft("cache", "verify", place, "--json").json
    assert (verified["quarantined"], verified["corpora_covered"], entry["corpora_covered"]) == (2, 0, 0)
    assert distft("cache", "prune", place, "--json").json["files_removed"] == 0
    probed = distft("cache", "verify", place, "--probe", "4", "--model", str(spoilt.model), "--json")
    assert (probed.status, probed.json["probe"]["documents"]) == (0, 4)


def test_two_actors_set_the_same_documents_apart(spoilt: Bench) -> None:
    told = spoilt.run("score", "score.workers=2").json
    assert [one["row"] for one in told["coverage"]["quarantined"]] == [3, 20]
    assert told["documents_scored"] == told["coverage"]["held"] == told["documents"] - 2
    cure = f"data.exclude=[{','.join(one['document'] for one in told['coverage']['quarantined'])}]"
    rows = spoilt.rows()
    rows[0]["messages"][0]["content"] = "What is new?"
    spoilt.write_rows(rows)
    spoilt.run("tokenize")
    assert spoilt.run("score", "score.workers=2", cure).json["documents_scored"] == 1


# --- memory ----------------------------------------------------------------------------------------------------------

LONG = 5000


def short_of_memory(spare: int) -> None:
    """Once the teacher is loaded, this process gets so many bytes more and no others."""
    import pyarrow

    from distft.teacher import scorer

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve address space in large pieces
    real = scorer.Scorer.__init__

    def loading(self: Any, *args: Any) -> None:
        real(self, *args)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    scorer.Scorer.__init__ = loading  # pyright: ignore[reportAttributeAccessIssue]  its process ends with it


def test_a_document_that_memory_does_not_suffice_for(bench: Bench) -> None:
    """Really: with eager attention it wants a matrix of 100 MB a head, and the process may have 250 MB."""
    rows = bench.rows()
    rows[5]["messages"][1]["content"] = "six seven " * (LONG // 2)
    bench.write_rows(rows)
    config = bench.config()
    config["model"]["attention"] = "eager"
    config["data"]["max_tokens"] = LONG
    bench.write(config)
    bench.run("tokenize")
    done = bench.start("score", "score.tokens_per_batch=12000", hook=short_of_memory, given=(250 << 20,)).wait()
    assert done.status == 0, done.err
    [one] = done.json["coverage"]["quarantined"]
    assert one["row"] == 6
    assert one["reason"].startswith("out of memory: ")
    assert done.json["documents_scored"] == done.json["documents"] - 1
    bench.refused("train", status=3, says="out of memory: ")
    told = bench.run("score", "score.retry_quarantined=true", "score.tokens_per_batch=12000").json
    assert (told["documents_scored"], told["coverage"]["complete"]) == (1, True)


# --- a trial ---------------------------------------------------------------------------------------------------------


def test_a_trial_costs_nothing_twice(bench: Bench) -> None:
    bench.run("tokenize")
    done = bench.run("score", "score.limit=9")
    trial, rest = done.json, done.json["rest"]
    assert 0 < trial["documents_scored"] <= 9
    assert trial["coverage"]["held"] == trial["documents_scored"]
    assert trial["coverage"]["missing"] == rest["documents"] == trial["documents"] - trial["documents_scored"]
    assert not trial["coverage"]["complete"]
    assert not list(bench.store.glob("teacher/*/coverage/*"))
    assert rest["bytes"] > 0
    assert rest["hours"] == pytest.approx(rest["tokens"] / rest["tokens_per_second"] / 3600)
    assert f"a trial. {rest['documents']} documents, {rest['tokens']:,} tokens, are left" in done.err
    refused = bench.refused("train", "score.limit=9", status=3, says=f"holds {trial['documents_scored']} of the corpus's")
    assert "score.limit=null: score.limit=9 is a trial" in refused.json["help"]
    larger = bench.run("score", "score.limit=15").json
    whole = bench.run("score").json
    assert whole["coverage"]["complete"]
    assert trial["documents_scored"] + larger["documents_scored"] + whole["documents_scored"] == whole["documents"]
    assert trial["tokens_scored"] + larger["tokens_scored"] + whole["tokens_scored"] == whole["coverage"]["scored_tokens"]
    assert rest["tokens"] == whole["coverage"]["tokens"] - trial["coverage"]["tokens"]
    after = bench.run("score", "score.limit=9")
    assert (after.json["documents_scored"], after.json["rest"]["documents"]) == (0, 0)
    assert "nothing is left to score" in after.err


def test_a_run_with_a_trial_ends_behind_it(bench: Bench) -> None:
    done = bench.run("run", "score.limit=5")
    assert list(done.json) == ["tokenize", "score"]
    assert "score.limit=5 is a trial; nothing was trained" in done.err
    assert not list(bench.store.glob("runs/*/config.yaml"))
    assert list(bench.run("run").json) == ["tokenize", "score", "train", "export", "evaluate", "report"]
    before = files(bench.store)
    bench.refused("score", "score.limit=5", "score.reuse_only=true", status=2, says="score.limit asks to score documents")
    assert files(bench.store) == before


def test_the_run_file_takes_them(bench: Bench) -> None:
    """As a list in the file, and named in the resolved one."""
    bench.run("run")
    cache = bench.run("score").json["teacher"]
    one = distft("cache", "show", cache, "--json").json["document_ids"][3]
    config = bench.config()
    config["name"] = "less"
    config["data"]["exclude"] = [one]
    bench.write(config)
    bench.run("score")
    bench.run("train")
    assert yaml.safe_load((bench.store / "runs" / "less" / "config.yaml").read_text())["data"]["exclude"] == [one]
