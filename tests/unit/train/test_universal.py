"""DeepSpeed's universal format without DeepSpeed: what we write we read, and what is not as it should be is refused by name, with
nothing run and nothing committed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distft.engine.base import Slice, share
from distft.errors import ConfigError, CorruptArtifactError, DistftError, MissingArtifactError, ModelError, StaleArtifactError
from distft.store.manifest import Manifest, commit
from distft.train import exchange
from distft.train.exchange import export_universal, import_universal
from distft.train.rank_files import Memory, manifest_facts, put_rank_file
from distft.train.record import step_folder
from distft.train.universal import MODEL_STATES
from tests.helpers.quiet import no_memo  # noqa: F401
from tests.helpers.stores import Lab, bits, differing, lab, random_documents

STEP = 2
MATRIX, NORM, TIED = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"
RAN = "it-ran"


class Code:
    """What a pickle would do to whoever opens it without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    """A run that has steps 1 to 2 and more to come."""
    made = lab(
        tmp_path, documents=random_documents(20), objective={"kind": "sft"}, train={"checkpoint": {"every_steps": 1, "keep": 100}}
    )
    made.train()
    return made


@pytest.fixture
def exported(made: Lab, tmp_path: Path) -> Path:
    export(made, tmp_path / "exported", step=STEP)
    return tmp_path / "exported"


@pytest.fixture
def other(made: Lab) -> Lab:
    """A run of the same settings that has not begun."""
    return made.changed(name="other")


def export(made: Lab, folder: Path, step: int | None = None) -> dict[str, Any]:
    return export_universal(made.run, made.run_identity(), made.store, folder, step=step)


def take(made: Lab, folder: Path, step: int | None = None) -> dict[str, Any]:
    return import_universal(made.run, made.model, made.corpus, made.run_identity(), made.store, folder, step=step)


def refused(made: Lab, folder: Path, kind: type[DistftError], *says: str, step: int | None = None) -> None:
    """It is, and there is no checkpoint."""
    with pytest.raises(kind) as told:
        take(made, folder, step)
    assert all(one in told.value.problem for one in says), told.value.problem
    assert told.value.help
    assert made.checkpoints().steps() == []
    assert made.run_folder.child("checkpoints").names(recursive=True) in ([], ["OWNER.json"])


def file(folder: Path, name: str, stem: str) -> Path:
    [tag] = folder.glob("global_step*")
    return tag / "zero" / name / f"{stem}.pt"


def change(path: Path, by: Callable[[Tensor], Any]) -> None:
    found = torch.load(path, weights_only=True)
    torch.save(by(found["param"]), path)


def test_what_is_exported_is_imported_bit_for_bit_and_ends_alike(made: Lab, other: Lab, exported: Path) -> None:
    result = take(other, exported)
    assert result["step"] == STEP
    done = other.train()
    assert done["resumed_from"] == STEP
    assert differing(bits(made.restored()), bits(other.restored())) == []


def test_the_newest_is_exported_unless_a_step_is_named(made: Lab, tmp_path: Path) -> None:
    newest = made.checkpoints().steps()[-1]
    assert export(made, tmp_path / "newest")["step"] == newest
    assert (tmp_path / "newest" / "latest_universal").read_text() == f"global_step{newest}_universal"
    with pytest.raises(MissingArtifactError, match="no checkpoint of step 99") as told:
        export(made, tmp_path / "none", step=99)
    assert f"{newest}" in told.value.help
    assert not (tmp_path / "none").exists()
    with pytest.raises(MissingArtifactError, match="has no checkpoint"):
        export(made.changed(name="empty"), tmp_path / "none")


def test_a_folder_that_is_not_empty_is_left_alone(made: Lab, tmp_path: Path) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="full is there already"):
        export(made, full)
    assert [path.name for path in full.iterdir()] == ["mine"]
    export(made, empty)
    assert (empty / "latest_universal").is_file()


def test_one_that_fails_leaves_nothing(made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made.checkpoints().at(STEP)
    assert found is not None
    where, manifest = found
    path = where.local(manifest.files[0].name)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="damaged"):
        export(made, tmp_path / "below" / "exported", step=STEP)
    assert list((tmp_path / "below").iterdir()) == []


