"""What scoring will take, measured on a few documents: the teacher is loaded here and reads them as `score` would, by the same scorer,
down to the compressed file. That goes into a temporary folder; the store is not touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch

from distft.config.schema import Run
from distft.corpus.reader import Corpus, Document
from distft.corpus.render import render_source
from distft.engine.world import device_count, this_device
from distft.errors import ConfigError
from distft.progress import Meter, say, track
from distft.store.location import open_location
from distft.store.model_folder import ModelFolder
from distft.teacher.catalogue import figures
from distft.teacher.identity import documents_key
from distft.teacher.scorer import Scorer, Unit

CALIBRATION_DOCUMENTS = 20
MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured. `seconds` go from token ids to the committed file, without loading the teacher. `bytes` are that file's:
    about 11 kB of them it takes however little is in it."""

    documents: int
    tokens: int
    scored_tokens: int
    bytes: int
    seconds: float
    device: str
    workers: int
    """Scorers that `score` would share the work among."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.scored_tokens

    @property
    def tokens_per_second(self) -> float:
        """Of one scorer."""
        return self.tokens / self.seconds

    def facts(self, corpus: tuple[int, int] | None) -> dict[str, Any]:
        """As `--json` prints them. `corpus` are all tokens that are to be read and those that are to be kept; None where that is not
        known yet, and the totals are of a million tokens then."""
        tokens, scored = corpus or (MILLION, MILLION * self.scored_tokens / self.tokens)
        return {
            "documents": self.documents, "tokens": self.tokens, "scored_tokens": self.scored_tokens, "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second, "bytes_per_token": self.bytes_per_token, "device": self.device,
            "workers": self.workers, "of_tokens": tokens, "whole_corpus": corpus is not None,
            "teacher_bytes": round(scored * self.bytes_per_token),
            "score_hours": tokens / (self.tokens_per_second * self.workers) / 3600,
        }  # fmt: skip


def calibrate(run: Run, model: ModelFolder, teacher: ModelFolder, corpus: Corpus | None) -> Calibration:
    """Measures on documents of the corpus where there is one, else on the first rows of the data. One process is one GPU: a teacher
    over several is refused."""
    if run.score.tensor_parallel > 1:
        raise ConfigError(
            "A teacher that is spread over GPUs is not measured here: it needs a process for each.",
            where=f"score.tensor_parallel={run.score.tensor_parallel}",
            help="Measure it by a trial: `distft score` with score.limit=100 reads so many documents, keeps them, and says what the "
            "rest will take. Or plan without --calibrate.",
        )  # fmt: skip
    documents = _spread(corpus) if corpus else _first(run, model)
    tokens = sum(len(document) for document in documents)
    device = this_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say(f"calibrate: {teacher.path.name} reads {len(documents)} documents of {tokens:,} tokens on {name}")
    with _threads_of_a_scorer(run), TemporaryDirectory(prefix="distft-calibrate-") as scratch:
        folder = open_location(scratch).child("teacher", "calibration")
        scorer = Scorer(run, _Sample(documents), teacher, folder)
        # The first pass of a process pays for what no later one does: kernels to load, memory to be got.
        for _ in scorer.read([min(documents, key=len)]):
            pass
        with track("calibrate", tokens, "tokens") as meter:
            seconds = _score(scorer, documents, meter)
        found = figures(folder)
    if found["documents"] < len(documents):
        say(f"calibrate: {len(documents) - found['documents']} of {len(documents)} documents cannot be read, and do not count")
    return Calibration(
        documents=found["documents"], tokens=found["tokens"], scored_tokens=found["scored_tokens"], bytes=found["bytes"],
        seconds=seconds, device=name, workers=scorers(run),
    )  # fmt: skip


def scorers(run: Run) -> int:
    """How many scorers share the work, on this machine as many as have devices of their own; `auto` on a cluster counts as one."""
    asked, group = run.score.workers, run.score.tensor_parallel
    if run.cluster.address != "local":
        return 1 if asked == "auto" else asked
    gpus = device_count()
    if asked == "auto":
        return max(1, gpus // group)
    return min(asked, max(1, (gpus or len(os.sched_getaffinity(0))) // group))


class _Sample(Corpus):
    """A few documents in memory, where a scorer expects a corpus."""

    def __init__(self, documents: list[Document]) -> None:
        self._documents = documents

    def count(self, split: str) -> int:
        return len(self._documents)

    def document(self, split: str, index: int) -> Document:
        return self._documents[index]


def _spread(corpus: Corpus) -> list[Document]:
    """Evenly over the training split, whose rows are often sorted by something; each once."""
    count = corpus.count("train")
    wanted = min(CALIBRATION_DOCUMENTS, count)
    chosen = (corpus.document("train", (2 * number + 1) * count // (2 * wanted)) for number in range(wanted))
    return list({document.digest: document for document in chosen}.values())


def _first(run: Run, model: ModelFolder) -> list[Document]:
    """Of the first rows of the training data, by the rules that `tokenize` has; each once."""
    source = run.data.train
    rows = min(CALIBRATION_DOCUMENTS, source.limit or CALIBRATION_DOCUMENTS)
    found = render_source(source.model_copy(update={"limit": rows}), model, max_tokens=run.data.max_tokens)
    return list({document.digest: document for document in found}.values())


def _score(scorer: Scorer, documents: list[Document], meter: Meter) -> float:
    """Seconds that it takes to score the documents and to commit them as one part."""
    unit = Unit(
        name=documents_key(document.digest for document in documents),
        places=tuple(("train", index) for index in range(len(documents))),
        tokens=sum(len(document) for document in documents),
    )
    started = time.perf_counter()
    for tokens in scorer(unit):
        meter.advance(tokens)
    return time.perf_counter() - started


@contextmanager
def _threads_of_a_scorer(run: Run) -> Iterator[None]:
    """One scorer in this process has all cores; of several, each has one where there is no GPU (`ScorerPlan`)."""
    before = torch.get_num_threads()
    if run.score.workers not in (1, "auto") and not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
