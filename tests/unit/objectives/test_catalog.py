"""Each rule against values worked out by hand, and what it declares against what it does."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from distft.objectives.catalog import Asft, Dft, Eaft, Eksft, Kd, Lwf, Objective, Sft, SftKl, Stm, StmKl, Talr
from distft.objectives.treatment import (
    LiveSignals,
    ObjectiveRule,
    Signals,
    Treatment,
    follows,
    highest,
    live_signals,
    share_of,
    treatment,
)

COLUMNS = ("ce", "kl", "rkl", "entropy", "collision", "count")

RULES: dict[str, ObjectiveRule] = {
    "sft": Sft(),
    "sft_kl": SftKl(kind="sft_kl", kl=0.25),
    "sft_kl backwards": SftKl(kind="sft_kl", kl=0.25, direction="student_to_teacher"),
    "stm": Stm(kind="stm", tau=2.0),
    "stm_kl": StmKl(kind="stm_kl", tau=2.0, kl=3.0),
    "stm fraction": Stm(kind="stm", tau=None, fraction=0.5),
    "stm lowest": Stm(kind="stm", tau=3.0, select="lowest"),
    "stm random": Stm(kind="stm", tau=2.0, select="random"),
    "stm random fraction": Stm(kind="stm", tau=None, fraction=0.5, select="random"),
    "lwf": Lwf(kind="lwf", alpha=4.0, beta=0.5, c=0.75, p_star=0.5),
    "lwf to its floor": Lwf(kind="lwf", alpha=1.0, beta=0.5, c="floor", p_star=0.7),
    "lwf given": Lwf(kind="lwf", anchors="given", alpha=4.0, beta=0.5, c=0.75, normalise="group_mean"),
    "kd": Kd(kind="kd", lam=0.75),
    "eksft": Eksft(kind="eksft", rho=0.25, lambda_kl=0.5, lambda_entropy=math.log(50)),
    "eksft both": Eksft(kind="eksft", rho=0.5, lambda_kl=0.5, lambda_entropy=0.0, combine="intersection"),
    "eksft published": Eksft(kind="eksft", rho=0.25, lambda_kl=0.5, lambda_entropy=math.log(50), variant="published_code"),
    "eaft": Eaft(kind="eaft", alpha=2.0),
    "dft": Dft(kind="dft"),
    "asft": Asft(kind="asft", kl=0.25),
    "talr": Talr(kind="talr", w_min=0.25),
}

DIGEST = "0123456789abcdef" * 2
MAY_BE_NEGATIVE = ("eksft published", "entropy")
"""The published code's regulariser pushes entropy down."""


def floats(*values: float) -> Any:
    return np.array(values, np.float32)


def signals(*probabilities: float, live: LiveSignals | None = None) -> Signals:
    """Of tokens whose label the teacher gives these probabilities; every other one is annotated. The student, unless it is given,
    agrees with the teacher on the labels and has numbers of its own for the rest."""
    n, label_logprob = len(probabilities), np.log(np.array(probabilities, np.float64)).astype(np.float32)
    steps = np.linspace(0.5, 2.5, n, dtype=np.float32)
    return Signals(
        label_logprob=label_logprob, entropy=np.ones_like(label_logprob), rank=np.zeros(n, np.uint32), document=DIGEST,
        anchors=np.arange(n) % 2 == 1, vocabulary=50,
        live=live or LiveSignals(
            label_logprob=label_logprob, entropy=steps, top_entropy=steps, kl=steps[::-1], rkl=np.float32(0.25) * steps[::-1],
            collision=np.float32(0.4) * steps,
        ),
    )  # fmt: skip


def columns(treatment: Treatment) -> dict[str, list[float]]:
    return {name: getattr(treatment, name).tolist() for name in COLUMNS}


