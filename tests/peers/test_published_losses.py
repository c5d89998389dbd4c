"""Our objectives against the losses that others publish: the same value, and the same gradient of every logit.

Compared on TRL 1.0.0 (its `GKDTrainer.generalized_jsd_loss` and `dft_loss`; 1.16.0 has the former with the same divergence, and the
latter no longer as a function) and LLaMA-Factory 0.9.5 (`dft_loss_func`, `asft_loss_func`, `eaft_loss_func`). How to install them
stands in tests/peers/published.py.

Ours go the whole way of a step: rule, micro-batch of packed documents, loss. So prompts, padding and the shift by one are compared,
too. What differs, and is allowed for here:

- GKD's softened divergence lacks the factor T^2 that `kd` has, so that its gradient fades with the temperature.
- GKD's loss jumps at the ends: beta 0 and 1 are whole divergences, while near them the divergence is beta (or 1 - beta) times that.
- GKD's loss does not shift: entry t of logits and labels belong together, and its trainer's slices see to it.
- GKD's loss, in this version, and LLaMA-Factory's ASFT take the mean over each micro-batch's own tokens, where ours and the others
  have one normaliser for the step. TRL 1.16.0's takes `num_items_in_batch`.
- LLaMA-Factory's ASFT has 0.1 as the default weight of its divergence; ours is the paper's 0.05.
- LLaMA-Factory's EAFT needs at least 20 tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from distft.corpus.reader import Document
from distft.engine.pack import lay_out
from distft.objectives.catalog import Objective
from distft.objectives.distributions import DenseHead, DenseRows, LogitShape, SparseRows
from distft.objectives.loss import token_loss
from distft.objectives.treatment import Signals, treatment
from distft.teacher.scores import Scores
from distft.train.live import LiveTreatment
from distft.train.targets import Treated, micro_batch
from tests.helpers.stores import document
from tests.peers.published import functions, version

pytestmark = pytest.mark.peers

SAME = 5e-6
"""Float32 on logits of the order of 3; a constant or a token that is off is off by hundredths."""

VOCABULARY, LENGTHS, IGNORED = 31, (7, 12, 3, 9), -100
SHAPE = LogitShape(rows=VOCABULARY)

TRL_GKD = ("trl/experimental/gkd/gkd_trainer.py", "generalized_jsd_loss")
TRL_DFT = [("trl/trainer/utils.py", "selective_log_softmax"), ("trl/trainer/sft_trainer.py", "dft_loss")]
FACTORY = "llamafactory/train/trainer_utils.py"
FACTORY_DFT = [(FACTORY, "_dft_cross_entropy"), (FACTORY, "dft_loss_func")]
FACTORY_EAFT = [(FACTORY, "_eaft_cross_entropy"), (FACTORY, "eaft_loss_func")]
FACTORY_ASFT = [(FACTORY, name) for name in ("_dft_cross_entropy", "_kl_divergence", "_asft_cross_entropy", "asft_loss_func")]


@dataclass
class Problem:
    """Documents side by side, padded: what every peer wants. Logits at a place are about the token behind it."""

    documents: list[Document]
    student_BLV: Tensor
    teacher_BLV: Tensor
    labels_BL: Tensor

    @property
    def tokens(self) -> int:
        return int((self.labels_BL != IGNORED).sum())

    @property
    def shifted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and labels, for peers that leave the shift to their caller."""
        return self.student_BLV[:, :-1], self.teacher_BLV[:, :-1], self.labels_BL[:, 1:]

    def half(self, rows: slice) -> Problem:
        """Some of the documents, as a micro-batch. The logits stay the whole's."""
        return Problem(self.documents[rows], self.student_BLV[rows], self.teacher_BLV[rows], self.labels_BL[rows])


@pytest.fixture(params=[0, 1, 2])
def problem(request: pytest.FixtureRequest) -> Problem:
    random, width = np.random.default_rng(request.param), max(LENGTHS)
    documents, labels_BL = [], torch.full((len(LENGTHS), width), IGNORED)
    for row, length in enumerate(LENGTHS):
        places = np.sort(random.choice(np.arange(1, length), max(1, int(0.7 * length)), replace=False)).tolist()
        documents.append(document(random.integers(0, VOCABULARY, length).tolist(), places))
        labels_BL[row, places] = torch.from_numpy(documents[row].tokens[places].astype(np.int64))
    made = [torch.from_numpy(3.0 * random.standard_normal((len(LENGTHS), width, VOCABULARY))).float() for _ in range(2)]
    student, teacher = made[0].double(), (made[0] + made[1]).double()
    return Problem(documents, student.requires_grad_(), teacher, labels_BL)


