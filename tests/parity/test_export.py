"""What is exported is what was trained, to transformers and to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distft.errors import MissingArtifactError
from distft.export import export_run
from distft.store.manifest import read_manifest, verify_files
from tests.helpers.stores import Lab, lab, loaded, random_documents, shared_model

FAMILIES = ["llama", "llama_untied_padded", "qwen3", "gemma3_softcap_sliding"]


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
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
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
    from distft.store.model_folder import resolve_model

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
    made = trained(tmp_path, dtype="bfloat16")
    folder, weights = export(made), dict(made.restored().weights())
    written = load_file(folder / "model.safetensors")
    assert written.keys() <= weights.keys()
    assert all(torch.equal(written[name], weights[name].bfloat16()) for name in written)


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
        patch.setattr("distft.export.commit", die)
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
    beside = made.run_folder.folders()
    assert sorted(beside) == ["checkpoints", "model"]


def test_a_run_without_a_checkpoint_cannot_be_exported(tmp_path: Path) -> None:
    made = lab(tmp_path, objective={"kind": "sft"})
    with pytest.raises(MissingArtifactError, match="no checkpoint"):
        export(made)