# What each rule does with tokens of probability 0.9, 0.5 (exactly 1/tau), 0.4 and 0.01.
BY_HAND: dict[str, dict[str, list[float]]] = {
    "sft": {"ce": [1, 1, 1, 1], "kl": [0, 0, 0, 0], "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 1, 1]},
    "sft_kl": {"ce": [1, 1, 1, 1], "kl": [0.25] * 4, "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 1, 1]},
    "sft_kl backwards": {"ce": [1] * 4, "kl": [0] * 4, "rkl": [0.25] * 4, "entropy": [0] * 4, "count": [1] * 4},
    "stm": {"ce": [1, 1, 0, 0], "kl": [0, 0, 0, 0], "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 0, 0]},
    "stm_kl": {"ce": [1, 1, 0, 0], "kl": [0, 0, 3, 3], "rkl": [0, 0, 0, 0], "entropy": [0, 0, 0, 0], "count": [1, 1, 1, 1]},
    "stm fraction": {"ce": [1, 1, 0, 0], "count": [1, 1, 0, 0]},
    "stm lowest": {"ce": [0, 1, 1, 1], "count": [0, 1, 1, 1]},  # 1/0.01 alone is above 3, so that one is masked: the likeliest
    "lwf": {"ce": [0, 0, 3, 3], "kl": [0.5, 0.5, 1, 1], "count": [1] * 4},
    "lwf to its floor": {
        "ce": [0, 0.2 / 0.5, 0.3 / 0.6, 0.69 / 0.99], "kl": [0.5, 0.3 / 0.5, 0.3 / 0.6, 0.3 / 0.99], "count": [1] * 4},
    "lwf given": {"ce": [0, 3, 0, 3], "kl": [0.5, 1, 0.5, 1], "count": [1] * 4, "group": [0, 1, 0, 1]},
    "kd": {"ce": [0.25] * 4, "kl": [0.75] * 4, "count": [1] * 4},
    # the last token has the highest entropy, the first the highest KL(p||q); 4/2 on what is learned, 4/1 on what is held
    "eksft": {"ce": [0, 2, 2, 0], "rkl": [2, 0, 0, 0], "entropy": [0, 0, 0, 4], "count": [1] * 4},
    # entropy chooses the last two and the divergence the first two: nothing is chosen by both, and all is learned
    "eksft both": {"ce": [1] * 4, "rkl": [1, 1, 0, 0], "count": [1] * 4},
    # the last has the highest entropy, the second the highest KL(p||q) of those with a score, which the first has not: labels one
    # before them are not learned; two are, and a sequence counts 1 in all. H is 2.5/ln 50 = 0.64 there, and no less than 0.5: down;
    # KL + H + C is 0.458 + 1.167 + 0.467 = 2.09 here, and above 2: up
    "eksft published": {"ce": [0, 0.5, 0, 0.5], "rkl": [0, 0.525, 0, 0], "entropy": [0, -0.525, 0, 0.95],
                        "collision": [0, 0.525, 0, 0], "count": [0.25] * 4},
    "eaft": {"ce": [(h / 3) ** 2 for h in (0.5, 0.5 + 2 / 3, 0.5 + 4 / 3, 2.5)], "count": [1] * 4},
    "dft": {"ce": [0.9, 0.5, 0.4, 0.01], "count": [1] * 4},
    "asft": {"ce": [0.9, 0.5, 0.4, 0.01], "kl": [0.25] * 4, "count": [1] * 4},
    # the mean NLL is -ln(0.9 * 0.5 * 0.4 * 0.01)/4 = 1.5800
    "talr": {"ce": [0.9 ** (1 / 1.58), 0.5 ** (1 / 1.58), 0.4 ** (1 / 1.58), 0.25], "count": [1] * 4},
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_each_rule_does_what_was_worked_out_by_hand(name: str) -> None:
    found = RULES[name].treat(signals(0.9, 0.5, 0.4, 0.01))
    expected = {column: [0.0] * 4 for column in COLUMNS} | {"group": [0] * 4} | BY_HAND[name]
    for column, values in expected.items():
        assert getattr(found, column).tolist() == pytest.approx(values, rel=1e-4), column


def test_every_rule_of_the_catalog_is_tested_here() -> None:
    assert {type(rule) for rule in RULES.values()} == set(get_args(Objective))
    assert BY_HAND.keys() == {name for name in RULES if "random" not in name}


@pytest.mark.parametrize("tau", [1.5, 2.0, 2.5, 7.0, 1000.0])
def test_stm_keeps_a_token_exactly_at_its_threshold_and_masks_the_next_one(tau: float) -> None:
    at = np.float32(-math.log(tau))
    below, above = np.nextafter(at, np.float32(-1e9)), np.nextafter(at, np.float32(0))
    given = signals(1.0, 1.0, 1.0)
    given = Signals(label_logprob=np.array([below, at, above], np.float32), entropy=given.entropy, rank=given.rank)
    assert Stm(kind="stm", tau=tau).treat(given).ce.tolist() == [0, 1, 1]
    assert StmKl(kind="stm_kl", tau=tau).treat(given).kl.tolist() == [1, 0, 0]


probabilities = st.lists(st.floats(1e-30, 1.0), max_size=12)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(labels=probabilities)
def test_weights_are_numbers_that_the_loss_can_bear(name: str, labels: list[float]) -> None:
    treatment = RULES[name].treat(signals(*labels))
    for column in COLUMNS:
        values = getattr(treatment, column)
        assert values.dtype == np.float32
        assert values.shape == (len(labels),)
        assert np.isfinite(values).all()
        assert (values >= 0).all() or (name, column) == MAY_BE_NEGATIVE


@settings(max_examples=60, deadline=None)
@given(labels=probabilities)
def test_stm_kl_learns_what_stm_learns_and_holds_the_rest(labels: list[float]) -> None:
    plain, held = RULES["stm"].treat(signals(*labels)), RULES["stm_kl"].treat(signals(*labels))
    assert held.ce.tolist() == plain.ce.tolist() == plain.count.tolist()
    assert (held.kl > 0).tolist() == [weight == 0 for weight in plain.ce.tolist()]
    assert held.count.tolist() == [1.0] * len(labels)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_reads_what_it_declares_and_nothing_else(name: str) -> None:
    """What a rule does not declare is NaN or missing (Feed does that), and must not reach a weight; what it declares must count."""
    rule, full = RULES[name], signals(0.9, 0.5, 0.4, 0.3, 0.01, 0.02)
    assert full.live is not None
    blank = np.full(len(full), np.nan, np.float32)
    told = {field.name: getattr(full.live, field.name) for field in fields(full.live)}
    least = replace(
        full,
        label_logprob=full.label_logprob if rule.needs_signals else blank,
        entropy=blank,
        document=DIGEST if rule.needs_document else "",
        anchors=full.anchors if rule.needs_anchors else None,
        live=None if rule.live == "no" else live_signals(len(full), **{f: told[f] for f in rule.live_fields}),
    )
    plain = columns(rule.treat(full))
    assert columns(rule.treat(least)) == plain

    turned = {
        "signals": (rule.needs_signals, signals(0.01, 0.02, 0.3, 0.4, 0.1, 0.9, live=full.live)),
        "anchors": (rule.needs_anchors, replace(full, anchors=np.array([True] * 5 + [False]))),
        "document": (rule.needs_document, replace(full, document=DIGEST[::-1])),
        **{f: (f in rule.live_fields, replace(full, live=replace(full.live, **{f: told[f][::-1].copy()}))) for f in told},
    }
    for what, (declared, other) in turned.items():
        assert (columns(rule.treat(other)) != plain) == declared, what


def test_lwf_lifts_to_the_floor_unless_anchors_are_given() -> None:
    assert Lwf(kind="lwf").model_dump()["c"] == Lwf.model_validate({"kind": "lwf", "c": None}).c == "floor"
    assert Lwf(kind="lwf", anchors="given").model_dump()["c"] == 0.999
    assert Lwf.model_validate(Lwf(kind="lwf", anchors="given", c=0.5).model_dump()).c == 0.5
    with pytest.raises(ValidationError, match="give a number for anchors that are given"):
        Lwf(kind="lwf", anchors="given", c="floor")


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({"kind": "eksft"}, True), ({"kind": "eksft", "lambda_kl": 0.0}, False),
        ({"kind": "eksft", "prompt_kl": 1.0, "lambda_kl": 0.0}, False),
        ({"kind": "eksft", "variant": "published_code"}, True),
        ({"kind": "eksft", "variant": "published_code", "lambda_kl": 0.0}, False),
        ({"kind": "lwf"}, True), ({"kind": "lwf", "beta": 0.0}, True), ({"kind": "lwf", "beta": 0.0, "c": 1.0}, False),
        ({"kind": "asft"}, True), ({"kind": "sft", "prompt_kl": 1.0}, False), ({"kind": "stm_kl"}, True), ({"kind": "kd"}, True),
    ],
)  # fmt: skip
def test_a_rule_holds_what_its_settings_say(settings: dict[str, Any], holds: bool) -> None:
    rule = TypeAdapter[Any](Objective).validate_python(settings)
    assert rule.holds == holds
    made = rule.treat(signals(0.9, 0.5, 0.4, 0.01, 0.2))
    assert bool((made.kl + made.rkl).any()) == holds
    assert rule.needs_distribution or not holds


@pytest.mark.parametrize("rounding", [1e-5, 1e-3])
def test_what_rounding_moves_has_not_moved(rounding: float) -> None:
    rkl = floats(0.5, 1.01, 0.99, 2.0) * np.float32(rounding)
    live = live_signals(4, entropy=floats(1, 2, 3, 4), rkl=rkl)
    made = Eksft(kind="eksft", rho=0.8, lambda_entropy=0.0).treat(replace(signals(*[0.5] * 4, live=live), rounding=rounding))
    assert (made.rkl > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_if_and_only_if_it_asks_for_a_distribution(name: str) -> None:
    rule = RULES[name]
    given = rule.treat(signals(0.9, 0.5, 0.4, 0.01))
    assert bool((given.kl + given.rkl).any()) == rule.needs_distribution
    assert rule.needs_tail == bool(given.rkl.any())
    assert not rule.live_fields & {"kl", "rkl"} or rule.needs_distribution
    assert "rkl" not in rule.live_fields or rule.needs_tail
    assert (rule.live == "no") == (not rule.live_fields)


@pytest.mark.parametrize("kind", [kind.model_fields["kind"].annotation.__args__[0] for kind in get_args(Objective)])
def test_holding_the_prompt_asks_for_a_distribution(kind: str) -> None:
    rule = TypeAdapter[Any](Objective).validate_python({"kind": kind, "prompt_kl": 0.5})
    assert rule.needs_distribution


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=40, deadline=None)
@given(labels=probabilities, seed=st.integers(0, 99))
def test_counts_and_groups_do_not_depend_on_the_student(name: str, labels: list[float], seed: int) -> None:
    rule, random = RULES[name], np.random.default_rng(seed)
    noise = {field.name: random.exponential(size=len(labels)).astype(np.float32) for field in fields(LiveSignals)}
    noise["label_logprob"] = -noise["label_logprob"]
    made = rule.treat(signals(*labels, live=LiveSignals(**noise)))
    count, group = rule.counts(replace(signals(*labels), live=None))
    assert made.count.tolist() == count.tolist()
    assert made.group.tolist() == group.tolist()
    assert (made.group < rule.groups).all()
    for column in COLUMNS:
        assert np.isfinite(getattr(made, column)).all()
        assert (getattr(made, column) >= 0).all() or (name, column) == MAY_BE_NEGATIVE


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.live == "token"])
@settings(max_examples=30, deadline=None)
@given(labels=probabilities)
def test_a_token_wise_rule_may_be_asked_token_by_token(name: str, labels: list[float]) -> None:
    """The head decides inside its chunks, wherever their borders fall."""
    whole, full = RULES[name].treat(signals(*labels)), signals(*labels)
    assert full.live is not None
    for t in range(len(labels)):
        part = {f.name: getattr(full.live, f.name)[t : t + 1] for f in fields(full.live)}
        alone = RULES[name].treat(
            Signals(label_logprob=full.label_logprob[t : t + 1], entropy=full.entropy[t : t + 1], rank=full.rank[t : t + 1],
                    live=LiveSignals(**part))
        )  # fmt: skip
        assert [getattr(alone, c)[0] for c in COLUMNS] == pytest.approx([getattr(whole, c)[t] for c in COLUMNS], rel=1e-6)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.live != "no"])
