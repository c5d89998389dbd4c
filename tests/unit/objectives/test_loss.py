"""The loss against a slow float64 reference, and what must hold of it whatever the numbers are."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distft.objectives.chunk import TINY
from distft.objectives.distributions import DenseHead, DenseRows, LogitShape, SparseRows
from distft.objectives.loss import BUFFER_BYTES, Targets, TokenValues, Weights, buffers, loss_chunk, measure, token_loss
from distft.objectives.treatment import LiveField
from tests.helpers.reference import Row, reference_loss, shaped_logits

# float32 sums over 37 logits against float64: a few units of 2^-24 on terms of up to some tens of nats
EXACT = 2e-5


def assert_close(found: Tensor, truth: Tensor | None, what: str) -> None:
    torch.testing.assert_close(found.double(), truth, rtol=EXACT, atol=EXACT, msg=lambda message: f"{what}: {message}")


def teacher_rows(random: np.random.Generator, counts: list[int], vocabulary: int) -> list[Row]:
    """Rows with so many kept entries each; 0 entries have tail 1, all of them tail 0, in between the rest of a real softmax."""
    rows = []
    for count in counts:
        logits = random.normal(size=vocabulary) * 2
        logprobs = logits - np.logaddexp.reduce(logits)
        ids = np.sort(random.permutation(vocabulary)[:count])
        # The kept mass and the tail sum to 1 in float32 as they do in a cache.
        tail = 1.0 if count == 0 else 0.0 if count == vocabulary else float(np.exp(np.delete(logprobs, ids)).sum())
        rows.append(Row(ids.tolist(), [float(np.float32(v)) for v in logprobs[ids]], float(np.float32(tail))))
    return rows


def sparse(rows: list[Row]) -> SparseRows:
    return SparseRows(
        ids_M=torch.tensor([i for row in rows for i in row.ids], dtype=torch.int64),
        logprobs_M=torch.tensor([v for row in rows for v in row.logprobs], dtype=torch.float32),
        counts_N=torch.tensor([len(row.ids) for row in rows], dtype=torch.int64),
        tail_N=torch.tensor([row.tail for row in rows], dtype=torch.float32),
    )


def targets(labels: list[int], weights_N4: Tensor, teacher: list[Row] | None) -> Targets:
    ce, kl, rkl, entropy = weights_N4.float().unbind(1)
    found = None if teacher is None else sparse(teacher)
    return Targets(labels_N=torch.tensor(labels), ce_N=ce, kl_N=kl, rkl_N=rkl, entropy_N=entropy, teacher=found)


def fast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Targets, shape: LogitShape, chunk: int
) -> tuple[float, TokenValues, list[Tensor | None]]:
    """Loss, values, and the gradients of hidden, weight and bias; the outer factor 0.5 must reach all of them."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    loss, values = token_loss(leaves[0], leaves[1], leaves[2], wanted, shape=shape, chunk=chunk)  # pyright: ignore[reportArgumentType]
    (loss * 0.5).backward()
    return float(loss.detach()), values, [None if leaf is None else leaf.grad for leaf in leaves]


SHAPES = {
    "plain": LogitShape(rows=37),
    "padded": LogitShape(rows=31),
    "scaled": LogitShape(rows=37, scale=0.35),
    "softcapped": LogitShape(rows=37, softcap=3.0),
    "all": LogitShape(rows=29, scale=1.7, softcap=5.0),
}
WEIGHTS = {
    "ce": (1.0, 0.0, 0.0, 0.0),
    "kl": (0.0, 1.0, 0.0, 0.0),
    "rkl": (0.0, 0.0, 1.0, 0.0),
    "entropy": (0.0, 0.0, 0.0, 1.0),
    "mixed": None,
}