Rows = Callable[[Tensor], SparseRows | DenseRows]


def every_token_kept(logits_NV: Tensor) -> SparseRows:
    tokens = len(logits_NV)
    return SparseRows(
        ids_M=torch.arange(VOCABULARY).repeat(tokens), logprobs_M=logits_NV.log_softmax(1).float().flatten(),
        counts_N=torch.full((tokens,), VOCABULARY), tail_N=torch.zeros(tokens),
    )  # fmt: skip


def hidden_states(logits_NV: Tensor) -> DenseRows:
    """The logits themselves, under a head that changes nothing."""
    return DenseRows(hidden_NT=logits_NV.float(), head=DenseHead(torch.eye(VOCABULARY), None, SHAPE))


KNOWN: dict[str, Rows] = {"every token kept": every_token_kept, "hidden states": hidden_states}
by_cache = pytest.mark.parametrize("rows", KNOWN.values(), ids=KNOWN.keys())


def ours(problem: Problem, rows: Rows = every_token_kept, **settings: Any) -> tuple[float, Tensor]:
    """Loss and gradient of the student's logits, in one step of one micro-batch. The logits pass for hidden states under a head that
    changes nothing, each document's where packing puts it."""
    rule: Any = TypeAdapter[Any](Objective).validate_python(settings)
    treated = []
    for one in problem.documents:
        places = np.flatnonzero(one.supervised)
        blank, none = np.full(len(places), np.nan, np.float32), np.zeros(len(places), np.uint32)
        known = Signals(label_logprob=blank, entropy=blank, rank=none, document=one.digest, vocabulary=VOCABULARY)
        scores = Scores(
            positions=places.astype(np.uint32), label_logprob=blank, entropy=blank, rank=none, tail=np.ones(len(places), np.float32),
            counts=none.astype(np.uint16), ids=none[:0], logprobs=np.zeros(0, np.float16),
        )  # fmt: skip
        made = rule.treat(known) if rule.live == "no" else treatment(len(known), count=rule.counts(known)[0])
        treated.append(Treated(one, places, made, scores, known))
    heard_NV = torch.cat(
        [problem.teacher_BLV[row, np.flatnonzero(one.supervised) - 1] for row, one in enumerate(problem.documents)]
    )
    batch, _ = micro_batch(
        treated if rule.live != "no" else [one.reached() for one in treated],
        lambda _: rows(heard_NV),
        live=LiveTreatment.of(rule, treated) if rule.live != "no" else None,
        temperature=rule.softening,
    )
    layout = lay_out([len(one.tokens) for one in problem.documents])
    flat_PV = torch.zeros(layout.rows * layout.width, VOCABULARY, dtype=torch.float64)
    for row, (one, start) in enumerate(zip(problem.documents, layout.starts, strict=True)):
        flat_PV[start : start + len(one.tokens)] = problem.student_BLV[row, : len(one.tokens)]
    hidden_NV = flat_PV.index_select(0, batch.predictor_N).float()
    loss, _ = token_loss(hidden_NV, torch.eye(VOCABULARY), None, batch.targets, shape=SHAPE, chunk=8)
    return _with_gradient(problem, loss / sum(one.treatment.count.sum() for one in treated))


def _with_gradient(problem: Problem, loss: Tensor) -> tuple[float, Tensor]:
    [gradient] = torch.autograd.grad(loss, [problem.student_BLV])
    return float(loss.detach()), gradient


def agree(problem: Problem, published: Tensor, found: tuple[float, Tensor], *, factor: float = 1.0, within: float = SAME) -> None:
    value, gradient = _with_gradient(problem, published)
    assert abs(gradient).max() > 1e-3, "there is something to compare"
    assert found[0] == pytest.approx(factor * value, rel=within)
    assert abs(found[1] - factor * gradient).max() <= within * max(1.0, float(abs(gradient).max()))


def cross_entropy(problem: Problem) -> Tensor:
    student, _, labels = problem.shifted
    return torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def gkd(problem: Problem, *, beta: float, **how: Any) -> Tensor:
    student, teacher, labels = problem.shifted
    [loss] = functions(TRL_GKD)
    return loss(student, teacher, labels, beta=beta, **how)


def test_which_versions_were_compared() -> None:
    found = {package: version(package) for package in ("trl", "llamafactory")}
    assert found == {"trl": "1.0.0", "llamafactory": "0.9.5"}, "what this file says of them has to be looked at again"


@by_cache
def test_gkd_at_beta_0_is_the_forward_divergence(problem: Problem, rows: Rows) -> None:
    agree(problem, gkd(problem, beta=0), ours(problem, rows, kind="kd", lam=1.0))
    agree(problem, cross_entropy(problem) + 0.7 * gkd(problem, beta=0), ours(problem, rows, kind="sft_kl", kl=0.7))


