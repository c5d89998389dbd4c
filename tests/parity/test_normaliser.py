"""Law 7: how a step is cut into micro-batches changes no gradient, no loss and no metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.engine.head import TrainedModel
from distft.engine.world import World
from distft.objectives.loss import PARTS
from distft.objectives.treatment import treatment
from distft.train.batches import Feed
from distft.train.drift import ROUNDING
from distft.train.targets import micro_batch, supervised
from tests.helpers.objectives import ALL_POSITIONS, CATALOG, uneven
from tests.helpers.steps import Taken, distance, feed, take, take_step
from tests.helpers.stores import Lab, document, lab, loaded, random_documents, shared_model

SAME = 1e-6
"""float32 sums in another order, over a step of some hundred tokens; a mean of means is off by tenths."""


def assert_same(one: Taken, two: Taken) -> None:
    assert distance(one.gradients, two.gradients) <= SAME
    assert two.values.loss == pytest.approx(one.values.loss, rel=SAME)
    assert two.values.counts == one.values.counts
    assert two.line == pytest.approx(one.line, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("objective", CATALOG)
def test_one_by_eight_two_by_four_and_eight_by_one_are_the_same_step(tmp_path: Path, objective: str) -> None:
    """The student has moved away from its teacher (another seed), so that divergences have gradients, too."""
    made = lab(tmp_path, documents=uneven(), objective=CATALOG[objective], score=ALL_POSITIONS)
    if made.run.needs_teacher:
        made.score()
    taken = []
    for pieces, budget in ((8, 16), (4, 32), (2, 64), (1, 128)):
        variant = made.changed(train={"micro_batch_tokens": budget, "clip": None})
        mine = feed(variant).step(np.arange(8))
        assert len(mine.micro_batches) == pieces
        taken.append(take_step_of_stranger(variant))
    for other in taken[1:]:
        assert_same(taken[0], other)
    line, tokens = taken[0].line, sum(int(d.supervised.sum()) for d in uneven())
    assert line["loss"] > 0.01
    assert ("mass_collision" in line) == ("published" in objective)
    assert sum(line.get(f"mass_{part}", 0.0) for part in PARTS) == pytest.approx(line["loss"], rel=1e-6)
    if objective.startswith("stm"):
        assert 0 < taken[0].values.counts["ce"] < tokens  # some of the tokens are masked, or this proves little
    if "prompt" in objective:
        assert taken[0].values.counts["kl"] >= 20
        assert line["mass_kl"] > 0.1
    if objective == "sft_kl":
        assert line["mass_ce"] == pytest.approx(line["ce"], rel=1e-6)
        assert line["mass_kl"] == pytest.approx(0.7 * line["kl"], rel=1e-6)
    if objective == "eksft":
        assert line["mass_entropy"] < 0 < line["mass_rkl"]


def take_step_of_stranger(made: Lab) -> Taken:
    """A step of another model than the one that is the teacher."""
    return take(replace(made, model=shared_model(seed=1)), feed(made).step(np.arange(8)), World())


@pytest.mark.parametrize(
    "case", [{"kind": "eksft", "rho": 0.3, "lambda_kl": 0.4}, {"kind": "eksft", "rho": 0.3, "combine": "intersection"}]
)
def test_in_bfloat16_a_student_that_is_its_teacher_has_moved_nowhere(tmp_path: Path, case: dict[str, Any]) -> None:
    """Rounding is no movement, and so chooses no token to be held, another one in each layout."""
    made = lab(tmp_path, documents=uneven(), objective=case).changed(model={"dtype": "bfloat16"}, train={"clip": None})
    made.score()
    found = []
    for budget in (16, 64, 128):
        variant = made.changed(train={"micro_batch_tokens": budget})
        mine = Feed(variant.corpus, variant.cache(), variant.run.objective, variant.run.train, World(), vocabulary=280,
                    rounding=ROUNDING["bfloat16"]).step(np.arange(8))  # fmt: skip
        found.append(take(variant, mine, World()).values.counts)
    assert [one["rkl"] for one in found] == [0, 0, 0]
    assert found[0]["ce"] == found[1]["ce"] == found[2]["ce"]


def test_a_run_tells_the_rule_how_much_is_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    plain = Feed.__init__

    def watching(self: Any, *args: Any, **named: Any) -> None:
        plain(self, *args, **named)
        seen.append(self.rounding)

    monkeypatch.setattr(Feed, "__init__", watching)
    made = lab(tmp_path, documents=uneven(), objective={"kind": "sft"}).changed(train={"max_steps": 1, "warmup_steps": 0})
    made.train()
    made.changed(name="half", model={"dtype": "bfloat16"}).train()
    assert seen == [1e-5, 1e-3]


def test_the_normaliser_is_the_count_over_the_whole_step(tmp_path: Path) -> None:
    """The gradient of a step is the count-weighted mean of its documents' gradients, not their plain mean."""
    made = lab(tmp_path, documents=uneven(), objective={"kind": "sft"}).changed(train={"clip": None})
    whole = take_step(made, list(range(8)))
    counts = [int(d.supervised.sum()) for d in made.corpus.documents("train")]
    alone = [take_step(made, [row]) for row in range(8)]
    mean = {
        name: sum(count * one.gradients[name] for count, one in zip(counts, alone, strict=True)) / sum(counts)
        for name in whole.gradients
    }
    assert distance(whole.gradients, mean) <= SAME  # pyright: ignore[reportArgumentType]
    assert whole.values.loss == pytest.approx(
        sum(c * one.values.loss for c, one in zip(counts, alone, strict=True)) / sum(counts), rel=SAME
    )


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=random_documents(8, seed=6), objective={"kind": "sft"}).changed(train={"clip": None})
    plain, saved = (
        take_step(made, list(range(8))),
        take_step(made.changed(train={"gradient_checkpointing": True}), list(range(8))),
    )
    assert distance(plain.gradients, saved.gradients) <= SAME


