"""Every bound of the run file refuses what is beyond it: a constraint that is misspelt would let everything through."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distft.config.load import dump, validate
from distft.config.schema import Run
from distft.errors import ConfigError

BASE: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}}
GENERATE = {"kind": "generate", "name": "x", "path": "p"}
NLL = {"kind": "nll", "name": "x", "source": {"path": "p"}}


def topk(**settings: Any) -> dict[str, Any]:
    return {"kind": "topk", **settings}


def draws(**given: Any) -> dict[str, Any]:
    return {"kind": "sample", **given}


def rule(kind: str, **given: Any) -> dict[str, Any]:
    return {"kind": kind, **given}


def number(tolerance: float) -> dict[str, Any]:
    return GENERATE | {"judge": {"kind": "number", "tolerance": tolerance}}


# Where, what is just beyond the bound, what is just within it. A list's place is its number.
BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("name", ["", "-a", ".", "a/b", "a b", "../a", "a\n", "a" * 101, "é"], ["a", "0", "a" * 100, "A.b_c-9"]),
    ("data.max_tokens", [1, 0, -1], [2]),
    ("data.exclude", [["abc"], ["0" * 11], ["0" * 33], ["ABCDEFABCDEF"], [123456789012]], [[], ["0" * 12], ["a" * 32]]),
    ("data.workers", [0, -1, "all"], [1, "auto"]),
    ("data.train.limit", [0, -1], [1, None]),
    ("data.heldout", [{"path": "h", "limit": 0}], [{"path": "h", "limit": 1}, None]),
    ("score.distribution", [topk(k=0), topk(k=65_536)], [topk(k=1), topk(k=65_535)]),
    ("score.distribution", [topk(min_prob=-1e-9), topk(min_prob=1.0)], [topk(min_prob=0), topk(min_prob=0.999)]),
    ("score.distribution", [draws(draws=0), draws(draws=4097)], [draws(draws=1), draws(draws=4096)]),
    ("score.distribution", [draws(seed=-1), draws(seed=2**32)], [draws(seed=0), draws(seed=2**32 - 1)]),
    ("score.limit", [0, -1], [1, None]),
    ("score.tokens_per_batch", [0, -5], [1]),
    ("score.workers", [0, -1, "all"], [1, 2, "auto"]),
    ("score.tensor_parallel", [0, 65, "auto"], [1, 2, 64]),
    ("train.sequence_parallel", [0, 1025, "auto"], [1, 2, 1024]),
    ("cluster.address", ["", "here", "h:", ":1", "h:123456", "a b:1", "h:1\n", "u@h:1", "ray://h:1"], ["local", "auto", "h-1.x:6379"]),
    ("objective", [{"kind": "sft_kl", "kl": 0}, {"kind": "sft_kl", "kl": -1}], [{"kind": "sft_kl", "kl": 1e-9}]),
    ("objective", [{"kind": "stm", "tau": 1}, {"kind": "stm", "tau": 0.5}], [{"kind": "stm", "tau": 1.001}]),
    ("objective", [{"kind": "stm_kl", "tau": 1}, {"kind": "stm_kl", "kl": 0}], [{"kind": "stm_kl", "tau": 1.5, "kl": 2}]),
    ("objective", [rule("stm", fraction=0), rule("stm", fraction=1)], [rule("stm", fraction=1e-9), rule("stm", fraction=0.999)]),
    ("objective", [rule("stm", seed=-1), rule("stm", seed=2**32)], [rule("stm", seed=0), rule("stm", seed=2**32 - 1)]),
    ("objective", [rule("kd", temperature=0), rule("kd", temperature=101)], [rule("kd", temperature=100)]),
    ("objective", [rule("sft", drift_budget=0), rule("sft", drift_budget=-1)], [rule("sft", drift_budget=1e-9)]),
    ("objective", [rule("sft", prompt_kl=-1e-9)], [rule("sft", prompt_kl=0), rule("sft", prompt_kl=3)]),
    ("objective", [rule("lwf", p_star=0), rule("lwf", p_star=1)], [rule("lwf", p_star=1e-9), rule("lwf", p_star=0.999)]),
    ("objective", [rule("lwf", c=0), rule("lwf", c=1.001), rule("lwf", c="p")], [rule("lwf", c=1), rule("lwf", c="floor")]),
    ("objective", [rule("lwf", alpha=0), rule("lwf", beta=-1e-9)], [rule("lwf", alpha=1e-9, beta=0)]),
    ("objective", [rule("eaft", alpha=0)], [rule("eaft", alpha=1e-9)]),
    ("objective", [rule("kd", lam=0), rule("kd", lam=1.001)], [rule("kd", lam=1e-9), rule("kd", lam=1)]),
    ("objective", [rule("eksft", rho=0), rule("eksft", rho=1)], [rule("eksft", rho=1e-9), rule("eksft", rho=0.999)]),
    ("objective", [rule("eksft", lambda_kl=-1e-9), rule("eksft", lambda_entropy=-1e-9)],
     [rule("eksft", lambda_kl=0, lambda_entropy=0)]),
    ("objective", [rule("asft", kl=0)], [rule("asft", kl=1e-9)]),
    ("objective", [rule("talr", w_min=-1e-9), rule("talr", w_min=1.001)], [rule("talr", w_min=0), rule("talr", w_min=1)]),
    ("train.epochs", [0, -1, 1.5], [1]),
    ("train.max_steps", [0, -1], [1, None]),
    ("train.tokens_per_step", [1, 0], [2]),
    ("train.micro_batch_tokens", [1, 0], [2]),
    ("train.lr", [0, -1e-5, 1.001], [1e-12, 1, 1.0]),
    ("train.warmup_steps", [-1], [0]),
    ("train.min_lr_fraction", [-0.001, 1.001], [0, 1]),
    ("train.weight_decay", [-0.001, 1], [0, 0.999]),
    ("train.betas", [[-0.1, 0.9], [1, 0.9], [0.9, -0.1], [0.9, 1], [0.9], [0.9, 0.9, 0.9], 0.9], [[0, 0.999]]),
    ("train.eps", [0, -1e-8], [1e-30]),
    ("train.clip", [0, -1], [1e-3, None]),
    ("train.seed", [-1, 2**32], [0, 2**32 - 1]),
    ("train.drift_every_steps", [0, -1], [1, None]),
    ("train.workers", [0, -1, "all", [2], [0, 2], [3, 2], [1, 2, 3], [1, "2"], [1, True]], [1, 2, "auto", [1, 1], [1, 2]]),
    ("train.restarts", [-1, None], [0, 3]),
    ("train.checkpoint.every_steps", [0, -1], [1, None]),
    ("train.checkpoint.keep", [0, -1], [1]),
    ("train.checkpoint.keep_every", [0, -1], [1, None]),
    ("export.shard_bytes", [(1 << 20) - 1, 0], [1 << 20]),
    ("evaluate.tokens_per_batch", [0, -1], [1]),
    ("evaluate.tasks", [[GENERATE | {"name": ""}], [GENERATE | {"name": "a b"}], [NLL | {"name": "../a"}]], [[GENERATE], [NLL], []]),
    ("evaluate.tasks", [[GENERATE | {"max_new_tokens": 0}], [GENERATE | {"limit": 0}]], [[GENERATE | {"limit": 1}]]),
    ("evaluate.tasks", [[number(-1e-9)]], [[number(0)]]),
    ("evaluate.tasks", [[NLL | {"source": {"path": "p", "limit": 0}}]], [[NLL | {"source": {"path": "p", "limit": 1}}]]),
]  # fmt: skip
CASES = [(path, bad) for path, refused, _ in BOUNDS for bad in refused]
WITHIN = [(path, good) for path, _, taken in BOUNDS for good in taken]


def with_value(path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(BASE)
    *sections, last = path.split(".")
    place = document
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return document


@pytest.mark.parametrize(("path", "bad"), CASES)
def test_beyond_a_bound(path: str, bad: Any) -> None:
    with pytest.raises(ConfigError) as told:
        validate(with_value(path, bad), where="run.yaml")
    assert f"\n  {path}" in told.value.problem, "the error does not begin with the key's path"


@pytest.mark.parametrize(("path", "good"), WITHIN)
def test_within_a_bound(path: str, good: Any) -> None:
    validate(with_value(path, good), where="run.yaml")


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, field in model.model_fields.items():
        inner = [part for part in parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        for section in inner:
            yield from leaves(section, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", field, field.annotation


def parts(annotation: Any) -> list[Any]:
    """The types that an annotation is made of, without Annotated, unions and tuples around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return parts(get_args(annotation)[0])
    if origin in (Union, types.UnionType, tuple):
        return [part for inner in get_args(annotation) for part in parts(inner)]
    return [annotation]


