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
MEASURED: dict[str, Any] = {"data": data(path="data/h.jsonl"), "train": {"drift_every_steps": 5}}
TASK = {"kind": "generate", "name": "x", "path": "p"}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (run(train={"engine": "local", "zero3": {"offload_optimizer": True}}), "train.zero3.offload_optimizer moves what"),
        (
            run(train={"sequence_parallel": 4, "workers": 6}),
            "train.sequence_parallel=4 has as many ranks share each row, and train.workers=6 is no multiple",
        ),
        (
            run(train={"sequence_parallel": 2, "workers": [2, 4]}),
            "train.workers=[2, 4] lets the number of ranks change, and train.sequence_parallel=2 needs a multiple of 2",
        ),
        (run(objective={"kind": "sft_kl"}, score=NONE), "objective.kind=sft_kl needs the teacher's distribution"),
        (run(objective={"kind": "stm_kl"}, score=NONE), "objective.kind=stm_kl needs the teacher's distribution"),
        (
            run(objective={"kind": "sft_kl", "direction": "student_to_teacher"}, score=SAMPLE),
            "KL(p||q), which draws from the teacher",
        ),
        (run(objective={"kind": "lwf"}, score=NONE), "objective.kind=lwf needs the teacher's distribution"),
        (run(objective={"kind": "kd"}, score=NONE), "objective.kind=kd needs the teacher's distribution"),
        (run(objective={"kind": "eksft"}, score=SAMPLE), "objective.kind=eksft asks for KL(p||q)"),
        (run(objective={"kind": "eksft", "variant": "published_code"}, score=SAMPLE), "objective.kind=eksft asks for KL(p||q)"),
        (run(objective={"kind": "eksft", "variant": "published_code"}, score=NONE), "needs the teacher's distribution"),
        (run(objective={"kind": "eksft", "variant": "published_code", "prompt_kl": 0.5}), "out; set score.positions=all"),
        (run(objective={"kind": "kd", "temperature": 2}), "asks the teacher about all tokens, and score.distribution.kind=topk"),
        (run(objective={"kind": "sft", "prompt_kl": 0.5}, score=NONE), "objective.kind=sft needs the teacher's distribution"),
        (run(objective={"kind": "sft", "prompt_kl": 0.5}), "leaves them out; set score.positions=all"),
        (run(data=data(path="h.jsonl"), score=NONE), "data.heldout is for measuring drift"),
        (run(teacher={"revision": "main"}), "teacher.revision is set without teacher.path"),
        (run(data=data(path="data/t.jsonl")), "data.heldout.path=data/t.jsonl is data.train.path"),
        (run(data=data(path="./data//t.jsonl")), "data.heldout.path=./data//t.jsonl is data.train.path"),
        (run(data=data(path="data/t.jsonl", limit=10)), "drift would be measured on what is trained"),
        (run(data=data(path="data/t.jsonl", split="train")), "drift would be measured on what is trained"),
        (run(train={"drift_every_steps": 5}), "train.drift_every_steps is set without data.heldout"),
        (run(train={"max_steps": 5}), "train.warmup_steps=20 is more than train.max_steps=5"),
        (
            run(objective={"kind": "eksft", "lambda_kl": 0.0, "drift_budget": 0.1}, **MEASURED),
            "eksft has none with these settings",
        ),
        (run(objective={"kind": "dft", "drift_budget": 0.1}, **MEASURED), "dft has none with these settings"),
        (
            run(objective={"kind": "kd", "drift_budget": 0.1}, teacher={"path": "t"}, **MEASURED),
            "drift is the distance from teacher.path=t, which training is to shorten",
        ),
        (
            run(
                objective={"kind": "sft_kl", "drift_budget": 0.1},
                **MEASURED | {"train": {"drift_every_steps": 50, "max_steps": 100}},
            ),
            "drift_every_steps=50 it is measured twice in 100 steps: make it at most 49",
        ),
        (
            run(
                objective={"kind": "sft_kl", "drift_budget": 0.1},
                **MEASURED | {"train": {"drift_every_steps": 999, "max_steps": 100}},
            ),
            "it is measured once in 100 steps",
        ),
        (
            run(
                objective={"kind": "sft", "prompt_kl": 0.5},
                score={"positions": "all"},
                data={"train": {"path": "t", "format": "text"}},
            ),
            "holds prompts, and data.train.format=text has none",
        ),
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
        run(objective={"kind": "stm", "fraction": 0.2, "select": "lowest"}, score=NONE),
        run(objective={"kind": "lwf"}, score=SAMPLE),
        run(objective={"kind": "lwf", "c": 1.0, "beta": 0.0}, score=NONE),
        run(objective={"kind": "kd"}, score=SAMPLE),
        run(objective={"kind": "sft_kl"}, score=SAMPLE, data=data(path="data/h.jsonl")),
        run(objective={"kind": "sft"}, score=NONE),
        run(objective={"kind": "sft", "prompt_kl": 0.5}, score={"positions": "all"}),
        run(objective={"kind": "lwf", "normalise": "group_mean"}),
        run(objective={"kind": "stm", "select": "random"}),
        run(objective={"kind": "eksft"}),
        run(objective={"kind": "eksft", "variant": "published_code", "prompt_kl": 0.5}, score={"positions": "all"}),
        run(objective={"kind": "eksft"}, score={"distribution": {"kind": "hidden"}}),
        run(objective={"kind": "eaft"}, score=NONE),
        run(objective={"kind": "dft"}, score=NONE),
        run(objective={"kind": "talr"}, score=NONE),
        run(objective={"kind": "asft"}, score=SAMPLE),
        run(data=data(path="data/t.jsonl", subset="b")),
        run(data=data(path="data/h.jsonl"), train={"drift_every_steps": 5}),
        run(train={"max_steps": 20}),
        run(train={"sequence_parallel": 4, "workers": 8}),
        run(train={"sequence_parallel": 4}),
        run(objective={"kind": "sft", "prompt_kl": 0.1, "drift_budget": 0.1}, score={"positions": "all"}, **MEASURED),
        run(objective={"kind": "eksft", "drift_budget": 0.1}, **MEASURED),
        run(
            objective={"kind": "sft_kl", "drift_budget": 0.1}, **MEASURED | {"train": {"drift_every_steps": 49, "max_steps": 100}}
        ),
        run(teacher={"path": "t", "revision": "main"}),
        run(evaluate={"tasks": [TASK, TASK | {"name": "y"}]}),
    ],
)
def test_a_pair_that_can(document: dict[str, Any]) -> None:
    check_run(validate(document, where=""), where="run.yaml")


