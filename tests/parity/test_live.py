"""Objectives that look at the student of the step: what reaches the head, what is left out, and steps with next to nothing in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.corpus.reader import Document
from distft.engine import head
from distft.engine.head import TrainedModel
from distft.engine.world import World
from distft.objectives.catalog import Dft, Eksft, Talr
from distft.objectives.distributions import SparseRows
from distft.objectives.treatment import Signals, Treatment, treatment
from distft.train.batches import Step
from distft.train.live import LiveTreatment
from distft.train.record import read_metrics
from distft.train.targets import Treated, micro_batch
from tests.helpers.objectives import ALL_POSITIONS, CATALOG, TAU, stranger, uneven
from tests.helpers.steps import Taken, distance, feed, take
from tests.helpers.stores import Lab, document, lab, loaded, random_documents, shared_model

LIVE = [name for name, settings in CATALOG.items() if settings["kind"] in ("eksft", "eaft", "dft", "asft", "talr")]


def scored(folder: Path, documents: list[Document] | None = None, **train: Any) -> Lab:
    made = lab(folder, documents=documents or uneven(alike=False), score=ALL_POSITIONS)
    made.score()
    return made.changed(train={"clip": None, "micro_batch_tokens": 60, **train})


def step_of(made: Lab, objective: dict[str, Any], *, kl_factor: float = 1.0) -> Taken:
    """A step with all documents, of a student that is not its teacher."""
    changed = made.changed(objective=objective)
    mine = feed(changed).step(np.arange(len(changed.corpus.lengths("train"))))
    if kl_factor != 1.0:
        mine = Factored(**{name: getattr(mine, name) for name in Step.__slots__})
        mine.factor.append(kl_factor)
    return take(stranger(changed, shared_model(seed=1)), mine, World())


class Factored(Step):
    """A step whose divergences are multiplied."""

    factor: list[float] = []  # noqa: RUF012

    def normalised(self, totals, *, kl_factor=1.0):
        return super().normalised(totals, kl_factor=self.factor.pop())


FACTORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cached": ({"kind": "sft_kl", "kl": 0.7}, {"kind": "sft_kl", "kl": 2.1}),
    "backwards": (
        {"kind": "sft_kl", "kl": 0.7, "direction": "student_to_teacher"},
        {"kind": "sft_kl", "kl": 2.1, "direction": "student_to_teacher"},
    ),
    "by group": ({**CATALOG["lwf, by group"], "c": 1.0}, {**CATALOG["lwf, by group"], "c": 1.0, "beta": 1.5}),
    "of single tokens": ({"kind": "asft", "kl": 0.1, "prompt_kl": 0.2}, {"kind": "asft", "kl": 0.3, "prompt_kl": 0.6}),
    "of sequences": (
        {"kind": "eksft", "lambda_kl": 0.1, "prompt_kl": 0.2},
        {"kind": "eksft", "lambda_kl": 0.3, "prompt_kl": 0.6},
    ),
    "nothing is held": ({"kind": "dft"}, {"kind": "dft"}),
}


@pytest.mark.parametrize("rule", FACTORS)
def test_a_factor_on_divergences_is_one_on_their_weights(tmp_path: Path, rule: str) -> None:
    made, (one, three) = scored(tmp_path), FACTORS[rule]
    factored, plain = step_of(made, one, kl_factor=3.0), step_of(made, three)
    assert distance(plain.gradients, factored.gradients) <= 1e-6
    assert factored.values.loss == pytest.approx(plain.values.loss, rel=1e-6)
    assert factored.values.masses == pytest.approx(plain.values.masses, rel=1e-6)


@pytest.mark.parametrize("objective", LIVE)
def test_the_same_step_twice_is_the_same_bit_for_bit(tmp_path: Path, objective: str) -> None:
    made = scored(tmp_path)
    one, two = (step_of(made, CATALOG[objective]) for _ in range(2))
    assert one.values == two.values
    assert all(torch.equal(gradient, two.gradients[name]) for name, gradient in one.gradients.items())


@pytest.mark.parametrize("objective", LIVE)
def test_small_chunks_make_the_same_step(tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums."""
    made = scored(tmp_path)
    whole = step_of(made, CATALOG[objective])
    monkeypatch.setattr("distft.objectives.loss.loss_chunk", lambda *_: 2)
    cut = step_of(made, CATALOG[objective])
    assert distance(whole.gradients, cut.gradients) <= 1e-5
    assert cut.values.counts == whole.values.counts
    assert cut.line == pytest.approx(whole.line, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("objective", "asked"), [
    ({"kind": "eaft", "prompt_kl": 0.2}, False), ({"kind": "asft", "prompt_kl": 0.2}, True),
    ({"kind": "eksft", "lambda_kl": 0.0, "prompt_kl": 0.2}, True),
])  # fmt: skip
def test_answers_that_no_rule_holds_or_reads_cost_no_teacher(tmp_path: Path, objective: dict[str, Any], asked: bool) -> None:
    made = scored(tmp_path).changed(objective=objective)
    for batch in feed(made).step(np.arange(8)).micro_batches:
        live, teacher = batch.selection or batch.targets.live, batch.targets.teacher
        assert isinstance(live, LiveTreatment)
        assert isinstance(teacher, SparseRows)
        answers = torch.from_numpy(live.answers)
        assert (teacher.counts_N[~answers] > 0).all()
        assert ((teacher.counts_N[answers] > 0) == asked).all()