NUMBERS = sorted({path for path, _, annotation in leaves(Run) if any(p in (int, float) for p in parts(annotation))})


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_bound_and_a_test_for_it(path: str) -> None:
    """A number without a case in BOUNDS is one whose limits nobody has thought of."""
    key = path.rpartition(".")[2]
    tested = [where for where, bad in CASES if path == where or (path.startswith(where) and f"'{key}'" in repr(bad))]
    assert tested, f"no case of BOUNDS refuses a value of {path}"


WITHIN_LISTS = ("objective", "score.distribution", "evaluate.tasks", "data.heldout", "train.betas")


@pytest.mark.parametrize("path", [path for path in NUMBERS if not path.startswith(WITHIN_LISTS)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "3", True, [3]])
def test_a_number_is_a_finite_number(path: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=path):
        validate(with_value(path, bad), where="run.yaml")


CHOICES = sorted({path for path, _, annotation in leaves(Run) if any(get_origin(part) is Literal for part in parts(annotation))})


@pytest.mark.parametrize("path", [path for path in CHOICES if not path.startswith(WITHIN_LISTS)])
def test_a_choice_admits_its_values_alone(path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        validate(with_value(path, "no-such-choice"), where="run.yaml")


def test_a_run_never_changes_after_loading() -> None:
    run = validate(copy.deepcopy(BASE), where="run.yaml")
    with pytest.raises(ValueError, match="frozen"):
        run.train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


def test_every_section_is_strict() -> None:
    found = set(sections(Run))
    assert len(found) > 15
    for section in found:
        for rule, value in (("extra", "forbid"), ("frozen", True), ("strict", True), ("allow_inf_nan", False)):
            assert section.model_config.get(rule) == value, f"{section.__name__}: {rule}"


def test_a_range_of_ranks() -> None:
    """What it admits, what a file says of it, and what is said of one that is none."""
    found = {repr(given): validate(with_value("train.workers", given), where="").train for given in ("auto", 3, [3, 3], [1, 3])}
    assert {given: (train.workers, train.least_ranks, train.most_ranks) for given, train in found.items()} == {
        "'auto'": ("auto", 1, None), "3": (3, 3, 3), "[3, 3]": (3, 3, 3), "[1, 3]": ((1, 3), 1, 3),
    }  # fmt: skip
    run = validate(with_value("train.workers", [1, 3]), where="")
    assert validate(yaml.safe_load(dump(run)), where="") == run
    with pytest.raises(ConfigError) as told:
        validate(with_value("train.workers", [3, 1]), where="")
    wanted = "should be a number from 1, auto, or [min, max] with 1 <= min <= max"
    assert told.value.problem.endswith(f"\n  train.workers: [3, 1]: {wanted}")


def test_the_teacher_is_the_model_unless_it_is_another() -> None:
    own = validate(copy.deepcopy(BASE) | {"model": {"path": "m", "revision": "r", "dtype": "float32"}}, where="")
    assert own.teacher_model == own.model
    other = validate(copy.deepcopy(BASE) | {"model": {"path": "m", "revision": "r"}, "teacher": {"path": "t"}}, where="")
    assert (other.teacher_model.path, other.teacher_model.revision, other.teacher_model.dtype) == ("t", None, "bfloat16")


@pytest.mark.parametrize(
    ("objective", "heldout", "needed"),
    [("sft", None, False), ("sft", {"path": "h"}, True), ("stm", None, True), ("sft_kl", None, True), ("stm_kl", None, True)],
)
def test_who_needs_a_teacher(objective: str, heldout: Any, needed: bool) -> None:
    data = {"train": {"path": "t"}, "heldout": heldout}
    assert validate(copy.deepcopy(BASE) | {"objective": {"kind": objective}, "data": data}, where="").needs_teacher is needed