def test_anchors_are_given_to_those_who_ask_and_not_left_unread() -> None:
    given = {"kind": "lwf", "anchors": "given"}
    annotated = {"train": {"path": "d.jsonl", "anchors": "a.jsonl"}}
    check_run(validate(run(objective=given, data=annotated), where=""), where="run.yaml")
    check_run(
        validate(run(objective={"kind": "sft"}, data=annotated), where=""), where="run.yaml"
    )  # a baseline on the same corpus
    for document, says in (
        (run(objective=given), "give data.train.anchors, or set objective.anchors=floor"),
        (run(objective={"kind": "lwf"}, data=annotated), "data.train.anchors=a.jsonl marks what is to be learned"),
    ):
        with pytest.raises(ConfigError) as told:
            check_run(validate(document, where=""), where="run.yaml")
        assert says in told.value.problem
        assert len(told.value.problem.splitlines()) == 2


def test_what_is_refused_beside_another_problem_is_told_with_it() -> None:
    document = run(objective={"kind": "lwf", "anchors": "given", "prompt_kl": 0.5}, score=NONE)
    with pytest.raises(ConfigError) as told:
        check_run(validate(document, where=""), where="run.yaml")
    assert [line.strip().split(" ")[1] for line in told.value.problem.splitlines()[1:]] == ["needs", "needs", "needs"]


def test_all_pairs_come_together() -> None:
    document = run(
        objective={"kind": "sft_kl"}, score=NONE, teacher={"revision": "x"}, data=data(path="data/t.jsonl"), train={"max_steps": 3},
        evaluate={"tasks": [TASK, TASK]},
    )  # fmt: skip
    with pytest.raises(ConfigError) as told:
        check_run(validate(document, where=""), where="run.yaml")
    assert len(told.value.problem.splitlines()) == 6
