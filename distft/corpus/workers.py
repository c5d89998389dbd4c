"""Tokenises chunks of rows, in this process or in others; the results come in the chunks' order either way."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING

import pyarrow as pa

from distft.config.schema import Data
from distft.corpus.chat import Renderer, load_tokenizer
from distft.corpus.files import Row
from distft.corpus.tabulate import Tally, tabulate
from distft.errors import DistftError

if TYPE_CHECKING:
    from distft.store.model_folder import ModelFolder

SPAWN_CHUNKS = 16  # fewer are tokenised here sooner than other processes have started

Chunk = list[Row]
Result = tuple[pa.RecordBatch, Tally]


class _Encoder:
    """Tokenises chunks of any split; each split's renderer is made when first needed."""

    def __init__(self, config: Data, model: ModelFolder) -> None:
        self.config, self.model = config, model
        self.renderers: dict[str, Renderer] = {}

    def __call__(self, split: str, chunk: Chunk) -> Result:
        if split not in self.renderers:
            source = self.config.train if split == "train" else self.config.heldout
            assert source is not None, f"{split} has no source"
            self.renderers[split] = Renderer(load_tokenizer(self.model), source)
        return tabulate(chunk, self.renderers[split].encode(chunk, self.config.max_tokens))


class Workers:
    """Tokenises chunks in order: in other processes when there is enough to do, which start then and serve all splits."""

    def __init__(self, config: Data, model: ModelFolder) -> None:
        self.count = len(os.sched_getaffinity(0)) if config.workers == "auto" else config.workers
        self.encoder = _Encoder(config, model)
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.pool is None:
            return
        if failure[0] is not None:
            _kill(self.pool)
        self.pool.shutdown(cancel_futures=True)

    def map(self, split: str, chunks: Iterator[Chunk]) -> Iterator[Result]:
        """The result of each chunk, in the chunks' order; a few are under way at once, so memory stays bounded."""
        ahead = list(islice(chunks, SPAWN_CHUNKS)) if self.count > 1 else []
        chunks = chain(ahead, chunks)
        if self.count == 1 or (len(ahead) < SPAWN_CHUNKS and self.pool is None):
            yield from (self.encoder(split, chunk) for chunk in chunks)
            return
        if self.pool is None:
            given = (self.encoder.config, self.encoder.model)
            self.pool = ProcessPoolExecutor(self.count, get_context("spawn"), _start_worker, given)
        under_way: deque[Future[Result]] = deque()
        try:
            for chunk in chunks:
                under_way.append(_submit(self.pool, split, chunk))
                if len(under_way) >= 2 * self.count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise DistftError(
                "a process that was tokenising died, perhaps for want of memory",
                where=f"data.workers={self.count}",
                help="Run the command again: it goes on from the last part. Fewer data.workers need less memory.",
            ) from error


def _submit(pool: ProcessPoolExecutor, split: str, chunk: Chunk) -> Future[Result]:
    try:
        return pool.submit(_work, split, chunk)
    except OSError as error:  # it broke, and closed its pipes, in the moment in which it was starting another process
        raise BrokenProcessPool from error


def _kill(pool: ProcessPoolExecutor) -> None:
    """Ends the pool's processes. Its own shutdown waits for ever for one that was started while the pool was breaking: the pool ends
    those it knows of, then waits for all. (Python 3.14 has `kill_workers`, which reads the same dictionary.)"""
    for process in list((pool._processes or {}).values()):
        process.kill()


_encode: _Encoder | None = None


def _start_worker(config: Data, model: ModelFolder) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent winds up
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _encode = _Encoder(config, model)


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(split: str, chunk: Chunk) -> Result:
    assert _encode is not None, "the worker was not started"
    return _encode(split, chunk)
