"""What a step is said to have cost adds up, and is what was computed. Nothing here asserts how long anything took."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distft.engine.clock import Spent, StepClock
from distft.engine.memory import peak_bytes
from distft.engine.world import World
from distft.errors import TrainingError
from distft.store.local import LocalLocation
from distft.store.model_folder import resolve_model
from distft.train.events import FOLDER, Events, figures
from distft.train.flops import PEAKS, Arithmetic, device_peak, pairs
from distft.train.meters import MACHINE
from distft.train.metrics import MetricsLog
from distft.train.record import read_metrics
from tests.helpers.models import tiny_model_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import feed
from tests.helpers.stores import Lab, document, lab, random_documents


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    found = lab(
        tmp_path, documents=random_documents(12, seed=3), heldout=random_documents(3, seed=4),
        train={"max_steps": 4, "epochs": 4, "drift_every_steps": 2, "checkpoint": {"every_steps": 2}},
    )  # fmt: skip
    found.score()
    return found


def test_the_parts_of_a_step_add_up_to_it(made: Lab) -> None:
    made.train()
    for line in read_metrics(made.run_folder):
        parts = [line[f"{name}_seconds"] for name in ("data", "forward", "backward", "update", "other")]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(line["seconds"], rel=1e-6)
        assert min(line[f"{name}_seconds"] for name in ("forward", "backward", "update")) > 0
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert line["model_flops_per_second"] > 0
        assert "mfu" not in line, "nobody knows what a CPU can do at most"
        # the kernel's count is not exact to the page
        assert 1 << 20 < line["memory_bytes"] <= 1.1 * peak_bytes(torch.device("cpu"))
        assert line.keys() >= MACHINE - {"mfu"}


def test_a_lap_is_of_the_part_that_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("distft.engine.clock.time.perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    clock.start()  # of a step that failed
    clock.start()
    for part in ("forward", "backward", "forward", "backward", "update"):
        clock.lap(part)
    spent = clock.read()
    assert spent == Spent(forward=1 + 3, backward=2 + 4, update=5)
    assert spent.total == 15


def test_flops_are_those_that_are_counted(tmp_path: Path) -> None:
    """Two documents of one length, so that there is no padding and no document's attention is masked by another's. The counter sees
    plain attention over whole squares of which half is masked, and the formula half of each: that much is added to the formula. The
    counter does not know products that are added in place, as the gradient of the head's weights is: that one is added to its count.
    Left are norms, which the formula takes for matrices, and the rotary embedding's table, which it does not know."""
    path = tiny_model_folder(tmp_path / "model", vocabulary=280, hidden=64, layers=3, tied=False)
    model, length = resolve_model(str(path), None), 24
    tokens = np.random.default_rng(0).integers(5, 250, (2, length))
    documents = [document([int(t) for t in row], range(4, length)) for row in tokens]
    made = lab(tmp_path / "lab", documents=documents, model=model, objective={"kind": "sft"}, train={"micro_batch_tokens": 200})
    made = made.changed(model={"attention": "eager"})
    engine, step = made.engine(), feed(made).step(np.arange(2))
    [batch] = step.micro_batches
    assert batch.packed.tokens_RL.numel() == 2 * length
    with FlopCounterMode(display=False) as counter:
        loss, _ = engine.trained(batch)
        loss.backward()
    arithmetic, lengths = Arithmetic.of(model), np.array([length, length])
    masked = 2 * length**2 - pairs(lengths, None)
    expected = arithmetic.flops(lengths, step.headed) + 12 * arithmetic.heads * 3 * masked
    assert step.headed == 2 * (length - 4)
    in_place = 2 * arithmetic.head * step.headed
    assert counter.get_total_flops() + in_place == pytest.approx(expected, rel=0.01)


def test_who_sees_whom() -> None:
    def by_hand(length: int, window: int | None) -> int:
        return sum(1 for t in range(length) for s in range(t + 1) if window is None or t - s < window)

    for window in (None, 1, 4, 9, 100):
        lengths = np.array([1, 2, 5, 9, 30])
        assert pairs(lengths, window) == sum(by_hand(int(length), window) for length in lengths)