def test_a_live_rule_without_a_student_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="was given no live signals"):
        RULES[name].treat(replace(signals(0.5, 0.5), live=None))


# --- stm's controls


@pytest.mark.parametrize("how", [{"tau": 1.5}, {"tau": 40.0}, {"tau": None, "fraction": 0.3}, {"tau": None, "fraction": 0.9}])
@settings(max_examples=60, deadline=None)
@given(labels=probabilities, seed=st.integers(0, 2**32 - 1))
def test_controls_mask_as_many_tokens_as_the_paper_does(how: dict[str, Any], labels: list[float], seed: int) -> None:
    given = signals(*labels)
    masks = {select: ~Stm(kind="stm", select=select, seed=seed, **how).kept(given) for select in ("highest", "lowest", "random")}
    assert len({int(mask.sum()) for mask in masks.values()}) == 1
    if how["tau"] is None:
        assert int(masks["highest"].sum()) == math.floor(round(how["fraction"] * len(labels), 6))
    for above, below in (("highest", masks["highest"]), ("lowest", ~masks["lowest"])):
        if below.any() and (~below).any():  # perplexity falls from the masked to the kept, or the other way round
            assert given.label_logprob[below].max() <= given.label_logprob[~below].min(), above


def test_random_masks_follow_from_seed_and_document_alone() -> None:
    def mask(seed: int, document: str, n: int = 12) -> list[int]:
        given = replace(signals(*[0.9] * n), document=document)
        rule = Stm(kind="stm", tau=None, fraction=0.5, select="random", seed=seed)
        return np.flatnonzero(~rule.kept(given)).tolist()

    assert mask(0, DIGEST) == mask(0, DIGEST) == PINNED
    assert mask(1, DIGEST) != mask(0, DIGEST) != mask(0, DIGEST[::-1])
    drawn = np.bincount(np.concatenate([mask(seed, DIGEST) for seed in range(400)]), minlength=12)
    assert drawn.sum() == 2400
    assert abs(drawn - 200).max() < 50  # five standard deviations of a fair draw


