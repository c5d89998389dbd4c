"""A run that stopped anywhere ends where the undisturbed one ends, bit for bit; and it never goes on from anything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distft import stopping
from distft.engine.local import LocalEngine
from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError, TrainingError
from distft.stopping import Interrupted
from distft.store.model_folder import resolve_model
from distft.train.checkpoint import Checkpoints
from distft.train.meters import MACHINE
from distft.train.record import read_metrics
from tests.helpers.models import tiny_model_folder
from tests.helpers.stores import Lab, bits, differing, lab, random_documents, shared_model, write_corpus

STEPS = 10


class Killed(BaseException):
    """Stands for a process that is no more."""


def train_until_killed(made: Lab, monkeypatch: pytest.MonkeyPatch, *, before: int) -> None:
    """The run dies when it would take this step, whatever it has done by then."""
    plain = LocalEngine.train_step
    taken: list[int] = []

    def train_step(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == before:
            raise Killed
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "train_step", train_step)
        with pytest.raises(Killed):
            made.train()


def prepared(folder: Path, **sections: Any) -> Lab:
    """Ten steps over two epochs, weighed down by all that a checkpoint must carry: clipping, decay, a schedule, drift."""
    documents = random_documents(40, seed=9)
    made = lab(
        folder, documents=documents, heldout=random_documents(4, seed=10),
        **{"train": {
            "tokens_per_step": 100, "epochs": 2, "max_steps": STEPS, "drift_every_steps": 5, "clip": 1.0, "lr": 3e-3,
            "warmup_steps": 2, "weight_decay": 0.1, "micro_batch_tokens": 48, "checkpoint": {"every_steps": 5, "keep": 2},
        }, **sections},
    )  # fmt: skip
    made.score()
    return made


def outcome(made: Lab) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The last checkpoint's weights and moments, and the metrics but for the clock."""
    lines = read_metrics(made.run_folder)
    return bits(made.restored()), [{k: v for k, v in line.items() if k not in MACHINE} for line in lines]


