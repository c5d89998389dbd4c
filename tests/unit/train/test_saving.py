"""Checkpoints of several ranks: written while training goes on, whole or not at all, and read by any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from distft.engine.local import LocalEngine
from distft.engine.world import World
from distft.errors import CorruptArtifactError, DistftError, StaleArtifactError, StoreError
from distft.train import checkpoint
from distft.train.checkpoint import Checkpoints
from distft.train.record import step_folder
from tests.helpers.stores import Lab, bits, lab, random_documents

T = TypeVar("T")
LOADING = threading.Lock()
"""transformers loads one model at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Threads(World):
    """Ranks that are threads of this process; the collectives are real, and meet in memory."""

    meeting: threading.Barrier
    board: dict[int, Any] = field(default_factory=dict)

    def total(self, *numbers: float) -> list[float]:
        self.board[self.rank] = numbers
        self.barrier()
        sums = [float(sum(column)) for column in zip(*(self.board[rank] for rank in range(self.size)), strict=True)]
        self.barrier()
        return sums

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.board[self.rank] = tensor
        self.barrier()
        found = [self.board[rank] for rank in range(self.size)]
        self.barrier()
        return found

    def barrier(self) -> None:
        self.meeting.wait(30)


def on_ranks(size: int, work: Callable[[World], T]) -> list[T]:
    """The work's results on each of `size` ranks; the first error that is no echo of another rank's."""
    meeting, board = threading.Barrier(size), dict[int, Any]()

    def one(rank: int) -> T:
        try:
            return work(_Threads(rank=rank, size=size, meeting=meeting, board=board) if size > 1 else World())
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for one in done if (error := one.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [one.result() for one in done]


@pytest.fixture
def made(tmp_path: Path) -> Lab:
    return lab(tmp_path, documents=random_documents(8), objective={"kind": "sft"})


def facts(step: int) -> dict[str, Any]:
    return {"loss": float(step), "drift": None, "total_steps": 9}


def checkpoints(made: Lab, world: World | None = None, **settings: Any) -> Checkpoints:
    return Checkpoints(made.run_folder.child("checkpoints"), made.run_identity(), **{"keep": 9, "world": world, **settings})


def fresh(made: Lab, world: World | None = None) -> LocalEngine:
    with LOADING:
        return made.engine(world)


def changed(made: Lab, seed: int, world: World | None = None) -> LocalEngine:
    """An engine with numbers of its own in weights and moments, the same on every rank."""
    engine, random = fresh(made, world), torch.Generator().manual_seed(seed)
    numbers = {name: torch.randn(tensor.shape, generator=random) for name, tensor in bits(engine).items()}
    engine.restore(numbers, optimizer_steps=seed)
    return engine


def saved(made: Lab, size: int, *steps: int, **settings: Any) -> dict[int, dict[str, Tensor]]:
    """Saves these steps, each with other numbers; what they were."""

    def work(world: World) -> dict[int, dict[str, Tensor]]:
        kept, found = checkpoints(made, world, **settings), {}
        for step in steps:
            engine = changed(made, step, world)
            kept.save(step, engine, facts(step))
            found[step] = bits(engine)
        kept.finish()
        return found

    return on_ranks(size, work)[0]


def restored(made: Lab, size: int) -> tuple[int, dict[str, Tensor]]:
    """Step and numbers that every rank has afterwards."""

    def work(world: World) -> tuple[int, dict[str, Tensor]]:
        engine = fresh(made, world)
        found = checkpoints(made, world).restore(engine)
        assert found is not None
        assert found.facts["loss"] == found.step
        return found.step, bits(engine)

    [first, *others] = on_ranks(size, work)
    assert all(step == first[0] and equal(numbers, first[1]) for step, numbers in others)
    return first


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 2), (3, 1), (2, 3)])
def test_bit_for_bit_on_any_number_of_ranks(made: Lab, before: int, after: int) -> None:
    numbers = saved(made, before, 1, 2)
    step, found = restored(made, after)
    assert step == 2
    assert equal(found, numbers[2])
    assert not equal(found, numbers[1])
    manifest = (checkpoints(made).newest() or pytest.fail("nothing was saved"))[1]
    assert len(manifest.files) == before
    names = step_folder(checkpoints(made).folder, 2).names(recursive=True)
    assert sorted(names) == sorted(["MANIFEST.json", *(entry.name for entry in manifest.files)]), "notes are cleared away"


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    released, plain = threading.Event(), checkpoint.put_rank_file

    def later(*given: Any) -> Any:
        assert released.wait(30)
        return plain(*given)

    monkeypatch.setattr(checkpoint, "put_rank_file", later)
    yield released
    released.set()


def test_training_goes_on_while_it_is_written(made: Lab, slow_disk: threading.Event) -> None:
    kept, engine = checkpoints(made), changed(made, 1)
    before = bits(engine)
    kept.save(1, engine, facts(1))
    assert kept.steps() == []
    for master in engine.masters.values():
        master.detach().add_(1.0)  # the next step
    slow_disk.set()
    kept.finish()
    assert kept.steps() == [1]
    assert equal(restored(made, 1)[1], before)


def test_what_is_being_written_is_not_written_over(made: Lab, slow_disk: threading.Event) -> None:
    kept, engine = checkpoints(made), changed(made, 1)
    kept.save(1, engine, facts(1))
    with pytest.raises(RuntimeError, match="still in use"):
        kept._memory.copy(engine.slices())
    slow_disk.set()
    kept.finish()
    kept._memory.copy(engine.slices())