PINNED = [0, 1, 3, 4, 6, 9]
"""A change of these numbers would change every run with select: random."""


def test_random_masks_need_a_document() -> None:
    with pytest.raises(ValueError, match="document's digest, and there is none"):
        Stm(kind="stm", select="random").treat(replace(signals(0.9, 0.1), document=""))


def test_among_equals_the_earlier_token_is_chosen() -> None:
    assert highest(floats(1, 3, 3, 2, 3), 2).tolist() == [False, True, True, False, False]
    assert highest(floats(0, 0, 0), 1).tolist() == [True, False, False]
    assert Stm(kind="stm", tau=None, fraction=0.5).kept(signals(0.5, 0.5, 0.5, 0.5)).tolist() == [False, False, True, True]
    same = np.zeros(4, np.float32)
    still = live_signals(4, entropy=same, rkl=same)
    assert RULES["eksft"].treat(signals(0.5, 0.5, 0.5, 0.5, live=still)).ce.tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3])


def test_a_share_is_meant_in_decimals() -> None:
    assert [share_of(0.29, 100), share_of(0.2, 4), share_of(0.2, 5), share_of(0.1, 30), share_of(0.3, 0)] == [29, 0, 1, 3, 0]


# --- others


def test_eksft_says_that_it_wants_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="size of the vocabulary is not said"):
        RULES["eksft"].treat(replace(signals(0.5, 0.5), vocabulary=0))
    assert RULES["eksft both"].treat(replace(signals(0.5, 0.5), vocabulary=0)).entropy.tolist() == [0, 0]


