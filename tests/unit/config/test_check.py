"""Settings that cannot go together."""

from __future__ import annotations

from typing import Any

import pytest

from distft.config.check import check_run
from distft.config.load import validate
from distft.errors import ConfigError


def run(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t.jsonl"}}}
    return base | changes


def data(**heldout: Any) -> dict[str, Any]:
    return {"train": {"path": "data/t.jsonl"}, "heldout": heldout}


NONE = {"distribution": {"kind": "none"}}
SAMPLE = {"distribution": {"kind": "sample"}}
TASK = {"kind": "generate", "name": "x", "path": "p"}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (run(objective={"kind": "sft_kl"}, score=NONE), "objective.kind=sft_kl needs the teacher's distribution"),
        (run(objective={"kind": "stm_kl"}, score=NONE), "objective.kind=stm_kl needs the teacher's distribution"),
        (
            run(objective={"kind": "sft_kl", "direction": "student_to_teacher"}, score=SAMPLE),
            "KL(p||q), which draws from the teacher",
        ),
        (run(data=data(path="h.jsonl"), score=NONE), "data.heldout is for measuring drift"),
        (run(teacher={"revision": "main"}), "teacher.revision is set without teacher.path"),
        (run(data=data(path="data/t.jsonl")), "data.heldout.path=data/t.jsonl is data.train.path"),
        (run(data=data(path="./data//t.jsonl")), "data.heldout.path=./data//t.jsonl is data.train.path"),
        (run(data=data(path="data/t.jsonl", limit=10)), "drift would be measured on what is trained"),
        (run(data=data(path="data/t.jsonl", split="train")), "drift would be measured on what is trained"),
        (run(train={"drift_every_steps": 5}), "train.drift_every_steps is set without data.heldout"),
        (run(train={"max_steps": 5}), "train.warmup_steps=20 is more than train.max_steps=5"),
        (run(evaluate={"tasks": [TASK, {"kind": "nll", "name": "x", "source": {"path": "p"}}]}), "the name 'x' stands twice"),
    ],
)
def test_a_pair_that_cannot_be(document: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as told:
        check_run(validate(document, where=""), where="run.yaml")
    assert says in told.value.problem
    assert (told.value.where, told.value.exit_status) == ("run.yaml", 2)
    assert told.value.help


@pytest.mark.parametrize(
    "document",
    [
        run(),
        run(objective={"kind": "stm"}, score=NONE),
        run(objective={"kind": "sft_kl"}, score=SAMPLE, data=data(path="data/h.jsonl")),
        run(objective={"kind": "sft"}, score=NONE),
        run(data=data(path="data/t.jsonl", subset="b")),
        run(data=data(path="data/h.jsonl"), train={"drift_every_steps": 5}),
        run(train={"max_steps": 20}),
        run(teacher={"path": "t", "revision": "main"}),
        run(evaluate={"tasks": [TASK, TASK | {"name": "y"}]}),
    ],
)
def test_a_pair_that_can(document: dict[str, Any]) -> None:
    check_run(validate(document, where=""), where="run.yaml")


def test_all_pairs_come_together() -> None:
    document = run(
        objective={"kind": "sft_kl"}, score=NONE, teacher={"revision": "x"}, data=data(path="data/t.jsonl"), train={"max_steps": 3},
        evaluate={"tasks": [TASK, TASK]},
    )  # fmt: skip
    with pytest.raises(ConfigError) as told:
        check_run(validate(document, where=""), where="run.yaml")
    assert len(told.value.problem.splitlines()) == 6
