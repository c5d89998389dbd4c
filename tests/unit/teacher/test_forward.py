"""What is kept of a distribution: the rules of top-k and floor, the tail, rank and entropy, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.config.schema import Distribution, NoDistribution, Sample, TopK
from distft.teacher.forward import Scores, _points, score_documents, score_logits
from tests.helpers.stores import loaded, random_documents, shared_model

QUICK = settings(max_examples=100, deadline=None)
VOCABULARY = 50


def scored(logits: torch.Tensor, labels: list[int], policy: Distribution) -> Scores:
    """Scores of one document that has these logits."""
    columns = score_logits(logits.clone(), torch.tensor(labels), policy)
    names = ("label_logprob", "entropy", "rank", "tail", "counts", "ids", "logprobs")
    return Scores(positions=np.arange(1, len(labels) + 1, dtype=np.uint32), **dict(zip(names, columns, strict=True)))


def rows(scores: Scores) -> list[list[int]]:
    return [part.tolist() for part in np.split(scores.ids, np.cumsum(scores.counts)[:-1])]


logits_rows = st.integers(0, 2**31).map(
    lambda seed: torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
)


@QUICK
@given(logits=logits_rows, k=st.integers(1, 60), min_prob=st.sampled_from([0.0, 1e-6, 1e-3, 0.02, 0.3, 0.9]))
def test_the_likeliest_are_kept_down_to_k_or_the_floor(logits: torch.Tensor, k: int, min_prob: float) -> None:
    scores = scored(logits, [0] * 6, TopK(k=k, min_prob=min_prob))
    logprobs = torch.log_softmax(logits.double(), 1)
    for n, ids in enumerate(rows(scores)):
        order = logprobs[n].argsort(descending=True).tolist()
        wanted = order[:k]
        if min_prob:
            at_floor = [v for v in wanted if abs(float(logprobs[n, v]) - math.log(min_prob)) < 1e-5]
            wanted = [v for v in wanted if v in at_floor or float(logprobs[n, v]) > math.log(min_prob)]
            assert set(wanted) - set(at_floor) <= set(ids) <= set(wanted)
        else:
            assert ids == sorted(wanted)
            assert len(ids) == min(k, VOCABULARY)
        assert ids == sorted(set(ids))
        left_out = [v for v in range(VOCABULARY) if v not in ids]
        assert float(scores.tail[n]) == pytest.approx(float(logprobs[n, left_out].exp().sum()), rel=1e-5, abs=1e-30)
        entries = slice(int(scores.counts[:n].sum()), int(scores.counts[: n + 1].sum()))
        # float16: 2^-11 of the number itself
        assert scores.logprobs[entries].tolist() == pytest.approx(logprobs[n, ids].tolist(), rel=2**-11, abs=1e-5)


@QUICK
@given(logits=logits_rows, labels=st.lists(st.integers(0, VOCABULARY - 1), min_size=6, max_size=6))
def test_signals_are_of_the_whole_vocabulary(logits: torch.Tensor, labels: list[int]) -> None:
    for policy in (TopK(k=1, min_prob=0.5), NoDistribution(kind="none")):
        scores = scored(logits, labels, policy)
        logprobs = torch.log_softmax(logits.double(), 1)
        chosen = logprobs[range(6), labels]
        assert scores.label_logprob.tolist() == pytest.approx(chosen.tolist(), abs=1e-5)
        assert scores.entropy.tolist() == pytest.approx((-(logprobs.exp() * logprobs).sum(1)).tolist(), abs=1e-5)
        assert scores.rank.tolist() == (logprobs > chosen[:, None]).sum(1).tolist()


def test_the_label_has_its_own_number_outside_the_kept_ones() -> None:
    scores = scored(torch.tensor([[10.0, 9.0, 0.0, -5.0]]), [3], TopK(k=2, min_prob=0.0))
    assert scores.ids.tolist() == [0, 1]
    assert scores.rank.tolist() == [3]
    assert scores.label_logprob.tolist() == pytest.approx([-5 - math.log(math.exp(10) + math.exp(9) + 1 + math.exp(-5))])


def test_a_crowded_row_keeps_its_best_k_and_does_not_disturb_its_neighbours() -> None:
    """Rows 1 and 2 have six tokens above the floor of 0.1 and room for three."""
    sure, flat = [20.0] + [0.0] * 5, [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    scores = scored(torch.tensor([sure, flat, [0.0] * 6]), [0, 0, 0], TopK(k=3, min_prob=0.1))
    assert rows(scores)[:2] == [[0], [0, 1, 2]]
    assert len(rows(scores)[2]) == 3  # six sixths, three places
    scores = scored(torch.tensor([sure, flat, [0.0] * 6]), [0, 0, 0], TopK(k=3, min_prob=0.17))
    assert [len(ids) for ids in rows(scores)] == [1, 3, 0]
    assert float(scores.tail[2]) == pytest.approx(1.0, abs=1e-6)


def test_a_sure_teachers_tail_is_exact_where_one_minus_the_rest_is_zero() -> None:
    """1 - 1 would be 0; the sum of what is left out is 49 e^-40."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 7] = 40.0
    for policy in (TopK(k=1, min_prob=0.0), TopK(k=8, min_prob=1e-3)):
        scores = scored(logits, [7], policy)
        assert scores.ids.tolist() == [7]
        assert float(scores.tail[0]) == pytest.approx(49 * math.exp(-40), rel=1e-5, abs=0)


def test_signals_alone_have_no_entries_and_all_tail() -> None:
    scores = scored(torch.randn(4, 9), [0, 1, 2, 3], NoDistribution(kind="none"))
    assert scores.counts.tolist() == [0, 0, 0, 0]
    assert len(scores.ids) == len(scores.logprobs) == 0
    assert scores.tail.tolist() == [1.0] * 4