RUNS = [False, True, True, False, True, True, False]
"""Two runs of three tokens and one of one."""


def published(
    *, entropy: list[float], rkl: list[float], collision: float = 0.0, follows: list[bool] | None = None, **settings: Any
) -> Treatment:
    n = len(entropy)
    live = live_signals(n, entropy=floats(*entropy), rkl=floats(*rkl), collision=np.full(n, collision, np.float32))
    given = replace(signals(*[0.5] * len(entropy), live=live), follows=None if follows is None else np.array(follows))
    return Eksft(kind="eksft", variant="published_code", **settings).treat(given)


def test_published_eksft_masks_the_token_before_and_only_within_a_run() -> None:
    """k = 2 of 7. The highest scores are of tokens that begin a run: the code has their position's label at -100."""
    made = published(entropy=[9, 1, 2, 9, 3, 1, 9], rkl=[9, 2, 1, 9, 1, 3, 9], follows=RUNS, rho=0.3, lambda_entropy=math.log(50))
    assert (made.entropy > 0).tolist() == [False, False, True, False, True, False, False]
    assert (made.rkl > 0).tolist() == [False, True, False, False, False, True, False]
    # before tokens 2 and 4, and before 1 and 5
    assert (made.ce > 0).tolist() == [False, False, True, False, False, True, True]
    assert made.ce.sum() == pytest.approx(1.0)
    assert made.count.sum() == pytest.approx(1.0)
    assert made.entropy[[2, 4]].tolist() == pytest.approx([0.95 / 2] * 2)
    assert made.rkl.sum() == made.collision.sum() == -made.entropy[[1, 5]].sum() == pytest.approx(1.05 * 0.05)


