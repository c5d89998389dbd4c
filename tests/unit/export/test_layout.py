"""What is streamed to disk is what transformers would have written with all of the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distft.engine.sharded import blank_model
from distft.errors import ModelError
from distft.export import layout
from distft.export.layout import shards, sources
from distft.store.model_folder import ModelFolder
from tests.helpers.exporting import ARCHITECTURES, architecture, random_weights, save_pretrained, stream
from tests.helpers.stores import FAMILIES, shared_model


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].dtype == two[name].dtype and one[name].equal(two[name]) for name in one)


def described(model: ModelFolder) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in blank_model(model, dtype="float32").named_parameters()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_is_the_one_that_transformers_writes(tmp_path: Path, family: str, dtype: str) -> None:
    model = shared_model(family)
    weights = random_weights(model)
    stream(model, weights, tmp_path / "new", dtype=dtype)
    save_pretrained(model, weights, tmp_path / "old", dtype=dtype)
    assert same(stored(tmp_path / "new"), stored(tmp_path / "old"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_that_are_stored_otherwise_are_stored_so(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = architecture(tmp_path / "model", name)
    weights = random_weights(model)
    stream(model, weights, tmp_path / "new", shard_bytes=20_000)
    save_pretrained(model, weights, tmp_path / "old")
    assert same(stored(tmp_path / "new"), stored(tmp_path / "old"))
    (tmp_path / "new" / "config.json").write_bytes((tmp_path / "old" / "config.json").read_bytes())
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32, local_files_only=True)
    parameters = dict(again.named_parameters())
    assert all(torch.equal(parameters[key], weights[key]) for key in weights)


@pytest.mark.parametrize("shard_bytes", [3_000, 20_000, 40_000])
def test_files_are_no_larger_than_asked_and_the_index_names_every_tensor(tmp_path: Path, shard_bytes: int) -> None:
    model = shared_model("llama_untied_padded")
    weights = random_weights(model)
    files = stream(model, weights, tmp_path / "new", shard_bytes=shard_bytes)
    save_pretrained(model, weights, tmp_path / "old", shard_bytes=shard_bytes)
    assert len(files) > 1
    assert all(file.size <= shard_bytes or len(file.tensors) == 1 for file in files)
    mine, theirs = (json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("new", "old"))
    assert mine["metadata"] == theirs["metadata"]
    assert mine["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path / "new").values())
    assert mine["weight_map"].keys() == theirs["weight_map"].keys()
    for name, file in mine["weight_map"].items():
        with safe_open(tmp_path / "new" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  (safe_open is no dict)
            assert opened.metadata() == {"format": "pt"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model.safetensors.index.json", *mine["weight_map"].values()}


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    model = shared_model()
    stream(model, random_weights(model), tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_what_transformers_keeps_in_float32_stays_so_and_begins_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    whole: Any = blank_model(model, dtype="bfloat16")
    whole._keep_in_fp32_modules_strict = {"norm"}
    found = sources(whole, model, described(model), "bfloat16")
    assert found is not None
    kinds = {source.name: source.dtype for source in found}
    assert {kinds[name] for name in kinds if "norm" in name} == {torch.float32}
    assert {kinds[name] for name in kinds if "norm" not in name} == {torch.bfloat16}
    odd = [layout.Stored("a", (3,), torch.bfloat16), layout.Stored("b", (2,), torch.float32)]
    made = [layout.Source(one.name, one.shape, one.dtype, (one,), plain=True) for one in odd]
    assert [len(file.tensors) for file in shards(made, 1 << 20)] == [1, 1]


def test_a_checkpoint_of_another_model_is_a_bug(tmp_path: Path) -> None:
    model = shared_model()
    trained, whole = described(model), blank_model(model, dtype="float32")
    with pytest.raises(RuntimeError, match="has no such"):
        sources(whole, model, [*trained, ("model.other", (3,))], "float32")
    with pytest.raises(RuntimeError, match="has no such"):
        sources(whole, model, [(trained[0][0], (3,)), *trained[1:]], "float32")
    with pytest.raises(RuntimeError, match="no weights for"):
        sources(whole, model, trained[:-1], "float32")


def test_a_buffer_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = architecture(tmp_path / "model", "deepseek_v3")
    [file] = model.weight_files()
    tensors = {name: tensor for name, tensor in load_file(file).items() if "e_score" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"have no model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        sources(blank_model(model, dtype="float32"), model, described(model), "float32")


@pytest.mark.parametrize("alone", ["another shape", "an error"])
def test_what_transformers_makes_of_several_parameters_together_is_not_streamed(
    alone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    model = shared_model()  # made before the patch, which its own saving would meet

    def joined(whole: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        keys = [name for name in state if "_proj" in name]
        if alone == "an error" and len(keys) == 1:
            raise KeyError("the others")
        return {name: tensor for name, tensor in state.items() if name not in keys} | {
            "all": torch.empty(len(keys), device="meta")
        }

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", joined)
    assert sources(blank_model(model, dtype="float32"), model, described(model), "float32") is None