def test_a_batch_without_a_weighted_token_runs_the_backbone_and_gives_zeros() -> None:
    """Ranks must not part ways: the same layers run, and every parameter has a gradient."""
    model = loaded(shared_model())
    trained = TrainedModel(model)
    seen = []
    model.whole.model.layers[-1].register_forward_hook(lambda *_: seen.append(1))
    documents = random_documents(3, seed=7)
    masked = [treatment(int(d.supervised.sum())) for d in documents]
    treated = [supervised(d, one) for d, one in zip(documents, masked, strict=True)]
    for batch, _ in (micro_batch([one.reached() for one in treated]), micro_batch([])):
        loss, values = trained(batch)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert len(values.ce_N) == 0
        gradients = {name: p.grad for name, p in model.whole.named_parameters()}
        assert all(g is not None and not g.any() for g in gradients.values()), [n for n, g in gradients.items() if g is None]
        model.whole.zero_grad(set_to_none=True)
    assert len(seen) == 2


def test_bfloat16_micro_batches_add_up_in_float32(tmp_path: Path) -> None:
    """Thirty-two equal micro-batches. Their normalisers are powers of two apart, so each gradient is rounded alike, and their sum
    is exact in float32; summed in bfloat16 (8 bits) it would not be."""
    same = document(np.random.default_rng(0).integers(5, 280, 16).tolist(), [3, 9])
    made = lab(tmp_path, documents=[same] * 32, objective={"kind": "sft"}, model=shared_model("qwen3"))
    made = made.changed(model={"dtype": "bfloat16"}, train={"clip": None, "micro_batch_tokens": 16})
    many, one = take_step(made, list(range(32))), take_step(made, [0])
    assert many.micro_batches == 32
    assert all(gradient.dtype == torch.float32 for gradient in many.gradients.values())
    assert distance(one.gradients, many.gradients) == 0