def assert_equal(one: tuple[dict[str, Tensor], list[Any]], two: tuple[dict[str, Tensor], list[Any]]) -> None:
    assert differing(one[0], two[0]) == []
    assert one[1] == two[1]
    assert len(one[1]) == STEPS


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "stm_kl": {"objective": {"kind": "stm_kl", "tau": 20.0}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_a_restart_and_five_more_are_ten(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = prepared(tmp_path / "straight", **KINDS[kind]), prepared(tmp_path / "broken", **KINDS[kind])
    whole = straight.train()
    assert (whole["steps"], whole["resumed_from"]) == (STEPS, None)
    train_until_killed(broken, monkeypatch, before=8)
    assert broken.checkpoints().steps() == [5]
    resumed = broken.train()
    assert (resumed["steps"], resumed["resumed_from"]) == (STEPS, 5)
    assert (resumed["loss"], resumed["drift"]) == (whole["loss"], whole["drift"])
    assert_equal(outcome(straight), outcome(broken))
    # and something was learnt meanwhile: the weights are not the model's
    assert differing(bits(straight.engine()), bits(straight.restored()))


def test_dropout_draws_the_same_numbers_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model_folder(tmp_path / "model", vocabulary=280, hidden=32, initializer_range=0.5, attention_dropout=0.3)
    model = resolve_model(str(path), None)
    straight, broken = prepared(tmp_path / "straight", model=model), prepared(tmp_path / "broken", model=model)
    straight.train()
    train_until_killed(broken, monkeypatch, before=9)
    broken.train()
    assert_equal(outcome(straight), outcome(broken))


def test_a_run_that_is_asked_to_stop_keeps_the_last_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = prepared(tmp_path / "straight"), prepared(tmp_path / "broken")
    straight.train()
    answers = iter([False] * 7 + [True])
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "requested", lambda: next(answers))
        with pytest.raises(Interrupted, match="step 7"):
            broken.train()
    assert broken.checkpoints().steps() == [5, 7]
    newest = broken.checkpoints().newest()
    assert newest is not None
    measured = [line["drift"] for line in read_metrics(broken.run_folder) if "drift" in line]
    assert newest[1].facts["drift"]["kl"] == measured[-1], "what was measured last is kept with the last step"
    assert broken.train()["resumed_from"] == 7
    assert_equal(outcome(straight), outcome(broken))


def newest_file(made: Lab) -> Path:
    where, manifest = made.checkpoints().newest() or pytest.fail("no checkpoint")
    [entry] = manifest.files
    path = where.local(entry.name)
    assert path is not None
    return path


def flip(path: Path, place: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["weight", "exp_avg", "exp_avg_sq", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"checkpoint": {"every_steps": 3, "keep": 2}}
    straight, broken = prepared(tmp_path / "straight"), prepared(tmp_path / "broken").changed(train=settings)
    straight.train()
    train_until_killed(broken, monkeypatch, before=8)
    assert broken.checkpoints().steps() == [3, 6]
    newest = newest_file(broken)
    if damage == "missing":
        newest.unlink()
    elif damage == "manifest":
        flip(newest.parent.parent / "MANIFEST.json", 40)
    else:
        flip(newest, {"weight": 1, "exp_avg": 3, "exp_avg_sq": 5}[damage] * newest.stat().st_size // 6)
    capsys.readouterr()
    assert broken.train()["resumed_from"] == 3
    assert "step-00000006" in capsys.readouterr().err
    assert_equal(outcome(straight), outcome(broken))


def test_only_damaged_checkpoints_are_no_fresh_start_until_somebody_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = prepared(tmp_path / "straight"), prepared(tmp_path / "broken")
    straight.train()
    train_until_killed(broken, monkeypatch, before=8)
    flip(newest_file(broken))
    with pytest.raises(CorruptArtifactError, match="No checkpoint of this run is whole"):
        broken.train()
    assert broken.train()["resumed_from"] is None
    assert_equal(outcome(straight), outcome(broken))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"train": {"lr": 1e-4}}, "train.lr"),
    "seed": ({"train": {"seed": 5}}, "train.seed"),
    "weight of the divergence": ({"objective": {"kind": "sft_kl", "kl": 2.0}}, "objective.kl"),
    "objective": ({"objective": {"kind": "sft"}}, "objective.kind"),
    "tokens per step": ({"train": {"tokens_per_step": 90}}, "train.tokens_per_step"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_not_taken_up_under_other_settings(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(tmp_path)
    train_until_killed(made, monkeypatch, before=7)
    before = sorted(made.run_folder.names(recursive=True))
    sections, field = CHANGES[change]
    with pytest.raises(StaleArtifactError, match=field) as caught:
        made.changed(**sections).train()
    assert "name" in caught.value.help
    assert sorted(made.run_folder.names(recursive=True)) == before


def test_a_run_is_not_taken_up_on_another_corpus_or_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(tmp_path)
    train_until_killed(made, monkeypatch, before=7)
    corpus = write_corpus(made.store, made.staging, train=random_documents(40, seed=11), heldout=random_documents(4, seed=10))
    other = replace(made, corpus=corpus)
    other.score()
    with pytest.raises(StaleArtifactError, match=r"corpus\.train"):
        other.train()
    stranger = replace(made, model=shared_model(seed=1))
    stranger.score()
    with pytest.raises(StaleArtifactError, match=r"(?s)teacher.*weights\.files"):
        stranger.train()


def test_what_changes_no_weight_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, checkpoints and the drift meter are the machine's business, and so is the held-out split."""
    made = prepared(tmp_path)
    train_until_killed(made, monkeypatch, before=7)
    other = made.changed(
        train={"micro_batch_tokens": 1000, "checkpoint": {"every_steps": 2, "keep": 1}, "drift_every_steps": None}
    )
    assert other.train()["resumed_from"] == 5


def test_a_finished_run_returns_without_loading_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(tmp_path)
    first = made.train()
    monkeypatch.setattr("distft.engine.choose.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert made.train() == {**first, "resumed_from": STEPS}


def test_a_cut_off_line_of_metrics_is_left_out_and_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = prepared(tmp_path / "straight"), prepared(tmp_path / "broken")
    straight.train()
    train_until_killed(broken, monkeypatch, before=8)
    path = broken.run_folder.local("metrics.jsonl")
    assert path is not None
    text = path.read_text()
    assert len(text.splitlines()) == 7  # two more than the checkpoint knows
    path.write_text(text[:-20])
    broken.train()
    assert_equal(outcome(straight), outcome(broken))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, STEPS + 1))


def test_a_loss_that_is_no_number_updates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops with the step and its rows; the last checkpoint is whole."""
    made = prepared(tmp_path)
    plain = LocalEngine.train_step
    weights: list[dict[str, Tensor]] = []
    taken: list[int] = []

    def train_step(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 6:
            self.model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
            weights.append(bits(self))
            try:
                return plain(self, *args, **kwargs)
            finally:
                weights.append(bits(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "train_step", train_step)
    with pytest.raises(TrainingError, match="gradient norm nan") as caught:
        made.train()
    assert "step 6" in caught.value.where
    assert "step 5" in caught.value.help
    assert differing(weights[0], weights[1]) == []
    assert made.checkpoints().steps() == [5]


def test_a_step_without_a_weighted_token_is_an_error_not_a_silent_skip(tmp_path: Path) -> None:
    made = prepared(tmp_path, objective={"kind": "stm", "tau": 1.0000001})
    with pytest.raises(TrainingError, match="masks all") as caught:
        made.train()
    assert caught.value.where == "step 1"


def test_checkpoints_hold_no_pickle_and_old_ones_go(tmp_path: Path) -> None:
    made = prepared(tmp_path).changed(train={"checkpoint": {"every_steps": 1, "keep": 2}})
    made.train()
    folder = made.run_folder.child("checkpoints")
    assert made.checkpoints().steps() == [9, 10]
    names = [name for name in folder.names(recursive=True) if name != "OWNER.json"]
    assert len(names) == 4
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"}
    with pytest.raises(MissingArtifactError):
        folder.read("step-00000001/MANIFEST.json")


def test_a_restored_engine_is_the_one_that_was_saved(tmp_path: Path) -> None:
    """Weights and both moments, bit for bit, in float32 even where the passes run in bfloat16."""
    made = prepared(tmp_path, dtype="bfloat16")
    made.train()
    saved = bits(made.restored())
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    again = Checkpoints(made.run_folder.child("again"), made.run_identity(), keep=1)
    again.save(STEPS, made.restored(), {})
    again.finish()
    engine = made.engine()
    assert again.restore(engine) is not None
    assert differing(saved, bits(engine)) == []
    rounded = [name for name, tensor in saved.items() if not torch.equal(tensor, tensor.bfloat16().float())]
    assert any(name.startswith("weight/") for name in rounded)  # it is the float32 weights that are kept
    assert any(name.startswith("exp_avg_sq/") for name in rounded)