def problem(shape: LogitShape, weights: tuple[float, ...] | None, *, bias: bool, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, width = 11, 6
    counts = [0, shape.rows, 1, 2, shape.rows - 1, 0, 5, shape.rows, 3, 1, 7]
    if weights is None:
        weights_N4 = torch.rand(tokens, 4, generator=generator, dtype=torch.float64) * 2
        weights_N4[4] = 0
        weights_N4[7, 1:] = 0
    else:
        weights_N4 = torch.tensor([weights] * tokens, dtype=torch.float64)
    return {
        "hidden": torch.randn(tokens, width, generator=generator) * 1.5,
        "weight": torch.randn(37, width, generator=generator),
        "bias": torch.randn(37, generator=generator) if bias else None,
        "labels": random.integers(0, shape.rows, tokens).tolist(),
        "weights_N4": weights_N4.float().double(),
        "teacher": teacher_rows(random, counts, shape.rows),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_formulas(shape: str, weights: str, bias: bool) -> None:
    check_against_reference(SHAPES[shape], WEIGHTS[weights], bias=bias, chunk=4)


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 12, 1000])
def test_any_chunk_size_gives_the_same(chunk: int) -> None:
    check_against_reference(SHAPES["all"], None, bias=True, chunk=chunk)


def check_against_reference(shape: LogitShape, weights: tuple[float, ...] | None, *, bias: bool, chunk: int) -> None:
    made = problem(shape, weights, bias=bias)
    leaves: list[Any] = [None if made[k] is None else made[k].double().requires_grad_() for k in ("hidden", "weight", "bias")]
    logits = shaped_logits(leaves[0], leaves[1], leaves[2], rows=shape.rows, scale=shape.scale, softcap=shape.softcap)
    expected, terms = reference_loss(logits, made["labels"], made["weights_N4"], made["teacher"])
    (expected * 0.5).backward()
    wanted = targets(made["labels"], made["weights_N4"], made["teacher"])
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], wanted, shape, chunk)

    assert loss == pytest.approx(float(expected.detach()), rel=2e-5)
    assert not any(column is not None and column.requires_grad for column in (values.ce_N, values.kl_N, values.entropy_N))
    for name, column in (("ce", values.ce_N), ("kl", values.kl_N), ("rkl", values.rkl_N)):
        truth = torch.stack([getattr(term, name).detach() for term in terms])
        assert_close(column, truth, name)
    if bool((made["weights_N4"][:, 3] != 0).any()):
        assert values.entropy_N is not None
        truth = torch.stack([term.entropy.detach() for term in terms])
        assert_close(values.entropy_N, truth, "entropy")
    else:
        assert values.entropy_N is None
    for name, gradient, leaf in zip(("hidden", "weight", "bias"), gradients, leaves, strict=True):
        if leaf is None:
            assert gradient is None
            continue
        assert gradient is not None
        assert_close(gradient, leaf.grad, f"d{name}")
    # Head rows beyond the tokenizer's have no part in anything.
    assert gradients[1] is not None
    assert not gradients[1][shape.rows :].any()


