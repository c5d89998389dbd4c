"""Scoring by Ray actors: the same cache as in one process, to the bit, whatever dies on the way."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.cluster.pool import map_units
from distft.config.schema import Run
from distft.errors import ConfigError, DistftError, StaleArtifactError
from distft.pipeline import Pipeline
from distft.store import digest
from distft.store.model_folder import resolve_model
from distft.teacher import build
from distft.teacher.build import build_teacher, in_process, units_of
from distft.teacher.identity import teacher_folder
from distft.teacher.scorer import Scorer, ScorerPlan, UnitScored
from tests.helpers.actors import DiesOnce
from tests.helpers.cluster import Cluster
from tests.helpers.runs import Bench
from tests.helpers.stores import Lab, copied_model, document, lab, random_documents, shared_model

DOCUMENTS = random_documents(40, seed=60)
TWO = "score.workers=2"


def cached(bench: Bench, *, left: int = 0) -> dict[str, str]:
    """Each part of the cache by the name of its documents, and the digest of its bytes. Actors that were killed may have `left` so
    many files that no part names."""
    found = {}
    for manifest in bench.store.glob("teacher/*/parts/*.json"):
        (entry,) = json.loads(manifest.read_text())["files"]
        assert (manifest.parents[1] / entry["name"]).is_file()
        found[manifest.stem] = entry["sha256"]
    files = len(list(bench.store.glob("teacher/*/data/*.arrow")))
    assert len(found) <= files <= len(found) + left, "files that no part names"
    return found


def undisturbed(bench: Bench) -> dict[str, str]:
    """What one process makes of it; scores into another store."""
    store = bench.folder / "undisturbed"
    for verb in ("tokenize", "score"):
        bench.run(verb, f"store={store}")
    twin = Bench(bench.folder / "twin")
    twin.folder.mkdir()
    (twin.folder / "store").symlink_to(store)
    return cached(twin)


def test_actors_and_one_process_make_the_same_cache(cluster: Cluster, bench: Bench) -> None:
    expected = undisturbed(bench)
    bench.run("tokenize")
    done = bench.run("score", TWO)
    assert done.json["documents_scored"] == 30
    assert done.json["tokens_scored"] == 327
    assert cached(bench) == expected
    assert len(expected) > 4
    assert "score: 1,171 of 1,171 tokens" in done.err
    assert "2 of 2 workers" in done.err
    again = bench.run("score", TWO).json
    assert again["documents_scored"] == 0
    assert bench.plan(TWO)["teacher"] == "have"


def dying(folder: Path, make_worker: Any, units: Any, report: Any) -> Any:
    return map_units(DiesOnce(make_worker, folder), units, report, workers=1)


def test_an_actor_that_is_killed_costs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    plain, made = lab(tmp_path / "plain", documents=DOCUMENTS), lab(tmp_path / "killed", documents=DOCUMENTS)
    plain.score()
    scored = build_teacher(made.run, made.corpus, made.model, made.store, partial(dying, tmp_path))
    assert (tmp_path / "died").exists()
    assert scored.documents_scored == 40
    assert cached(Bench(made.folder)) == cached(Bench(plain.folder))


def die_behind(results: int, environment: dict[str, str]) -> None:
    """Makes a driver's process kill itself when it has got so many results."""
    os.environ.update(environment)
    from distft.cluster.pool import Pool

    real, seen = Pool._next_event, 0

    def counting(self: Any, stream: Any, hand: Any) -> Any:
        nonlocal seen
        event = real(self, stream, hand)
        seen += event[0] == "result"
        if seen == results:
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    Pool._next_event = counting


def test_a_killed_driver_goes_on_beside_another(cluster: Cluster, bench: Bench) -> None:
    """Killed while its actors work; then the same command twice, at once, by actors and in one process."""
    expected = undisturbed(bench)
    bench.run("tokenize")
    elsewhere = "score.workers=1", f"cluster.address={cluster.address}"
    process = bench.start("score", *elsewhere, hook=die_behind, given=(3, cluster.environment))
    assert process.wait().status == -signal.SIGKILL
    assert 3 <= len(list(bench.store.glob("teacher/*/parts/*.json"))) < len(expected)
    beside = bench.start("score")
    mine = bench.run("score", *elsewhere).json
    theirs = beside.wait()
    assert theirs.status == 0, theirs.err
    assert mine["documents"] == theirs.json["documents"] == 30
    assert cached(bench, left=1) == expected


