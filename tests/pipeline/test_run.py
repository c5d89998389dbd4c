"""The whole way, on a disk and on S3: what is made, what is said, and that nothing is made twice."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distft.config.load import load_config
from distft.store.location import open_location
from distft.store.manifest import read_manifest, verify_files
from distft.train.rank_files import read_weights
from tests.helpers.runs import Bench, distft, files

KEYS = {
    "tokenize": {"corpus", "documents", "tokens", "supervised_tokens", "dropped"},
    "score": {"teacher", "documents", "documents_scored", "tokens_scored", "bytes_per_token"},
    "train": {"run", "steps", "resumed_from", "loss", "drift"},
    "export": {"model"},
    "evaluate": {"eval", "scores"},
    "report": {"page"},
}
METRICS = {"step", "loss", "ce", "kl", "rkl", "entropy", "tokens", "lr", "grad_norm", "tokens_per_second"}


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, loading weights is an error."""
    import transformers

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", load)


def kinds(names: list[str]) -> set[str]:
    """File names without what is unique in them."""
    return {re.sub(r"[0-9a-f]{16,32}|(?<=-)[0-9]{5,8}|(?<=tfevents\.)[0-9.]+(?=\.)", "*", name) for name in names}


@pytest.mark.parametrize(("where", "s3_server"), [("local", "moto"), ("s3", "moto")], indirect=["s3_server"])
def test_everything_once(
    bench: Bench, where: str, s3_server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(bench.store) if where == "local" else request.getfixturevalue("s3_url")
    bench.write(bench.config() | {"store": url})
    told = bench.run("run").json
    assert list(told) == list(KEYS)
    for verb, keys in KEYS.items():
        assert keys <= told[verb].keys(), verb
    assert told["tokenize"]["documents"] == 30
    assert told["train"]["steps"] == 12
    assert told["train"]["resumed_from"] is None
    assert told["train"]["drift"] > 0
    assert told["evaluate"]["scores"]["held"]["after"]["nll"] < told["evaluate"]["scores"]["held"]["before"]["nll"]

    store = open_location(url)
    assert {name for name in kinds(store.names(recursive=True)) if name != "runs/first/report.md"} == {
        "corpus/*/MANIFEST.json", "corpus/*/data/train-*-*.arrow", "corpus/*/data/heldout-*-*.arrow",
        "corpus/*/parts/train-*.json", "corpus/*/parts/heldout-*.json",
        "teacher/*/IDENTITY.json", "teacher/*/coverage/*.json", "teacher/*/parts/*.json", "teacher/*/data/part-*-*.arrow",
        "eval/*/MANIFEST.json", "eval/*/data/items-*.jsonl",
        "runs/first/config.yaml", "runs/first/metrics.jsonl", "runs/first/report.html", "runs/first/eval/summary.json",
        "runs/first/checkpoints/OWNER.json",
        "runs/first/checkpoints/step-*/MANIFEST.json", "runs/first/checkpoints/step-*/data/rank-*-*.safetensors",
        "runs/first/model/MANIFEST.json", "runs/first/model/model.safetensors", "runs/first/model/config.json",
        "runs/first/model/generation_config.json", "runs/first/model/tokenizer.json", "runs/first/model/tokenizer_config.json",
        "runs/first/model/chat_template.jinja", "runs/first/model/README.md",
        "runs/first/tensorboard/events.out.tfevents.*.distft",
    }  # fmt: skip
    run = store.child("runs", "first")
    steps = [name for name in run.child("checkpoints").folders() if run.child("checkpoints", name).names(recursive=True)]
    assert steps == ["step-00000010", "step-00000012"]
    lines = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line.keys() >= METRICS for line in lines)
    assert [line["step"] for line in lines if "drift" in line] == [5, 10, 12]
    kept = bench.folder / "kept.yaml"
    kept.write_bytes(run.read("config.yaml"))
    assert load_config(kept) == load_config(bench.file)
    for name in [name for name in store.names(recursive=True) if name.endswith("MANIFEST.json")]:
        folder = open_location(f"{url}/{name.rpartition('/')[0]}")
        manifest = read_manifest(folder)
        assert manifest is not None
        verify_files(folder, manifest)

    before = store.names(recursive=True)
    request.getfixturevalue("no_models")
    again = bench.run("run").json
    assert store.names(recursive=True) == before, "the second run made something"
    assert again["score"]["documents_scored"] == 0
    assert again["train"] == told["train"] | {"resumed_from": 12}
    assert again["evaluate"] == told["evaluate"]
    assert set(bench.plan().values()) == {"have"}
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(bench.folder / "another"))  # as on another machine: staging is empty
    assert bench.run("run").json["evaluate"] == told["evaluate"]


