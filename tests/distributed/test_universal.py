"""DeepSpeed's universal format, both ways, with DeepSpeed itself at the other end: its loader takes what we export, and what its
converter writes becomes a run that goes on. The engines at that end are plain ones on two ranks, started once for both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distft.engine.world import World
from distft.store.model_folder import resolve_model
from distft.train.exchange import export_universal, import_universal
from distft.train.record import read_metrics
from tests.helpers.models import tiny_model_folder
from tests.helpers.plain import Plain
from tests.helpers.quiet import no_memo, one_thread  # noqa: F401
from tests.helpers.ranks import run_ranks
from tests.helpers.stores import Lab, bits, differing, lab, random_documents

AFTER = 3
"""The step that is handed over."""
TRAIN = {"clip": None, "lr": 1e-3, "epochs": 2, "tokens_per_step": 64, "workers": 1, "engine": "local"}


@dataclass(frozen=True)
class There:
    """What a rank's engines, ours nowhere among them, have to tell."""

    loaded: dict[str, Tensor]
    """What our export became."""
    state: dict[str, Any]
    counts: list[Any]
    """The optimizer's steps by group."""
    stepped: dict[str, Tensor]
    """And what the next step made of it."""
    loss: float
    saved: dict[str, Tensor]
    """What another engine had saved of another model."""
    next_loss: float