def test_published_eksft_chooses_no_token_without_a_score_however_many_it_may() -> None:
    made = published(entropy=[1] * 7, rkl=[1] * 7, follows=RUNS, rho=0.9, lambda_entropy=0.0)
    assert (made.rkl > 0).tolist() == RUNS
    assert (made.ce > 0).tolist() == [not later for later in [*RUNS[1:], False]]
    whole = published(entropy=[1] * 7, rkl=[1] * 7, rho=0.9, lambda_entropy=0.0)
    assert (whole.rkl > 0).tolist() == [False] + [True] * 6


def test_published_eksft_holds_nothing_that_has_not_moved() -> None:
    made = published(entropy=[0] * 5, rkl=[0, 9e-6, 1, 9e-6, 0], rho=0.6, lambda_entropy=0.0)
    assert (made.rkl > 0).tolist() == [False, False, True, False, False]
    assert made.rkl[2] == made.collision[2] == -made.entropy[2] == np.float32(0.95 * 0.05)


@pytest.mark.parametrize(
    ("entropy", "nudged"), [(0.0, 1.05), (0.49, 1.05), (0.51, 0.95), (1.0, 0.95)],
)  # fmt: skip
def test_published_eksft_rewards_entropy_more_where_there_is_little(entropy: float, nudged: float) -> None:
    """The mean over the two tokens that it chooses, which are alike in sum only."""
    most = math.log(50)
    each = [0.0, entropy * 1.2 * most, entropy * 0.8 * most, 0.0, 0.0]
    made = published(entropy=each, rkl=[0] * 5, rho=0.4, lambda_entropy=0.3 * most)
    assert made.entropy[1:3].tolist() == pytest.approx([0.3 * nudged / 2] * 2)


@pytest.mark.parametrize(
    ("rkl", "entropy", "collision", "nudged"),
    [
        (0.1, 0.1, 0.9, 0.95), (0.5, 0.5, 0.99, 0.95), (0.55, 0.5, 0.99, 1.05), (1.9, 0.0, 0.0, 0.95), (0.1, 1.8, 0.2, 1.05),
        (2.1, 0.0, 0.0, 1.05),
    ],
)  # fmt: skip
def test_published_eksft_holds_more_where_its_regulariser_is_above_two(
    rkl: float, entropy: float, collision: float, nudged: float
) -> None:
    """KL(p||q) + H(p) + C(p), of the tokens that are held: the others' would be far above."""
    made = published(
        entropy=[9, entropy, entropy, 9, 9], rkl=[0, rkl * 1.05, rkl * 0.95, 0, 0], collision=collision, rho=0.4, lambda_entropy=0.0,
        lambda_kl=0.2,
    )  # fmt: skip
    assert made.rkl.tolist() == pytest.approx([0, 0.1 * nudged, 0.1 * nudged, 0, 0])
    assert made.collision.tolist() == made.rkl.tolist() == (-made.entropy).tolist()


def test_published_eksft_asks_for_the_collision_only_if_it_holds() -> None:
    assert "collision" in RULES["eksft published"].live_fields
    assert "collision" not in Eksft(kind="eksft", variant="published_code", lambda_kl=0.0).live_fields
    assert "collision" not in RULES["eksft"].live_fields
    made = Eksft(kind="eksft", variant="published_code", lambda_kl=0.0).treat(
        replace(signals(*[0.5] * 5), live=live_signals(5, entropy=floats(1, 2, 3, 4, 5), rkl=floats(1, 2, 3, 4, 5)))
    )
    assert np.isfinite(made.entropy).all()
    assert not made.rkl.any()


