"""Law 1: entry t of every column belongs to token t, given the tokens before it; from the corpus to the gradient."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from distft.config.schema import TopK
from distft.corpus.reader import Document
from distft.engine.load import LanguageModel
from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.teacher.cache import sparse_rows
from distft.teacher.encode import PlainShard, to_batch
from distft.teacher.forward import Scores, score_documents
from distft.train.batches import Feed
from tests.helpers.reference import Row, token_terms
from tests.helpers.stores import FAMILIES, Lab, document, lab, loaded, random_documents, shared_model
from tests.helpers.toy import bigram, nowhere

# --- five tokens, worked out by hand ---------------------------------------------------------------------------------

AFTER_2 = [0.4, 0.3, 0.15, 0.1, 0.05]
AFTER_3 = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]
ELSE = [0.9, 0.025, 0.025, 0.025, 0.025]
TEACHER = [ELSE, ELSE, AFTER_2, AFTER_3, ELSE]
STUDENT = [ELSE, ELSE, [0.2] * 5, [1 / 4, 1 / 4, 1 / 4, 1 / 8, 1 / 8], ELSE]

FIVE = document([1, 3, 0, 2, 4], [2, 4])  # 0 after 3, and 4 after 2
LONG = document([0, 0, 0, 0, 0, 0, 0, 3, 1], [8])  # 1 after 3
SHORT = document([2, 3], [1])  # 3 after 2

# Top-2 keeps {0, 1}: after 3 they leave 1/4, after 2 they leave 0.3.
KL_AFTER_3 = 1 / 2 * math.log(2) + 1 / 4 * math.log(1) + 1 / 4 * math.log(1 / 2)
KL_AFTER_2 = 0.4 * math.log(2) + 0.3 * math.log(1.5) + 0.3 * math.log(0.5)


def by_hand(folder: Path, monkeypatch: pytest.MonkeyPatch, **objective: object) -> Lab:
    """A scored store of the three documents, by a teacher that is the table above."""
    made = lab(
        folder, documents=[FIVE, LONG, SHORT], model=nowhere("teacher"), objective={"kind": "sft_kl", **objective},
        score={"distribution": {"kind": "topk", "k": 2, "min_prob": 0.0}},
    )  # fmt: skip
    monkeypatch.setattr("distft.teacher.scorer.load_model", lambda *_, **__: bigram(TEACHER))
    monkeypatch.setattr("distft.teacher.scorer.token_rows", lambda _: 5)
    made.score()
    return made


def test_the_cache_holds_what_was_worked_out_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = by_hand(tmp_path, monkeypatch).cache().supervised(FIVE)
    assert scores.positions.tolist() == [2, 4]
    assert scores.label_logprob.tolist() == pytest.approx([math.log(1 / 2), math.log(0.05)], rel=1e-6)
    assert scores.entropy.tolist() == pytest.approx([1.875 * math.log(2), -sum(p * math.log(p) for p in AFTER_2)], rel=1e-6)
    assert scores.rank.tolist() == [0, 4]
    assert scores.counts.tolist() == [2, 2]
    assert scores.ids.tolist() == [0, 1, 0, 1]
    kept = [math.log(p) for p in (1 / 2, 1 / 4, 0.4, 0.3)]
    assert scores.logprobs.astype(float).tolist() == pytest.approx(kept, rel=2**-11)  # float16
    assert scores.tail.tolist() == pytest.approx([0.25, 0.3], rel=1e-6)


def test_the_step_is_what_was_worked_out_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, predictors, weights and gradient of a packed step, from the student's explicit probabilities."""
    made = by_hand(tmp_path, monkeypatch, kl=2.0)
    student = bigram(STUDENT)
    made = made.changed(train={"clip": None, "micro_batch_tokens": 64})
    step = Feed(made.corpus, made.cache(), made.run.objective, made.run.train, World(), vocabulary=5).step(np.array([0, 1, 2]))
    assert step.counts[0] == 4
    (batch,) = step.micro_batches
    # The long document fills the first row of nine places; the other two share the second.
    assert batch.targets.labels_N.tolist() == [1, 0, 4, 3]
    assert batch.predictor_N.tolist() == [7, 9 + 1, 9 + 3, 14]
    assert batch.packed.tokens_RL.flatten()[batch.predictor_N].tolist() == [3, 3, 2, 2]

    engine = LocalEngine(student, made.run.train, World())
    gradients = {}
    monkeypatch.setattr(engine.optimizer, "step", lambda: gradients.update(head=student.head.weight.grad))
    values = engine.train_step(step.micro_batches, normaliser=step.counts[0], lr=0.0)
    ce, kl = 2 * math.log(4) + 2 * math.log(5), 2 * (KL_AFTER_3 + KL_AFTER_2)
    assert values.loss == pytest.approx((ce + 2 * kl) / 4, rel=1e-3)  # float16 log-probabilities
    assert values.sums["ce"] == pytest.approx(ce, rel=1e-6)
    assert values.sums["kl"] == pytest.approx(kl, rel=1e-2)  # a difference of float16 numbers
    assert values.counts == {"ce": 4, "kl": 4, "rkl": 0, "entropy": 0, "collision": 0}

    # After 3 the labels are 1 and 0: p - onehot twice; the divergence pulls 0 up, leaves 1, and lets the tail halve.
    after_3 = np.array([2 / 4 - 1, 2 / 4 - 1, 2 / 4, 2 / 8, 2 / 8]) + 2 * 2 * np.array([-1 / 4, 0, 1 / 8, 1 / 16, 1 / 16])
    after_2 = np.array([0.4, 0.4, 0.4, 0.4 - 1, 0.4 - 1]) + 2 * 2 * np.array([-0.2, -0.1, 0.1, 0.1, 0.1])
    expected = np.zeros((5, 5))
    expected[:, 3], expected[:, 2] = after_3 / 4, after_2 / 4
    np.testing.assert_allclose(gradients["head"].numpy(), expected, atol=2e-4)  # float16 log-probabilities


