"""What an objective adds to a whole training step: treatment and targets, forward pass, loss, backward pass, update.

python -m pytest -m bench -s tests/bench/step_speed.py

A is plain fine-tuning on the same documents. All but the first token of each document is supervised, so that every token bears the
divergence: with prompts that are not trained on, the backbone's share grows and the ratios come closer to 1. What is left out is
reading the cache from disk, which happens in another thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from distft.config.schema import Train
from distft.corpus.reader import Document
from distft.engine.base import MicroBatch
from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.objectives.catalog import Objective
from distft.objectives.distributions import DenseHead, DenseRows, SparseRows
from distft.objectives.treatment import ObjectiveRule, Signals, treatment
from distft.teacher.cache import sparse_rows
from distft.teacher.head_copy import dense_rows
from distft.teacher.scores import Scores
from distft.train.live import LiveTreatment
from distft.train.targets import Treated, micro_batch
from tests.bench.ratios import HEADER, compare
from tests.bench.scoring_speed import LAYERS, LENGTHS, VOCABULARY, WIDTH, model
from tests.helpers.stores import document

ROUNDS = 5
"""A round is two steps of some seconds each."""

MASKED = 0.22
"""The share of tokens that stm masks, as its authors report for real documents."""

Made = tuple[Document, Scores]
Rows = Callable[[list[Scores]], SparseRows | DenseRows]


def default_like(random: np.random.Generator, tokens: int) -> np.ndarray:
    """Entries per token as the default floor leaves them of real text: few for most, up to 128 for some, some 20 on average."""
    return np.clip(np.round(np.exp(random.normal(np.log(8), 1.5, tokens))), 1, 128).astype(np.uint16)


def fixed(random: np.random.Generator, tokens: int) -> np.ndarray:
    return np.full(tokens, 64, np.uint16)


def documents(entries: Callable[[np.random.Generator, int], np.ndarray], *, hidden: bool = False) -> list[Made]:
    """The same texts, whatever the teacher said of them."""
    texts, random, made = np.random.default_rng(0), np.random.default_rng(1), []
    for length in LENGTHS:
        one = document(texts.integers(0, VOCABULARY, length).tolist(), list(range(1, length)))
        tokens = length - 1
        counts = np.zeros(tokens, np.uint16) if hidden else entries(random, tokens)
        ids = [np.sort(random.choice(VOCABULARY, count, replace=False)) for count in counts]
        logprobs = [np.log(0.95 * random.dirichlet(np.ones(count)) + 1e-6) for count in counts]
        words = random.standard_normal((tokens, WIDTH)).astype(np.float32).view(np.uint16).reshape(-1)
        likely = texts.random(tokens) >= MASKED
        scores = Scores(
            positions=np.arange(1, length, dtype=np.uint32),
            label_logprob=np.where(likely, -0.1, -5.0).astype(np.float32), entropy=np.ones(tokens, np.float32),
            rank=np.zeros(tokens, np.uint32), tail=np.full(tokens, 0.05, np.float32), counts=counts,
            ids=np.concatenate([np.zeros(0), *ids]).astype(np.uint32),
            logprobs=np.concatenate([np.zeros(0), *logprobs]).astype(np.float16),
            hidden=words if hidden else np.zeros(0, np.uint16),
        )  # fmt: skip
        made.append((one, scores))
    return made


def batch(rule: ObjectiveRule, made: list[Made], rows: Rows) -> tuple[MicroBatch, float]:
    """What the loop's feed makes of a step's documents, and the step's normaliser."""
    treated = []
    for one, scores in made:
        known = Signals(
            label_logprob=scores.label_logprob, entropy=scores.entropy, rank=scores.rank, document=one.digest, vocabulary=VOCABULARY
        )  # fmt: skip
        places = np.flatnonzero(one.supervised)
        weights = rule.treat(known) if rule.live == "no" else treatment(len(known), count=rule.counts(known)[0])
        treated.append(Treated(one, places, weights, scores if rule.needs_signals or rule.needs_distribution else None, known))
    count = float(sum(one.treatment.count.sum() for one in treated))
    if rule.live == "no":
        return micro_batch([one.reached() for one in treated], rows)[0], count
    return micro_batch(treated, rows, live=LiveTreatment.of(rule, treated))[0], count


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_what_an_objective_adds_to_a_step() -> None:
    torch.set_num_threads(1)
    student = model()
    engine = LocalEngine(student, Train(lr=1e-6, micro_batch_tokens=sum(LENGTHS)), World())
    head = DenseHead(student.head.weight.detach().clone(), None, student.shape)

    def step(settings: dict[str, Any], made: list[Made], rows: Rows = sparse_rows) -> Callable[[], object]:
        rule: Any = TypeAdapter[Any](Objective).validate_python(settings)

        def run() -> object:
            micro, count = batch(rule, made, rows)
            return engine.train_step([micro], normaliser=count, lr=1e-6)

        return run

    few, many, states = documents(default_like), documents(fixed), documents(fixed, hidden=True)
    entries = sum(len(scores.ids) for _, scores in few) / sum(len(scores) for _, scores in few)
    sft, sft_kl, stm = {"kind": "sft"}, {"kind": "sft_kl"}, {"kind": "stm", "tau": 2.5}
    plain = step(sft, few)
    ways = {
        f"sft_kl, default policy, {entries:.0f} entries": step(sft_kl, few),
        "sft_kl, 64 entries": step(sft_kl, many),
        "sft_kl, hidden states": step(sft_kl, states, lambda scores: dense_rows(scores, head)),
        f"stm, {MASKED:.0%} masked": step(stm, few),
        f"stm_kl, {MASKED:.0%} held": step({**stm, "kind": "stm_kl"}, few),
        "dft": step({"kind": "dft"}, few),
        "eksft": step({"kind": "eksft"}, few),
    }
    print(
        f"\na step: {sum(LENGTHS)} tokens, {LAYERS} layers of {WIDTH}, {VOCABULARY:,} rows, float32, one thread; {ROUNDS} rounds, "
        f"load {os.getloadavg()[0]:.1f}\n{HEADER}"
    )
    for name, way in ways.items():
        row = compare(plain, way, rounds=ROUNDS).row(f"A sft, B {name}")
        print(f"{row}   load {os.getloadavg()[0]:.1f}", flush=True)