@pytest.mark.parametrize("labels", [[], [0.5]])
def test_published_eksft_masks_nothing_of_next_to_nothing(labels: list[float]) -> None:
    made = RULES["eksft published"].treat(signals(*labels))
    assert (made.ce.tolist(), made.count.tolist()) == ([1.0] * len(labels),) * 2
    assert not made.rkl.any()
    assert not made.entropy.any()


def test_which_tokens_follow_another_is_read_off_their_places() -> None:
    assert follows(np.array([False, True, True, False, True, False, True, True, True])).tolist() == [
        False, True, False, False, True, True]  # fmt: skip
    assert follows(np.zeros(3, np.bool_)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(labels=probabilities)
def test_lwf_learns_what_stm_masks(labels: list[float]) -> None:
    learned = Lwf(kind="lwf", p_star=0.5, c=1.0, beta=1.0).treat(signals(*labels))
    kept = Stm(kind="stm", tau=2.0).kept(signals(*labels))
    assert (learned.ce > 0).tolist() == (~kept).tolist()
    assert (learned.kl > 0).tolist() == kept.tolist()


@settings(max_examples=60, deadline=None)
@given(label=st.floats(1e-30, 0.6))
def test_the_floors_confidence_gives_the_label_the_floor(label: float) -> None:
    rule = Lwf(kind="lwf", p_star=0.7, c="floor", alpha=1.0)
    c = float(rule.treat(signals(label)).ce[0])
    assert c + (1 - c) * label == pytest.approx(0.7, abs=1e-6)


def test_lwf_without_an_annotation_is_an_error() -> None:
    with pytest.raises(ValueError, match="the document has no annotation"):
        RULES["lwf given"].treat(replace(signals(0.5), anchors=None))


def test_talr_does_not_weigh_a_hard_document_down() -> None:
    """The deviation from the paper, whose median over the batch would: weights follow from the document's own spread."""
    easy, hard = (RULES["talr"].treat(signals(*p)).ce for p in ([0.8**2, 0.8], [0.1**2, 0.1]))
    assert hard.tolist() == pytest.approx(easy.tolist(), rel=1e-5)


def test_talr_of_one_token_or_of_a_sure_student() -> None:
    assert RULES["talr"].treat(signals(0.01)).ce.tolist() == pytest.approx([math.exp(-1)])
    assert RULES["talr"].treat(signals(1.0, 1.0)).ce.tolist() == [1.0, 1.0]


def test_groups_that_do_not_fit_are_refused() -> None:
    assert treatment(3).group.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="2 groups for 3 tokens"):
        replace(treatment(3), group=np.zeros(2, np.uint8))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "stm", "tau": 1.0}, "greater than 1"),
        ({"kind": "stm", "fraction": 1.0}, "less than 1"),
        ({"kind": "stm", "tau": 2.0, "fraction": 0.2}, "tau and fraction both say how much is masked"),
        ({"kind": "stm", "tau": None}, "tau and fraction both say how much is masked"),
        ({"kind": "eksft", "rho": 0.0}, "greater than 0"),
        ({"kind": "eksft", "lambda_entropy": -0.1}, "greater than or equal to 0"),
        ({"kind": "eksft", "variant": "code"}, "'paper' or 'published_code'"),
        ({"kind": "eksft", "variant": "published_code", "drift_budget": 0.1}, "is more than a divergence"),
        ({"kind": "lwf", "p_star": 1.0}, "less than 1"),
        ({"kind": "lwf", "c": "floor", "anchors": "given"}, "c: floor is about anchors: floor"),
        ({"kind": "eaft", "alpha": 0.0}, "greater than 0"),
        ({"kind": "talr", "w_min": 1.5}, "less than or equal to 1"),
        ({"kind": "kd", "lam": 0.0}, "greater than 0"),
        ({"kind": "sft", "prompt_kl": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter[Any](Objective).validate_python(given)


def test_a_fraction_alone_replaces_taus_default_and_survives_its_own_dump() -> None:
    rule = Stm.model_validate({"kind": "stm", "fraction": 0.2})
    assert (rule.tau, rule.fraction) == (None, 0.2)
    assert Stm.model_validate(rule.model_dump()) == rule