def test_a_run_tells_the_rule_its_vocabulary(tmp_path: Path) -> None:
    """The entropy bonus is a share of log V: the first step of a run is the step that is taken here."""
    made = scored(tmp_path, max_steps=1, warmup_steps=0, tokens_per_step=100_000).changed(
        objective={"kind": "eksft", "rho": 0.4, "lambda_entropy": 0.5}
    )
    made.train()
    [line] = read_metrics(made.run_folder)
    taken = take(made, feed(made).step(np.arange(8)), World())
    assert line["mass_entropy"] == pytest.approx(taken.line["mass_entropy"], rel=1e-5)
    assert line["mass_entropy"] < -0.01


class Seen:
    """How many tokens each pass over the head was given, and with which targets."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.measured, self.trained, self.targets = [], [], []
        measure, token_loss = head.measure, head.token_loss

        def measuring(hidden_ND: torch.Tensor, *rest: Any, **named: Any) -> Any:
            self.measured.append(len(hidden_ND))
            return measure(hidden_ND, *rest, **named)

        def training(hidden_ND: torch.Tensor, weight: Any, bias: Any, targets: Any, **named: Any) -> Any:
            self.trained.append(len(hidden_ND))
            self.targets.append(targets)
            return token_loss(hidden_ND, weight, bias, targets, **named)

        patch.setattr(head, "measure", measuring)
        patch.setattr(head, "token_loss", training)


TOKENS = sum(int(d.supervised.sum()) for d in uneven(alike=False))


@pytest.mark.parametrize("select", ["highest", "random"])
def test_what_stm_masks_never_reaches_the_head(tmp_path: Path, select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = scored(tmp_path), Seen(monkeypatch)
    taken = step_of(made, {"kind": "stm", "tau": TAU, "select": select})
    likely = [made.cache().supervised(d).label_logprob >= -np.log(TAU) for d in made.corpus.documents("train")]
    kept = sum(int(one.sum()) for one in likely)
    assert 0 < kept < TOKENS
    assert (sum(seen.trained), seen.measured) == (kept, [])
    assert taken.values.counts["ce"] == kept
    assert all(targets.teacher is None for targets in seen.targets)


def test_eksft_trains_only_what_bears_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a weight on what moved or wavers, tokens that both criteria choose are left out of the second pass."""
    made, seen = scored(tmp_path), Seen(monkeypatch)
    rule = {"kind": "eksft", "rho": 0.6, "lambda_kl": 0.0, "lambda_entropy": 0.0, "combine": "intersection"}
    taken = step_of(made, rule)
    assert sum(seen.measured) == TOKENS
    assert sum(seen.trained) == taken.values.counts["ce"]
    # each criterion takes floor(0.6 n) of n tokens, so that both take between floor(1.2 n) - n and floor(0.6 n) of them
    counts = [int(d.supervised.sum()) for d in made.corpus.documents("train")]
    assert sum(n - 6 * n // 10 for n in counts) <= sum(seen.trained) <= sum(2 * (n - 6 * n // 10) for n in counts) < 2 * TOKENS
    assert sum(seen.trained) < TOKENS


def test_eksft_reads_the_teacher_again_only_of_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = scored(tmp_path), Seen(monkeypatch)
    step_of(made, {"kind": "eksft", "rho": 0.3, "lambda_kl": 0.4, "prompt_kl": 0.2})
    for targets in seen.targets:
        held = ((targets.rkl_N != 0) | (targets.kl_N != 0)).tolist()
        assert 0 < sum(held) < len(held)
        assert (targets.teacher.counts_N > 0).tolist() == held
        assert (targets.teacher.tail_N[~torch.tensor(held)] == 1).all()
        assert len(targets.teacher.ids_M) == int(targets.teacher.counts_N.sum())


def test_a_rule_of_sequences_is_told_the_collision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own tokens, from the student of the step. H(p) alone is never below what C(p) allows: H >= -log C."""
    told: list[Signals] = []
    treat = Eksft.treat
    monkeypatch.setattr(Eksft, "treat", lambda self, signals: (told.append(signals), treat(self, signals))[1])
    step_of(scored(tmp_path), CATALOG["eksft, published code"])
    heard = [one.student for one in told if not np.isnan(one.student.rkl).any()]
    assert sum(len(one.collision) for one in heard) == TOKENS
    for one in heard:
        assert (one.collision > 0).all()
        assert (one.collision <= 1).all()
        assert (one.entropy >= -np.log(one.collision) - 1e-4).all()
        assert not np.array_equal(one.collision, one.entropy)
    told.clear()
    step_of(scored(tmp_path / "paper"), CATALOG["eksft"])
    assert all(np.isnan(one.student.collision).all() for one in told)


def test_rules_of_single_tokens_cost_no_other_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = scored(tmp_path), Seen(monkeypatch)
    for objective in ("eaft", "dft", "asft"):
        step_of(made, CATALOG[objective])
    assert seen.measured == []
    assert sum(seen.trained) == 3 * TOKENS


class Blind(Eksft):
    """Masks all and holds nothing."""

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals))


class Deaf(Dft):
    """The same, of single tokens."""

    def treat(self, signals: Signals) -> Treatment:
        return treatment(len(signals), ce=0 * signals.student.label_logprob)


@pytest.mark.parametrize(
    ("rule", "empty"),
    [
        (Blind(kind="eksft"), False), (Blind(kind="eksft"), True), (Deaf(kind="dft"), False), (Deaf(kind="dft"), True),
        (Talr(kind="talr"), True),  # it masks nothing: where it trains nothing, nothing is there
    ],
)  # fmt: skip
def test_a_batch_that_trains_nothing_runs_the_backbone_and_gives_zeros(rule: Any, empty: bool) -> None:
    """Masked by the student, or a rank without documents: every parameter has a gradient."""
    model = loaded(shared_model())
    treated = [] if empty else [known(one) for one in random_documents(3, seed=7)]
    batch, group = micro_batch(treated, live=LiveTreatment.of(rule, treated))
    loss, values = TrainedModel(model)(batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert len(group) == sum(len(one.places) for one in treated)
    assert len(values.ce_N) == (len(group) if rule.live == "token" else 0)
    gradients = {name: p.grad for name, p in model.whole.named_parameters()}
    assert all(g is not None and not g.any() for g in gradients.values()), [n for n, g in gradients.items() if g is None]


def known(one: Document) -> Treated:
    count = int(one.supervised.sum())
    blank = np.full(count, np.nan, np.float32)
    signals = Signals(label_logprob=blank, entropy=blank, rank=np.zeros(count, np.uint32), document=one.digest, vocabulary=280)
    return Treated(one, np.flatnonzero(one.supervised), treatment(count), None, signals)


@pytest.mark.parametrize("objective", LIVE)
def test_documents_of_a_single_token_are_steps_of_their_own(tmp_path: Path, objective: str) -> None:
    """Two tokens, the second supervised, so that there is no prompt either; and all tokens of a step in one such document."""
    shortest = [document([5, 9], [1]), document([7, 8, 9], [2]), document([6, 11], [1])]
    taken = step_of(scored(tmp_path, shortest), CATALOG[objective])
    assert np.isfinite(taken.values.loss)
    assert taken.values.loss > 0
    assert taken.values.counts["ce"] == 3  # floor(rho * 1) = 0: nothing is masked
    alone = step_of(scored(tmp_path / "alone", shortest[:1]), CATALOG[objective])
    assert alone.values.counts["ce"] == 1
    assert alone.values.counts["kl"] == (1 if "asft" in objective else 0)


def test_a_rule_of_single_tokens_that_wants_entropy_is_an_error() -> None:
    class Wanting(Dft):
        def treat(self, signals: Signals) -> Treatment:
            return treatment(len(signals), ce=1.0, entropy=0.1)

    treated = [known(one) for one in random_documents(2, seed=7)]
    batch, _ = micro_batch(treated, live=LiveTreatment.of(Wanting(kind="dft"), treated))
    with pytest.raises(ValueError, match="entropy"):
        TrainedModel(loaded(shared_model()))(batch)


def test_a_prompt_is_held_also_where_the_step_has_no_token_of_the_first_group(tmp_path: Path) -> None:
    """All labels are anchors here, so that group 0 counts nothing; the prompt is divided by all tokens, not by its group's."""
    made = scored(tmp_path)
    rule = {"kind": "lwf", "p_star": 0.9999999, "c": 1.0, "alpha": 1.0, "beta": 1.0, "prompt_kl": 0.7}
    grouped, plain = step_of(made, {**rule, "normalise": "group_mean"}), step_of(made, rule)
    assert plain.values.masses["kl"] > 0.1
    assert grouped.values.masses == pytest.approx(plain.values.masses, rel=1e-6)
    assert distance(plain.gradients, grouped.gradients) <= 1e-6
