"""What looking at the student of the step costs: rules of single tokens, decided inside the loss, and rules of whole documents, which
pass over the head twice.

python -m pytest -m bench tests/bench/live_selection.py -s
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from distft.objectives.catalog import Objective
from distft.objectives.loss import measure, token_loss
from distft.objectives.treatment import ObjectiveRule, Signals, treatment
from distft.teacher.scores import Scores
from distft.train.live import LiveTreatment
from distft.train.targets import Treated, micro_batch
from tests.bench.head import VOCABULARY, WIDTH, head
from tests.bench.ratios import HEADER, compare
from tests.helpers.stores import document

DOCUMENTS, LENGTH, KEPT = 8, 128, 8
TOKENS = DOCUMENTS * LENGTH
"""KEPT: what the default floor leaves of a real teacher."""
ROUNDS = 3
"""A round is some seconds."""

RULES: dict[str, dict[str, Any]] = {
    "dft": {"kind": "dft"},
    "eaft": {"kind": "eaft"},
    "talr": {"kind": "talr"},
    "eksft": {"kind": "eksft"},
}


def batch_of(rule: ObjectiveRule) -> Any:
    """A micro-batch of documents whose every token but the first is supervised."""
    random, treated = np.random.default_rng(0), []
    for _ in range(DOCUMENTS):
        one = document(random.integers(0, VOCABULARY, LENGTH + 1).tolist(), list(range(1, LENGTH + 1)))
        blank = np.zeros(LENGTH, np.float32)
        ids = np.concatenate([np.sort(random.choice(VOCABULARY, KEPT, replace=False)) for _ in range(LENGTH)])
        logprobs = np.log(0.95 * random.dirichlet(np.ones(KEPT), LENGTH)).reshape(-1)
        scores = Scores(
            positions=np.arange(1, LENGTH + 1, dtype=np.uint32), label_logprob=blank, entropy=blank, rank=blank.astype(np.uint32),
            tail=np.full(LENGTH, 0.05, np.float32), counts=np.full(LENGTH, KEPT, np.uint16), ids=ids.astype(np.uint32),
            logprobs=logprobs.astype(np.float16),
        )  # fmt: skip
        known = Signals(label_logprob=blank, entropy=blank, rank=scores.rank, document=one.digest, vocabulary=VOCABULARY)
        weights = treatment(LENGTH) if rule.live != "no" else rule.treat(known)
        treated.append(Treated(one, np.arange(1, LENGTH + 1), weights, scores if rule.needs_distribution else None, known))
    return micro_batch(treated, live=None if rule.live == "no" else LiveTreatment.of(rule, treated))[0]


@pytest.mark.bench
def test_what_it_costs_to_look_at_the_student() -> None:
    hidden, weight, shape = head(TOKENS)

    selecting: list[float] = []

    def step(batch: Any) -> None:
        states, targets = hidden, batch.targets
        if batch.selection is not None:
            began = time.process_time()
            seen = measure(hidden.detach(), weight, None, targets, shape=shape, wanted=batch.selection.fields)
            targets, borne = batch.selection.settle(seen, targets)
            states = hidden.index_select(0, borne)
            selecting.append(time.process_time() - began)
        loss, _ = token_loss(states, weight, None, targets, shape=shape)
        loss.backward()
        hidden.grad = weight.grad = None

    def made(settings: dict[str, Any]) -> Any:
        return batch_of(TypeAdapter[Any](Objective).validate_python(settings))

    sft, held = made({"kind": "sft"}), made({"kind": "sft_kl"})
    print(f"\nloss head, forward and backward: {TOKENS} tokens, {VOCABULARY:,} rows of {WIDTH}, float32, one thread\n{HEADER}")
    print(compare(lambda: step(sft), lambda: step(held), rounds=ROUNDS).row("A sft, B sft_kl"))
    for name, settings in RULES.items():
        live = made(settings)
        selecting.clear()
        found = compare(lambda: step(sft), lambda live=live: step(live), rounds=ROUNDS)
        print(found.row(f"A sft, B {name}"))
        if selecting:
            spent = statistics.median(selecting)
            print(
                f"  of which the selecting pass {spent * 1e3:.1f} ms, {spent / found.two:.0%} of B, {spent / found.one:.2f} of A"
            )
