"""How fast a teacher cache is read: unpacked once when it is staged, then document by document in random order.

python -m pytest -m bench -s tests/bench/cache_read.py
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distft.store.location import open_location
from distft.store.manifest import fetch
from distft.store.shards import ShardWriter, read_batches, read_shard
from distft.teacher.encode import COLUMNS, SCHEMA, PlainShard, to_batch
from distft.teacher.forward import Scores
from distft.teacher.planes import from_planes, stored_schema, to_planes
from distft.teacher.staging import staged

DOCUMENTS, LENGTH, KEPT = 400, 500, 64
ROUNDS = 5


def document(random: np.random.Generator) -> Scores:
    entries = LENGTH * KEPT
    return Scores(
        positions=np.arange(1, LENGTH + 1, dtype=np.uint32), label_logprob=-random.random(LENGTH, np.float32),
        entropy=random.random(LENGTH, np.float32), rank=random.integers(0, 9, LENGTH).astype(np.uint32),
        tail=random.random(LENGTH, np.float32), counts=np.full(LENGTH, KEPT, np.uint16),
        ids=np.sort(random.integers(0, 150_000, (LENGTH, KEPT)), axis=1).astype(np.uint32).reshape(-1),
        logprobs=-(random.random(entries) * 9).astype(np.float16),
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process that are its own, mapped files left out."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.bench
def test_staging_and_random_reads(tmp_path: Path) -> None:
    pa.set_cpu_count(1)
    random, store = np.random.default_rng(0), open_location(str(tmp_path / "store"))
    with ShardWriter(store, "part", stored_schema(SCHEMA)) as writer:
        for start in range(0, DOCUMENTS, 64):
            made = [document(random) for _ in range(min(64, DOCUMENTS - start))]
            writer.write(to_planes(to_batch([f"{start + n:032x}" for n in range(len(made))], [LENGTH + 1] * len(made), made)))
    tokens = DOCUMENTS * LENGTH
    [batch, *_] = read_batches(fetch(store, writer.entry, tmp_path / "staging"))
    before = time.process_time()
    for _ in range(ROUNDS):
        from_planes(batch, SCHEMA, where="bench")
    unpacking = ROUNDS * batch.num_rows * LENGTH / (time.process_time() - before)
    before = time.process_time()
    path = staged(store, writer.entry, tmp_path / "staging")
    spent = time.process_time() - before
    print(f"\nstaging {tokens:,} tokens of {KEPT} entries, {writer.entry.size / tokens:.0f} stored bytes each")
    print(f"unpacked: {unpacking:,.0f} tokens per CPU second")
    print(f"verified, unpacked, written and hashed: {tokens / spent:,.0f} tokens per CPU second")

    shard, order, bytes_each = (
        PlainShard(read_shard(path), where="bench"),
        random.permutation(DOCUMENTS),
        LENGTH * (20 + 2 + KEPT * 6),
    )
    flat = np.frombuffer(random.bytes(bytes_each * DOCUMENTS), np.uint8)
    target = np.empty(bytes_each, np.uint8)
    ratios, used = [], resident()
    for _ in range(ROUNDS):
        before = time.process_time()
        for row in order:
            _, _, scores = shard.read(int(row))
            at = 0
            for name in COLUMNS:
                column = getattr(scores, name).view(np.uint8)
                target[at : at + len(column)] = column
                at += len(column)
        reading = time.process_time() - before
        before = time.process_time()
        for row in order:
            target[:] = flat[row * bytes_each : (row + 1) * bytes_each]
        ratios.append((time.process_time() - before) / reading)
    print(f"random documents copied out of the staged shard: {np.median(ratios):.2f} of memcpy's speed")
    print(f"memory grew by {(resident() - used) / 2**20:.1f} MiB while {tokens * ROUNDS:,} tokens were read")