def test_a_distribution_that_is_no_number_is_seen() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = float("nan")
    assert not scored(logits, [0, 0], TopK(k=2)).finite
    assert scored(logits[:1], [0], TopK(k=2)).finite


def test_padded_head_rows_have_no_mass() -> None:
    """Five rows of the head stand for no token; giving them the largest weights changes nothing that is stored."""
    model = loaded(shared_model("llama_untied_padded"))
    assert model.head.weight.shape[0] == model.shape.rows + 5
    documents = random_documents(4, seed=20)
    places = [np.arange(1, len(d), dtype=np.uint32) for d in documents]

    def score() -> list[Scores]:
        return score_documents(model, [d.tokens for d in documents], places, TopK(k=20))

    before = score()
    with torch.no_grad():
        model.head.weight[model.shape.rows :] *= 1000
    for one, two in zip(before, score(), strict=True):
        assert int(two.ids.max()) < model.shape.rows
        assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("ids", "tail", "entropy", "rank"))


@QUICK
@given(seed=st.integers(0, 1000), data=st.data())
def test_selecting_tokens_takes_their_entries_along(seed: int, data: st.DataObject) -> None:
    logits = torch.randn(7, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    scores = scored(logits, list(range(7)), TopK(k=9, min_prob=0.01))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=7, max_size=7)))
    part = scores.select(chosen)
    assert rows(part) == [ids for ids, wanted in zip(rows(scores), chosen, strict=True) if wanted] or not chosen.any()
    assert part.positions.tolist() == scores.positions[chosen].tolist()
    assert part.label_logprob.tolist() == scores.label_logprob[chosen].tolist()
    assert len(part.ids) == len(part.logprobs) == part.counts.sum()


def test_logits_of_minus_infinity_have_no_mass() -> None:
    """Some models give them to tokens that they never say; 0 times infinity must not reach the entropy."""
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[:, 7:20] = -math.inf
    truth = torch.distributions.Categorical(logits=logits.double()).probs
    for policy in (TopK(), NoDistribution(kind="none")):
        scores = scored(logits, [0, 1, 2], policy)
        assert scores.finite
        assert scores.entropy.tolist() == pytest.approx(torch.special.entr(truth).sum(1).tolist(), rel=1e-5)
    assert not set(scored(logits, [0, 1, 2], TopK()).ids.tolist()) & set(range(7, 20))


def drawn(logits: torch.Tensor, document: np.ndarray, policy: Sample) -> Scores:
    """What the policy draws for the document's tokens, if these were their logits."""
    points = _points([document], [np.arange(1, len(logits) + 1, dtype=np.uint32)], policy)
    columns = score_logits(logits.clone(), torch.zeros(len(logits), dtype=torch.int64), policy, torch.from_numpy(points))
    names = ("label_logprob", "entropy", "rank", "tail", "counts", "ids", "logprobs")
    return Scores(positions=np.arange(1, len(logits) + 1, dtype=np.uint32), **dict(zip(names, columns, strict=True)))


def shares(scores: Scores) -> np.ndarray:
    found = np.zeros((len(scores.counts), VOCABULARY))
    found[np.repeat(np.arange(len(scores.counts)), scores.counts), scores.ids] = np.exp(scores.logprobs.astype(np.float64))
    return found


def test_draws_are_unbiased_and_few() -> None:
    """Over many seeds their shares average to the distribution itself, so that the gradient of KL(w||p), p - w, averages to p - q."""
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 3
    document, truth = np.arange(6, dtype=np.uint32), logits.double().softmax(1).numpy()
    found = [drawn(logits, document, Sample(kind="sample", draws=10, seed=seed)) for seed in range(2000)]
    mean = np.mean([shares(scores) for scores in found], axis=0)
    # a share's standard deviation is at most that of 10 independent draws
    assert (np.abs(mean - truth) < 5 * np.sqrt(truth * (1 - truth) / 10 / 2000) + 1e-3).all()
    assert np.abs(mean.sum(1) - 1).max() < 1e-3
    assert all(scores.counts.max() <= 10 and (scores.tail == 0).all() for scores in found)
    one = found[0]
    assert all(ids == sorted(set(ids)) for ids in rows(one))


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((4, VOCABULARY), -math.inf)
    logits[:, [3, VOCABULARY - 1]] = 0.0
    for seed in range(50):
        scores = drawn(logits, np.arange(5, dtype=np.uint32), Sample(kind="sample", draws=7, seed=seed))
        assert set(scores.ids.tolist()) == {3, VOCABULARY - 1}


def test_draws_follow_from_seed_and_document_not_from_the_batch() -> None:
    made = random_documents(5, seed=7)
    tokens, places = [d.tokens for d in made], [np.flatnonzero(d.supervised).astype(np.uint32) for d in made]
    everywhere = [np.arange(1, len(t), dtype=np.uint32) for t in tokens]
    policy = Sample(kind="sample", draws=20, seed=1)
    together = score_documents(loaded(shared_model()), tokens, places, policy)
    for n, one in enumerate(together):
        [alone] = score_documents(loaded(shared_model()), tokens[n : n + 1], places[n : n + 1], policy)
        assert one.ids.tolist() == alone.ids.tolist()
        [whole] = score_documents(loaded(shared_model()), tokens[n : n + 1], everywhere[n : n + 1], policy)
        chosen = np.isin(whole.positions, one.positions)
        assert whole.select(chosen).ids.tolist() == one.ids.tolist()
    other = score_documents(loaded(shared_model()), tokens, places, Sample(kind="sample", draws=20, seed=2))
    assert [s.ids.tolist() for s in other] != [s.ids.tolist() for s in together]