def test_layers_and_experts_are_counted_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = ["sliding_attention", "full_attention"]
    sliding = tiny_model_folder(tmp_path / "sliding", family="gemma3_text", layer_types=types, sliding_window=6)
    assert dict(Arithmetic.of(resolve_model(str(sliding), None)).layers) == {6: 1, None: 1}
    plain = resolve_model(str(tiny_model_folder(tmp_path / "plain")), None)
    tied = Arithmetic.of(plain)
    assert dict(tied.layers) == {None: 2}
    assert tied.active + tied.head == plain.parameter_count()
    assert tied.heads == 64
    untied = Arithmetic.of(resolve_model(str(tiny_model_folder(tmp_path / "untied", tied=False)), None))
    assert untied == tied, "an embedding multiplies nothing"
    monkeypatch.setattr(type(plain), "tensor_sizes", lambda self: Counter({"a": 10, "b.experts.0.w": 40, "b.experts.1.w": 40}))
    plain.config.update(num_experts=8, num_experts_per_tok=2)
    assert Arithmetic.of(plain).active == 10 + 20


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA B200", 2250e12),
        ("NVIDIA A10G", None), ("Tesla T4", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert device_peak(name) == peak


def test_a_plan_and_a_run_know_the_same_peaks() -> None:
    from distft.plan import estimate

    assert PEAKS["H100"] == estimate.H100_FLOPS


def spoilt(world: World, made: Lab) -> str:
    """The error of a step in which the last rank's last micro-batch has a weight that is no number."""
    from dataclasses import replace

    engine, mine = made.engine(world), feed(made, world).step(np.arange(8))
    batches = mine.micro_batches
    assert len(batches) > 1
    if world.rank == world.size - 1:
        bad = batches[-1]
        batches = [*batches[:-1], replace(bad, targets=replace(bad.targets, ce_N=bad.targets.ce_N * float("nan")))]
    with pytest.raises(TrainingError, match="nothing was updated") as told:
        engine.train_step(batches, normaliser=1.0, lr=1e-3)
    return json.dumps([told.value.where, list(mine.micro_batches[-1].documents)])


def test_a_loss_that_is_no_number_names_the_documents_of_its_micro_batch(made: Lab) -> None:
    where, documents = json.loads(spoilt(World(), made))
    assert where == ", ".join(documents)
    known = {f"{one.file}:{one.row} ({one.digest[:12]})" for one in made.corpus.documents("train")}
    assert documents
    assert set(documents) <= known


def test_every_rank_names_the_documents_of_the_one_that_met_them(made: Lab) -> None:
    small = made.changed(train={"micro_batch_tokens": 24, "engine": "local"})
    (first, _), (second, documents) = (json.loads(one) for one in run_ranks(spoilt, 2, small))
    assert first == second == f"{', '.join(documents)} (rank 1)"


def events(made: Lab) -> list[Any]:
    """Of the run's only event file, without a reader of TensorBoard's: each record is a length, a check, bytes and a check."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    folder = made.run_folder.child(FOLDER)
    [name] = folder.names()  # one file, however often the run was started
    data, found, start = folder.read(name), [], 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 8], "little")
        found.append(Event.FromString(data[start + 12 : start + 12 + size]))
        start += 16 + size
    return found


def assert_as_logged(made: Lab, steps: int) -> None:
    version, begun, *rest = events(made)
    assert version.file_version == "brain.Event:2"
    assert begun.session_log.status == 1
    lines = read_metrics(made.run_folder)
    assert [event.step for event in rest] == [line["step"] for line in lines] == list(range(1, steps + 1))
    for event, line in zip(rest, lines, strict=True):
        shown = {value.tag: value.simple_value for value in event.summary.value}
        assert shown == pytest.approx(figures(line), rel=1e-6)
        assert event.wall_time == line["time"]


def test_tensorboard_shows_the_log_and_nothing_else_after_a_resume(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.engine.local import LocalEngine

    plain, taken = LocalEngine.train_step, []

    def train_step(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "train_step", train_step)
        with pytest.raises(KeyboardInterrupt):
            made.train()
    assert_as_logged(made, 3)
    assert made.train()["resumed_from"] == 2
    assert_as_logged(made, 4)
    tags = {value.tag for event in events(made) for value in event.summary.value}
    assert {"loss/loss", "loss/kl", "share/ce", "time/data_seconds", "heldout/drift", "step/grad_norm", "step/tokens"} <= tags


def test_tensorboard_can_be_left_out(made: Lab) -> None:
    made.changed(train={"log": {"tensorboard": False}}).train()
    assert made.run_folder.child(FOLDER).names() == []


def test_who_follows_the_log_is_no_part_of_what_a_run_is(made: Lab) -> None:
    other = {"tensorboard": False, "mlflow": {"experiment": "e", "tracking_uri": "x"}}
    assert made.changed(train={"log": other}).run_identity() == made.run_identity()


class Remote(LocalLocation):
    """A store whose files are no files of this machine."""

    def child(self, *names: str) -> Remote:
        return Remote(super().child(*names).folder)

    def local(self, name: str) -> Path | None:
        return None


def test_a_store_that_is_no_disk_gets_events_at_checkpoints_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scratch = Remote(tmp_path / "run"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def stored() -> int:
        [*names] = run.child(FOLDER).names()
        assert len(names) <= 1
        return len(run.child(FOLDER).read(names[0])) if names else 0

    sizes = []
    for after, fails in ((0, True), (1, False)):
        with contextlib.suppress(KeyboardInterrupt), MetricsLog(run, after_step=after, followers=[Events(run)]) as log:
            for step in (after + 1, after + 2):
                log.add({"step": step, "tokens": 1, "loss": 1.0, "time": 5.0})
                sizes.append(stored())
                if step == 1:
                    log.flush()
                    sizes.append(stored())
            if fails:
                raise KeyboardInterrupt
        sizes.append(stored())
    none, first, unchanged, two, *meanwhile, three = sizes
    assert none == 0 < first == unchanged < two < three
    assert set(meanwhile) == {0}, "what an earlier start wrote is gone"
    assert not list(scratch.iterdir()), "nothing stays on this machine"
