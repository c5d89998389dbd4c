"""What a plan says of tokens is what training does: against a recount by hand, against the feed, and against a first step."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.engine.world import World
from distft.errors import CorruptArtifactError
from distft.objectives.treatment import Signals, treatment
from distft.plan.show import plan_text
from distft.plan.tokens import QUADRANTS, TREATMENTS, Seen, TokenPlan, codes, plan_tokens
from distft.teacher.encode import PlainShard
from distft.teacher.glimpse import Glimpse, glimpse, spread
from distft.teacher.identity import read_parts
from distft.train.batches import Feed
from tests.helpers.runs import Bench
from tests.helpers.stores import Lab, document, lab, random_documents, run_config, shared_model

Q = [0.9, 0.5, 0.3, 0.05, 0.6, 0.001, 0.4]
H = [0.1, 1.2, 0.2, 2.5, 1.4, 0.3, 3.0]
CE = [-math.log(q) for q in Q]


def seen_by_hand() -> list[Seen]:
    """Two documents, of four and three supervised tokens."""
    found = []
    for part in (slice(0, 4), slice(4, 7)):
        q, h = np.array(Q[part], np.float32), np.array(H[part], np.float32)
        made = document([7] * (len(q) + 2), range(2, len(q) + 2))
        known = Signals(label_logprob=np.log(q), entropy=h, rank=np.arange(len(q), dtype=np.uint32))
        found.append(Seen(document=made, signals=known, entries=np.full(len(q), 3, np.uint16)))
    return found


def by_hand(kind: str = "stm", **sections: Any) -> TokenPlan:
    run = run_config(Path("store"), shared_model(), **{"objective": {"kind": kind}, **sections})
    return plan_tokens(run, seen_by_hand(), held=2, rows=2, vocabulary=280)


def objective(facts: dict[str, Any], name: str) -> dict[str, Any]:
    [found] = [one for one in facts["objectives"] if one["name"] == name]
    return found


def look(made: Lab, **limits: int) -> Glimpse:
    given: Any = {"documents": 10**9, "tokens": 10**9, "bytes": 10**12, **limits}
    return glimpse(made.cache().folder, made.corpus, made.staging, positions=made.run.score.positions, **given)


def plan_of(made: Lab) -> TokenPlan:
    found = look(made)
    seen = [
        Seen(document=d, entries=s.counts, signals=Signals(label_logprob=s.label_logprob, entropy=s.entropy, rank=s.rank))
        for d, s in found.documents
    ]
    return plan_tokens(made.run, seen, held=found.held, rows=found.rows, vocabulary=280)


def test_figures_are_those_of_a_recount() -> None:
    facts = by_hand().facts()
    assert (facts["documents"], facts["supervised_tokens"]) == (2, 7)
    assert facts["mean_ce"] == pytest.approx(sum(CE) / 7)
    assert facts["entropy_threshold"] == pytest.approx(math.log(2))
    mine = facts["objectives"][0]
    masked = [n for n, q in enumerate(Q) if 1 / q > 2.5 * (1 + 1e-6)]  # 0.4 is exactly tau, and is learned
    assert masked == [2, 3, 5]
    assert mine["treatments"]["masked"]["tokens"] == pytest.approx(3 / 7)
    assert mine["treatments"]["masked"]["ce"] == pytest.approx(sum(CE[n] for n in masked) / sum(CE))
    assert mine["loss_at_step_0"] == pytest.approx(sum(ce for n, ce in enumerate(CE) if n not in masked) / 4)
    members = {"sure_likely": [0], "sure_unlikely": [2, 5], "unsure_likely": [1, 4], "unsure_unlikely": [3, 6]}
    for name, tokens in members.items():
        assert facts["quadrants"][name]["tokens"] == pytest.approx(len(tokens) / 7)
        assert facts["quadrants"][name]["ce"] == pytest.approx(sum(CE[n] for n in tokens) / sum(CE))
        found = mine["quadrants"][name]
        assert found["treatments"]["masked"] == pytest.approx(len(set(tokens) & set(masked)) / len(tokens))
        assert found["mean_ce_weight"] == pytest.approx(1 - len(set(tokens) & set(masked)) / len(tokens))
    lowest = facts["sweep"][0]
    over = [n for n, q in enumerate(Q) if 1 / q > 1.5]
    assert lowest["tau"] == 1.5
    assert lowest["tokens"] == pytest.approx(len(over) / 7)
    assert lowest["ce"] == pytest.approx(sum(CE[n] for n in over) / sum(CE))


@pytest.mark.parametrize("teacher", [None, "elsewhere"])
def test_shares_add_up(teacher: str | None) -> None:
    facts = by_hand(teacher={"path": teacher}).facts()
    assert len(facts["objectives"]) == 11
    assert facts["objectives"][0]["configured"]
    for one in facts["objectives"]:
        for unit in ("tokens", "ce"):
            assert sum(share[unit] for share in one["treatments"].values()) == pytest.approx(1)
        for quadrant in one["quadrants"].values():
            assert sum(quadrant["treatments"].values()) == pytest.approx(1)
        assert tuple(one["treatments"]) == TREATMENTS
    for unit in ("tokens", "ce"):
        assert sum(facts["quadrants"][name][unit] for name in QUADRANTS) == pytest.approx(1)
    json.dumps(facts, allow_nan=False)


def test_the_sweep_falls() -> None:
    plan = plan_tokens(
        run_config(Path("store"), shared_model(), objective={"kind": "stm"}),
        seen_by_hand() * 20,
        held=40,
        rows=40,
        vocabulary=280,
    )
    found = plan.sweep([1.01, 1.2, 1.5, 2.5, 5.0, 10.0, 25.0, 1000.0])
    for before, after in pairwise(found):
        assert after["tokens"] <= before["tokens"]
        assert after["ce"] <= before["ce"]
        assert after["ce"] >= after["tokens"], "what is masked is what weighs most"
    assert found[-1]["tokens"] == 0


def test_live_objectives_are_asked_where_the_student_is_the_teacher() -> None:
    plan = by_hand("dft")
    facts = plan.facts()
    assert facts["objectives"][0]["basis"] == "step 0"
    np.testing.assert_allclose(plan.applied[0].weights[0], Q, rtol=1e-6)
    assert facts["objectives"][0]["loss_at_step_0"] == pytest.approx(sum(q * ce for q, ce in zip(Q, CE, strict=True)) / 7)
    [eaft] = [one for one in plan.applied if one.name == "eaft"]
    np.testing.assert_allclose(eaft.weights[0], [min(h, math.log(20)) / 3 for h in H], rtol=1e-6)
    assert "20 likeliest" in " ".join(objective(facts, "eaft")["notes"])
    [talr] = [one for one in plan.applied if one.name == "talr"]
    np.testing.assert_allclose(talr.weights[0][:4], [q ** (4 / sum(CE[:4])) for q in Q[:4]], rtol=1e-5)
    assert "No token has moved at step 0" in " ".join(objective(facts, "eksft")["notes"])
    asft = objective(facts, "asft")["treatments"]
    assert asft["held"]["tokens"] == 0, "0.001 of CE against 0.05 of KL is more than a hundredth"
    assert by_hand("stm").facts()["objectives"][0]["basis"] == "fixed"


def test_published_eksft_is_told_as_what_it_does() -> None:
    """At step 0 nothing has moved: k = 1 of 4 and of 3, the highest entropies with a score, whose tokens before are masked."""
    settings = {"kind": "eksft", "variant": "published_code", "rho": 0.34}
    run = run_config(Path("store"), shared_model(), objective=settings)
    plan = plan_tokens(run, seen_by_hand(), held=2, rows=2, vocabulary=280)
    facts = plan.facts()["objectives"][0]
    assert facts["name"] == "eksft rho=0.34 variant=published_code"
    masked = [TREATMENTS[code] == "masked" for code in plan.applied[0].codes]
    assert masked == [False, False, True, False, False, True, False]
    ce = (CE[0] + CE[1] + CE[3]) / 3 + (CE[4] + CE[6]) / 2
    assert H[3] / math.log(280) < 0.5 < H[6] / math.log(280), "so that the weight goes up in one and down in the other"
    bonus = 0.05 / math.log(280) * (1.05 * H[3] + 0.95 * H[6])
    assert facts["loss_at_step_0"] == pytest.approx((ce - bonus) / 2, rel=1e-6)
    assert "not learn the tokens before those" in " ".join(facts["notes"])


def test_what_collides_is_held() -> None:
    ce, collision = np.array([0, 1, 1], np.float32), np.array([0.1, 0.1, 0.001], np.float32)
    held = codes(treatment(3, ce=ce, entropy=-0.1, collision=collision))
    assert [TREATMENTS[code] for code in held] == ["held", "both", "learned"]


def test_with_another_teacher_live_objectives_stay_undecided() -> None:
    facts = by_hand("dft", teacher={"path": "elsewhere"}).facts()
    mine = facts["objectives"][0]
    assert mine["basis"] == "unknown"
    assert mine["treatments"]["live"] == {"tokens": 1.0, "ce": 1.0}
    assert mine["loss_at_step_0"] is None
    assert mine["mean_ce_weight"] is None
    assert objective(facts, "stm")["treatments"]["masked"]["tokens"] == pytest.approx(3 / 7), "the teacher alone decides"
    assert objective(facts, "stm")["loss_at_step_0"] is None, "the student's cross-entropy is not known"


def test_what_the_cache_cannot_serve_is_left_out_by_name() -> None:
    kinds = {one["kind"] for one in by_hand("stm", score={"distribution": {"kind": "none"}}).facts()["objectives"]}
    assert kinds == {"stm", "sft", "dft", "eaft", "talr"}
    facts = by_hand("stm", score={"distribution": {"kind": "sample", "draws": 8}}).facts()
    assert set(facts["left_out"]) == {"eksft"}


def test_the_runs_settings_are_told_beside_the_defaults() -> None:
    run = run_config(Path("store"), shared_model(), objective={"kind": "stm", "tau": 10})
    names = [one["name"] for one in plan_tokens(run, seen_by_hand(), held=2, rows=2, vocabulary=280).facts()["objectives"]]
    assert names[0] == "stm tau=10"
    assert "stm" in names[1:]


def test_a_weight_that_is_next_to_nothing_does_not_name_the_treatment() -> None:
    plan = by_hand(objective={"kind": "lwf", "c": 0.999})
    learned = np.flatnonzero(np.array(Q) < 0.9 - 1e-6)
    assert (codes_of(plan)[learned] == TREATMENTS.index("learned")).all(), "an anchor holds with a thousandth of its weight"
    assert set(codes_of(by_hand("sft_kl"))) == {TREATMENTS.index("both")}


def codes_of(plan: TokenPlan) -> Any:
    return plan.applied[0].codes


@pytest.mark.parametrize("settings", [
    {"kind": "stm", "tau": 30.0}, {"kind": "stm", "fraction": 0.3}, {"kind": "stm", "tau": 30.0, "select": "random"},
    {"kind": "stm_kl", "tau": 30.0}, {"kind": "lwf", "beta": 0.0, "p_star": 0.02, "c": 0.999}, {"kind": "sft"},
])  # fmt: skip
def test_masked_is_what_the_feed_drops(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = lab(tmp_path, documents=random_documents(30, seed=5), heldout=random_documents(2, seed=6), objective=settings)
    made.score()
    plan = plan_of(made)
    feed = Feed(made.corpus, made.cache(), made.run.objective, made.run.train, World(), vocabulary=280)
    step = feed.step(np.arange(30))
    borne = sum(len(batch.predictor_N) for batch in step.micro_batches)
    learned = sum(int((batch.targets.ce_N > 0).sum()) for batch in step.micro_batches)
    tokens = len(plan.ce)
    shares = plan.facts()["objectives"][0]["treatments"]
    assert tokens == int(made.corpus.supervised_counts("train").sum())
    assert shares["masked"]["tokens"] == pytest.approx(1 - borne / tokens)
    assert shares["learned"]["tokens"] == pytest.approx(learned / tokens)
    if settings["kind"] == "stm":
        assert 0 < borne < tokens, "the test is about something"


@pytest.mark.parametrize("kind", ["sft", "sft_kl", "stm", "stm_kl", "lwf", "kd", "dft", "asft", "talr"])
def test_the_loss_at_step_0_is_the_first_one_of_the_log(tmp_path: Path, kind: str) -> None:
    settings = {"kind": kind, **({"tau": 30.0} if kind.startswith("stm") else {})}
    made = lab(
        tmp_path, documents=random_documents(12, seed=3), heldout=random_documents(2, seed=4), objective=settings,
        train={"tokens_per_step": 100_000, "micro_batch_tokens": 4096, "warmup_steps": 0, "max_steps": 1},
    )  # fmt: skip
    made.score()
    said = plan_of(made).facts()["objectives"][0]["loss_at_step_0"]
    made.train()
    [line] = [json.loads(text) for text in made.run_folder.read("metrics.jsonl").splitlines()]
    assert said == pytest.approx(line["loss"], rel=2e-3, abs=2e-3)


def test_a_glimpse_of_all_is_what_training_reads(tmp_path: Path) -> None:
    documents = random_documents(30, seed=9)
    made = lab(tmp_path, documents=[*documents, documents[3]], score={"positions": "all"})
    made.score()
    found, cache = look(made), made.cache()
    assert (found.held, found.rows) == (31, 31)
    assert [one.digest for one, _ in found.documents] == made.corpus.digests("train")
    for one, scores in found.documents:
        assert np.array_equal(scores.label_logprob, cache.supervised(one).label_logprob)
        assert len(scores) == one.supervised.sum()


def test_a_glimpse_is_spread_evenly_and_reads_no_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.teacher import build

    monkeypatch.setattr(build, "PARTS_AT_LEAST", 8)
    made = lab(tmp_path, documents=random_documents(64, seed=10))
    folder = made.score().folder
    digests = made.corpus.digests("train")
    some = [digests.index(one.digest) for one, _ in look(made, documents=8).documents]
    assert some == spread(64, 8) == [4, 12, 20, 28, 36, 44, 52, 60]
    few = look(made, tokens=40)
    assert 1 <= len(few.documents) < 20
    assert len(read_parts(folder)) > 2
    half = look(made, bytes=sum(entry.size for part in read_parts(folder) for entry in part.files) // 2)
    assert 0 < len(half.documents) < 40
    assert half.held == 64
    assert spread(3, 5) == [0, 1, 2]


def test_documents_that_are_not_scored_are_not_looked_at(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=random_documents(20, seed=11), score={"limit": 6})
    folder = made.score().folder
    found = glimpse(folder, made.corpus, made.staging, positions="supervised", documents=100, tokens=10**6, bytes=10**9)
    assert (len(found.documents), found.held, found.rows) == (6, 6, 20)


def test_a_row_about_other_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab(tmp_path, documents=random_documents(6, seed=12))
    made.score()
    real = PlainShard.read

    def moved(self: PlainShard, row: int) -> Any:
        digest, tokens, scores = real(self, row)
        object.__setattr__(scores, "positions", scores.positions + 1)
        return digest, tokens, scores

    monkeypatch.setattr(PlainShard, "read", moved)
    with pytest.raises(CorruptArtifactError, match="about other tokens"):
        glimpse(made.store.child("teacher", made.store.child("teacher").folders()[0]), made.corpus, made.staging,
                positions="supervised", documents=9, tokens=999, bytes=10**9)  # fmt: skip


def test_no_token_at_all_is_no_trouble() -> None:
    run = run_config(Path("store"), shared_model(), objective={"kind": "stm"})
    facts = plan_tokens(run, [], held=0, rows=3, vocabulary=280).facts()
    assert facts["supervised_tokens"] == 0
    json.dumps(facts, allow_nan=False)


def test_treatments_by_weights() -> None:
    from distft.objectives.treatment import treatment

    made = treatment(
        6, ce=np.array([1, 1, 0, 0, 0, 1], np.float32), kl=np.array([0, 1, 1, 0, 0, 0.001], np.float32),
        entropy=np.array([0, 0, 1, 1, 0, 0], np.float32),
    )  # fmt: skip
    assert [TREATMENTS[code] for code in codes(made)] == ["learned", "both", "held", "entropy", "masked", "learned"]


def test_plan_tells_of_tokens_once_there_are_scores(bench: Bench) -> None:
    unscored = bench.run("plan").json
    assert unscored["tokens"] is None
    assert "known once documents are scored" in plan_text(unscored)
    bench.refused("plan", "--page=page.html", status=3, says="scored no training document")
    bench.run("tokenize")
    bench.run("score")
    result = bench.run("plan")
    told = result.json["tokens"]
    assert set(told) == {
        "documents", "documents_held", "documents_in_corpus", "supervised_tokens", "mean_ce", "mean_entropy", "student_is_teacher",
        "entropy_threshold", "probability_threshold", "quadrants", "sweep", "objectives", "left_out",
    }  # fmt: skip
    assert told["documents"] == told["documents_in_corpus"] > 0
    assert [one["tau"] for one in told["sweep"]] == [1.5, 2.5, 10, 25, 1000]
    assert told["objectives"][0]["name"] == "sft_kl kl=0.5"
    text = plan_text(result.json)
    for part in (
        "what sft_kl kl=0.5 will do",
        "learned and held",
        "what stm would mask",
        "every objective",
        "at step 0",
        "sure, unlikely",
    ):
        assert part in text, part


def test_a_damaged_cache_leaves_the_rest_of_the_plan(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    [folder] = (bench.store / "teacher").iterdir()
    for path in folder.rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    done = bench.run("plan")
    assert done.json["tokens"] is None
    assert "what the objective will do is left out" in done.err


def test_tokens_are_planned_without_torch(bench: Bench) -> None:
    bench.run("tokenize")
    bench.run("score")
    program = f"""
import sys
from distft.config.load import load_config
from distft.pipeline import Pipeline
from pathlib import Path
result = Pipeline(load_config(Path({str(bench.file)!r}), [])).plan()
heavy = {{"torch", "transformers", "ray", "jinja2"}} & set(sys.modules)
sys.exit(f"loaded {{heavy}}" if heavy or not result["tokens"] else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
