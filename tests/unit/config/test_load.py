"""How a run file is read: what is refused, in which words, and what overrides do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from distft.config.load import dump, load_config, validate
from distft.config.schema import GenerateTask, NumberJudge, Run
from distft.errors import ConfigError
from distft.objectives.catalog import SftKl, StmKl

BASE = "name: a\nmodel: {path: m}\ndata: {train: {path: t.jsonl}}\n"
TASK = "{kind: generate, name: x, path: p}"
OBJECTIVES = "sft, sft_kl, stm, stm_kl, lwf, kd, eksft, eaft, dft, asft, talr"


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Run:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def refused(tmp_path: Path, text: str | bytes, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as told:
        load(tmp_path, text, *overrides)
    assert told.value.exit_status == 2
    assert told.value.where
    assert told.value.help
    return told.value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BASE + "trian: {lr: 1}\n", "trian: no such key; did you mean 'train'?"),
        (BASE + "train: {lern: 3}\n", "train.lern: no such key; did you mean 'lr'?"),
        (BASE + "train: {epoch: 3}\n", "train.epoch: no such key; did you mean 'epochs'?"),
        (BASE + "train: {checkpoint: {every: 3}}\n", "train.checkpoint.every: no such key; did you mean 'every_steps'?"),
        (BASE + "score: {distribution: {kind: topk, top: 3}}\n", "score.distribution.top: no such key; known are k, kind, min_prob"),
        (BASE + f"evaluate: {{tasks: [{TASK[:-1]}, limt: 3}}]}}\n", "evaluate.tasks[0].limt: no such key; did you mean 'limit'?"),
        (BASE + f"evaluate: {{tasks: [{TASK}, {TASK[:-1]}, judge: {{kind: exact, x: 1}}}}]}}\n",
         "evaluate.tasks[1].judge.x: no such key; known are ignore_case, kind, strip"),
        (BASE + f"evaluate: {{tasks: [{TASK[:-1]}, judge: {{kind: exct}}}}]}}\n",
         "evaluate.tasks[0].judge.kind: 'exct' is none of exact, number; did you mean 'exact'?"),
        (BASE + f"evaluate: {{tasks: [{TASK[:-1]}, judge: {{}}}}]}}\n",
         "evaluate.tasks[0].judge.kind: is missing; one of exact, number"),
        (BASE + "evaluate: {tasks: [{name: x}]}\n", "evaluate.tasks[0].kind: is missing; one of generate, nll"),
        (BASE + "evaluate: {tasks: {kind: nll}}\n", "evaluate.tasks: should be a list"),
        (BASE + "evaluate: {tasks: [{kind: nll, name: x}]}\n", "evaluate.tasks[0].source: is missing"),
        (BASE + "objective: {kind: grpo}\n", f"objective.kind: 'grpo' is none of {OBJECTIVES}"),
        (BASE + "objective: {kl: 3}\n", f"objective.kind: is missing; one of {OBJECTIVES}"),
        (BASE + "objective: {kind: sft, kl: 3}\n", "objective.kl: no such key; known are drift_budget, kind, prompt_kl"),
        (BASE + "objective: {kind: stm, tau: 2.0, fraction: 0.2}\n", "objective: tau and fraction both say how much is masked"),
        (BASE + "evaluate:\n", "evaluate: is an empty section"),
        (BASE + "train: 3\n", "train: 3: input should be a valid dictionary"),
        (BASE + "train: {lr: '1e-3'}\n", "train.lr: '1e-3': input should be a valid number"),
        (BASE + "1: 2\n", "[1]: 1: keys should be strings"),
        ("name: 2024-01-01\nmodel: {path: m}\ndata: {train: {path: t}}\n", "name: input should be a valid string"),
        ("model: {path: m}\n", "name: is missing"),
        ("model: {path: m}\n", "data: is missing"),
    ],
)  # fmt: skip
def test_each_problem_has_its_sentence(tmp_path: Path, text: str, says: str) -> None:
    assert f"\n  {says}" in refused(tmp_path, text).problem


def test_all_problems_come_together(tmp_path: Path) -> None:
    text = BASE + "train: {lr: 0, epochs: x, betas: [0.9, 1.5]}\nscore: {tokens_per_batch: 0}\nextra: 1\n"
    problem = refused(
        tmp_path, text + f"evaluate: {{tasks: [{TASK[:-1]}, limit: 0, judge: {{kind: number, tolerance: -1}}}}]}}\n"
    ).problem
    first, *rest = problem.splitlines()
    assert first == "7 problems in the run file:"
    assert [line.split(":")[0].strip() for line in rest] == [
        "score.tokens_per_batch", "train.epochs", "train.lr", "train.betas[1]", "evaluate.tasks[0].judge.tolerance",
        "evaluate.tasks[0].limit", "extra",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "this is empty"),
        ("# only a comment\n", "this is empty"),
        ("- a\n- b\n", "this is a list"),
        ("just words", "this is a str"),
        ("name: [", "not valid YAML"),
        (BASE + "a: b\x07", "not valid YAML"),
        (BASE + "---\nname: b\n", "another document"),
        (BASE + "name: b\n", "the key 'name' stands twice"),
        (BASE + "train:\n  lr: 1e-5\n  lr: 1e-4\n", "the key 'lr' stands twice"),
        (BASE + "? [a]\n: b\n", "a list or a mapping stands as a key"),
        (BASE + "store: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (BASE + "x: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        (BASE.encode() + b"# caf\xe9\n", "not UTF-8"),
        (BASE.encode("utf-16"), "not UTF-8"),
    ],
)
def test_what_is_no_run_file(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert says in refused(tmp_path, text).problem


def test_yaml_errors_have_line_and_column(tmp_path: Path) -> None:
    assert refused(tmp_path, BASE + "train:\n  lr: 1e-5\n  lr: 1e-4\n").where.endswith("run.yaml:6:3")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no such run file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="This is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize("written", ["1e-5", "1E-5", "1.0e-5", "1.e-5", "+1e-5", "0.00001", "1_0e-6", ".1e-4", ".00001"])
def test_a_number_is_written_as_everywhere_else(tmp_path: Path, written: str) -> None:
    assert load(tmp_path, BASE + f"train: {{lr: {written}}}").train.lr == pytest.approx(1e-5, rel=1e-12)
    assert load(tmp_path, BASE, f"train.lr={written}").train.lr == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["1e5", "1E5", "12e03", "1_0e5", "true", "null", "0x10", "1.5", "2024-01-01", "12", "~", "no", "e5"]
)
def test_dump_reads_back_as_the_same_run(tmp_path: Path, name: str) -> None:
    document: dict[str, Any] = {
        "name": name if name != "~" else "a", "store": name, "model": {"path": f"dossier é/{name}"},
        "data": {"train": {"path": name, "limit": 3}, "heldout": {"path": "b: c # d"}},
        "objective": {"kind": "stm_kl", "kl": 1e-7}, "train": {"lr": 1e-5, "betas": [0.9, 0.999], "clip": None},
        "evaluate": {"tasks": [{"kind": "nll", "name": "n", "source": {"path": "x"}},
                               {"kind": "generate", "name": "g", "path": "p", "judge": {"kind": "exact", "strip": "\n\t \"'"}}]},
    }  # fmt: skip
    run = validate(document, where="")
    assert load(tmp_path, dump(run)) == run


def test_overrides_reach_everywhere(tmp_path: Path) -> None:
    run = load(
        tmp_path, BASE + f"evaluate: {{tasks: [{TASK}, {TASK.replace('x', 'y')}]}}\n",
        "train.lr=2e-5", "train.clip=null", "name=b", "data.heldout.path=h.jsonl", "train.betas=[0.5, 0.6]", "train.betas[1]=0.7",
        "evaluate.tasks[1].judge.kind=number", "evaluate.tasks[1].limit=9", "train.gradient_checkpointing=true", "train.lr=3e-5",
        "data.train.path=a=b", "score.distribution={kind: topk, k: 7}", "score.distribution.min_prob=0",
    )  # fmt: skip
    assert (run.train.lr, run.train.clip, run.name, run.train.betas) == (3e-5, None, "b", (0.5, 0.7))
    assert run.data.heldout is not None
    assert (run.data.heldout.path, run.data.train.path) == ("h.jsonl", "a=b")
    assert run.score.distribution.model_dump() == {"kind": "topk", "k": 7, "min_prob": 0.0}
    task = run.evaluate.tasks[1]
    assert isinstance(task, GenerateTask)
    assert (task.limit, task.judge, task.name) == (9, NumberJudge(kind="number"), "y")


def test_another_kind_clears_the_keys_of_the_old_one(tmp_path: Path) -> None:
    text = BASE + "objective: {kind: sft_kl, kl: 3.0, direction: student_to_teacher}\n"
    assert load(tmp_path, text, "objective.kind=stm_kl", "objective.tau=2.0").objective == StmKl(kind="stm_kl", tau=2.0)
    assert load(tmp_path, text, "objective.kind=sft_kl").objective == SftKl(kind="sft_kl", kl=3.0, direction="student_to_teacher")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train", "is not an override"),
        ("=3", "is not an override"),
        ("train.=3", "is not an override"),
        (".lr=3", "is not an override"),
        ("train..lr=3", "is not an override"),
        ("evaluate.tasks[x].limit=3", "is not an override"),
        ("[0]=3", "is not an override"),
        ("train.lr=[", "not valid YAML"),
        ("train.lr={a: 1, a: 2}", "not valid YAML"),
        ("name.x=3", "reaches into 'name'"),
        ("train.lr.x=3", "reaches into 'lr'"),
        ("model={path: x}", "whole section"),
        ("evaluate.tasks[0].limit=3", "'tasks' has 0 items"),
        ("name[0]=3", "'name' has 0 items"),
        ("train.lr=many", "train.lr: 'many'"),
        ("train.lrr=3", "did you mean 'lr'"),
        ("train=3", "train: 3"),
        ("teacher=null", "teacher: is an empty section"),
        ("data.train.path=", "data.train.path: None"),
    ],
)
def test_an_override_that_cannot_be(tmp_path: Path, override: str, says: str) -> None:
    assert says in refused(tmp_path, BASE + "train: {lr: 1e-3}\n", override).problem


@pytest.mark.parametrize("override", ["store.x=hunter2", "store=[hunter2", "name[0]=hunter2", "model=hunter2: x"])
def test_a_misplaced_value_is_not_repeated(tmp_path: Path, override: str) -> None:
    assert "hunter2" not in str(refused(tmp_path, BASE + "store: s\n", override))


def test_the_document_is_not_changed() -> None:
    document: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "data": {"train": {"path": "t"}}}
    before = copy.deepcopy(document)
    validate(document, where="")
    assert document == before


def test_a_kind_is_laid_over_before_the_keys_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASE + "objective: {kind: stm_kl, tau: 3.0, kl: 2.0}\n"
    run = load(tmp_path, text, "train.lr=1e-4", "objective.kl=0.25", "objective.kind=sft_kl")
    assert isinstance(run.objective, SftKl)
    assert run.objective.kl == 0.25
    assert "kl, tau belonged to kind stm_kl" in capsys.readouterr().err
    assert load(tmp_path, text, "objective.kl=0.25").objective.model_dump()["tau"] == 3.0
    twice = load(tmp_path, text, "objective.kind=stm", "objective.kind=sft_kl", "objective.kl=1")
    assert twice.objective.model_dump()["kind"] == "sft_kl", "left to right: the last kind counts"
    nested = load(
        tmp_path, BASE, f"evaluate.tasks=[{TASK}]", "evaluate.tasks[0].judge.tolerance=1", "evaluate.tasks[0].judge.kind=number"
    )
    task = nested.evaluate.tasks[0]
    assert isinstance(task, GenerateTask)
    assert task.judge.model_dump() == {"kind": "number", "tolerance": 1.0}
    last = load(
        tmp_path, BASE, "evaluate.tasks=[{kind: nll}]", f"evaluate.tasks=[{TASK}]", "evaluate.tasks[0].judge.kind=number"
    ).evaluate.tasks[0]
    assert isinstance(last, GenerateTask)


def test_an_override_of_a_section_that_the_file_leaves_out_means_its_default_kind(tmp_path: Path) -> None:
    run = load(tmp_path, BASE, "score.distribution.k=7", "train.checkpoint.keep=9")
    assert run.score.distribution.model_dump() == {"kind": "topk", "k": 7, "min_prob": 1e-3}
    assert run.train.checkpoint.keep == 9
    assert (
        load(tmp_path, BASE, "score.distribution.draws=9", "score.distribution.kind=sample").score.distribution.model_dump()[
            "draws"
        ]
        == 9
    )
    assert "objective.kl: no such key" in refused(tmp_path, BASE, "objective.kl=3").problem