def test_room_is_free_after_a_write_that_failed(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoints(made)
    with monkeypatch.context() as full:
        full.setattr(checkpoint, "put_rank_file", lambda *_: pytest.fail("the disk is full"))
        kept.save(1, made.engine(), facts(1))
        with pytest.raises(pytest.fail.Exception, match="disk is full"):
            kept.finish()
    kept.save(2, made.engine(), facts(2))
    kept.finish()
    assert kept.steps() == [2]


def test_a_save_waits_for_the_one_before(made: Lab, slow_disk: threading.Event) -> None:
    kept, engine = checkpoints(made), changed(made, 1)
    kept.save(1, engine, facts(1))
    threading.Timer(0.2, slow_disk.set).start()
    kept.save(2, engine, facts(2))
    assert kept.steps()[0] == 1
    kept.finish()
    assert kept.steps() == [1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_written_is_told_and_commits_nothing(made: Lab, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = saved(made, 2, 1)
    plain = checkpoint.put_rank_file

    def full(folder: Any, snapshot: Any, number: int) -> Any:
        if number == rank:
            raise StoreError("the disk is full")
        return plain(folder, snapshot, number)

    monkeypatch.setattr(checkpoint, "put_rank_file", full)

    def work(world: World) -> str:
        kept = checkpoints(made, world)
        kept.save(2, changed(made, 2, world), facts(2))
        with pytest.raises(DistftError) as told:
            kept.finish()
        return told.value.problem

    told = on_ranks(2, work)
    assert told[rank] == "the disk is full"
    assert "Another rank could not write" in told[1 - rank] or "was not committed" in told[1 - rank]
    assert checkpoints(made).steps() == [1]
    assert equal(restored(made, 2)[1], numbers[1])


def test_a_failure_shows_before_anybody_waits_for_it(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise StoreError("the disk is full")

    monkeypatch.setattr(checkpoint, "put_rank_file", full)
    kept = checkpoints(made)
    assert not kept.failed
    kept.save(1, made.engine(), facts(1))
    kept._writer.submit(lambda: None).result()
    assert kept.failed
    with pytest.raises(StoreError):
        kept.save(2, made.engine(), facts(2))


def test_a_rank_that_never_writes_is_not_waited_for_after_closing(made: Lab) -> None:
    meeting = threading.Barrier(1)
    leads = _Threads(rank=0, size=1, meeting=meeting)
    kept = checkpoints(made, leads)
    object.__setattr__(leads, "size", 2)  # the other died between the collectives and its write
    snapshot = kept._memory.copy(made.engine().slices())
    threading.Timer(0.2, kept.close, kwargs={"grace": 0}).start()
    with pytest.raises(DistftError, match=r"was not committed: written/[0-9a-f]{12}-00001\.json never came"):
        kept._write(1, snapshot, "0" * 12, facts(1))
    assert kept.steps() == []


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(1, None, [6]), (2, None, [5, 6]), (1, 2, [2, 4, 6]), (2, 3, [3, 5, 6])]
)
def test_which_stay(made: Lab, keep: int, keep_every: int | None, left: list[int]) -> None:
    saved(made, 1, 1, 2, 3, 4, 5, 6, keep=keep, keep_every=keep_every)
    assert checkpoints(made).steps() == left


def damage(made: Lab, step: int, rank: int) -> str:
    folder = step_folder(checkpoints(made).folder, step)
    [name] = [name for name in folder.names(recursive=True) if f"rank-{rank:05d}" in name]
    data = bytearray(folder.read(name))
    data[len(data) // 2] ^= 1
    folder.replace(name, bytes(data))
    return name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_flipped_bit_sends_all_ranks_to_the_checkpoint_before(
    made: Lab, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = saved(made, 2, 1, 2)
    name = damage(made, 2, rank=1)
    step, found = restored(made, size)
    assert step == 1
    assert equal(found, numbers[1])
    assert f"{name} is damaged between bytes" in capsys.readouterr().err
    assert checkpoints(made).steps() == [1]
    assert [name for name in step_folder(checkpoints(made).folder, 2).names() if name.startswith("SET-ASIDE")]


def test_a_run_that_lost_all_does_not_begin_again_in_silence(made: Lab) -> None:
    saved(made, 1, 1, 2)
    damage(made, 1, rank=0)
    damage(made, 2, rank=0)
    with pytest.raises(CorruptArtifactError, match="No checkpoint of this run is whole"):
        restored(made, 1)
    assert checkpoints(made).restore(made.engine()) is None


def test_a_file_that_is_gone(made: Lab) -> None:
    numbers = saved(made, 2, 1, 2)
    folder = step_folder(checkpoints(made).folder, 2)
    [name] = [name for name in folder.names(recursive=True) if "rank-00001" in name]
    folder.delete(name)
    step, found = restored(made, 2)
    assert step == 1
    assert equal(found, numbers[1])


def test_another_versions_checkpoint_is_no_damage(made: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr(checkpoint, "manifest_facts", lambda _: {})
        saved(made, 1, 1)
    with pytest.raises(StaleArtifactError, match="written by another version of distft"):
        restored(made, 1)
    assert checkpoints(made).steps() == [1]