def test_files_of_several_ranks_are_put_together_a_few_parameters_at_a_time(
    made: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "TOGETHER", 3000)
    run, whole = made.changed(name="ranks"), bits(made.restored())
    where, names = step_folder(run.run_folder.child("checkpoints"), STEP), [n for n in whole if n.startswith("weight/")]
    entries = []
    for rank in range(3):
        slices = []
        for name in (name.removeprefix("weight/") for name in names):
            start, stop = share(whole[f"weight/{name}"].numel(), rank, 3)
            parts = {part: whole[f"{part}/{name}"].view(-1)[start:stop] for part in ("weight", "exp_avg", "exp_avg_sq")}
            slices.append(Slice(name=name, shape=tuple(whole[f"weight/{name}"].shape), start=start, **parts))
        entries.append(put_rank_file(where, Memory().copy(slices), rank))
    shapes = [(name.removeprefix("weight/"), tuple(whole[name].shape)) for name in names]
    facts = {"loss": 1.0, "drift": None, "total_steps": 9, **manifest_facts(shapes)}
    commit(
        where, Manifest(kind="checkpoint", identity={"step": STEP, "run": run.run_identity()}, files=tuple(entries), facts=facts)
    )
    export(run, tmp_path / "ranks")
    again = made.changed(name="again")
    take(again, tmp_path / "ranks")
    assert differing(whole, bits(again.restored())) == []


def test_flat_tensors_without_counts_are_those_of_zero3(other: Lab, exported: Path) -> None:
    for path in exported.rglob("*.pt"):
        if path.name == "step.pt":
            path.unlink()
        elif path.parent.parent.name == "zero":
            change(path, lambda tensor: tensor.flatten())
    assert take(other, exported)["step"] == STEP


def test_what_lower_stages_add_is_passed_over(other: Lab, exported: Path) -> None:
    """The converter writes tied weights by both names, one of them without moments."""
    path = file(exported, TIED, "fp32")
    path.parent.mkdir()
    shutil.copy(file(exported, "model.embed_tokens.weight", "fp32"), path)
    assert take(other, exported)["step"] == STEP