def test_the_reference_gradient_is_that_of_finite_differences() -> None:
    """The reference's own gradients come from autograd; this ties both to the values alone."""
    made = problem(SHAPES["plain"], None, bias=False)
    wanted = targets(made["labels"], made["weights_N4"], made["teacher"])
    _, _, (gradient, _, _) = fast(made["hidden"], made["weight"], None, wanted, SHAPES["plain"], 4)
    assert gradient is not None

    def value(hidden: Tensor) -> float:
        logits = shaped_logits(hidden, made["weight"].double(), None, rows=37, scale=1.0, softcap=None)
        return float(reference_loss(logits, made["labels"], made["weights_N4"], made["teacher"])[0])

    step = 1e-5
    for n, d in ((0, 0), (1, 3), (6, 5), (10, 2)):
        up, down = made["hidden"].double(), made["hidden"].double()
        up[n, d] += step
        down[n, d] -= step
        slope = 0.5 * (value(up) - value(down)) / (2 * step)
        assert float(gradient[n, d]) == pytest.approx(slope, rel=1e-4, abs=1e-4)  # float32 against second order in the step


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bfloat16_inputs_lose_their_own_rounding_and_no_more(weights: str) -> None:
    shape = SHAPES["padded"]
    made = problem(shape, WEIGHTS[weights], bias=False, seed=3)
    hidden, weight = made["hidden"].bfloat16(), made["weight"].bfloat16()
    # The model's own forward rounds its logits to bfloat16; everything after that is float32 here.
    logits = (hidden @ weight[: shape.rows].T).double().requires_grad_()
    expected, _ = reference_loss(logits, made["labels"], made["weights_N4"], made["teacher"])
    (expected * 0.5).backward()
    assert logits.grad is not None
    wanted = targets(made["labels"], made["weights_N4"], made["teacher"])
    loss, values, (grad_hidden, grad_weight, _) = fast(hidden, weight, None, wanted, shape, 4)

    assert loss == pytest.approx(float(expected.detach()), rel=2e-5)
    assert values.ce_N.dtype == torch.float32
    assert grad_hidden is not None
    assert grad_weight is not None
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    for gradient, truth in (
        (grad_hidden, logits.grad @ weight[: shape.rows].double()),
        (grad_weight[: shape.rows], logits.grad.T @ hidden.double()),
    ):
        # Two roundings to bfloat16 (2^-8 each) on the way, of terms that partly cancel: a share of the largest entry.
        assert float((gradient.double() - truth).abs().max()) <= 2**-7 * float(truth.abs().max())


def test_sft_is_torchs_cross_entropy() -> None:
    made = problem(SHAPES["plain"], (1.0, 0.0, 0.0, 0.0), bias=True)
    wanted = targets(made["labels"], made["weights_N4"], None)
    loss, values, gradients = fast(made["hidden"], made["weight"], made["bias"], wanted, SHAPES["plain"], 4)
    leaves = [made[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")]
    own = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*leaves), torch.tensor(made["labels"]), reduction="sum"
    )  # fmt: skip
    (own * 0.5).backward()
    assert loss == pytest.approx(float(own.detach()), rel=1e-6)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6)  # both float32, other order of sums
    assert not values.kl_N.any()
    assert not values.rkl_N.any()


def test_measure_tells_the_same_values_and_entropy() -> None:
    made = problem(SHAPES["all"], None, bias=True)
    wanted = targets(made["labels"], made["weights_N4"], made["teacher"])
    _, trained, _ = fast(made["hidden"], made["weight"], made["bias"], wanted, SHAPES["all"], 1000)
    seen = measure(made["hidden"], made["weight"], made["bias"], wanted, shape=SHAPES["all"], wanted=frozenset({"entropy"}))
    for name in ("ce_N", "kl_N", "rkl_N", "entropy_N"):
        torch.testing.assert_close(getattr(seen, name), getattr(trained, name), rtol=1e-6, atol=1e-6)
    assert measure(made["hidden"], made["weight"], made["bias"], wanted, shape=SHAPES["all"]).entropy_N is None
    nothing = targets([], torch.zeros(0, 4), None)
    assert len(measure(made["hidden"][:0], made["weight"], None, nothing, shape=SHAPES["all"]).ce_N) == 0


def test_rows_without_a_weight_have_no_gradient_and_no_part_in_others() -> None:
    shape = SHAPES["all"]
    made = problem(shape, None, bias=True)
    silent = [4, 7]
    weights = made["weights_N4"].clone()
    weights[silent] = 0
    _, _, (with_them, weight_with, _) = fast(
        made["hidden"], made["weight"], made["bias"], targets(made["labels"], weights, made["teacher"]), shape, 3
    )
    kept = [n for n in range(11) if n not in silent]
    without = targets([made["labels"][n] for n in kept], weights[kept], [made["teacher"][n] for n in kept])
    _, _, (alone, weight_alone, _) = fast(made["hidden"][kept], made["weight"], made["bias"], without, shape, 3)
    assert with_them is not None
    assert alone is not None
    assert weight_with is not None
    assert weight_alone is not None
    assert not with_them[silent].any()
    assert with_them[kept].any(1).all()
    torch.testing.assert_close(with_them[kept], alone, rtol=1e-6, atol=1e-6)  # other chunk borders, other order of sums
    torch.testing.assert_close(weight_with, weight_alone, rtol=1e-6, atol=1e-6)