def test_each_verb_tells_what_it_made(bench: Bench) -> None:
    told = {verb: bench.run(verb).json for verb in KEYS}
    for verb, keys in KEYS.items():
        assert keys <= told[verb].keys(), verb
    assert Path(told["report"]["page"]).is_file()


def test_a_person_reads_stderr(finished: Bench) -> None:
    for verb in ("plan", "tokenize", "score", "train", "export", "evaluate", "report"):
        done = distft(verb, str(finished.file))
        assert (done.status, done.out) == (0, ""), verb
        assert done.err.strip(), verb


@pytest.mark.usefixtures("no_models")
def test_what_is_moved_or_renamed_is_still_the_same(finished: Bench, tmp_path: Path) -> None:
    """`finished` is itself a copy in another folder of a store that was made elsewhere."""
    assert finished.run("run").json["train"]["resumed_from"] == 12
    config = finished.config()
    shutil.move(finished.model, tmp_path / "renamed model")
    shutil.move(finished.folder / "train.jsonl", tmp_path / "sums.jsonl")
    shutil.move(finished.store, tmp_path / "elsewhere")
    config["model"]["path"] = str(tmp_path / "renamed model")
    config["data"]["train"]["path"] = str(tmp_path / "sums.jsonl")
    config["store"] = str(tmp_path / "elsewhere")
    moved = Bench(tmp_path / "other")
    moved.folder.mkdir()
    moved.write(config)
    told = moved.run("run").json
    assert told["score"]["documents_scored"] == 0
    assert told["train"]["resumed_from"] == 12
    assert set(moved.plan().values()) == {"have"}


@pytest.mark.usefixtures("no_models")
def test_what_only_changes_speed_or_safety_changes_nothing(finished: Bench) -> None:
    told = finished.run(
        "run", "train.micro_batch_tokens=500", "train.checkpoint.every_steps=7", "score.tokens_per_batch=64", "data.workers=1",
        "evaluate.tokens_per_batch=64", "train.gradient_checkpointing=true", "score.workers=3", "cluster.address=elsewhere:6379",
    ).json  # fmt: skip
    assert told["score"]["documents_scored"] == 0
    assert told["train"]["resumed_from"] == 12


def test_two_objectives_share_corpus_teacher_and_base_scores(finished: Bench) -> None:
    before = files(finished.store)
    other = finished.run("run", "name=second", "objective.kind=sft").json
    assert other["score"]["documents_scored"] == 0
    made = files(finished.store).keys() - before.keys()
    assert not [name for name in made if name.startswith(("corpus", "teacher"))]
    assert len([name for name in made if re.fullmatch(r"eval/\w+/MANIFEST.json", name)]) == 3, "two tasks and drift, after alone"
    first = json.loads((finished.store / "runs/first/eval/summary.json").read_text())
    for task, scores in other["evaluate"]["scores"].items():
        assert scores["before"]["items"].rpartition("/")[2] == first["scores"][task]["before"]["items"].rpartition("/")[2]


def test_new_rows_alone_are_scored(finished: Bench) -> None:
    rows = finished.rows()
    rows.append({"messages": [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Nothing else."}]})
    finished.write_rows(rows)
    assert finished.plan("name=larger") == {"corpus": "stale", "teacher": "partial", "checkpoints": "missing", "model": "missing",
                                            "eval": "missing", "report": "missing"}  # fmt: skip
    finished.run("tokenize")
    assert finished.plan("name=larger")["teacher"] == "partial"
    assert finished.run("score").json["documents_scored"] == 1
    finished.write_rows(rows[:5])
    finished.run("tokenize")
    assert finished.run("score").json["documents_scored"] == 0, "a smaller data set costs nothing"


def test_the_model_is_as_usable_as_its_base(finished: Bench) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.store / "runs" / "first" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == (finished.model / "chat_template.jinja").read_text()
    step = open_location(str(finished.store)).child("runs", "first", "checkpoints", "step-00000012")
    exported = dict(model.named_parameters())
    for name, tensor in read_weights(step, read_manifest(step) or pytest.fail("no checkpoint")).items():
        assert exported[name].equal(tensor), name


def test_the_same_twice_is_the_same_bit_for_bit(finished: Bench) -> None:
    finished.run("train", "name=again")
    finished.run("export", "name=again")
    mine, theirs = (load_file(finished.store / f"runs/{name}/model/model.safetensors") for name in ("first", "again"))
    assert all(mine[name].equal(theirs[name]) for name in mine)
