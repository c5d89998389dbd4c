"""An export from end to end, on a disk and on S3: what it leaves, in which order, and what it leaves alone when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distft.errors import CorruptArtifactError
from distft.export import stage
from distft.export.stage import export_run
from distft.store.location import PARTIAL, Location, open_location
from distft.store.manifest import read_manifest, verify_files
from distft.store.model_folder import ModelFolder
from tests.helpers.exporting import run_of, save_checkpoint, save_pretrained
from tests.helpers.models import tiny_model_folder

EXPORT = {"shard_bytes": 1 << 20, "dtype": "float32"}
SIZES: dict[str, Any] = {"hidden": 96, "layers": 5, "padded_rows": 2048, "tied": False}
"""Three files and more."""


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    tiny_model_folder(tmp_path / "model", **SIZES)
    return save_checkpoint(tmp_path, ranks=2, **EXPORT)


@pytest.fixture
def on_s3(tmp_path: Path, weights: dict[str, Tensor], s3_url: str) -> Location:
    """The same store there."""
    return copied(open_location(str(tmp_path / "store")), open_location(s3_url))


@pytest.fixture
def anywhere(tmp_path: Path, weights: dict[str, Tensor], store: Location) -> Location:
    """On the disk as it is, and on S3."""
    return copied(open_location(str(tmp_path / "store")), store)


def copied(here: Location, there: Location) -> Location:
    for name in here.names(recursive=True) if there != here else ():
        there.replace(name, here.read(name))
    return there


def export(folder: Path, store: Location | None = None, **changes: Any) -> Location:
    run, model, identity, here = run_of(folder, **{**EXPORT, **changes})
    export_run(run, model, identity, store or here)
    return (store or here).child("runs", "run", "model")


def exported(folder: Location, tmp_path: Path) -> dict[str, Tensor]:
    """All tensors of a folder that is whole."""
    manifest, found = read_manifest(folder), dict[str, Tensor]()
    assert manifest is not None
    verify_files(folder, manifest)
    assert sorted(folder.names(recursive=True)) == sorted(["MANIFEST.json", *(entry.name for entry in manifest.files)])
    for number, name in enumerate(name for name in folder.names() if name.endswith(".safetensors")):
        folder.download(name, tmp_path / f"fetched-{number}")
        found |= load_file(tmp_path / f"fetched-{number}")
    return found


def damage(folder: Location) -> None:
    """Flips a byte of the last weight that the second rank wrote: all others are read before it."""
    checkpoint = folder.child("checkpoints", "step-00000003")
    [name] = [name for name in checkpoint.names(recursive=True) if "rank-00001" in name]
    data = bytearray(checkpoint.read(name))
    head = 8 + int.from_bytes(data[:8], "little")
    data[head + (len(data) - head) // 3 - 1] ^= 1
    checkpoint.replace(name, bytes(data))


def test_the_settings_are_those_that_transformers_writes(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    from distft.store.model_folder import resolve_model

    folder, model = export(tmp_path), resolve_model(str(tmp_path / "model"), None)
    save_pretrained(model, weights, tmp_path / "old", shard_bytes=EXPORT["shard_bytes"])
    files = sorted(path.name for path in (tmp_path / "old").iterdir())
    assert len([name for name in files if name.startswith("model-")]) > 2
    ours = {name for name in folder.names() if name not in ("MANIFEST.json", "README.md")}
    assert ours == {*files, *(path.name for path in model.tokenizer_files())}
    for name in ("config.json", "generation_config.json"):
        assert folder.read(name) == (tmp_path / "old" / name).read_bytes()
    # Without advice of its makers transformers writes its own.
    (model.path / "generation_config.json").unlink()
    other = export(tmp_path, dtype="bfloat16")
    assert other.exists("generation_config.json")
    assert b'"dtype": "bfloat16"' in other.read("config.json")


def test_a_folder_on_disk_loads_with_its_tokenizer(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = export(tmp_path).local("config.json")
    assert path is not None
    whole: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype="auto", local_files_only=True)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in whole.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, local_files_only=True)
    assert tokenizer.decode(tokenizer("Hello")["input_ids"]) == "Hello"


def test_terms_come_along_and_the_base_models_card_does_not(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", "README.md"):
        (tmp_path / "model" / name).write_text(f"the base model's {name}")
    folder = export(tmp_path)
    for name in ("LICENSE", "LICENSE.txt", "NOTICE"):
        assert folder.read(name).decode() == f"the base model's {name}"
    assert b"the base model's" not in folder.read("README.md")


def test_on_s3_no_file_waits_for_another(
    tmp_path: Path, weights: dict[str, Tensor], on_s3: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sent = type(on_s3).upload, list[tuple[str, int]]()

    def upload(self: Any, name: str, path: Path) -> None:
        sent.append((name, len(list(path.parent.glob("*.safetensors")))))
        plain(self, name, path)

    monkeypatch.setattr(type(on_s3), "upload", upload)
    folder = export(tmp_path, on_s3)
    assert max(count for _, count in sent) == 1
    assert [name for name, _ in sent][-1] == "config.json"
    found = exported(folder, tmp_path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_damaged_checkpoint_is_named_and_leaves_the_model_that_was_there(tmp_path: Path, anywhere: Location) -> None:
    folder = export(tmp_path, anywhere)
    damage(anywhere.child("runs", "run"))
    with pytest.raises(CorruptArtifactError, match=r"step 3 is damaged and was set aside: data/rank-00001"):
        export(tmp_path, anywhere, dtype="bfloat16")
    assert {tensor.dtype for tensor in exported(folder, tmp_path).values()} == {torch.float32}
    assert not [*tmp_path.rglob(f"{PARTIAL}*")], "no scratch is left"


def test_a_damaged_checkpoint_gives_nothing_that_looks_whole(tmp_path: Path, anywhere: Location) -> None:
    damage(anywhere.child("runs", "run"))
    with pytest.raises(CorruptArtifactError, match="is damaged and was set aside"):
        export(tmp_path, anywhere)
    left = anywhere.child("runs", "run", "model").names(recursive=True)
    assert not {"MANIFEST.json", "config.json", "model.safetensors.index.json"} & {*left}
    assert anywhere.local("x") is None or left == []


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_export_gives_nothing_that_looks_whole(
    tmp_path: Path, weights: dict[str, Tensor], on_s3: Location, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sent = type(on_s3).upload, list[str]()

    def upload(self: Any, name: str, path: Path) -> None:
        if len(sent) == after:
            raise KeyboardInterrupt
        sent.append(name)
        plain(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(type(on_s3), "upload", upload)
        with pytest.raises(KeyboardInterrupt):
            export(tmp_path, on_s3)
    left = on_s3.child("runs", "run", "model").names(recursive=True)
    assert sorted(left) == sorted(sent)
    assert not {"MANIFEST.json", "config.json"} & {*left}
    assert exported(export(tmp_path, on_s3), tmp_path).keys() == weights.keys()


def test_what_cannot_be_streamed_is_written_the_plain_way_and_that_is_said(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(whole: Any, model: ModelFolder, *_: Any) -> None:
        return None

    monkeypatch.setattr(stage, "sources", none)
    folder = export(tmp_path)
    assert "transformers stores LlamaForCausalLM rearranged" in capsys.readouterr().err
    found = exported(folder, tmp_path)
    assert all(torch.equal(found[name], weights[name]) for name in found)
    assert found.keys() == weights.keys()


def test_progress_is_told_in_bytes(tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path)
    size = sum(tensor.nbytes for tensor in weights.values())
    assert f"export: {size:,} of {size:,} bytes" in capsys.readouterr().err