def test_equal_inputs_give_equal_bits() -> None:
    made = problem(SHAPES["all"], None, bias=True)
    wanted = targets(made["labels"], made["weights_N4"], made["teacher"])
    runs = [fast(made["hidden"], made["weight"], made["bias"], wanted, SHAPES["all"], 3) for _ in range(3)]
    for loss, values, gradients in runs[1:]:
        assert loss == runs[0][0]
        assert all(torch.equal(getattr(values, n), getattr(runs[0][1], n)) for n in ("ce_N", "kl_N", "rkl_N", "entropy_N"))
        assert all(
            torch.equal(one, two) for one, two in zip(gradients, runs[0][2], strict=True) if one is not None and two is not None
        )


def test_no_tokens_at_all_is_a_loss_of_zero_with_gradients() -> None:
    weight = torch.randn(37, 6)
    loss, _, gradients = fast(torch.zeros(0, 6), weight, None, targets([], torch.zeros(0, 4), None), SHAPES["plain"], 4)
    assert loss == 0.0
    assert gradients[1] is not None
    assert torch.equal(gradients[1], torch.zeros_like(weight))


# --- divergences -----------------------------------------------------------------------------------------------------

VOCABULARY = 12
logit_lists = st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY)
id_sets = st.sets(st.integers(0, VOCABULARY - 1))


def normalised(logits: list[float]) -> np.ndarray:
    array = np.array(logits, np.float64)
    return array - np.logaddexp.reduce(array)


def row_of(logq: np.ndarray, ids: list[int]) -> Row:
    others = np.delete(np.arange(len(logq)), ids)
    return Row(ids, logq[ids].tolist(), float(np.exp(logq[others]).sum()) if len(ids) < len(logq) else 0.0)


def divergences(student: list[float], row: Row) -> tuple[float, float]:
    """KL(q||p) and KL(p||q) as the fast loss measures them; the head is the identity, so hidden states are logits."""
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    values = measure(
        torch.tensor([student]), torch.eye(VOCABULARY), None, targets([0], weights, [row]), shape=LogitShape(rows=VOCABULARY)
    )
    return float(values.kl_N), float(values.rkl_N)


def full_divergences(student: list[float], teacher: np.ndarray) -> tuple[float, float]:
    logp = normalised([float(np.float32(v)) for v in student])
    return float((np.exp(teacher) * (teacher - logp)).sum()), float((np.exp(logp) * (logp - teacher)).sum())


@settings(max_examples=150, deadline=None)
@given(student=logit_lists, teacher=logit_lists, ids=id_sets)
def test_a_sparse_divergence_is_never_negative_and_never_above_the_full_one(
    student: list[float], teacher: list[float], ids: set[int]
) -> None:
    logq = normalised(teacher)
    kl, rkl = divergences(student, row_of(logq, sorted(ids)))
    full_kl, full_rkl = full_divergences(student, logq)
    assert 0 <= kl <= full_kl * (1 + 1e-5) + 1e-5  # float32 terms of up to 60 nats
    assert 0 <= rkl <= full_rkl * (1 + 1e-5) + 1e-5


@settings(max_examples=100, deadline=None)
@given(student=logit_lists, teacher=logit_lists)
def test_with_every_token_kept_it_is_the_full_one(student: list[float], teacher: list[float]) -> None:
    logq = normalised(teacher)
    assert divergences(student, row_of(logq, list(range(VOCABULARY)))) == pytest.approx(
        full_divergences(student, logq), rel=1e-5, abs=1e-5
    )