def test_stm_learns_the_one_token_that_the_teacher_finds_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the probabilities 1/2, 0.05, 1/4 and 0.1 only the first is at least 1/2.5; the student gives it 1/4."""
    made = by_hand(tmp_path, monkeypatch).changed(objective={"kind": "stm", "tau": 2.5})
    step = Feed(made.corpus, made.cache(), made.run.objective, made.run.train, World(), vocabulary=5).step(np.array([0, 1, 2]))
    assert step.counts[0] == 1
    engine = LocalEngine(bigram(STUDENT), made.run.train, World())
    values = engine.train_step(step.micro_batches, normaliser=step.counts[0], lr=0.0)
    assert values.loss == pytest.approx(math.log(4), rel=1e-6)
    assert [batch.targets.labels_N.tolist() for batch in step.micro_batches if len(batch.predictor_N)] == [[0]]


# --- cached teacher against a live one, at every position ------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_the_live_model_at_every_position(family: str, attention: str) -> None:
    model = loaded(shared_model(family), attention=attention)
    documents = random_documents(7, seed=2, longest=30)
    check_live(model, documents, documents, TopK(k=40, min_prob=1e-2))
    for each in documents[:3]:
        check_live(model, [each], [each], TopK(k=5, min_prob=0.0))


def check_live(model: LanguageModel, read_together: list[Document], documents: list[Document], policy: TopK) -> None:
    """Scores all documents in one pass, through the columns on disk, and compares each token with the model's own logits on its
    document alone."""
    places = [np.arange(1, len(d), dtype=np.uint32) for d in read_together]
    scored = score_documents(model, [d.tokens for d in read_together], places, policy)
    table = pa.Table.from_batches([to_batch([d.digest for d in documents], [len(d) for d in documents], scored)])
    for row, one in enumerate(documents):
        digest, length, scores = PlainShard(table, where="memory").read(row)
        assert (digest, length) == (one.digest, len(one))
        with torch.no_grad():
            tokens = torch.from_numpy(one.tokens.astype(np.int64))[None]
            logits = model.whole(input_ids=tokens, use_cache=False).logits[0].double()
        assert len(scores.positions) == len(one) - 1
        entry = 0
        for index, place in enumerate(scores.positions.tolist()):
            entries = slice(entry, entry + int(scores.counts[index]))
            entry = entries.stop
            check_token(logits[place - 1, : model.shape.rows], int(one.tokens[place]), scores, index, entries, policy)


def check_token(logits: torch.Tensor, label: int, scores: Scores, index: int, entries: slice, policy: TopK) -> None:
    logprobs = torch.log_softmax(logits, 0)
    near = 2e-4  # float32 forward passes of other batch shapes, logits of size 10
    truth = token_terms(logits, label, None)
    assert float(scores.label_logprob[index]) == pytest.approx(-float(truth.ce), abs=near)
    assert float(scores.entropy[index]) == pytest.approx(float(truth.entropy), abs=near)
    above = int((logprobs > logprobs[label] + near).sum())
    assert above <= int(scores.rank[index]) <= int((logprobs > logprobs[label] - near).sum()) - 1
    ids = scores.ids[entries].astype(np.int64)
    assert (np.diff(ids) > 0).all()
    # Who is kept: exactly the likeliest, down to the floor or to k; only what rounding could swap may differ.
    best = logprobs.sort(descending=True).values
    allowed = min(policy.k, len(logprobs))
    edge = float(best[allowed - 1])
    if policy.min_prob:
        edge = max(edge, math.log(policy.min_prob))
    kept = torch.zeros(len(logprobs), dtype=torch.bool)
    kept[torch.from_numpy(ids)] = True
    assert kept[logprobs > edge + near].all()
    assert not kept[logprobs < edge - near].any()
    assert len(ids) <= allowed
    stored = scores.logprobs[entries].astype(np.float64)
    np.testing.assert_allclose(stored, logprobs[kept].numpy(), rtol=2**-11, atol=near)  # float16
    assert float(scores.tail[index]) == pytest.approx(float(logprobs[~kept].exp().sum()), abs=1e-5, rel=1e-4)


def test_what_the_loss_gets_sums_to_one() -> None:
    """float16 keeps three digits; the loss's gradient takes for granted that kept mass and tail are 1."""
    model = loaded(shared_model())
    documents = random_documents(5, seed=4)
    places = [np.flatnonzero(d.supervised).astype(np.uint32) for d in documents]
    rows = sparse_rows(score_documents(model, [d.tokens for d in documents], places, TopK()))
    mass = [float(part.double().exp().sum()) for part in rows.logprobs_M.split(rows.counts_N.tolist())]
    np.testing.assert_allclose(np.array(mass) + rows.tail_N.double().numpy(), 1.0, atol=1e-6)
    assert rows.counts_N.sum() == len(rows.ids_M) == len(rows.logprobs_M)


