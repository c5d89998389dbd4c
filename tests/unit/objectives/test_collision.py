"""The fifth weight, on the sum of p^2: value and gradient against float64 and autograd, and nothing of it where nobody asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.objectives.chunk import Chunk
from distft.objectives.distributions import DenseHead, DenseRows, LogitShape, SparseRows
from distft.objectives.loss import Targets, measure
from distft.objectives.treatment import LiveField
from distft.objectives.whole import WholeChunk
from tests.helpers.reference import reference_loss, shaped_logits
from tests.unit.objectives.test_dense_teacher import HELD, as_rows, dense
from tests.unit.objectives.test_loss import (
    SHAPES,
    assert_a_chunks_room,
    assert_close,
    fast,
    problem,
    sparse,
    targets,
    teacher_rows,
)

ONLY = (0.0, 0.0, 0.0, 0.0)
TEACHERS = ("none", "truncated", "all kept", "dense", "some dense")


def collision_weights(tokens: int = 11) -> Tensor:
    """Some of them 0, and of either sign."""
    weights = torch.randn(tokens, generator=torch.Generator().manual_seed(9))
    weights[[2, 7]] = 0
    return weights


def teacher_of(kind: str, made: dict[str, Any], shape: LogitShape) -> tuple[SparseRows | DenseRows | None, Any]:
    """For the loss, and as the reference is told."""
    if kind == "none":
        return None, None
    if "dense" in kind:
        rows = dense(replace(LogitShape(rows=37, scale=0.6), rows=shape.rows))
        if kind == "dense":
            return rows, as_rows(rows)
        held = torch.tensor(HELD, dtype=torch.bool)
        made["weights_N4"][~held, 1:3] = 0
        return rows.select(torch.arange(11), held), as_rows(rows)
    found = made["teacher"] if kind == "truncated" else teacher_rows(np.random.default_rng(4), [shape.rows] * 11, shape.rows)
    return sparse(found), found


def reference(made: dict[str, Any], shape: LogitShape, rows: Any, weights_N: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss and each token's sum of p^2 in float64, and the gradients of half the loss."""
    leaves = [made[key].double().requires_grad_() for key in ("hidden", "weight", "bias")]
    logits = shaped_logits(*leaves, rows=shape.rows, scale=shape.scale, softcap=shape.softcap)
    loss, _ = reference_loss(logits, made["labels"], made["weights_N4"], rows)
    collision_N = torch.stack([torch.softmax(row, 0).square().sum() for row in logits])
    loss = loss + (weights_N.double() * collision_N).sum()
    (0.5 * loss).backward()
    return loss.detach(), collision_N.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("chunk", [1, 4, 11])
@pytest.mark.parametrize("weights", [ONLY, None])
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("shape", ["plain", "all"])
def test_value_and_gradient_are_those_of_the_formula(shape: str, kind: str, weights: Any, chunk: int) -> None:
    made, spread_N = problem(SHAPES[shape], weights, bias=True), collision_weights()
    if kind == "none":
        made["weights_N4"][:, 1:3] = 0
    teacher, rows = teacher_of(kind, made, SHAPES[shape])
    truth, collision_N, gradients = reference(made, SHAPES[shape], rows, spread_N)
    wanted = replace(targets(made["labels"], made["weights_N4"], None), teacher=teacher, collision_N=spread_N)
    loss, values, found = fast(made["hidden"], made["weight"], made["bias"], wanted, SHAPES[shape], chunk)
    assert loss == pytest.approx(float(truth), rel=2e-5, abs=2e-5)
    assert values.collision_N is not None
    assert values.weights is not None
    assert values.weights.collision_N is not None
    assert torch.equal(values.weights.collision_N, spread_N)
    assert_close(values.collision_N, collision_N, "collision")
    for name, gradient, leaf in zip(("hidden", "weight", "bias"), found, gradients, strict=True):
        assert gradient is not None
        assert_close(gradient, leaf, f"d{name}")


@pytest.mark.parametrize("kind", ["none", "truncated", "dense"])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    """Of values in float64 alone."""
    made, shape = problem(SHAPES["plain"], ONLY, bias=True), SHAPES["plain"]
    teacher, _ = teacher_of(kind, made, shape)
    wanted = replace(targets(made["labels"], made["weights_N4"], None), teacher=teacher, collision_N=torch.ones(11))
    _, _, (gradient, _, _) = fast(made["hidden"], made["weight"], made["bias"], wanted, shape, 4)
    assert gradient is not None

    def value(hidden: Tensor) -> float:
        logits = shaped_logits(hidden, made["weight"].double(), made["bias"].double(), rows=37, scale=1.0, softcap=None)
        return float(torch.softmax(logits, 1).square().sum())

    step = 1e-5
    for n, d in ((0, 0), (1, 3), (6, 5), (10, 2)):
        moved = torch.zeros_like(made["hidden"], dtype=torch.float64)
        moved[n, d] = step
        slope = (value(made["hidden"] + moved) - value(made["hidden"] - moved)) / (2 * step)
        assert float(gradient[n, d]) == pytest.approx(0.5 * slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["all kept", "dense"])