@by_cache
def test_gkd_at_beta_1_is_the_reverse_divergence(problem: Problem, rows: Rows) -> None:
    held = ours(problem, rows, kind="sft_kl", kl=0.7, direction="student_to_teacher")
    agree(problem, cross_entropy(problem) + 0.7 * gkd(problem, beta=1), held)


def test_gkd_near_its_ends_is_beta_times_a_divergence(problem: Problem) -> None:
    beta = 1e-8
    agree(problem, gkd(problem, beta=beta) / beta, ours(problem, kind="kd", lam=1.0), within=1e-4)
    held = ours(problem, kind="sft_kl", kl=1.0, direction="student_to_teacher")
    agree(problem, cross_entropy(problem) + gkd(problem, beta=1 - beta) / beta, held, within=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_gkd_softened_lacks_the_square_of_the_temperature(problem: Problem, temperature: float) -> None:
    found = ours(problem, hidden_states, kind="kd", lam=1.0, temperature=temperature)
    agree(problem, temperature**2 * gkd(problem, beta=0, temperature=temperature), found)


def test_dft_of_trl(problem: Problem) -> None:
    _, loss = functions(*TRL_DFT)
    agree(problem, loss(_Outputs(problem.student_BLV), problem.labels_BL), ours(problem, kind="dft"))


def test_dft_of_llamafactory(problem: Problem) -> None:
    _, loss = functions(*FACTORY_DFT)
    agree(problem, loss({"logits": problem.student_BLV}, problem.labels_BL), ours(problem, kind="dft"))


@pytest.mark.parametrize("kl", [0.05, 0.1, 2.0])
@by_cache
def test_asft_of_llamafactory(problem: Problem, rows: Rows, kl: float) -> None:
    *_, loss = functions(
        *((FACTORY, name) for name in ("_dft_cross_entropy", "_kl_divergence", "_asft_cross_entropy", "asft_loss_func"))
    )
    published = loss({"logits": problem.student_BLV}, problem.labels_BL, problem.teacher_BLV.float(), asft_alpha=kl)
    agree(problem, published, ours(problem, rows, kind="asft", kl=kl))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_eaft_of_llamafactory(problem: Problem, alpha: float) -> None:
    _, loss = functions(*FACTORY_EAFT)
    published = loss({"logits": problem.student_BLV}, problem.labels_BL, alpha=alpha)
    agree(problem, published, ours(problem, kind="eaft", alpha=alpha))


def test_two_micro_batches_under_one_normaliser(problem: Problem) -> None:
    """Given the step's tokens as `num_items_in_batch`, the peers' parts add up to our whole step."""
    halves, items = [problem.half(slice(0, 1)), problem.half(slice(1, None))], problem.tokens
    _, trl_dft = functions(*TRL_DFT)
    _, dft = functions(*FACTORY_DFT)
    _, eaft = functions(*FACTORY_EAFT)
    parts: dict[str, Tensor] = {
        "trl's dft": sum((trl_dft(_Outputs(h.student_BLV), h.labels_BL, items) for h in halves), torch.zeros(())),
        "dft": sum((dft({"logits": h.student_BLV}, h.labels_BL, items) for h in halves), torch.zeros(())),
        "eaft": sum((eaft({"logits": h.student_BLV}, h.labels_BL, items) for h in halves), torch.zeros(())),
    }
    agree(problem, parts["trl's dft"], ours(problem, kind="dft"))
    agree(problem, parts["dft"], ours(problem, kind="dft"))
    agree(problem, parts["eaft"], ours(problem, kind="eaft"))


def test_asft_of_llamafactory_has_a_normaliser_for_each_micro_batch(problem: Problem) -> None:
    """The mean of its micro-batches' losses is another number than the whole step's where they have unequal numbers of tokens."""
    *_, loss = functions(
        *((FACTORY, name) for name in ("_dft_cross_entropy", "_kl_divergence", "_asft_cross_entropy", "asft_loss_func"))
    )
    halves = [problem.half(slice(0, 1)), problem.half(slice(1, None))]
    parts = [loss({"logits": h.student_BLV}, h.labels_BL, h.teacher_BLV.float(), asft_alpha=1.0) for h in halves]
    whole, _ = ours(problem, kind="asft", kl=1.0)
    values = [float(part.detach()) for part in parts]
    assert abs(sum(values) / 2 - whole) > 1e-3
    weighed = sum(value * h.tokens for value, h in zip(values, halves, strict=True)) / problem.tokens
    assert whole == pytest.approx(weighed, rel=SAME)


@dataclass
class _Outputs:
    logits: Tensor