@settings(max_examples=100, deadline=None)
@given(logits=logit_lists, ids=id_sets)
def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(logits: list[float], ids: set[int]) -> None:
    row = row_of(normalised([float(np.float32(v)) for v in logits]), sorted(ids))
    assert divergences(logits, row) == pytest.approx((0.0, 0.0), abs=1e-5)
    wanted = targets([0], torch.tensor([[0.0, 1.0, 1.0, 0.0]]), [row])
    _, _, (gradient, _, _) = fast(torch.tensor([logits]), torch.eye(VOCABULARY), None, wanted, LogitShape(rows=VOCABULARY), 1)
    assert gradient is not None
    assert float(gradient.abs().max()) <= 1e-5


def test_the_directions_are_not_each_other() -> None:
    """Teacher (1/2, 1/2), student (9/10, 1/10): KL(q||p) = ln(5/3), KL(p||q) = .9 ln 1.8 + .1 ln .2."""
    row = Row([0, 1], [math.log(0.5)] * 2, 0.0)
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    student = torch.tensor([[math.log(0.9), math.log(0.1)]])
    values = measure(student, torch.eye(2), None, targets([0], weights, [row]), shape=LogitShape(rows=2))
    assert float(values.kl_N) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)
    assert float(values.rkl_N) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)


def test_what_lies_in_the_tail_counts() -> None:
    """Teacher: a half on token 0, a half elsewhere. Student: nearly all on token 0. Without the tail category this would look
    like a gain (negative), and nothing would pull mass back."""
    student = [math.log(0.98)] + [math.log(0.02 / (VOCABULARY - 1))] * (VOCABULARY - 1)
    row = Row([0], [math.log(0.5)], 0.5)
    kl, rkl = divergences(student, row)
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.98) + 0.5 * math.log(0.5 / 0.02), rel=1e-5)
    assert rkl == pytest.approx(0.98 * math.log(0.98 / 0.5) + 0.02 * math.log(0.02 / 0.5), rel=1e-5)


@pytest.mark.parametrize("gap", [20.0, 70.0, 90.0, 120.0, 1000.0])
@pytest.mark.parametrize("weight", [1.0, 1e4])
@pytest.mark.parametrize("kept", [[0], [1], [], list(range(VOCABULARY))])
def test_a_student_that_is_extremely_sure_stays_finite(gap: float, weight: float, kept: list[int]) -> None:
    """At a gap of 70 its tail mass is 4e-31, at 120 it is below float32; the teacher gives the tail a third."""
    logq = normalised([math.log(2 / 3)] + [math.log(1 / 3 / (VOCABULARY - 1))] * (VOCABULARY - 1))
    row = row_of(logq, kept)
    wanted = targets([3], torch.full((1, 4), weight), [row])
    student = torch.tensor([[gap] + [0.0] * (VOCABULARY - 1)])
    loss, values, gradients = fast(student, torch.eye(VOCABULARY), None, wanted, LogitShape(rows=VOCABULARY), 1)
    assert math.isfinite(loss)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    if gap <= 70 and kept == [0]:
        logp_tail = math.log(VOCABULARY - 1) - gap
        assert float(values.kl_N) == pytest.approx(2 / 3 * math.log(2 / 3) + 1 / 3 * (math.log(1 / 3) - logp_tail), rel=1e-5)
        # ce + kl pull the tail up: by the label's 1, and by a third of the mass shared evenly
        only_kl = replace(wanted, ce_N=torch.zeros(1), rkl_N=torch.zeros(1), entropy_N=torch.zeros(1), kl_N=torch.ones(1))
        _, _, (gradient, _, _) = fast(student, torch.eye(VOCABULARY), None, only_kl, LogitShape(rows=VOCABULARY), 1)
        assert gradient is not None
        assert gradient[0, 1:].tolist() == pytest.approx([-0.5 / 3 / (VOCABULARY - 1)] * (VOCABULARY - 1), rel=1e-5)


