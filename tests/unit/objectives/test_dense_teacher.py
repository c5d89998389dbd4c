"""A teacher of whom hidden states and head are kept: both divergences are over the whole vocabulary, exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.objectives.catalog import Kd
from distft.objectives.distributions import DenseHead, DenseRows, LogitShape
from distft.objectives.loss import Targets, measure, token_loss
from distft.objectives.treatment import Signals
from tests.helpers.reference import Row, reference_loss, shaped_logits
from tests.unit.objectives.test_loss import SHAPES, WEIGHTS, assert_close, fast, problem

TEACHERS = {
    "plain": LogitShape(rows=37),
    "its own scale and cap": LogitShape(rows=37, scale=0.6, softcap=2.5),
}


def dense(shape: LogitShape, *, tokens: int = 11, width: int = 9, bias: bool = True, seed: int = 5) -> DenseRows:
    """A teacher of another width than the student's."""
    generator = torch.Generator().manual_seed(seed)
    head = DenseHead(
        torch.randn(shape.rows, width, generator=generator), torch.randn(shape.rows, generator=generator) if bias else None, shape
    )
    return DenseRows(hidden_NT=torch.randn(tokens, width, generator=generator), head=head)


def as_rows(teacher: DenseRows) -> list[Row]:
    """What the reference is told: every token of the vocabulary, and nothing in the tail."""
    head = teacher.head
    bias = None if head.bias_V is None else head.bias_V.double()
    logits = shaped_logits(
        teacher.hidden_NT.double(), head.weight_VT.double(), bias, rows=head.shape.rows, scale=head.shape.scale,
        softcap=head.shape.softcap,
    )  # fmt: skip
    logprobs = torch.log_softmax(logits, 1)
    return [Row(list(range(head.shape.rows)), row.tolist(), 0.0) for row in logprobs]


def wanted(made: dict[str, Any], teacher: DenseRows) -> Targets:
    ce, kl, rkl, entropy = made["weights_N4"].float().unbind(1)
    return Targets(labels_N=torch.tensor(made["labels"]), ce_N=ce, kl_N=kl, rkl_N=rkl, entropy_N=entropy, teacher=teacher)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_formulas(shape: str, weights: str, teacher: str) -> None:
    student = SHAPES[shape]
    made = problem(student, WEIGHTS[weights], bias=True)
    rows = dense(replace(TEACHERS[teacher], rows=student.rows))
    leaves: list[Any] = [made[k].double().requires_grad_() for k in ("hidden", "weight", "bias")]
    logits = shaped_logits(*leaves, rows=student.rows, scale=student.scale, softcap=student.softcap)
    expected, terms = reference_loss(logits, made["labels"], made["weights_N4"], as_rows(rows))
    (expected * 0.5).backward()
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], wanted(made, rows), student, 4)

    assert loss == pytest.approx(float(expected.detach()), rel=2e-5)
    for name, column in (("ce", values.ce_N), ("kl", values.kl_N), ("rkl", values.rkl_N)):
        assert_close(column, torch.stack([getattr(term, name).detach() for term in terms]), name)
    for name, gradient, leaf in zip(("hidden", "weight", "bias"), gradients, leaves, strict=True):
        assert gradient is not None
        assert_close(gradient, leaf.grad, f"d{name}")
    measured = measure(made["hidden"], made["weight"], made["bias"], wanted(made, rows), shape=student)
    assert_close(measured.kl_N, values.kl_N.double(), "kl, measured")
    assert_close(measured.rkl_N, values.rkl_N.double(), "rkl, measured")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_is_at_no_distance(kind: torch.dtype) -> None:
    shape = LogitShape(rows=300, softcap=5.0)
    rows = dense(shape, bias=False)
    weight, hidden = (rows.head.weight_VT * 3).to(kind), rows.hidden_NT.to(kind)
    rows = DenseRows(hidden_NT=hidden, head=DenseHead(weight, None, shape))
    made = problem(SHAPES["plain"], WEIGHTS["kl"], bias=False)
    both = Targets(**{**vars_of(wanted(made, rows)), "rkl_N": torch.ones(11)})
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, values = token_loss(leaves[0], leaves[1], None, both, shape=shape, chunk=4)
    loss.backward()
    assert float(values.kl_N.max()) <= 1e-6
    assert float(values.rkl_N.max()) <= 1e-6
    for leaf in leaves:
        assert leaf.grad is not None
        assert float(leaf.grad.abs().max()) <= 1e-5


def vars_of(one: Targets) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__slots__}


def test_tokens_that_a_model_never_says_are_no_trouble() -> None:
    """Some heads have a bias of -inf; the divergence is then of the others."""
    shape = LogitShape(rows=37)
    rows = dense(shape)
    silent: Tensor = torch.zeros(37)
    silent[[3, 20]] = -torch.inf
    rows = DenseRows(hidden_NT=rows.hidden_NT, head=DenseHead(rows.head.weight_VT, silent, shape))
    made = problem(shape, WEIGHTS["kl"], bias=True)
    made["labels"] = [1] * 11
    made["bias"] = made["bias"] + silent
    targets = wanted(made, rows)
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], targets, shape, 4)
    assert torch.isfinite(torch.tensor(loss))
    assert bool(torch.isfinite(values.kl_N).all())
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)