def test_a_model_has_no_divergence_from_its_own_cache_anywhere() -> None:
    """The same statement in one number: the student is the teacher, so every KL is rounding. Shifted by one it is nats."""
    model = loaded(shared_model("gemma3_softcap_sliding"))
    documents = random_documents(6, seed=5)
    places = [np.arange(1, len(d), dtype=np.uint32) for d in documents]
    scored = score_documents(model, [d.tokens for d in documents], places, TopK())
    worst = {0: 0.0, 1: math.inf}
    for one, scores in zip(documents, scored, strict=True):
        with torch.no_grad():
            logits = (
                model.whole(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None], use_cache=False).logits[0].double()
            )
        rows, parts = sparse_rows([scores]), []
        ids, logprobs = rows.ids_M.split(rows.counts_N.tolist()), rows.logprobs_M.split(rows.counts_N.tolist())
        for n in range(len(rows.counts_N)):
            parts.append(Row(ids[n].tolist(), logprobs[n].tolist(), float(rows.tail_N[n])))
        for shift in (0, 1):
            pairs = [(parts[n], logits[n + shift]) for n in range(len(parts)) if n + shift < len(parts)]
            kls = [float(token_terms(at[: model.shape.rows], 0, row).kl) for row, at in pairs]
            if shift == 0:
                worst[0] = max(worst[0], *kls)
            elif kls:
                worst[1] = min(worst[1], max(kls))
    assert worst[0] < 1e-5  # second order in float16's 2^-11
    assert worst[1] > 0.1