@pytest.mark.parametrize("low", [-50.0, -95.0, -150.0, -1000.0])
def test_a_kept_token_that_the_student_never_says_counts_in_full(low: float) -> None:
    """exp underflows below 87 nats under the peak; a divergence of 0.3 * 1000 is no rounding. In float64, and as a dense teacher."""
    logq = normalised([0.0, 1.0, 0.5, *[-1.0] * (VOCABULARY - 3)])
    student = [0.0, low, low / 2, *[low] * (VOCABULARY - 3)]
    full = full_divergences(student, logq)
    assert divergences(student, row_of(logq, list(range(VOCABULARY)))) == pytest.approx(full, rel=1e-5)
    head = DenseHead(torch.eye(VOCABULARY), None, LogitShape(rows=VOCABULARY))
    teacher = DenseRows(hidden_NT=torch.tensor(logq[None], dtype=torch.float32), head=head)
    wanted = replace(targets([0], torch.ones(1, 4), None), teacher=teacher)
    values = measure(torch.tensor([student]), torch.eye(VOCABULARY), None, wanted, shape=LogitShape(rows=VOCABULARY))
    assert (float(values.kl_N), float(values.rkl_N)) == pytest.approx(full, rel=1e-5)
    some = divergences(student, row_of(logq, [0, 1, 2]))
    tail = float(np.exp(logq[3:]).sum())
    logp_tail = max(math.log(VOCABULARY - 3) + low, math.log(TINY))  # the tail stops where float32 does, for its logits are gone
    kept = np.exp(logq[:3]) @ (logq[:3] - np.array(student[:3]))
    assert some[0] == pytest.approx(float(kept) + tail * (math.log(tail) - logp_tail), rel=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, for as long as they are alive, and the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.largest = 0, 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._alive or size == 0:
            return
        self._alive.add(place)
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)
        weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


class Asking:
    """Weights of a live rule that asks for one thing."""

    def __init__(self, field: LiveField) -> None:
        self.fields: frozenset[LiveField] = frozenset({field})

    def decide(self, rows: slice, seen: dict[LiveField, Tensor]) -> Weights:
        [value] = seen.values()
        return Weights(ce_N=value, kl_N=torch.ones_like(value), rkl_N=value, entropy_N=torch.zeros_like(value))


def assert_a_chunks_room(
    wanted: Targets, shape: LogitShape, *, width: int, chunk: int, dense: bool, kind: torch.dtype = torch.float32
) -> None:
    """A pass forward and back over a drawn head makes no more buffers than a chunk's size is made from."""
    tokens = len(wanted.labels_N)
    hidden, weight = (torch.randn(n, width).to(kind).requires_grad_() for n in (tokens, shape.rows))
    gc.collect()
    with Watched() as watched:
        loss, _ = token_loss(hidden, weight, None, wanted, shape=shape, chunk=chunk)
        loss.backward()
    one = 4 * chunk * shape.rows
    assert watched.largest == one
    count = buffers(shape, dense=dense, half=kind == torch.bfloat16)
    assert watched.most <= count * one + 40 * tokens * width + 16 * shape.rows * width + 300 * tokens


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("weights", ["ce", "kl", "mixed", "entropy", "top_entropy", "collision"])
@pytest.mark.parametrize("teacher", ["none", "sparse", "dense", "some dense"])
def test_nothing_larger_than_a_chunk_of_logits_is_made(
    teacher: str, weights: str, softcap: float | None, kind: torch.dtype
) -> None:
    """768 tokens over 2,000 rows in chunks of 256, on every path of the loss: the buffers are those that a chunk's size is made from,
    and the second chunk's are those of the first."""
    random, (tokens, vocabulary, width, chunk) = np.random.default_rng(0), (768, 2_000, 4, 256)
    weights_N4 = torch.rand(tokens, 4) if weights == "mixed" else torch.tensor([[1.0, weights == "kl", 0.0, 0.0]] * tokens)
    rows = teacher_rows(random, random.integers(0, 4, tokens).tolist(), vocabulary) if teacher == "sparse" else None
    wanted = targets(random.integers(0, vocabulary, tokens).tolist(), weights_N4, rows)
    shape = LogitShape(rows=vocabulary, softcap=softcap)
    if "dense" in teacher:
        head = DenseHead(torch.randn(vocabulary, width).to(kind), None, shape)
        whole = DenseRows(hidden_NT=torch.randn(tokens, width).to(kind), head=head)
        held = torch.from_numpy(random.random(tokens) < 0.2)
        wanted = replace(wanted, teacher=whole if teacher == "dense" else whole.select(torch.arange(tokens), held))
    if weights in ("entropy", "top_entropy", "collision"):
        wanted = replace(wanted, live=Asking(weights))  # pyright: ignore[reportArgumentType]
    assert_a_chunks_room(wanted, shape, width=width, chunk=chunk, dense="dense" in teacher, kind=kind)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("rows", [50_000, 151_936, 262_144])