def test_no_folder_and_no_universal_one(other: Lab, exported: Path, tmp_path: Path) -> None:
    refused(other, tmp_path / "nowhere", ModelError, "nowhere is no checkpoint in DeepSpeed's universal format")
    (exported / "latest_universal").write_text("../exported")
    refused(other, exported, ModelError, "exported is no checkpoint")
    native = tmp_path / "native" / "tag"
    native.mkdir(parents=True)
    (native / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(ModelError) as told:
        take(other, tmp_path / "native")
    assert "ds_to_universal" in told.value.help


def test_parameters_that_are_missing_too_many_or_of_another_shape_are_named(other: Lab, exported: Path) -> None:
    shutil.rmtree(file(exported, NORM, "fp32").parent)
    shutil.copytree(file(exported, MATRIX, "fp32").parent, file(exported, "another.weight", "fp32").parent)
    change(file(exported, MATRIX, "exp_avg"), lambda tensor: {"param": tensor.T.contiguous()})
    refused(
        other, exported, ModelError, f"1 missing: {NORM}", "1 not the model's: another.weight",
        f"1 of another shape: {MATRIX}/exp_avg.pt [32, 64] instead of [64, 32]",
    )  # fmt: skip


def test_a_flat_tensor_has_the_shape_that_the_engine_told(other: Lab, exported: Path) -> None:
    change(file(exported, MATRIX, "fp32"), lambda tensor: tensor.flatten())
    [tag] = exported.glob("global_step*")
    states = torch.load(tag / MODEL_STATES[0], weights_only=True)
    states["param_shapes"][0][MATRIX] = torch.Size([32, 64])
    torch.save(states, tag / MODEL_STATES[0])
    refused(other, exported, ModelError, f"{MATRIX}/fp32.pt [32, 64] instead of [64, 32]")


@pytest.mark.parametrize(
    ("stem", "spoil", "says"),
    [
        ("fp32", lambda path, to: torch.save(Code(to), path), "cannot be read as tensors and plain values"),
        ("exp_avg", lambda path, to: torch.save({"param": Code(to)}, path), "cannot be read as tensors and plain values"),
        ("exp_avg", lambda path, to: path.write_bytes(path.read_bytes()[:-200]), "cannot be read as tensors and plain values"),
        ("exp_avg_sq", lambda path, to: path.write_bytes(b""), "cannot be read"),
        ("exp_avg_sq", lambda path, to: path.unlink(), "is not there"),
        ("fp32", lambda path, to: torch.save({"param": [1.0]}, path), "holds no plain tensor"),
        ("fp32", lambda path, to: change(path, lambda tensor: tensor.bfloat16()), "holds bfloat16 and not float32"),
        ("exp_avg", lambda path, to: change(path, lambda tensor: tensor * float("nan")), "are not finite"),
        ("exp_avg_sq", lambda path, to: change(path, lambda tensor: tensor - 1), "mean squares below 0"),
        ("step", lambda path, to: torch.save("two", path), "says two where steps are counted"),
        ("step", lambda path, to: torch.save(STEP + 1, path), f"taken {STEP} steps of"),
    ],
    ids=["code", "code inside", "truncated", "empty", "gone", "list", "dtype", "nan", "negative", "no count", "two counts"],
)  # fmt: skip
def test_a_file_that_is_not_as_it_should_be_is_named(
    stem: str, spoil: Callable[[Path, Path], None], says: str, other: Lab, exported: Path, tmp_path: Path
) -> None:
    spoil(file(exported, MATRIX, stem), tmp_path / RAN)
    refused(other, exported, ModelError, MATRIX, says)
    assert not (tmp_path / RAN).exists()


def test_what_the_engines_user_added_is_not_run_and_can_be_done_without(other: Lab, exported: Path, tmp_path: Path) -> None:
    [tag] = exported.glob("global_step*")
    for path in exported.rglob("step.pt"):
        path.unlink()
    torch.save({"global_steps": STEP, "args": Code(tmp_path / RAN)}, tag / MODEL_STATES[0])
    torch.save(Code(tmp_path / RAN), tag / "zero" / "optimizer_state.pt")
    refused(other, exported, ModelError, "model_states.pt cannot be read")
    assert take(other, exported, step=STEP)["step"] == STEP
    assert not (tmp_path / RAN).exists()


def test_the_step_is_the_optimizers(other: Lab, exported: Path) -> None:
    refused(other, exported, ConfigError, "--step is 3", f"has taken {STEP} steps", step=3)
    for path in exported.rglob("step.pt"):
        path.unlink()
    [tag] = exported.glob("global_step*")
    (tag / MODEL_STATES[0]).unlink()
    refused(other, exported, ConfigError, "does not say how many steps")
    refused(other, exported, ConfigError, "nothing would be left to train", step=10_000)
    assert take(other, exported, step=3)["step"] == 3


def test_steps_that_were_passed_over_are_not_the_optimizers(other: Lab, exported: Path) -> None:
    [tag] = exported.glob("global_step*")
    for path in exported.rglob("step.pt"):
        path.unlink()
    torch.save({"global_steps": STEP + 3, "skipped_steps": 3}, tag / MODEL_STATES[0])
    assert take(other, exported)["step"] == STEP


def test_a_run_that_has_begun_is_left_alone(made: Lab, other: Lab, exported: Path) -> None:
    steps, owner = made.checkpoints().steps(), made.run_folder.child("checkpoints").read("OWNER.json")
    with pytest.raises(StaleArtifactError, match="has begun: it has a checkpoint"):
        take(made, exported)
    assert made.checkpoints().steps() == steps
    assert made.run_folder.child("checkpoints").read("OWNER.json") == owner, "who trains it, elsewhere, would stop"
    other.run_folder.replace("metrics.jsonl", b'{"step": 1, "tokens": 5}\n')
    with pytest.raises(StaleArtifactError, match="1 lines in its log"):
        take(other, exported)


def test_every_later_checkpoint_says_where_the_run_began(other: Lab, exported: Path) -> None:
    origin = take(other, exported)["imported"]
    assert origin["from"] == "exported"
    stopped = other.checkpoints().newest()
    assert stopped is not None
    assert stopped[1].facts["loss"] is None
    other.train()
    newest = other.checkpoints().newest()
    assert newest is not None
    assert newest[1].identity["step"] > STEP
    assert newest[1].facts["imported"] == origin


def test_a_drift_budgets_control_begins_anew(made: Lab, exported: Path) -> None:
    """It is told, and what has not been measured is not claimed to be kept: a step at least is left."""
    held = made.changed(name="held", objective={"kind": "sft_kl", "drift_budget": 0.1})
    take_with = import_universal(held.run, held.model, held.corpus, {"any": "identity"}, held.store, exported)
    found = step_folder(held.run_folder.child("checkpoints"), STEP)
    assert take_with["step"] == STEP
    assert '"factor": 1.0' in found.read("MANIFEST.json").decode()