def test_with_the_entropy_it_makes_the_published_regulariser_of_the_divergence(kind: str) -> None:
    """KL(p||q) + H(p) + sum p^2 = sum p (p - log q)."""
    made, shape = problem(SHAPES["all"], (0.0, 0.0, 1.0, -1.0), bias=True), SHAPES["all"]
    teacher, rows = teacher_of(kind, made, shape)
    leaves: list[Tensor] = [made[key].double().requires_grad_() for key in ("hidden", "weight", "bias")]
    p_NV = torch.softmax(shaped_logits(*leaves, rows=shape.rows, scale=shape.scale, softcap=shape.softcap), 1)
    log_q_NV = torch.tensor([row.logprobs for row in rows], dtype=torch.float64)
    truth = (p_NV * (p_NV - log_q_NV)).sum()
    (0.5 * truth).backward()
    wanted = replace(targets(made["labels"], made["weights_N4"], None), teacher=teacher, collision_N=torch.ones(11))
    loss, _, found = fast(made["hidden"], made["weight"], made["bias"], wanted, shape, 4)
    assert loss == pytest.approx(float(truth.detach()), rel=2e-6)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert gradient is not None
        assert leaf.grad is not None
        assert float((gradient - leaf.grad).norm() / leaf.grad.norm()) <= 2e-6


@pytest.mark.parametrize("gap", [20.0, 120.0, 1000.0])
@pytest.mark.parametrize("kind", ["none", "truncated", "dense"])
def test_a_student_that_is_extremely_sure_collides_with_itself(kind: str, gap: float) -> None:
    made, shape = problem(SHAPES["plain"], ONLY, bias=True), SHAPES["plain"]
    made["bias"] = torch.eye(37)[5] * gap
    teacher, _ = teacher_of(kind, made, shape)
    wanted = replace(targets(made["labels"], made["weights_N4"], None), teacher=teacher, collision_N=torch.full((11,), 1e4))
    _, values, found = fast(made["hidden"] * 0, made["weight"], made["bias"], wanted, shape, 4)
    assert values.collision_N is not None
    torch.testing.assert_close(values.collision_N, torch.ones(11), rtol=0, atol=1e-5)
    assert all(g is not None and bool(g.isfinite().all()) for g in found)


def test_where_nobody_asks_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = problem(SHAPES["all"], None, bias=True)
    plain = targets(made["labels"], made["weights_N4"], made["teacher"])
    with_zeros = replace(plain, collision_N=torch.zeros(11))
    truth = fast(made["hidden"], made["weight"], made["bias"], with_zeros, SHAPES["all"], 4)
    monkeypatch.setattr(Chunk, "_collision", None)
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], plain, SHAPES["all"], 4)
    assert values.collision_N is None
    assert values.weights is not None
    assert values.weights.collision_N is None
    assert loss == truth[0]
    assert all(torch.equal(one, two) for one, two in zip(gradients, truth[2], strict=True) if one is not None and two is not None)
    rows = dense(SHAPES["all"])
    logits_NV = SHAPES["all"].logits(made["hidden"], made["weight"], made["bias"])
    whole = WholeChunk(logits_NV, plain.labels_N, rows, asked=frozenset(), temperature=1.0)
    assert not hasattr(whole, "collision_C")
    assert replace(with_zeros, teacher=None).to(torch.device("meta")).collision_N is not None


@pytest.mark.parametrize("chunk", [1, 4, 11])
@pytest.mark.parametrize("kind", TEACHERS)
def test_a_rule_that_asks_is_told_and_no_other(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, shape = problem(SHAPES["all"], None, bias=True), SHAPES["all"]
    teacher, rows = teacher_of(kind, made, shape)
    _, collision_N, _ = reference(made, shape, rows, collision_weights())
    asks = replace(targets(made["labels"], made["weights_N4"], None), teacher=teacher)
    told = measure(made["hidden"], made["weight"], made["bias"], asks, shape=shape, wanted=frozenset({"collision"}), chunk=chunk)
    assert told.collision_N is not None
    assert_close(told.collision_N, collision_N, "collision")
    assert told.entropy_N is None
    monkeypatch.setattr(Chunk, "_collision", None)
    others: frozenset[LiveField] = frozenset({"entropy", "rkl"})
    plain = measure(made["hidden"], made["weight"], made["bias"], asks, shape=shape, wanted=others, chunk=chunk)
    assert plain.collision_N is None
    assert torch.equal(plain.ce_N, told.ce_N)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("teacher", ["none", "sparse", "dense"])
def test_it_takes_no_more_room_than_a_chunks_buffers(teacher: str, softcap: float | None) -> None:
    """As `test_nothing_larger_than_a_chunk_of_logits_is_made`, with all five weights."""
    random, (tokens, vocabulary, width, chunk) = np.random.default_rng(0), (768, 2_000, 4, 256)
    rows: SparseRows | DenseRows | None = None
    shape = LogitShape(rows=vocabulary, softcap=softcap)
    if teacher == "sparse":
        rows = sparse(teacher_rows(random, random.integers(0, 4, tokens).tolist(), vocabulary))
    elif teacher == "dense":
        rows = DenseRows(hidden_NT=torch.randn(tokens, width), head=DenseHead(torch.randn(vocabulary, width), None, shape))
    ce, kl, rkl, entropy, collision = torch.rand(5, tokens)
    wanted = Targets(
        labels_N=torch.from_numpy(random.integers(0, vocabulary, tokens)), ce_N=ce, kl_N=kl, rkl_N=rkl, entropy_N=entropy,
        collision_N=collision, teacher=rows,
    )  # fmt: skip
    assert_a_chunks_room(wanted, shape, width=width, chunk=chunk, dense=teacher == "dense")