def test_a_chunk_is_as_long_as_its_buffers_allow(rows: int, softcap: float | None, half: bool) -> None:
    shape = LogitShape(rows=rows, softcap=softcap)
    for teacher in (None, DenseRows(hidden_NT=torch.zeros(1, 1), head=DenseHead(torch.zeros(1, 1), None, shape))):
        size = loss_chunk(shape, teacher, torch.bfloat16 if half else torch.float32)
        taken = 4 * size * rows * buffers(shape, dense=teacher is not None, half=half)
        assert taken <= BUFFER_BYTES
        assert size == 1024 or taken > 0.95 * BUFFER_BYTES


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_heads_gradient_is_made_without_a_second_one(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is large beside a chunk: its float32 sum, in bfloat16 its rounded copy, and little else; in rows or whole alike."""
    tokens, vocabulary, width = 48, 5_000, 256
    wanted = targets(
        np.random.default_rng(0).integers(0, vocabulary, tokens).tolist(), torch.rand(tokens, 4) * torch.eye(4)[0], None
    )
    hidden, weight = (torch.randn(n, width, generator=torch.Generator().manual_seed(n)).to(kind) for n in (tokens, vocabulary))
    monkeypatch.setattr("distft.objectives.loss.WEIGHT_ROWS", 500)
    gc.collect()
    with Watched() as watched:
        token_loss(hidden, weight.requires_grad_(), None, wanted, shape=LogitShape(rows=vocabulary), chunk=16)
    head = 4 * vocabulary * width
    assert watched.most <= weight.nbytes + (1.0 if kind == torch.float32 else 1.5) * head + 0.12 * head + 2 * 4 * 16 * vocabulary
    _, _, (_, in_rows, _) = fast(hidden, weight.detach(), None, wanted, LogitShape(rows=vocabulary), 16)
    monkeypatch.setattr("distft.objectives.loss.WEIGHT_ROWS", vocabulary)
    _, _, (_, whole, _) = fast(hidden, weight.detach(), None, wanted, LogitShape(rows=vocabulary), 16)
    assert in_rows is not None
    assert whole is not None
    torch.testing.assert_close(in_rows, whole, rtol=1e-2 if kind == torch.bfloat16 else 0, atol=1e-4)


def test_bfloat16_gradients_are_scaled_in_float32() -> None:
    """The factor is 1/normaliser: rounded to bfloat16 first it would be off by up to 0.4 %, the same way in every gradient."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 16, generator=random).bfloat16()
    weight = torch.randn(37, 16, generator=random).bfloat16()
    wanted = targets([1, 2, 3, 4, 5, 6], torch.tensor([[1.0, 0, 0, 0]] * 6), None)
    whole, scaled = [], []
    for found, factor in ((whole, 1.0), (scaled, 1 / 3.01)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _ = token_loss(leaves[0], leaves[1], None, wanted, shape=LogitShape(rows=37))
        (loss * factor).backward()
        found.extend(leaf.grad for leaf in leaves)
    for one, third in zip(whole, scaled, strict=True):
        assert torch.equal(third, (one.float() * torch.tensor(1 / 3.01)).bfloat16())