def there(world: World, ours: Lab, exported: str, theirs: Lab, native: str) -> There:
    torch.set_num_threads(1)
    plain = Plain(ours.model, ours.run.train, ours.corpus, world, universal=True)
    state = plain.load(exported)
    loaded = plain.tensors()
    counts = [one["step"] for one in plain.engine.optimizer.optimizer.state.values()]
    plain.count_apart(plain.engine.global_steps)
    loss = plain.step(AFTER + 1)
    stepped = plain.tensors()

    other = Plain(theirs.model, theirs.run.train, theirs.corpus, world)
    for step in range(1, AFTER + 1):
        other.step(step)
    other.engine.save_checkpoint(native, tag="theirs", client_state={"note": "anything plain"})
    saved = other.tensors()
    return There(loaded, state, counts, stepped, loss, saved, other.step(AFTER + 1))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Lab, Path, list[There]]]:
    before = os.environ.get("DISTFT_CACHE_DIR")
    os.environ["DISTFT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("universal")
    tied, untied = (run_of(folder / name, tied=name == "tied") for name in ("tied", "untied"))
    tied.train()
    export_universal(tied.run, tied.run_identity(), tied.store, folder / "exported", step=AFTER)
    found = run_ranks(there, 2, tied, str(folder / "exported"), untied, str(folder / "native"))
    yield tied, untied, folder, found
    if before is not None:
        os.environ["DISTFT_CACHE_DIR"] = before


def run_of(folder: Path, *, tied: bool) -> Lab:
    """A run that keeps every step."""
    tiny_model_folder(folder / "model", tied=tied, seed=1, vocabulary=280, hidden=32, initializer_range=0.5)
    return lab(
        folder, documents=random_documents(20, seed=5), model=resolve_model(str(folder / "model"), None), objective={"kind": "sft"},
        train={**TRAIN, "checkpoint": {"every_steps": 1, "keep": 100}},
    )  # fmt: skip


def kept(made: Lab, step: int) -> dict[str, Tensor]:
    """Weights and moments of the checkpoint of a step."""
    from distft.train.rank_files import read_slices

    found = made.checkpoints().at(step)
    assert found is not None
    engine, (where, manifest) = made.engine(), found
    engine.restore_slices(read_slices(where, manifest, engine.wanted()), optimizer_steps=step)
    return bits(engine)


def test_deepspeed_loads_what_is_exported_bit_for_bit(both: tuple[Lab, Lab, Path, list[There]]) -> None:
    tied, _, _, found = both
    expected = kept(tied, AFTER)
    assert not any("lm_head" in name for name in expected), "it is tied"
    for rank in found:
        assert differing(expected, rank.loaded) == []
        assert [(type(count), count) for count in rank.counts] == [(int, AFTER)] * 2, "a tensor would be shared by both groups"
        told = rank.state["distft"]
        assert (told["step"], told["weight_decay"]) == (AFTER, {"matrices": 0.1, "norms and biases": 0.0})


def test_its_next_step_is_ours(both: tuple[Lab, Lab, Path, list[There]]) -> None:
    tied, _, _, found = both
    expected, before = kept(tied, AFTER + 1), kept(tied, AFTER)
    line = next(line for line in read_metrics(tied.run_folder) if line["step"] == AFTER + 1)
    for rank in found:
        assert rank.loss == pytest.approx(line["loss"], rel=1e-6)
        assert rank.stepped.keys() == expected.keys()
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            names = [name for name in expected if name.startswith(f"{part}/")]
            mine, theirs, old = (
                torch.cat([one[name].flatten() for name in names]).double() for one in (expected, rank.stepped, before)
            )
            assert (mine - theirs).norm() <= 1e-6 * mine.norm()
            assert (mine - theirs).norm() <= 1e-4 * (mine - old).norm(), "it is what was there that agrees, not the step"


def test_what_deepspeed_converts_is_imported_bit_for_bit_and_training_goes_on(both: tuple[Lab, Lab, Path, list[There]]) -> None:
    _, untied, folder, found = both
    converted = folder / "native" / "theirs_universal"
    convert(folder / "native" / "theirs", converted)
    result = import_universal(untied.run, untied.model, untied.corpus, untied.run_identity(), untied.store, converted)
    assert (result["step"], result["imported"]["from"]) == (AFTER, "theirs_universal")
    assert differing(found[0].saved, bits(untied.restored())) == []

    done = untied.train()
    assert done["resumed_from"] == AFTER
    lines = read_metrics(untied.run_folder)
    assert [line["step"] for line in lines] == list(range(AFTER + 1, done["steps"] + 1))
    assert lines[0]["loss"] == pytest.approx(found[0].next_loss, rel=1e-6)
    last = untied.checkpoints().newest()
    assert last is not None
    assert last[1].facts["imported"] == result["imported"], "no later checkpoint passes for one of this run alone"


def second_stage(world: World, made: Lab, native: str) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    plain = Plain(made.model, made.run.train, made.corpus, world, stage=2)
    for step in range(1, AFTER + 1):
        plain.step(step)
    plain.engine.save_checkpoint(native, tag="theirs")
    return {f"weight/{name}": parameter.detach().clone() for name, parameter in plain.engine.module.named_parameters()}


@pytest.mark.slow
def test_what_a_lower_stage_saved_is_imported_as_well(tmp_path: Path) -> None:
    """Its tied weight has a second name there, and no moments."""
    made = run_of(tmp_path / "run", tied=True)
    saved, _ = run_ranks(second_stage, 2, made, str(tmp_path / "native"))
    convert(tmp_path / "native" / "theirs", tmp_path / "converted", "--inject_missing_state")
    assert (tmp_path / "converted" / "zero" / "lm_head.weight" / "fp32.pt").is_file()
    import_universal(made.run, made.model, made.corpus, made.run_identity(), made.store, tmp_path / "converted")
    found = bits(made.restored())
    assert differing(saved, {key: tensor for key, tensor in found.items() if key.startswith("weight/")}) == []
    for key, tensor in found.items():
        part, name = key.split("/")
        if part != "weight":
            written = torch.load(tmp_path / "converted" / "zero" / name / f"{part}.pt", weights_only=True)
            assert torch.equal(written["param"].view_as(tensor), tensor)
            assert tensor.any()
    assert made.train()["resumed_from"] == AFTER


def convert(native: Path, converted: Path, *more: str) -> None:
    """DeepSpeed's own converter, in a process of its own."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(native), "--output_folder",
               str(converted), "--num_extract_workers", "1", "--num_merge_workers", "1", *more]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
