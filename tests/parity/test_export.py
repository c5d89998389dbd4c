"""What is exported is what was trained, to transformers and to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distft.errors import MissingArtifactError
from distft.export.stage import export_run
from distft.store.location import PARTIAL
from distft.store.manifest import read_manifest, verify_files
from distft.store.model_folder import ModelFolder, resolve_model
from tests.helpers.models import tiny_model_folder
from tests.helpers.stores import FAMILIES, Lab, lab, loaded, random_documents, shared_model


def trained(folder: Path, family: str = "llama", **sections: Any) -> Lab:
    documents = random_documents(12, seed=14)
    made = lab(folder, documents=documents, model=shared_model(family), objective={"kind": "sft"}, **sections)
    made = made.changed(train={"max_steps": 3, "lr": 1e-2})
    made.train()
    return made


def export(made: Lab) -> Path:
    export_run(made.run, made.model, made.run_identity(), made.store)
    path = made.run_folder.child("model").local("MANIFEST.json")
    assert path is not None
    return path.parent


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_engines_logits(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    made = trained(tmp_path, family)
    folder, engine = export(made), made.restored()
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    reloaded.eval()
    whole = engine.model.whole.eval()
    for one in made.corpus.documents("train"):
        tokens = torch.from_numpy(one.tokens.astype("int64"))[None]
        with torch.no_grad():
            theirs, ours = (m(input_ids=tokens, use_cache=False).logits for m in (reloaded, whole))
        assert torch.equal(theirs, ours)
    names = dict(reloaded.named_parameters())
    weights = dict(engine.weights())
    assert names.keys() == weights.keys()
    assert all(torch.equal(names[name], weights[name]) for name in weights)
    before = dict(loaded(made.model).whole.named_parameters())
    assert not any(torch.equal(before[name], weights[name]) for name in weights if weights[name].dim() == 2)
    tied = made.model.config["tie_word_embeddings"]
    assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != tied


def test_the_exported_model_goes_through_the_same_door(tmp_path: Path) -> None:
    """It is a model folder again, and has the identity of no other; its settings and tokenizer are those it came with."""
    made = trained(tmp_path)
    folder = export(made)
    again = resolve_model(str(folder), None)
    assert loaded(again).shape == loaded(made.model).shape
    assert again.weights_identity()["files"] != made.model.weights_identity()["files"]
    assert again.weights_identity()["config"] == made.model.weights_identity()["config"]
    assert again.tokenizer_identity() == made.model.tokenizer_identity()
    files = made.model.tokenizer_files()
    assert files
    assert all((folder / file.name).read_bytes() == file.read_bytes() for file in files)
    assert not [name for name in made.run_folder.child("model").names(recursive=True) if name.endswith((".bin", ".pt"))]


def test_bfloat16_export_is_the_rounded_float32_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trained(tmp_path, dtype="bfloat16")
    folder, engine = export(made), made.restored()
    weights, written = dict(engine.weights()), load_file(folder / "model.safetensors")
    assert written.keys() <= weights.keys()
    assert all(torch.equal(written[name], weights[name].bfloat16()) for name in written)
    # What the engine's passes read is the same rounding, so that its logits are the same to the bit.
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokens = torch.from_numpy(next(iter(made.corpus.documents("train"))).tokens.astype("int64"))[None]
    with torch.no_grad():
        theirs, ours = (m.eval()(input_ids=tokens, use_cache=False).logits for m in (reloaded, engine.model.whole))
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs, ours)


def test_small_files_hold_what_one_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = lab(
        tmp_path,
        documents=random_documents(6, seed=3),
        model=_large(tmp_path),
        objective={"kind": "sft"},
        train={"max_steps": 2, "warmup_steps": 1},
    )
    made.train()
    folder = export(made.changed(export={"shard_bytes": 1 << 20}))
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    weights = dict(made.restored().weights())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in reloaded.named_parameters())


def _large(folder: Path) -> ModelFolder:
    return resolve_model(str(tiny_model_folder(folder / "large", hidden=128, layers=4, vocabulary=280)), None)


def test_a_second_export_leaves_the_first_alone_and_another_dtype_replaces_it(tmp_path: Path) -> None:
    made = trained(tmp_path)
    folder = export(made)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert export(made) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    other = made.changed(export={"dtype": "bfloat16"})
    export(other)
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_an_interrupted_export_is_no_model_and_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(tmp_path).changed(export={"shard_bytes": 1 << 20})

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("distft.export.stage.commit", die)
        with pytest.raises(Killed):
            export(made)
    folder = made.run_folder.child("model")
    assert folder.exists("model.safetensors")
    assert read_manifest(folder) is None
    path = folder.local("left-over.safetensors")
    assert path is not None
    path.write_bytes(b"of another export")
    export(made)
    manifest = read_manifest(folder)
    assert manifest is not None
    verify_files(folder, manifest)
    assert sorted(folder.names(recursive=True)) == sorted(["MANIFEST.json", *(entry.name for entry in manifest.files)])
    assert not [*(made.folder / "store").rglob(f"{PARTIAL}*")], "no scratch is left"


def test_a_run_without_a_checkpoint_cannot_be_exported(tmp_path: Path) -> None:
    made = lab(tmp_path, objective={"kind": "sft"})
    with pytest.raises(MissingArtifactError, match="no checkpoint"):
        export(made)
