"""What is made from something else is never used: it is refused, with the field that differs and the command that helps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.runs import Bench, files


def edit_template(bench: Bench) -> None:
    path = bench.model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>\n", "<|im_end|>"))


def edit_weight(bench: Bench) -> None:
    path = bench.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})


def swap_two_ids(bench: Bench) -> None:
    path = bench.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(tokenizer))


def edit_row(bench: Bench) -> None:
    rows = bench.rows()
    rows[7]["messages"][1]["content"] += "!"
    bench.write_rows(rows)


def edit_heldout_row(bench: Bench) -> None:
    rows = bench.rows("heldout")
    rows[0]["messages"][1]["content"] += "!"
    bench.write_rows(rows, "heldout")


def shuffle_rows(bench: Bench) -> None:
    rows = bench.rows()
    random.Random(1).shuffle(rows)
    bench.write_rows(rows)


def edit_settings(bench: Bench) -> None:
    """A setting that changes what the model computes, though no weight did."""
    path = bench.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))


Change = Callable[[Bench], None]
CORPUS = "distft tokenize"
SCORE = "distft score"


@pytest.mark.parametrize(
    ("change", "field", "command"),
    [
        (edit_template, "tokenizer.template: ", CORPUS),
        (edit_weight, "weights.files.model.safetensors: ", SCORE),
        (swap_two_ids, "tokenizer.vocabulary: ", CORPUS),
        (edit_row, "train.content: ", CORPUS),
        (edit_heldout_row, "heldout.content: ", CORPUS),
        (shuffle_rows, "train.content: ", CORPUS),
        (edit_settings, "weights.config: ", SCORE),
    ],
)
def test_a_change_of_bytes_is_refused(finished: Bench, change: Change, field: str, command: str) -> None:
    change(finished)
    before = files(finished.store)
    done = finished.refused("train", status=3, says=field)
    assert command in done.json["help"]
    assert files(finished.store) == before


@pytest.mark.parametrize(
    ("override", "field", "command"),
    [
        ("data.max_tokens=20", "max_tokens: 128 -> 20", CORPUS),
        ("data.train.limit=20", "train.limit: null -> 20", CORPUS),
        ("score.distribution={kind: topk, k: 3}", "distribution.k: 128 -> 3", SCORE),
        ("score.positions=all", "positions: supervised -> all", SCORE),
        ("teacher.dtype=bfloat16", "dtype: float32 -> bfloat16", SCORE),
        ("train.lr=2e-3", "train.lr: 0.001 -> 0.002", "name"),
        ("train.seed=1", "train.seed: 0 -> 1", "name"),
        ("train.epochs=3", "train.epochs: 2 -> 3", "name"),
        ("objective.kl=0.25", "objective.kl: 0.5 -> 0.25", "name"),
        ("objective.kind=sft", "objective.kind: sft_kl -> sft", "name"),
        ("objective={kind: stm}", "would replace a whole section", "one by one"),
    ],
)
def test_a_change_of_settings_is_refused(finished: Bench, override: str, field: str, command: str) -> None:
    before = files(finished.store)
    status = 2 if "whole section" in field else 3
    done = finished.refused("train", override, status=status, says=field)
    assert command in done.json["help"]
    assert files(finished.store) == before, "a refused config left something"


@pytest.mark.parametrize("verb", ["export", "evaluate"])
def test_later_verbs_refuse_another_run_of_this_name(finished: Bench, verb: str) -> None:
    before = files(finished.store)
    finished.refused(verb, "train.lr=2e-3", status=3, says="train.lr: 0.001 -> 0.002")
    assert files(finished.store) == before


def test_the_change_is_meant(finished: Bench) -> None:
    """The way out that the error names works, and the old artifacts stay for whoever goes back."""
    rows = finished.rows()
    edit_row(finished)
    finished.run("tokenize")
    assert (
        finished.refused("train", "name=second", status=3, says="holds 29 of the corpus's 30 documents")
        .json["help"]
        .startswith("Run `distft score`")
    )
    assert finished.run("score").json["documents_scored"] == 1
    assert finished.run("train", "name=second").json["resumed_from"] is None
    finished.write_rows(rows)
    assert finished.run("run").json["train"]["resumed_from"] == 12


def test_a_new_evaluation_after_each_change(finished: Bench) -> None:
    """Evaluations are known by what they measure: items, settings and where answers end."""

    def overridden(*overrides: str) -> str:
        return finished.run("evaluate", *overrides).json["scores"]["sums"]["before"]["items"]

    first = overridden()
    assert overridden("evaluate.tokens_per_batch=50") == first
    assert overridden("evaluate.tasks[0].max_new_tokens=5") != first
    assert overridden("evaluate.tasks[0].judge.kind=exact") != first
    assert overridden("evaluate.tasks[0].limit=1") != first
    ends = finished.model / "generation_config.json"
    ends.write_text(json.dumps(json.loads(ends.read_text()) | {"eos_token_id": [1, 4]}))
    assert overridden() != first
