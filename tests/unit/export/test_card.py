"""The card says what the model was made from, in what the hub reads and in words; and nothing that is nobody's business."""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import distft
from distft.config.schema import Run
from distft.export import code
from distft.export.card import Known, front_matter, model_card
from distft.store.manifest import Manifest
from distft.store.model_folder import ModelFolder
from distft.train.identity import run_identity
from tests.helpers.stores import copied_model, shared_model

DRIFT = {"kl": 0.0912, "nll": 1.25, "teacher_nll": 1.5, "label_gap": 0.1, "tokens": 4321}
CORPUS: dict[str, Any] = {
    "train": {"content": ["a" * 64], "format": "chat"}, "heldout": {"content": ["b" * 64] * 9, "format": "chat"}, "max_tokens": 77,
}  # fmt: skip
FACTS = {"train": {"documents": 1234, "tokens": 56_789, "supervised_tokens": 4_444, "dropped": 3}}


def known(folder: ModelFolder | None = None, *, step: int = 30, drift: dict[str, Any] | None = DRIFT, **sections: Any) -> Known:
    model = folder or shared_model()
    run = Run.model_validate({
        "name": "held", "store": "/home/anna/store", "model": {"path": str(model.path), "dtype": "bfloat16"},
        "data": {"train": {"path": "/home/anna/data/train.jsonl"}, "heldout": {"path": "/home/anna/kept/*.jsonl"}},
        "objective": {"kind": "sft_kl", "kl": 0.75, "drift_budget": 0.1}, "train": {"lr": 2e-5, "seed": 17, "drift_every_steps": 5},
        **sections,
    })  # fmt: skip
    checkpoint = Manifest(
        kind="checkpoint", files=(), facts={"loss": 1.2345678, "drift": drift, "total_steps": 30},
        identity={"step": step, "run": run_identity(run, model, corpus=CORPUS, teacher="c" * 16)},
    )  # fmt: skip
    corpus = Manifest(kind="corpus", identity=CORPUS, files=(), facts=FACTS)
    return Known(run=run, model=model, checkpoint=checkpoint, corpus=corpus, cache="c" * 16, dtype="float32")


def parsed(text: str) -> tuple[dict[str, Any], str]:
    found = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", text, flags=re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2]


def test_a_card_says_what_the_model_was_made_from() -> None:
    one = known()
    front, page = parsed(model_card(one))
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distft", "full-fine-tuning", "sft-kl"],
    }  # fmt: skip
    files = one.checkpoint.identity["run"]["weights"]["files"]
    for said in (
        "`train.jsonl`", "1,234 documents", "56,789 tokens", "4,444 supervised tokens", "3 rows dropped", "a" * 64, "9 times a file",
        "the base model itself", "c" * 16, "`topk`, k 128", "kl: 0.75", "lr: 2.0e-05", "seed: 17", "steps: 30 of 30", "1.235",
        "**0.0912 nats per token**", "4,321 held-out tokens", f"{math.exp(-0.0912):.1%}", "The budget was 0.1", "lower bound",
        distft.__version__, "torch ", "AutoModelForCausalLM.from_pretrained", one.checkpoint.id, *files.values(),
    ):  # fmt: skip
        assert said in page, said
    assert "not finished" not in page
    assert "**The run was not finished: these are the weights after step 4 of 30.**" in model_card(known(step=4))
    assert "Not measured." in model_card(known(drift=None))


def test_a_card_tells_of_steps_that_were_taken_elsewhere() -> None:
    one = known(drift=None)
    told = {"from": "/home/anna/global_step7", "step": 7, "sha256": "d" * 64}
    taken_up = replace(one.checkpoint, facts={**one.checkpoint.facts, "loss": None, "imported": told})
    page = model_card(replace(one, checkpoint=taken_up))
    assert "steps 1 to 7 were taken elsewhere, and imported from `global_step7`" in page
    assert "d" * 64 in page
    assert "anna" not in page
    assert "loss of the last step" not in page
    assert "elsewhere" not in model_card(one)


def test_a_card_can_be_read_by_the_hubs_own_parser() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(known(model={"path": "someone/some-model", "revision": "abc"}))).data.to_dict()
    assert (data["base_model"], data["library_name"]) == ("someone/some-model", "transformers")


def test_names_of_the_hub_stand_in_the_front_matter_and_folders_do_not() -> None:
    named = front_matter(known(model={"path": "someone/some-model"}, data={"train": {"path": "someone/answers"}, "heldout": None},
                               objective={"kind": "sft"}))  # fmt: skip
    assert (named["base_model"], named["datasets"]) == ("someone/some-model", ["someone/answers"])
    assert not {"base_model", "datasets", "license"} & front_matter(known()).keys()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", {"license": "other", "license_name": "llama3"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\nlicense: 'a: b\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("license: mit", {}),
    ],
)
def test_a_license_is_the_base_models_own(tmp_path: Path, card: str, expected: dict[str, str]) -> None:
    model = copied_model(shared_model(), tmp_path / "model")
    (model.path / "README.md").write_text(card)
    found = front_matter(known(model))
    assert {key: found[key] for key in found if "license" in key} == expected


def test_no_folder_user_or_secret_is_told() -> None:
    told = model_card(known(
        data={"train": {"path": "https://anna:hunter2@example.org/anna/rows.jsonl?token=s3cr3t", "anchors": "/home/anna/marks.jsonl"},
              "heldout": {"path": "s3://KEY:SECRET@bucket"}},
        model={"path": "/home/anna/models/base"}, teacher={"path": "/srv/anna/teachers/large"},
        objective={"kind": "lwf", "anchors": "given"},
    ))  # fmt: skip
    for secret in (
        "anna",
        "hunter2",
        "s3cr3t",
        "token=",
        "SECRET",
        "KEY",
        "/home",
        "/srv",
        "example.org",
        str(shared_model().path),
    ):
        assert secret not in told, secret
    assert all(said in told for said in ("`rows.jsonl`", "`marks.jsonl`", "`base`", "`large`", "another model"))


def test_text_from_outside_is_no_markup() -> None:
    told = model_card(
        known(data={"train": {"path": "/data/`<script>`\n# Title.jsonl"}, "heldout": None}, objective={"kind": "sft"})
    )
    assert "`'<script>' # Title.jsonl`" in told
    assert "\n# Title" not in told


def test_a_card_without_a_corpus_or_teacher_says_what_is_known() -> None:
    one = known(data={"train": {"path": "train.jsonl"}}, objective={"kind": "sft"}, drift=None)
    told = model_card(replace(one, corpus=None, cache=None))
    assert "neither the objective nor a drift meter reads one" in told
    assert "documents," not in told
    assert "None" not in told


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "repo" / "distft"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(distft, "__file__", str(package / "__init__.py"))
    assert code.code_version() == distft.__version__, "no repository"
    git = ["git", "-C", str(package.parent), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert code.code_version() == f"{distft.__version__}, commit {commit}"
    (package / "__init__.py").write_text("changed = 1")
    assert code.code_version() == f"{distft.__version__}, commit {commit}, with changes that were not committed"
    # Installed in somebody else's repository, or where there is no git.
    monkeypatch.setattr(distft, "__file__", str(package / "venv" / "distft" / "__init__.py"))
    (package / "venv" / "distft").mkdir(parents=True)
    assert code.code_version() == distft.__version__
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code.code_version() == distft.__version__
