"""Model folders: what is in them, what identifies them, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from distft.errors import ModelError
from distft.store.model_folder import HEADER_LIMIT, ModelFolder, resolve_model

CONFIG = {
    "architectures": ["B", "A"], "vocab_size": 50, "hidden_size": 4, "torch_dtype": "bfloat16", "transformers_version": "5.0",
    "_name_or_path": "here", "use_cache": True, "rope": {"theta": 1e4, "dtype": "float32"},
}  # fmt: skip
TOKENIZER_CONFIG = {"eos_token": "</s>", "chat_template": "{{ messages }}", "name_or_path": "here"}


@pytest.fixture(autouse=True)
def _memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTFT_CACHE_DIR", str(tmp_path / "cache"))


def write(folder: Path, name: str, document: Any) -> None:
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model of 50 x 4 + 4 x 4 numbers, with a tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "config.json", CONFIG)
    save_file({"embed": np.zeros((50, 4), np.float32)}, folder / "model-00001-of-00002.safetensors")
    save_file({"layer": np.ones((4, 4), np.float16)}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    names = {"embed": "model-00001-of-00002.safetensors", "layer": "model-00002-of-00002.safetensors"}
    write(folder, "model.safetensors.index.json", {"weight_map": names})
    write(folder, "tokenizer.json", {"model": {}})
    write(folder, "tokenizer_config.json", TOKENIZER_CONFIG)
    write(folder, "special_tokens_map.json", {"eos_token": "</s>"})
    return folder


def model(folder: Path) -> ModelFolder:
    return resolve_model(str(folder), None)


def test_a_folder_is_described(folder: Path) -> None:
    found = model(folder)
    assert found.path == folder
    assert found.config == CONFIG
    assert [path.name for path in found.weight_files()] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [path.name for path in found.tokenizer_files()] == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert found.parameter_count() == 50 * 4 + 4 * 4
    assert found.vocabulary_rows() == 50


def test_a_single_file_and_bare_shards_are_weights_too(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert len(model(folder).weight_files()) == 2
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")
    assert [path.name for path in model(folder).weight_files()] == ["model.safetensors"]


def test_a_model_of_text_and_more_has_its_vocabulary_inside(folder: Path) -> None:
    write(folder, "config.json", {"text_config": {"vocab_size": 77}})
    assert model(folder).vocabulary_rows() == 77
    write(folder, "config.json", {"text_config": {"vocab_size": "77"}})
    with pytest.raises(ModelError, match="no vocab_size"):
        model(folder).vocabulary_rows()


def test_identity_is_the_contents_and_not_the_place(folder: Path) -> None:
    before = model(folder)
    weights, tokenizer = before.weights_identity(), before.tokenizer_identity()
    moved = folder.rename(folder.with_name("elsewhere"))
    noise = {
        "torch_dtype": "float32",
        "_name_or_path": "there",
        "use_cache": False,
        "transformers_version": "6",
        "architectures": ["A", "B"],
    }
    write(moved, "config.json", dict(reversed((CONFIG | noise).items())))
    write(moved, "tokenizer_config.json", TOKENIZER_CONFIG | {"name_or_path": "there"})
    assert model(moved).weights_identity() == weights
    assert model(moved).tokenizer_identity() == tokenizer
    assert str(folder.parent) not in json.dumps([weights, tokenizer])


@pytest.mark.parametrize("change", [{"vocab_size": 51}, {"rope": {"theta": 2e4}}, {"new": None}, {"architectures": ["C"]}])
def test_settings_that_mean_something_change_the_identity(folder: Path, change: dict[str, Any]) -> None:
    before = model(folder).weights_identity()
    write(folder, "config.json", CONFIG | change)
    after = model(folder).weights_identity()
    assert after["config"] != before["config"]
    assert after["files"] == before["files"]


def test_a_changed_weight_changes_the_identity(folder: Path) -> None:
    before = model(folder).weights_identity()
    save_file({"layer": np.zeros((4, 4), np.float16)}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    after = model(folder).weights_identity()
    changed = [name for name in before["files"] if before["files"][name] != after["files"][name]]
    assert changed == ["model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("name", "document", "changed"),
    [
        ("tokenizer.json", {"model": {"a": 1}}, {"vocabulary"}),
        ("tokenizer_config.json", TOKENIZER_CONFIG | {"eos_token": "<e>"}, {"special"}),
        ("special_tokens_map.json", {"eos_token": "<e>"}, {"special"}),
        ("tokenizer_config.json", TOKENIZER_CONFIG | {"chat_template": "{{ other }}"}, {"template"}),
        ("chat_template.jinja", "{{ other }}", {"template"}),
        ("chat_template.jinja", "{{ messages }}", set()),
        ("chat_template.json", {"chat_template": "{{ ignored }}"}, set()),
        (
            "tokenizer_config.json",
            TOKENIZER_CONFIG | {"chat_template": [{"name": "default", "template": "{{ messages }}"}]},
            set(),
        ),
        ("vocab.json", {"unused beside": "tokenizer.json"}, set()),
    ],
)
def test_each_part_of_the_tokenizer_has_its_field(folder: Path, name: str, document: Any, changed: set[str]) -> None:
    before = model(folder).tokenizer_identity()
    write(folder, name, document)
    after = model(folder).tokenizer_identity()
    assert {key for key in before if before[key] != after[key]} == changed


def test_a_tokenizer_without_a_template_says_so_with_an_empty_field(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {})
    assert model(folder).tokenizer_identity()["template"] == ""
    write(folder, "chat_template.json", {"chat_template": "{{ messages }}"})
    assert len(model(folder).tokenizer_identity()["template"]) == 64


def test_sentencepiece_and_word_lists_are_vocabularies(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        model(folder).tokenizer_identity()
    write(folder, "vocab.json", {"a": 0})
    write(folder, "merges.txt", "a b")
    before = model(folder).tokenizer_identity()["vocabulary"]
    write(folder, "merges.txt", "b a")
    assert model(folder).tokenizer_identity()["vocabulary"] != before


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        model(folder).weight_files()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "pytorch_model.bin", 7, ""])
def test_an_index_that_names_anything_else_is_refused(folder: Path, name: Any) -> None:
    save_file({"x": np.zeros(1)}, folder.parent / "other.safetensors")
    write(folder, "pytorch_model.bin", "x")
    write(folder, "model.safetensors.index.json", {"weight_map": {"x": name}})
    with pytest.raises(ModelError, match="index"):
        model(folder).weight_files()


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(folder: Path, index: str) -> None:
    write(folder, "model.safetensors.index.json", index)
    with pytest.raises(ModelError, match="index"):
        model(folder).weight_files()


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match="both"):
        model(folder).weight_files()


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no weights.*it holds config\.json"):
        model(folder).weight_files()
    write(folder, "pytorch_model.bin", "x")
    with pytest.raises(ModelError, match="pickled") as told:
        model(folder).weight_files()
    assert "save_pretrained" in told.value.help


def test_an_adapter_is_no_model(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    save_file({"x": np.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="adapter"):
        model(folder).weight_files()


def test_models_that_bring_code_are_refused(folder: Path) -> None:
    write(folder, "config.json", CONFIG | {"auto_map": {"AutoModel": "modeling.Model"}})
    with pytest.raises(ModelError, match="auto_map"):
        model(folder)


@pytest.mark.parametrize("config", ["{", "[]", "\0"])
def test_a_config_that_is_none_is_refused(folder: Path, config: str) -> None:
    write(folder, "config.json", config)
    with pytest.raises(ModelError, match=r"config\.json"):
        model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        model(folder)


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\1\2", header("{}", length=2**63), header("{}", length=HEADER_LIMIT + 1), header("{}", length=3), header("["),
        header("[]"),
        header('{"x": 3}'), header('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        header('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', bytes(8)),
        header('{"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}', bytes(8)),
        header('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', bytes(8)),
        header('{"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}', bytes(8)),
        header('{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', bytes(8)),
    ],
)  # fmt: skip
def test_a_safetensors_header_is_not_trusted(folder: Path, data: bytes) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not a sound safetensors file"):
        model(folder).parameter_count()


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ModelError, match="no revision 'main'"):
        resolve_model(str(folder), "main")


def test_neither_a_folder_nor_on_the_hub(tmp_path: Path) -> None:
    ask = (
        "import sys\nfrom distft.errors import ModelError\nfrom distft.store.model_folder import resolve_model\n"
        "for name in sys.argv[1:]:\n    try:\n        resolve_model(name, None)\n"
        "    except ModelError as error:\n        print(error.problem)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    names = ["nobody/nothing", "./no/such/folder", "a b", str(tmp_path / "nothing")]
    done = subprocess.run([sys.executable, "-c", ask, *names], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert all("is neither a folder nor reachable on the hub" in line for line in lines[:4])
    assert lines[4] == "False False"


@pytest.mark.parametrize(
    ("heads", "keys", "ranks", "holds"), [(9, 3, 3, True), (9, 3, 1, True), (9, 3, 4, False), (8, 2, 4, False)]
)
def test_heads_are_shared_whole_or_not_at_all(tmp_path: Path, heads: int, keys: int, ranks: int, holds: bool) -> None:
    folder = ModelFolder(tmp_path, {"num_attention_heads": heads, "num_key_value_heads": keys})
    if holds:
        folder.check_shared_by(ranks)
        return
    with pytest.raises(ModelError, match=f"among {ranks} ranks: it has {heads}, with {keys}") as caught:
        folder.check_shared_by(ranks)
    assert caught.value.help == f"Set score.tensor_parallel to one of 1, {keys}."


@pytest.mark.parametrize(
    ("heads", "keys", "possible"),
    [(8, 2, [1, 2, 4, 8]), (8, 1, [1, 2, 4, 8]), (9, 3, [1, 3, 9]), (12, 4, [1, 2, 4, 12]), (14, 2, [1, 2, 14])],
)
def test_rows_are_shared_by_ranks_that_each_have_whole_heads(tmp_path: Path, heads: int, keys: int, possible: list[int]) -> None:
    folder = ModelFolder(tmp_path, {"text_config": {"num_attention_heads": heads, "num_key_value_heads": keys}})
    for ranks in range(1, heads + 2):
        if ranks in possible:
            folder.check_rows_shared_by(ranks)
            continue
        with pytest.raises(ModelError, match=f"among {ranks} ranks: it has {heads}, with {keys}") as caught:
            folder.check_rows_shared_by(ranks)
        assert caught.value.help == f"Set train.sequence_parallel to one of {', '.join(map(str, possible))}."
