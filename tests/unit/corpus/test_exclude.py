"""Documents that are left out by name: a corpus is then, in all that it says, one without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distft.corpus.reader import Corpus, named_documents
from distft.errors import ConfigError
from distft.store.location import open_location
from tests.helpers.stores import random_documents, write_corpus

TRAIN, HELDOUT = random_documents(30, seed=90), random_documents(5, seed=91)
ROWS = [*TRAIN, TRAIN[4], TRAIN[11]]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(open_location(str(tmp_path / "store")), tmp_path / "staging", train=ROWS, heldout=HELDOUT)


def less(corpus: Corpus, *names: str) -> Corpus:
    return Corpus.open(corpus.folder, corpus.staging, names)


@pytest.mark.parametrize("gone", [[0], [4, 29], list(range(29)), [11, 12, 13]])
def test_everything_is_told_without_them(corpus: Corpus, gone: list[int]) -> None:
    names = {TRAIN[number].digest for number in gone}
    found = less(corpus, *names, HELDOUT[2].digest)
    places = [place for place, one in enumerate(ROWS) if one.digest not in names]
    assert found.count("train") == len(places)
    assert found.digests("train") == [ROWS[place].digest for place in places]
    assert np.array_equal(found.lengths("train"), corpus.lengths("train")[places])
    assert np.array_equal(found.supervised_counts("train"), corpus.supervised_counts("train")[places])
    for index, (document, place) in enumerate(zip(found.documents("train"), places, strict=True)):
        assert (document.digest, document.row) == (ROWS[place].digest, place + 1)
        assert document.tokens.tolist() == found.document("train", index).tokens.tolist() == ROWS[place].tokens.tolist()
    with pytest.raises(IndexError, match=f"document {len(places)} of {len(places)}"):
        found.document("train", len(places))
    assert found.digests("heldout") == [one.digest for one in HELDOUT if one is not HELDOUT[2]]
    assert found.manifest == corpus.manifest


def test_nothing_left_out_is_the_corpus_itself(corpus: Corpus) -> None:
    assert less(corpus).digests("train") == [one.digest for one in ROWS]
    assert less(corpus).count("train") == len(ROWS)


def test_the_first_digits_will_do(corpus: Corpus) -> None:
    assert less(corpus, TRAIN[3].digest[:12]).digests("train") == less(corpus, TRAIN[3].digest).digests("train")


def test_all_that_is_unknown_is_named_at_once(corpus: Corpus) -> None:
    slip = TRAIN[3].digest[:14] + ("0" if TRAIN[3].digest[14] != "0" else "1")
    with pytest.raises(ConfigError) as told:
        less(corpus, slip, TRAIN[0].digest, "0123456789ab")
    assert (told.value.exit_status, told.value.where) == (2, "data.exclude")
    assert "2 of the 3 documents" in told.value.problem
    assert f"{slip}: no document is called so; nearest is {TRAIN[3].digest}, in its first 14 digits" in told.value.problem
    assert "0123456789ab: no document is called so; and none that is nearly so" in told.value.problem


def test_a_name_that_fits_two(corpus: Corpus) -> None:
    digests = {"abcdabcdabcd" + "0" * 20, "abcdabcdabcd" + "1" * 20, "ffff" * 8}
    with pytest.raises(ConfigError, match="abcdabcdabcd: 2 documents or more begin with it"):
        named_documents(digests, ["abcdabcdabcd"])
    assert named_documents(digests, ["abcdabcdabcd0"]) == {"abcdabcdabcd" + "0" * 20}
    assert named_documents(digests, ["ffffffffffff"]) == {"ffff" * 8}


@pytest.mark.parametrize(("split", "documents"), [("train", TRAIN), ("heldout", HELDOUT)])
def test_a_split_is_not_emptied(corpus: Corpus, split: str, documents: list) -> None:
    with pytest.raises(ConfigError, match=rf"data.exclude leaves no document of data.{split}"):
        less(corpus, *(one.digest for one in documents))
