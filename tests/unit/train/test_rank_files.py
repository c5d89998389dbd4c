"""Checkpoints of any number of ranks, read by any number of others: every element comes back, bit for bit, and no byte is believed."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distft.engine.base import Slice, Wanted, share
from distft.errors import CorruptArtifactError
from distft.store import blocks, put
from distft.store.location import Location, open_location
from distft.store.manifest import Manifest
from distft.train import rank_files
from distft.train.rank_files import PARTS, Layout, Memory, manifest_facts, pass_weights, put_rank_file, read_slices

SHAPES = {"embed": (37, 8), "norm": (8,), "one": (1,), "layers.0.w": (16, 24), "layers.1.w": (5, 3, 2), "b": (3,)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 200)


@pytest.fixture
def store(tmp_path: Path) -> Location:
    return open_location(str(tmp_path / "store"))


def numbers() -> dict[str, dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return {part: {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()} for part in PARTS}


FULL = numbers()


def owned(rank: int, size: int) -> list[Slice]:
    found = []
    for name, shape in SHAPES.items():
        start, stop = share(math.prod(shape), rank, size)
        parts: dict[str, Tensor] = {part: FULL[part][name].view(-1)[start:stop] for part in PARTS}
        found.append(Slice(name=name, shape=shape, start=start, **parts))
    return found


@pytest.fixture
def saved(store: Location) -> Callable[[int], Manifest]:
    def make(size: int) -> Manifest:
        entries, parameters = [], None
        for rank in range(size):
            snapshot = Memory().copy(owned(rank, size))
            entries.append(put_rank_file(store, snapshot, rank))
            parameters = snapshot.parameters
        assert parameters is not None
        return Manifest(kind="checkpoint", identity={}, files=tuple(reversed(entries)), facts=manifest_facts(parameters))

    return make


def wanted_by(rank: int, size: int) -> list[Wanted]:
    return [Wanted(name, shape, *share(math.prod(shape), rank, size)) for name, shape in SHAPES.items()]


@pytest.mark.parametrize("before", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_any_number_of_ranks_reads_what_any_other_wrote(
    store: Location, saved: Callable[[int], Manifest], before: int, after: int
) -> None:
    manifest = saved(before)
    again = {part: {name: torch.full((math.prod(shape),), torch.nan) for name, shape in SHAPES.items()} for part in PARTS}
    for rank in range(after):
        for piece in read_slices(store, manifest, wanted_by(rank, after)):
            for part in PARTS:
                target = again[part][piece.name][piece.start : piece.stop]
                assert bool(target.isnan().all()), "each element comes once"
                target.copy_(getattr(piece, part))
    for part in PARTS:
        for name, shape in SHAPES.items():
            assert torch.equal(again[part][name].view(shape), FULL[part][name])


@pytest.fixture
def asked(store: Location, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each block that is fetched, by its file and number."""
    found, plain = list[tuple[str, int]](), type(store).read_range

    def counted(self: Location, name: str, start: int, length: int) -> bytes:
        found.append((name, start // 200))
        return plain(self, name, start, length)

    monkeypatch.setattr(type(store), "read_range", counted)
    return found


@pytest.mark.parametrize("parts", [PARTS, ("weight",), ("exp_avg_sq",)])
@pytest.mark.parametrize(
    "wanted",
    [[("embed", 0, 40)], [("embed", 0, 296)], [("layers.0.w", 380, 384)], [("b", 0, 3), ("norm", 2, 3), ("embed", 100, 260)]],
)
def test_a_rank_reads_no_block_that_it_does_not_need(
    store: Location, saved: Callable[[int], Manifest], asked: list[tuple[str, int]], wanted: Any, parts: Any
) -> None:
    manifest, needed = saved(2), set[tuple[str, int]]()
    layout = Layout(list(SHAPES.items()), 2)
    for entry in manifest.files:
        rank = entry.facts["rank"]
        head = entry.size - 12 * layout.elements(rank)
        touched = set[int]()
        for name, start, stop in wanted:
            owned, end, offset = layout.places(rank)[name]
            for element in range(max(start, owned), min(stop, end)):
                places = [PARTS.index(part) * layout.elements(rank) + offset + element - owned for part in parts]
                touched |= {byte // 200 for place in places for byte in range(head + 4 * place, head + 4 * place + 4)}
        if touched:
            needed |= {(entry.name, number) for number in touched | set(range(-(-head // 200)))}
    list(read_slices(store, manifest, [Wanted(name, SHAPES[name], start, stop) for name, start, stop in wanted], parts=parts))
    assert sorted(asked) == sorted(needed)


def test_a_whole_checkpoint_is_read_once_in_whatever_order_it_is_wanted(
    store: Location, saved: Callable[[int], Manifest], asked: list[tuple[str, int]]
) -> None:
    manifest = saved(3)
    list(read_slices(store, manifest, reversed(wanted_by(0, 1))))
    assert len(asked) == len(set(asked)) == sum(-(-entry.size // 200) for entry in manifest.files)


class _Block(bytes):
    """Tells how many of its kind are in memory."""

    here = most = 0
    counting = threading.RLock()

    def __new__(cls, data: bytes) -> _Block:
        with cls.counting:
            cls.here += 1
            cls.most = max(cls.most, cls.here)
        return super().__new__(cls, data)

    def __del__(self) -> None:
        with self.counting:
            _Block.here -= 1


def test_memory_does_not_grow_with_the_ranks(
    store: Location, saved: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 32)
    plain, threads = type(store).read_range, threading.active_count()
    monkeypatch.setattr(type(store), "read_range", lambda self, *given: _Block(plain(self, *given)))
    monkeypatch.setattr(_Block, "most", 0)
    seen = 0
    for _ in read_slices(store, saved(40), wanted_by(0, 1)):
        seen = max(seen, threading.active_count() - threads)
    assert seen <= 1 + blocks.AHEAD, "one pool for all files"
    assert 0 < _Block.most <= 5 + 2 * blocks.AHEAD  # a block lies across two parts, twice; a thread may be about to let go of one
    until = time.monotonic() + 20
    while _Block.here and time.monotonic() < until:
        time.sleep(0.01)
    assert _Block.here == 0


def test_one_part_alone(store: Location, saved: Callable[[int], Manifest]) -> None:
    for piece in read_slices(store, saved(3), wanted_by(0, 1), parts=("weight",)):
        assert torch.equal(piece.weight, FULL["weight"][piece.name].view(-1)[piece.start : piece.stop])
        assert not piece.exp_avg.any()
        assert len(piece.exp_avg) == len(piece.exp_avg_sq) == len(piece.weight)


def test_others_can_read_the_files(store: Location, saved: Callable[[int], Manifest]) -> None:
    manifest, layout = saved(2), Layout(list(SHAPES.items()), 2)
    for entry in manifest.files:
        path = store.local(entry.name)
        assert path is not None
        found = load_file(path)
        assert set(found) == set(PARTS)
        for name, (start, stop, offset) in layout.places(entry.facts["rank"]).items():
            for part in PARTS:
                assert torch.equal(found[part][offset : offset + stop - start], FULL[part][name].view(-1)[start:stop])
        assert len(found["weight"]) == layout.elements(entry.facts["rank"])


def test_what_a_manifest_says_of_a_file_is_so(store: Location, saved: Callable[[int], Manifest]) -> None:
    for entry in saved(2).files:
        assert hashlib.sha256(store.read(entry.name)).hexdigest() == entry.sha256
        assert store.size(entry.name) == entry.size


def test_a_rank_file_is_not_read_back(saved: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(put, "file_sha256", lambda path: pytest.fail(f"{path} was read"))
    saved(1)


def test_a_snapshot_is_of_its_moment_and_room_is_taken_once() -> None:
    memory, live = Memory(), torch.arange(4.0)
    piece = Slice(name="x", shape=(4,), start=0, weight=live, exp_avg=live, exp_avg_sq=live)
    first = memory.copy([piece])
    room = first.vectors["weight"].data_ptr()
    live += 1
    assert first.vectors["weight"].tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="still in use"):
        memory.copy([piece])
    assert first.vectors["weight"].tolist() == [0, 1, 2, 3]
    memory.give_back(first)
    assert not first.vectors, "nobody can write what may be another step's by now"
    second = memory.copy([piece])
    assert second.vectors["weight"].tolist() == [1, 2, 3, 4]
    assert second.vectors["weight"].data_ptr() == room
    with pytest.raises(RuntimeError, match="not the one that is lent"):
        memory.give_back(first)


@pytest.mark.parametrize("place", [3, 60, 400, -1])
def test_a_flipped_bit_is_named(store: Location, saved: Callable[[int], Manifest], place: int) -> None:
    manifest = saved(2)
    entry = next(one for one in manifest.files if one.facts["rank"] == 1)
    data = bytearray(store.read(entry.name))
    data[place] ^= 4
    store.replace(entry.name, bytes(data))
    with pytest.raises(CorruptArtifactError, match=f"{entry.name} is damaged between bytes"):
        list(read_slices(store, manifest, wanted_by(0, 1)))


def another(manifest: Manifest, **facts: Any) -> Manifest:
    return replace(manifest, files=tuple(replace(one, facts={**one.facts, **facts}) for one in manifest.files))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: replace(made, facts={}), "cannot be understood"),
        (lambda made: replace(made, facts={"parameters": [["x"]]}), "cannot be understood"),
        (lambda made: replace(made, facts={"parameters": [["x", [-1]]]}), "its parameters make no sense"),
        (lambda made: replace(made, files=()), "the ranks of its files have a gap"),
        (lambda made: replace(made, files=made.files[:1]), "the ranks of its files have a gap|does not hold"),
        (lambda made: another(made, rank=0), "the ranks of its files have a gap"),
        (lambda made: another(made, rank="0"), "the ranks of its files have a gap"),
        (
            lambda made: replace(made, facts=manifest_facts([(name, (9, *shape[1:])) for name, shape in SHAPES.items()])),
            "not of this model|does not hold",
        ),
        (lambda made: replace(made, files=(made.files[1], replace(made.files[1], facts={**made.files[1].facts, "rank": 1}))),
         "does not hold"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_not_right(
    store: Location, saved: Callable[[int], Manifest], change: Callable[[Manifest], Manifest], says: str
) -> None:
    with pytest.raises(CorruptArtifactError, match=says) as told:
        list(read_slices(store, change(saved(2)), wanted_by(0, 1)))
    assert told.value.where == store.url


def test_another_models_parameters(store: Location, saved: Callable[[int], Manifest]) -> None:
    with pytest.raises(CorruptArtifactError, match=r"norm, of the shape \[9\], has the shape \[8\]"):
        list(read_slices(store, saved(1), [Wanted("norm", (9,), 0, 9)]))
    with pytest.raises(CorruptArtifactError, match=r"other, of the shape \[9\], is not in it"):
        list(read_slices(store, saved(1), [Wanted("other", (9,), 0, 9)]))


def passed(store: Location, manifest: Manifest) -> dict[str, Tensor]:
    """What comes out from front to back, put together."""
    runs: dict[str, list[Tensor]] = {}
    for name, run in pass_weights(store, manifest, memory=1):
        assert name in list(runs)[-1:] or name not in runs, "the runs of a parameter follow each other"
        runs.setdefault(name, []).append(run)
    return {name: torch.cat(found).view(SHAPES[name]) for name, found in runs.items()}


@pytest.mark.parametrize("piece", [8, 64, 1 << 16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_weights_pass_from_front_to_back_whoever_wrote_them(
    store: Location, saved: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch, ranks: int, piece: int
) -> None:
    monkeypatch.setattr(rank_files, "PIECE_BYTES", (piece, piece))
    found = passed(store, saved(ranks))
    assert list(found) == list(SHAPES)
    assert all(torch.equal(found[name], FULL["weight"][name]) for name in SHAPES)


@pytest.mark.parametrize("piece", [8, 1 << 16])
@pytest.mark.parametrize("at", [0, 8, 100, 250, 1500, -1])
def test_no_damaged_weight_passes_unseen(
    store: Location, saved: Callable[[int], Manifest], monkeypatch: pytest.MonkeyPatch, at: int, piece: int
) -> None:
    """Wherever in what is read the byte lies, in the head too; -1 is the last byte of the last weight."""
    monkeypatch.setattr(rank_files, "PIECE_BYTES", (piece, piece))
    manifest = saved(2)
    entry = manifest.files[0]
    layout = Layout([(name, tuple(shape)) for name, shape in manifest.facts["parameters"]], 2)
    path = store.local(entry.name)
    assert path is not None
    data = bytearray(path.read_bytes())
    last = 8 + int.from_bytes(data[:8], "little") + 4 * layout.elements(entry.facts["rank"]) - 1
    data[at if at >= 0 else last] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="is damaged between bytes"):
        passed(store, manifest)


def test_a_file_that_vanished_or_ends_early_does_not_pass(store: Location, saved: Callable[[int], Manifest]) -> None:
    manifest = saved(3)
    path = store.local(manifest.files[1].name)
    assert path is not None
    data = path.read_bytes()
    path.write_bytes(data[:-300])
    with pytest.raises(CorruptArtifactError, match="ends at byte"):
        passed(store, manifest)
    path.unlink()
    with pytest.raises(CorruptArtifactError, match="is in the manifest, and gone"):
        passed(store, manifest)
