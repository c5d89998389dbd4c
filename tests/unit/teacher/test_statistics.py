"""What `cache show` says, against the same figures computed slowly, token by token."""

from __future__ import annotations

import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.corpus.reader import Corpus
from distft.errors import MissingArtifactError
from distft.store.location import Location, open_location
from distft.teacher.catalogue import find_cache
from distft.teacher.forward import Scores
from distft.teacher.rows import Documents, document_facts, find_row
from distft.teacher.statistics import ENTROPY_EDGES, MASS_STEPS, PERPLEXITY_EDGES, Statistics, cache_statistics
from distft.teacher.verify import verify_cache
from tests.helpers.caches import join_two_parts, only_cache
from tests.helpers.stores import Lab, lab, random_documents, write_corpus

DOCUMENTS = random_documents(30, seed=60)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    made = lab(tmp_path, documents=[*DOCUMENTS, DOCUMENTS[3]], score={"distribution": {"kind": "topk", "k": 6, "min_prob": 0.02}})
    made.score()
    return made


def test_every_figure_is_that_of_a_slow_count(made: Lab) -> None:
    cache = made.cache()
    all_scores = [cache.scores(one) for one in DOCUMENTS]
    labels = [float(x) for s in all_scores for x in s.label_logprob]
    entropies = [float(x) for s in all_scores for x in s.entropy]
    kept = sorted(1 - float(x) for s in all_scores for x in s.tail)
    tau = math.exp(-sorted(labels)[len(labels) // 3])
    found = cache_statistics(cache.folder, made.staging, tau=tau)
    assert (found["documents"], found["tokens"]) == (30, sum(len(one) for one in DOCUMENTS))
    assert found["scored_tokens"] == len(labels) == sum(int(one.supervised.sum()) for one in DOCUMENTS)
    assert found["entries_per_token"] == pytest.approx(sum(len(s.ids) for s in all_scores) / len(labels))
    assert found["mean_nll"] == pytest.approx(-sum(labels) / len(labels))
    assert found["mean_entropy"] == pytest.approx(sum(entropies) / len(labels))
    assert found["first_choice_share"] == pytest.approx(sum(int((s.rank == 0).sum()) for s in all_scores) / len(labels))
    assert 0 < found["share_above_tau"] < 1
    assert found["share_above_tau"] == pytest.approx(sum(x < -math.log(tau) for x in labels) / len(labels))
    assert found["mass_kept"]["mean"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
    assert kept[0] < found["mass_kept"]["p5"] < kept[-1]
    assert found["mass_kept"]["p5"] == pytest.approx(kept[int(0.05 * len(kept))], abs=1 / MASS_STEPS)
    for name, edges, values in (
        ("perplexity", PERPLEXITY_EDGES, [math.exp(-x) for x in labels]), ("entropy", ENTROPY_EDGES, entropies),
    ):  # fmt: skip
        counts = [0] * (len(edges) - 1)
        for value in values:
            counts[max(0, bisect_right(edges, value) - 1)] += 1
        assert found[name]["counts"] == counts
        assert found[name]["edges"] == [*edges[:-1], None]
        assert sum(bool(count) for count in counts) > 2, "the histogram is blind"
    files = (made.folder / "store" / "teacher").rglob("*.arrow")
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert found["document_ids"] == sorted(one.digest for one in DOCUMENTS)


def test_a_document_that_two_parts_hold_counts_once(made: Lab) -> None:
    folder = only_cache(made.store)
    before = cache_statistics(folder, made.staging, tau=2.5)
    join_two_parts(folder, made.staging)
    after = cache_statistics(folder, made.staging, tau=2.5)
    assert after["bytes"] > before["bytes"]
    assert (after["documents"], after["perplexity"]) == (before["documents"], before["perplexity"])
    assert (
        verify_cache(find_cache(folder.url, ""), Documents(None, made.staging), made.staging)["documents"] == before["documents"]
    )


def test_edges_belong_to_the_bin_above_and_tau_is_learned() -> None:
    """`stm` learns perplexity <= tau: a token right at tau is not above it."""
    labels = np.log(np.array([1.0, 0.5, 0.4, 0.39999, 1e-30], np.float32)).astype(np.float32)
    none = np.zeros(0)
    zeros = np.zeros(5, np.float32)
    scores = Scores(
        positions=np.arange(1, 6, dtype=np.uint32), label_logprob=labels, entropy=zeros, rank=zeros.astype(np.uint32),
        tail=np.array([0, 0, 0, 0, 1], np.float32), counts=zeros.astype(np.uint16), ids=none.astype(np.uint32),
        logprobs=none.astype(np.float16),
    )  # fmt: skip
    found = Statistics(tau=2.0)
    found.add(7, scores)
    facts = found.facts()
    assert facts["share_above_tau"] == 3 / 5
    assert facts["perplexity"]["counts"][0] == 1
    assert facts["perplexity"]["counts"][-1] == 1
    assert facts["entropy"]["counts"][0] == 5
    assert facts["mass_kept"] == {"mean": 0.8, "p5": 0.0}


def test_one_document_whole(made: Lab) -> None:
    one, cache = DOCUMENTS[5], made.cache()
    row = find_row(cache.folder, one.digest[:12], made.staging)
    facts = document_facts(row, Documents(made.store, made.staging).get(row.digest), "float32")
    scores = cache.scores(one)
    assert facts["document"] == one.digest
    assert facts["tokens"] == one.tokens.tolist()
    assert facts["token_count"] == len(one)
    for name in ("positions", "label_logprob", "entropy", "rank", "tail"):
        assert facts[name] == getattr(scores, name).tolist()
    assert [len(ids) for ids in facts["ids"]] == [len(kept) for kept in facts["logprobs"]] == scores.counts.tolist()
    assert [one for ids in facts["ids"] for one in ids] == scores.ids.tolist()
    assert document_facts(row, Documents(None, made.staging).get(row.digest), "float32")["tokens"] is None


def test_one_document_opens_no_more_corpora_than_it_takes(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is downloaded whole where the store is far."""
    for number in range(3):
        write_corpus(made.store, made.staging, train=[DOCUMENTS[number]])
    opened, plain = list[str](), Corpus.open

    def open(folder: Location, *rest: Any) -> Corpus:
        opened.append(folder.url.rpartition("/")[2])
        return plain(folder, *rest)

    monkeypatch.setattr(Corpus, "open", open)
    there, documents = made.store.child("corpus").folders(), Documents(made.store, made.staging)
    assert opened == []
    first = plain(made.store.child("corpus", there[0]), made.staging).document("train", 0)
    found = documents.get(first.digest)
    assert found is not None
    assert found.tokens.tolist() == first.tokens.tolist()
    assert opened == there[:1], "the first has it"
    assert documents.get("0" * 32) is None
    assert opened == there
    assert len(documents.corpora) == len(there) == 4
    assert "0" * 32 not in documents
    assert opened == there, "each once"


def test_an_empty_cache_has_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="no document yet"):
        cache_statistics(open_location(str(tmp_path)), tmp_path, tau=2.5)


@pytest.mark.parametrize("text", ["", "zz"])
def test_a_document_that_is_not_one(made: Lab, text: str) -> None:
    with pytest.raises(MissingArtifactError, match="documents of the cache begin with"):
        find_row(made.cache().folder, text, made.staging)