def test_the_head_is_moved_to_a_device_once() -> None:
    head = dense(LogitShape(rows=37)).head
    moved = head.to(torch.device("meta"))
    assert moved is not head
    assert head.to(torch.device("meta")) is moved
    assert moved.to(torch.device("meta")) is moved
    assert head.to(torch.device("cpu")) is head


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
@pytest.mark.parametrize("shape", ["plain", "all"])
def test_a_temperature_softens_both_sides_and_leaves_the_label_alone(shape: str, temperature: float) -> None:
    student = SHAPES[shape]
    made = problem(student, None, bias=True)
    made["weights_N4"][:, 3] = 0
    rows = dense(replace(TEACHERS["its own scale and cap"], rows=student.rows))
    teacher = torch.tensor([row.logprobs for row in as_rows(rows)], dtype=torch.float64)
    softened = torch.log_softmax(teacher / temperature, 1)  # a softmax forgets the constant that log-probabilities differ by

    leaves: list[Any] = [made[k].double().requires_grad_() for k in ("hidden", "weight", "bias")]
    logits = shaped_logits(*leaves, rows=student.rows, scale=student.scale, softcap=student.softcap)
    plain, soft = torch.log_softmax(logits, 1), torch.log_softmax(logits / temperature, 1)
    ce_N = -plain[torch.arange(11), made["labels"]]
    kl_N = (softened.exp() * (softened - soft)).sum(1)
    rkl_N = (soft.exp() * (soft - softened)).sum(1)
    expected = (torch.stack([ce_N, kl_N, rkl_N], 1) * made["weights_N4"][:, :3]).sum()
    (expected * 0.5).backward()

    targets = replace(wanted(made, rows), temperature=temperature)
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], targets, student, 4)
    assert loss == pytest.approx(float(expected.detach()), rel=2e-5)
    for name, column, truth in (("ce", values.ce_N, ce_N), ("kl", values.kl_N, kl_N), ("rkl", values.rkl_N, rkl_N)):
        torch.testing.assert_close(column.double(), truth.detach(), rtol=5e-5, atol=5e-5, msg=name)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-4, atol=1e-4)


def test_the_square_of_a_temperature_is_in_the_weights() -> None:
    """Of answers and of prompts, so that values and metrics are nats."""
    rule = Kd(kind="kd", lam=0.25, temperature=3.0, prompt_kl=0.5)
    blank = np.zeros(2, np.float32)
    made = rule.treat(Signals(label_logprob=blank, entropy=blank, rank=np.zeros(2, np.uint32)))
    assert (made.ce.tolist(), made.kl.tolist()) == ([0.75] * 2, [0.25 * 9] * 2)
    assert rule.prompt_weight(4, 2) == 0.5 * 9 * 4 / 2


HELD = [0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 20])
@pytest.mark.parametrize("held", [HELD, [0] * 11, [1] * 11])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_that_are_not_held_cost_no_teacher_and_have_no_divergence(
    chunk: int, held: list[int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is as if every token were held and the others had no weight on a divergence."""
    made, held_N = problem(SHAPES["all"], None, bias=True), torch.tensor(held, dtype=torch.bool)
    made["weights_N4"][~held_N, 1:3] = 0
    rows = dense(replace(TEACHERS["its own scale and cap"], rows=SHAPES["all"].rows))
    asked: list[int] = []
    logprobs = DenseHead.logprobs
    whole = replace(wanted(made, rows), temperature=temperature)
    truth = fast(made["hidden"], made["weight"], made["bias"], whole, SHAPES["all"], chunk)
    monkeypatch.setattr(DenseHead, "logprobs", lambda self, h, t=1.0: asked.append(len(h)) or logprobs(self, h, t))
    some = replace(whole, teacher=rows.select(torch.arange(11), held_N))
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], some, SHAPES["all"], chunk)
    assert sum(asked) == sum(held)
    assert loss == pytest.approx(truth[0], rel=1e-6)
    for name in ("kl_N", "rkl_N"):
        found = getattr(values, name)
        torch.testing.assert_close(found[held_N], getattr(truth[1], name)[held_N], rtol=1e-6, atol=1e-6)
        assert not found[~held_N].any()
    for one, other in zip(gradients, truth[2], strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_selection_of_a_selection_holds_what_both_hold() -> None:
    rows = dense(LogitShape(rows=37))
    some = rows.select(torch.arange(11), torch.tensor(HELD, dtype=torch.bool))
    assert torch.equal(some.hidden_NT, rows.hidden_NT[[1, 2, 5, 7]])
    less = some.select(torch.tensor([0, 2, 3, 5, 7, 9]), torch.tensor([True, True, True, False, True, False]))
    assert less.held_N is not None
    assert less.held_N.tolist() == [False, True, False, False, True, False]
    assert torch.equal(less.hidden_NT, rows.hidden_NT[[2, 7]])
    part = less.chunk(1, 5)
    assert torch.equal(part.hidden_NT, rows.hidden_NT[[2, 7]])
    assert len(less.chunk(2, 4).hidden_NT) == 0