def test_what_an_interrupted_run_left_over_is_scored_to_the_same_bits(tmp_path: Path) -> None:
    plain, made = lab(tmp_path / "plain", documents=DOCUMENTS), lab(tmp_path / "killed", documents=DOCUMENTS)
    plain.score()

    def third_and_fifth(make_worker: Any, units: Any, report: Any) -> Any:
        yield from in_process(make_worker, [units[2], units[4]], report)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_teacher(made.run, made.corpus, made.model, made.store, third_and_fifth)
    assert len(list(made.folder.glob("store/teacher/*/parts/*.json"))) == 2
    made.score()
    assert cached(Bench(made.folder)) == cached(Bench(plain.folder))


def test_a_unit_whose_part_is_there_is_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor may die between its commit and its answer, and another driver may have been faster."""
    made = lab(tmp_path, documents=DOCUMENTS)
    made.score()
    wanted = {digest: ("train", row) for row, digest in enumerate(made.corpus.digests("train"))}
    (unit, *_) = units_of(made.corpus, wanted, set(wanted))
    monkeypatch.setattr("distft.teacher.scorer.score_documents", lambda *_: pytest.fail("it was scored again"))
    told: list[float] = []
    (result,) = in_process(plan_of(made), [unit], lambda amount, note: told.append(amount))
    assert result == UnitScored(documents=0, scored_tokens=0, found_tokens=unit.tokens)
    assert told == [0.0, unit.tokens]  # ready, then at once all of it


def test_units_follow_from_the_corpus_alone(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS)
    wanted = {digest: ("train", row) for row, digest in enumerate(made.corpus.digests("train"))}
    units = units_of(made.corpus, wanted, set(wanted))
    assert build.PARTS_AT_LEAST <= len(units) <= 2 * build.PARTS_AT_LEAST
    assert [place for unit in units for place in unit.places] == list(wanted.values())
    assert sum(unit.tokens for unit in units) == made.corpus.lengths("train").sum()
    held = {made.corpus.document(*place).digest for place in units[3].places + units[7].places}
    assert units_of(made.corpus, wanted, set(wanted) - held) == [*units[:3], *units[4:7], *units[8:]]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_finite_is_refused_as_in_one_process(cluster: Cluster, bench: Bench) -> None:
    bench.run("tokenize")
    path = bench.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path, {"format": "pt"})
    bench.refused("score", "cluster.address=auto", "score.workers=1", status=2, says="logits are not finite")


def test_a_document_that_is_not_finite_comes_back_by_name(cluster: Cluster, tmp_path: Path) -> None:
    """Its input embedding is broken, which no look at the model shows; every other document is sound."""
    model = copied_model(shared_model("llama_untied_padded"), tmp_path / "model")
    weights = load_file(model.path / "model.safetensors")
    weights["model.embed_tokens.weight"][279] = torch.nan
    save_file(weights, model.path / "model.safetensors", {"format": "pt"})
    sound = [d for d in DOCUMENTS if 279 not in d.tokens]
    made = lab(
        tmp_path, documents=[*sound[:6], document([5, 279, 7], [2]), *sound[6:12]], model=resolve_model(str(model.path), None)
    )
    scored = build_teacher(made.run, made.corpus, made.model, made.store, partial(map_units, workers=1))
    (broken,) = (one.digest for one in made.corpus.documents("train") if 279 in one.tokens)
    assert scored.coverage.quarantined == {broken: "the teacher's distribution over it is not finite"}
    assert scored.documents_scored == 12


# --- elsewhere -------------------------------------------------------------------------------------------------------


def plan_of(made: Lab) -> ScorerPlan:
    folder = teacher_folder(made.store, made.identity())
    return ScorerPlan(run=made.run, model=made.model, folder=folder, corpus=made.corpus.folder, opened=made.corpus)


def elsewhere(plan: ScorerPlan) -> ScorerPlan:
    """The plan as it arrives in another process."""
    return pickle.loads(pickle.dumps(plan))  # noqa: S301


def test_a_plan_opens_everything_anew_elsewhere(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=DOCUMENTS[:4])
    plan = elsewhere(plan_of(made))
    assert plan.opened is None
    torch.set_num_threads(2)
    scorer = plan()
    assert isinstance(scorer, Scorer)
    assert torch.get_num_threads() == 1, "scorers beside each other would fight for the cores"
    assert np.array_equal(scorer.corpus.document("train", 2).tokens, DOCUMENTS[2].tokens)


def test_other_weights_under_the_same_path_are_refused(tmp_path: Path) -> None:
    """As on a machine whose copy of the model is another; in one cache there is one teacher."""
    made = lab(tmp_path, documents=DOCUMENTS[:4], model=copied_model(shared_model(), tmp_path / "model"))
    plan = plan_of(made)
    path = made.model.path / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(StaleArtifactError, match="on this machine are not those"):
        elsewhere(plan)()


def test_scorers_of_a_fresh_machine_hash_its_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain, hashed = lab(tmp_path, documents=DOCUMENTS[:4]), digest.file_sha256, list[Path]()
    plan = plan_of(made)
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path / "fresh"))
    monkeypatch.setattr(digest, "YOUNG_SECONDS", 0.0)
    monkeypatch.setattr(digest, "_known", {})

    def slowly(path: Path) -> str:
        hashed.append(path)
        time.sleep(0.2)
        return plain(path)

    monkeypatch.setattr(digest, "file_sha256", slowly)
    scorers = [threading.Thread(target=plan._model_here) for _ in range(4)]
    for one in scorers:
        one.start()
    for one in scorers:
        one.join()
    assert [path.name for path in hashed].count("model.safetensors") == 1
    assert len(hashed) == len(set(hashed))


def test_a_unit_of_another_corpus_is_refused(tmp_path: Path) -> None:
    made, other = lab(tmp_path / "a", documents=DOCUMENTS[:4]), lab(tmp_path / "b", documents=DOCUMENTS[4:8])
    wanted = {digest: ("train", row) for row, digest in enumerate(other.corpus.digests("train"))}
    unit = units_of(other.corpus, wanted, set(wanted))[0]
    with pytest.raises(DistftError, match="are others here"):
        list(plan_of(made)()(unit))


@pytest.mark.parametrize(
    ("address", "workers", "gpus", "expected"),
    [
        ("local", "auto", 0, None), ("local", 1, 0, None), ("local", "auto", 1, None), ("local", 1, 8, None),
        ("local", "auto", 8, {"workers": 8, "gpus": 8}), ("local", 3, 0, {"workers": 3, "gpus": 0}),
        ("local", 2, 8, {"workers": 2, "gpus": 8}), ("auto", "auto", 0, {"workers": None, "gpus": 0}),
        ("h:1", 1, 0, {"workers": 1, "gpus": 0}), ("auto", 16, 2, {"workers": 16, "gpus": 2}),
        ("local", "auto", 8, {"workers": 2, "gpus": 8, "group": 4}), ("local", 1, 0, {"workers": 1, "gpus": 0, "group": 2}),
        ("auto", "auto", 0, {"workers": None, "gpus": 0, "group": 2}),
    ],
)  # fmt: skip
def test_who_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, workers: Any, gpus: int, expected: dict[str, Any] | None
) -> None:
    group = (expected or {}).get("group", 1)
    mapping = chosen(tmp_path, monkeypatch, address, workers, gpus, group)
    if expected is None:
        assert mapping is in_process
    else:
        assert mapping.func is map_units
        assert mapping.keywords == {"address": address, "group": 1, **expected}


def test_more_scorers_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"workers=3 with score.tensor_parallel=1 need 3 GPUs, and this machine has 2"):
        chosen(tmp_path, monkeypatch, "local", 3, 2, 1)
    with pytest.raises(ConfigError, match=r"workers=1 with score.tensor_parallel=4 need 4 GPUs, and this machine has 2"):
        chosen(tmp_path, monkeypatch, "local", "auto", 2, 4)


def chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, workers: Any, gpus: int, group: int
) -> Any:  # fmt: skip
    monkeypatch.setattr("distft.engine.world.device_count", lambda: gpus)
    run = Run.model_validate({
        "name": "a", "store": str(tmp_path), "model": {"path": "m"}, "data": {"train": {"path": "t"}},
        "score": {"workers": workers, "tensor_parallel": group}, "cluster": {"address": address},
    })  # fmt: skip
    return Pipeline(run)._map_units()
