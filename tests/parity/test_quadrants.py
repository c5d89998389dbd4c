"""What a step says it spent on each kind of supervised token, against a recount in float64 over whole distributions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from distft.engine.world import World
from distft.objectives import quadrants
from distft.objectives.loss import PARTS
from distft.objectives.quadrants import QUADRANTS
from distft.objectives.treatment import ObjectiveRule
from distft.train.record import read_metrics
from tests.helpers.objective_reference import Doc
from tests.helpers.objectives import ALL_POSITIONS, CATALOG, dense, stranger, uneven
from tests.helpers.steps import feed, take
from tests.helpers.stores import Lab, lab, loaded, shared_model
from tests.unit.objectives.test_against_papers import exact_signals, rule_of, terms

EVERYTHING = {"kind": "topk", "k": 65_535, "min_prob": 0.0}
CASES = {
    **{name: case for name, case in CATALOG.items() if rule_of(case).needs_signals or rule_of(case).needs_distribution},
    "eksft, some without a weight": {"kind": "eksft", "rho": 0.4, "lambda_kl": 0.4, "lambda_entropy": 0.0},
}


def scored(folder: Path) -> Lab:
    made = lab(folder, documents=uneven(alike=False), score={**ALL_POSITIONS, "distribution": EVERYTHING})
    made.score()
    return made.changed(train={"clip": None, "micro_batch_tokens": 60})


def recount(answers: list[Doc], rule: ObjectiveRule, *, unsure: float, likely: float) -> tuple[Counter[str], Counter[str]]:
    """Tokens of each kind, and what they add to the loss."""
    treated = [rule.treat(exact_signals(doc, rule)) for doc in answers]
    totals = [sum(float(one.count[one.group == group].sum()) for one in treated) for group in range(rule.groups)]
    tokens, masses = Counter[str](), Counter[str]()
    for doc, one in zip(answers, treated, strict=True):
        q = torch.softmax(doc.teacher, 1)
        for t, label in enumerate(doc.labels):
            entropy = float(-(q[t] * q[t].log()).sum())
            kind = f"{'unsure' if entropy > unsure else 'sure'}_{'likely' if float(q[t, label]) >= likely else 'unlikely'}"
            tokens[kind] += 1
            for part, value in zip(PARTS, terms(doc), strict=True):
                sign = -1 if part == "entropy" else 1
                masses[kind] += sign * float(getattr(one, part)[t]) * float(value[t]) / totals[one.group[t]]
    return tokens, masses


@pytest.mark.parametrize("objective", CASES)
def test_a_step_tells_what_it_spent_on_each_kind(tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teachers of tests are unsure of everything: the thresholds here are where they split it."""
    made, student = scored(tmp_path).changed(objective=CASES[objective]), shared_model(seed=1)
    with torch.no_grad():
        answers, _ = dense(made, loaded(student).whole.double(), list(made.corpus.documents("train")))
    teachers = [torch.softmax(doc.teacher, 1) for doc in answers]
    entropies = [-(q * q.log()).sum(1) for q in teachers]
    labels = [q.gather(1, torch.tensor(doc.labels)[:, None]) for q, doc in zip(teachers, answers, strict=True)]
    bounds = {"unsure": float(between(torch.cat(entropies))), "likely": float(between(torch.cat(labels)))}
    for name, bound in bounds.items():
        monkeypatch.setattr(quadrants, name.upper(), bound)

    line = take(stranger(made, student), feed(made).step(np.arange(8)), World()).line
    tokens, masses = recount(answers, rule_of(CASES[objective]), **bounds)
    whole = sum(tokens.values())
    assert min(tokens.values()) > 0
    for kind in QUADRANTS:
        assert line[f"tokens_{kind}"] == pytest.approx(tokens[kind] / whole)
        assert line[f"mass_{kind}"] == pytest.approx(masses[kind], rel=1e-3, abs=1e-5)
    parts = sum(line.get(f"mass_{part}", 0.0) for part in PARTS)
    rest = parts - sum(line[f"mass_{kind}"] for kind in QUADRANTS)
    assert (rest > 0.01) if "prompt" in objective else abs(rest) <= 1e-6


def between(values: torch.Tensor) -> float:
    """A threshold in the middle of the widest gap among the middle half: rounding moves nothing over it."""
    ordered = values.flatten().sort().values[len(values) // 4 : -(len(values) // 4)]
    at = int(ordered.diff().argmax())
    return float(ordered[at] + ordered[at + 1]) / 2


def test_without_a_teacher_there_are_no_kinds(tmp_path: Path) -> None:
    made = lab(tmp_path, documents=uneven(), objective={"kind": "sft"}).changed(train={"max_steps": 1, "warmup_steps": 0})
    made.train()
    [line] = read_metrics(made.run_folder)
    assert not [key for key in line if "sure" in key]
