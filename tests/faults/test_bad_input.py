"""Whatever is wrong with what a user gives: a status that says whose fault it is, words that help, and nothing that looks done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.test_disk_faults import mounted
from tests.helpers.models import tiny_tokenizer_folder
from tests.helpers.runs import Bench
from tests.helpers.s3 import BUCKET, s3_environment, set_s3_environment

Spoil = Callable[[Bench], None]


def committed(bench: Bench, kind: str) -> list[Path]:
    """What claims to be a finished artifact of a kind."""
    names = {"corpus": "corpus/*/MANIFEST.json", "teacher": "teacher/*/coverage/*.json", "train": "runs/*/checkpoints/*/MANIFEST.json",
             "model": "runs/*/model/MANIFEST.json", "eval": "eval/*/MANIFEST.json"}  # fmt: skip
    return sorted(bench.store.glob(names[kind]))


def write_text(name: str, text: str | bytes) -> Spoil:
    def spoil(bench: Bench) -> None:
        (bench.folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def add_row(row: Any) -> Spoil:
    def spoil(bench: Bench) -> None:
        with (bench.folder / "train.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    return spoil


def said(content: Any, role: Any = "assistant") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}, {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (write_text("train.jsonl", ""), "empty"),
        (write_text("train.jsonl", "\n \n"), "empty"),
        (write_text("heldout.jsonl", ""), "empty"),
        (write_text("train.jsonl", b'{"messages": [{"role": "user", "content": "caf\xe9"}]}\n'), "not UTF-8: byte 0xe9"),
        (write_text("train.jsonl", '{"messages": \n'), "not JSON"),
        (write_text("train.jsonl", "[1, 2]\n"), "a row must be a JSON object, not list"),
        (add_row({"mesages": []}), "Did you mean 'mesages'?"),
        (add_row({"prompt": "a", "completion": "b"}), "no column 'messages'; there are: 'prompt', 'completion'"),
        (add_row({"messages": "Hello"}), "row 25"),
        (add_row({"messages": 3}), "row 25"),
        (add_row({"messages": []}), "empty list"),
        (add_row(said(3)), "row 25"),
        (add_row(said(None, role=7)), "row 25"),
    ],
)  # fmt: skip
def test_bad_rows(bench: Bench, spoil: Spoil, says: str) -> None:
    spoil(bench)
    bench.refused("tokenize", status=2, says=says)
    assert committed(bench, "corpus") == []
    bench.refused("train", status=3, says="There is no corpus in this store.")


def test_no_such_data(bench: Bench) -> None:
    for path in (
        "absent.jsonl",
        str(bench.folder / "absent.jsonl"),
        str(bench.folder / "*.nothing"),
        str(bench.folder / "model.bin"),
    ):
        bench.refused("tokenize", f"data.train.path={path}", status=2, says=path)
    bench.refused("tokenize", f"data.train.path={bench.file}", status=2, says="no reader for .yaml")


def test_max_tokens_below_the_shortest_prompt(bench: Bench) -> None:
    done = bench.refused("tokenize", "data.max_tokens=4", status=2, says="the shortest prompt has")
    assert "Raise data.max_tokens" in done.json["help"]
    assert committed(bench, "corpus") == []


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def no_weights(bench: Bench) -> None:
    (bench.model / "model.safetensors").unlink()


def pickled(bench: Bench) -> None:
    torch.save(load_file(bench.model / "model.safetensors"), bench.model / "pytorch_model.bin")
    no_weights(bench)


def truncated(bench: Bench) -> None:
    cut(bench.model / "model.safetensors", 0.9)


def truncated_header(bench: Bench) -> None:
    cut(bench.model / "model.safetensors", 0.001)


def garbage(bench: Bench) -> None:
    (bench.model / "model.safetensors").write_bytes(b"\xff" * 5000)


def nan_weight(bench: Bench) -> None:
    change_weight(bench, "model.layers.0.mlp.down_proj.weight", float("nan"))


def change_weight(bench: Bench, name: str, value: float) -> None:
    path = bench.model / "model.safetensors"
    weights = load_file(path)
    weights[name][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})


def missing_tensor(bench: Bench) -> None:
    path = bench.model / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def foreign_code(bench: Bench) -> None:
    path = bench.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))


def no_architecture(bench: Bench) -> None:
    path = bench.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "unheard-of"}))


def no_config(bench: Bench) -> None:
    (bench.model / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_weights, "no weights"),
        (pickled, "pickled weights (pytorch_model.bin)"),
        (truncated, "incomplete"),
        (truncated_header, "invalid header length"),
        (garbage, "header too large"),
        (nan_weight, "model.layers.0.mlp.down_proj.weight"),
        (missing_tensor, "model.layers.1.self_attn.q_proj.weight"),
        (foreign_code, "auto_map"),
        (no_architecture, "unheard-of"),
        (no_config, "no config.json"),
    ],
)
def test_bad_models(bench: Bench, spoil: Spoil, says: str) -> None:
    bench.run("tokenize")
    spoil(bench)
    bench.refused("score", status=2, says=says)
    assert committed(bench, "teacher") == []


def test_a_tokenizer_that_is_larger_than_the_model(bench: Bench) -> None:
    shutil.copytree(bench.model, bench.folder / "larger")
    tiny_tokenizer_folder(bench.folder / "larger", vocabulary=320)
    bench.refused("tokenize", f"model.path={bench.folder / 'larger'}", status=2, says="tokens, the model's vocabulary")


def test_a_teacher_that_speaks_another_language(bench: Bench) -> None:
    bench.run("tokenize")
    other = bench.folder / "other"
    shutil.copytree(bench.model, other)
    tiny_tokenizer_folder(other, vocabulary=290)
    for verb in ("score", "train", "plan"):
        bench.refused(verb, f"teacher.path={other}", status=2, says="different vocabularies")
    assert committed(bench, "teacher") == []


def test_a_store_below_a_file(bench: Bench) -> None:
    bench.refused("run", f"store={bench.file}/store", status=2, says="a file stands where a folder should be")
    assert bench.plan(f"store={bench.file}/store")["corpus"] == "missing"


def test_a_read_only_store(finished: Bench, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=16m") as disk:
        shutil.copytree(finished.store, disk / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        override = f"store={disk / 'store'}"
        assert set(finished.plan(override).values()) == {"have"}
        for verb in ("tokenize", "score", "train", "export", "evaluate", "report"):
            finished.refused(verb, override, status=2, says="read-only")


def test_a_disk_that_fills_up(bench: Bench, tmp_path: Path) -> None:
    """Each stage in turn finds no room; with room again, the same command goes on and ends as if nothing had been."""
    stages = [("tokenize", "corpus"), ("score", "teacher"), ("train", "train"), ("export", "model")]
    for number, (verb, kind) in enumerate(stages):
        before = [earlier for earlier, _ in stages[:number]]
        with mounted(tmp_path / verb, "size=8m") as disk:
            override = f"store={disk / 'store'}"
            for earlier in before:
                bench.run(earlier, override)
            filler = disk / "filler"
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
            filler.write_bytes(bytes(free - 16_384))
            on_disk = Bench(disk)
            told = bench.refused(verb, override, status=2, says="o space left")
            assert "space" in told.json["help"] or "room" in told.json["help"]
            assert committed(on_disk, kind) == []
            filler.unlink()
            bench.run(verb, override)
            assert committed(on_disk, kind)


def test_s3_without_credentials(bench: Bench, monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    empty = {key: value for key, value in s3_environment(s3_server).items() if "KEY" not in key}
    set_s3_environment(monkeypatch, empty)
    monkeypatch.setenv("HOME", str(bench.folder))
    bench.refused("tokenize", f"store=s3://{BUCKET}/x", status=2, says="no credentials were found")


def test_no_such_bucket(bench: Bench, s3_url: str) -> None:
    bench.refused("tokenize", "store=s3://no-such-bucket/x", status=2, says="there is no bucket 'no-such-bucket'")
    bench.refused("plan", "store=s3://no-such-bucket/x", status=2, says="there is no bucket 'no-such-bucket'")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no items"),
        ("\n\n", "has no items"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ', "task.jsonl:2"),
        (b'{"prompt": "\xe9", "answer": "b"}\n', "Not a JSON object in UTF-8"),
        ('{"prompt": "a"}\n', "needs `prompt` and `answer`; this has ['prompt']"),
        ("[1]\n", "this has list"),
        ('{"prompt": 3, "answer": "b"}\n', "neither a string nor a list"),
        ('{"prompt": [], "answer": "b"}\n', "neither a string nor a list"),
        ('{"prompt": [{"role": "user"}], "answer": "b"}\n', "neither a string nor a list"),
        ('{"prompt": "a", "answer": null}\n', "`answer` is a NoneType"),
        ('{"prompt": "a", "answer": true}\n', "`answer` is a bool"),
        ("[" * 50_000 + "\n", "Not a JSON object"),
    ],
)
def test_bad_tasks(finished: Bench, text: str | bytes, says: str) -> None:
    before = committed(finished, "eval")
    write_text("task.jsonl", text)(finished)
    finished.refused("evaluate", status=2, says=says)
    assert committed(finished, "eval") == before


def test_no_such_task(finished: Bench) -> None:
    (finished.folder / "task.jsonl").unlink()
    finished.refused("evaluate", status=2, says="The task sums cannot be read: No such file")


def test_a_template_that_refuses_a_prompt(finished: Bench) -> None:
    path = finished.model / "chat_template.jinja"
    path.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + path.read_text()
    )
    write_text("task.jsonl", json.dumps({"prompt": [{"role": "system", "content": "x"}], "answer": "1"}))(finished)
    for verb in ("tokenize", "score", "train", "export"):
        finished.run(verb, "name=other")
    finished.refused("evaluate", "name=other", status=2, says="no system here")


@pytest.mark.parametrize("verb", ["export", "evaluate", "report"])
def test_a_run_that_was_never_trained(finished: Bench, verb: str) -> None:
    done = finished.refused(verb, "name=unknown", status=3, says="unknown")
    assert "distft " in done.json["help"]
    assert not (finished.store / "runs" / "unknown" / "model").exists()


def test_a_stage_whose_input_is_not_there(bench: Bench) -> None:
    assert "distft tokenize" in bench.refused("score", status=3, says="no corpus").json["help"]
    bench.run("tokenize")
    assert "distft score" in bench.refused("train", status=3, says="no teacher cache").json["help"]


def test_heldout_that_is_trained_on(bench: Bench) -> None:
    bench.refused(
        "tokenize",
        f"data.heldout.path={bench.folder / 'train.jsonl'}",
        status=2,
        says="drift would be measured on what is trained",
    )
    shutil.copy(bench.folder / "train.jsonl", bench.folder / "heldout.jsonl")
    bench.refused("tokenize", status=2, says="24 of the 24 held-out documents are in the training data too")
    bench.refused("score", status=2, says="24 of the 24 held-out documents are in the training data too")


def test_an_objective_without_its_signals(bench: Bench) -> None:
    bench.refused("run", "score.distribution={kind: none}", status=2, says="needs the teacher's distribution")


def test_inputs_are_looked_at_before_anything_is_spent(bench: Bench) -> None:
    """Not after a week of training. All bad ones are told at once."""
    config = bench.config()
    config["evaluate"]["tasks"] += [
        {"kind": "generate", "name": "lost", "path": "absent-task.jsonl"},
        {"kind": "nll", "name": "gone", "source": {"path": "absent.jsonl"}},
        {"kind": "generate", "name": "odd", "path": str(bench.folder / "odd.jsonl")},
    ]
    bench.write(config)
    (bench.folder / "odd.jsonl").write_text('{"prompt": [{"role": "user", "content": 3}], "answer": "x"}\n')
    for verb in ("plan", "run"):
        told = bench.refused(verb, "model.path=nowhere", status=2, says="4 inputs cannot be used").json["error"]
        assert "model: nowhere is neither" in told
        assert "task lost: " in told
        assert "task gone: " in told
        assert "task odd: `prompt` is neither" in told
    assert not bench.store.exists()


@pytest.mark.parametrize(
    "spoil", [write_text("train.jsonl", ""), write_text("train.jsonl", "3\n"), write_text("heldout.jsonl", "x")]
)
def test_a_plan_looks_at_the_data(bench: Bench, spoil: Spoil) -> None:
    spoil(bench)
    config = bench.config()
    config["evaluate"]["tasks"] = []
    bench.write(config)
    bench.refused("plan", status=2, says="")


def test_a_plan_counts_attention_heads(bench: Bench) -> None:
    seven = ("train.workers=7", "train.sequence_parallel=7")
    bench.refused("plan", *seven, status=2, says="attention heads cannot be shared evenly among 7 ranks")


def test_a_model_of_an_earlier_step_is_not_judged_for_the_run(finished: Bench) -> None:
    checkpoints = finished.store / "runs" / "first" / "checkpoints"
    newest = sorted(checkpoints.glob("step-*"))[-1]
    shutil.rmtree(newest)
    done = finished.run("export")
    assert done.json["step"] < done.json["total_steps"] == 12
    assert "The run is not finished" in done.err
    finished.run("train")
    finished.refused("evaluate", status=3, says="not that of the finished run")
    finished.run("export")
    finished.run("evaluate")


def test_a_generation_config_that_is_no_object(bench: Bench) -> None:
    (bench.model / "generation_config.json").write_text("[1]")
    bench.refused("run", status=2, says="a generation_config.json that is not a JSON object")
