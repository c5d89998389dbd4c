"""Asks the live teacher again about some documents of a cache, and says how far its answers are from those that were stored.

Bytes can be right and meaning wrong: a column shifted by one token, another model's numbers. That shows only here. Ranks and first
choices of near-equal tokens may swap by rounding, so each is judged by the interval that the tolerance leaves it, never by a share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distft.config.schema import Hidden, Score, TopK
from distft.corpus.reader import Document
from distft.corpus.render import token_rows
from distft.engine.load import LanguageModel, load_model
from distft.engine.memory import enough_memory
from distft.engine.pack import batches_by_tokens
from distft.engine.world import this_device
from distft.errors import CorruptArtifactError, MissingArtifactError, StaleArtifactError
from distft.objectives.distributions import DenseHead
from distft.objectives.loss import chunk_tokens
from distft.progress import track
from distft.store.manifest import describe, differences
from distft.store.model_folder import ModelFolder
from distft.teacher.catalogue import FoundCache
from distft.teacher.forward import score_documents
from distft.teacher.head_copy import dense_rows, read_head
from distft.teacher.identity import read_parts, scored_positions
from distft.teacher.rows import Documents, Row, rows
from distft.teacher.scores import Scores

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Nats between two passes of one model: other batch shapes, another device. A shift by one token gives several."""
SHARE = {"float32": 0.0, "bfloat16": 0.25}
"""What rounding may do beyond that, as a share of a log-probability or an entropy: bfloat16 has 8 bits for a logit of any size, and a
label that a real model gives e^-10 may differ by half a nat between two batches. A shift gives most of its tokens many times that."""
HIDDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""The same between hidden states: the length of their difference over that of the live one."""
HALF_STEP = 2.0**-11
"""Relative rounding of a float16 log-probability."""
TOKENS_PER_BATCH = 4096


@dataclass(slots=True, kw_only=True)
class Agreement:
    """Stored against live. Gaps are the largest, in nats; `*_off` count tokens that differ by more than rounding explains."""

    tolerance: float
    share: float = 0.0
    worst: float = 0.0
    """The largest gap of a label, an entropy or a kept entry over what rounding may do to it: at most 1 in an honest cache."""
    documents: int = 0
    tokens: int = 0
    label_gap: float = 0.0
    entropy_gap: float = 0.0
    kept_gap: float = 0.0
    """Beyond the rounding to float16."""
    choices: int = 0
    """Tokens with a stored first choice."""
    same_choice: int = 0
    same_rank: int = 0
    choice_off: int = 0
    rank_off: int = 0
    hidden_tolerance: float | None = None
    """None where no hidden states are stored."""
    hidden_gap: float = 0.0
    kl: float = 0.0
    """The sum over tokens of KL(stored || live) over the whole vocabulary."""
    largest_kl: float = 0.0

    def add(self, stored: Scores, live: Scores, *, bound_N: npt.NDArray[np.float64], kept: bool) -> None:
        """One document. `live` keeps more than was stored; what it leaves out is at most `bound_N` per token. `kept`: whether the
        stored distribution has log-probabilities of the teacher (and not, say, shares of draws)."""
        self.documents += 1
        self.tokens += len(stored.positions)
        self.label_gap = _larger(self.label_gap, self._gap(stored.label_logprob, live.label_logprob))
        self.entropy_gap = _larger(self.entropy_gap, self._gap(stored.entropy, live.entropy))
        ends = np.cumsum(live.counts, dtype=np.int64)
        stored_ends = np.cumsum(stored.counts, dtype=np.int64)
        for token, bound in enumerate(bound_N):
            ids = live.ids[ends[token] - live.counts[token] : ends[token]]
            logprobs = live.logprobs[ends[token] - live.counts[token] : ends[token]].astype(np.float64)
            self._rank(int(stored.rank[token]), float(live.label_logprob[token]), logprobs, float(bound))
            self.same_rank += int(stored.rank[token] == live.rank[token])
            if kept and stored.counts[token]:
                mine = slice(stored_ends[token] - stored.counts[token], stored_ends[token])
                self._kept(stored.ids[mine], stored.logprobs[mine].astype(np.float64), ids, logprobs, float(bound))

    def _gap(self, stored_N: npt.NDArray[np.float32], live_N: npt.NDArray[np.float32]) -> float:
        """The largest difference, which is also held against what rounding may do."""
        gap_N = np.abs(stored_N.astype(np.float64) - live_N)
        self.worst = _larger(self.worst, _largest(gap_N / (self.tolerance + self.share * np.abs(live_N))))
        return _largest(gap_N)

    def _allowed(self, value: float) -> float:
        return self.tolerance + self.share * abs(value)

    def add_hidden(self, gap_N: npt.NDArray[np.float64], kl_N: npt.NDArray[np.float64]) -> None:
        """The hidden states of a document's tokens: by how much of their length they differ, and what that is in distributions."""
        self.hidden_gap = _larger(self.hidden_gap, _largest(gap_N))
        self.largest_kl = _larger(self.largest_kl, _largest(kl_N))
        self.kl += float(kl_N.sum())

    def _rank(self, rank: int, label: float, logprobs: npt.NDArray[np.float64], bound: float) -> None:
        """A rank may be any between the number of tokens that are surely likelier than the label and those that may be."""
        slack = self._allowed(label) + HALF_STEP * abs(label) * 2
        surely = int((logprobs > label + slack).sum())
        known = label - slack > bound  # else tokens that were left out may be likelier, too
        possibly = int((logprobs >= label - slack).sum()) if known else math.inf
        self.rank_off += not surely <= rank <= possibly

    def _kept(
        self, ids: npt.NDArray[np.uint32], logprobs: npt.NDArray[np.float64], live_ids: npt.NDArray[np.uint32],
        live_logprobs: npt.NDArray[np.float64], bound: float,
    ) -> None:  # fmt: skip
        place = np.searchsorted(live_ids, ids).clip(max=max(0, len(live_ids) - 1))
        there = live_ids[place] == ids if len(live_ids) else np.zeros(len(ids), np.bool_)
        gaps = np.maximum(logprobs - bound, 0.0)  # what the live teacher left out is less likely than that
        gaps[there] = np.abs(logprobs[there] - live_logprobs[place[there]])
        rounding = HALF_STEP * np.abs(logprobs) * 2  # each of the two was rounded
        beyond = np.maximum(gaps - rounding, 0.0)
        self.kept_gap = _larger(self.kept_gap, float(beyond.max()))
        self.worst = _larger(self.worst, float((beyond / (self.tolerance + self.share * np.abs(logprobs))).max()))
        first = int(logprobs.argmax())
        best = float(live_logprobs.max()) if len(live_logprobs) else bound
        self.choices += 1
        self.same_choice += bool(there[first]) and bool(live_logprobs[place[first]] == best)
        reached = float(live_logprobs[place[first]]) if there[first] else bound
        self.choice_off += bool(best - reached > self._allowed(reached) + 2 * HALF_STEP * abs(best))

    @property
    def holds(self) -> bool:
        """NaN holds nothing."""
        alike = self.hidden_tolerance is None or self.hidden_gap <= self.hidden_tolerance
        rounding = self.worst <= 1 and self.largest_kl <= self.tolerance
        return rounding and alike and not self.choice_off and not self.rank_off

    def facts(self) -> dict[str, Any]:
        hidden = self.hidden_tolerance is not None
        return {
            "documents": self.documents, "tokens": self.tokens, "tolerance": self.tolerance, "tolerance_share": self.share,
            "max_label_gap": self.label_gap, "max_entropy_gap": self.entropy_gap,
            "max_kept_gap": self.kept_gap if self.choices else None, "worst": self.worst,
            "argmax_agreement": self.same_choice / self.choices if self.choices else None,
            "rank_agreement": self.same_rank / max(1, self.tokens),
            "argmax_beyond_tolerance": self.choice_off, "rank_beyond_tolerance": self.rank_off,
            "hidden_tolerance": self.hidden_tolerance, "max_hidden_gap": self.hidden_gap if hidden else None,
            "max_kl": self.largest_kl if hidden else None, "mean_kl": self.kl / max(1, self.tokens) if hidden else None,
        }  # fmt: skip


def probe_cache(cache: FoundCache, documents: Documents, model: ModelFolder, *, count: int, staging: Path) -> dict[str, Any]:
    """Figures of a probe that agrees; a CorruptArtifactError with the same figures otherwise."""
    _check_teacher(cache, model)
    chosen = list(_chosen(cache, documents, count, staging))
    dtype, score = cache.identity["dtype"], Score.model_validate(
        {"distribution": cache.identity["distribution"], "positions": cache.identity["positions"]}
    )  # fmt: skip
    hidden = isinstance(score.distribution, Hidden)
    found = Agreement(
        tolerance=TOLERANCE[dtype], share=SHARE[dtype], hidden_tolerance=HIDDEN_TOLERANCE[dtype] if hidden else None
    )
    head = read_head(cache.folder, staging) if hidden else None
    with enough_memory("Probe fewer documents, or on the device that scored."):
        teacher = load_model(model, dtype=dtype, attention="sdpa", head_rows=token_rows(model), device=this_device())
        with track("probe", sum(len(document) for _, document in chosen), "tokens") as meter:
            for batch in batches_by_tokens([len(document) for _, document in chosen], TOKENS_PER_BATCH):
                _compare(found, teacher, [chosen[index] for index in batch], score, head)
                meter.advance(sum(len(chosen[index][1]) for index in batch))
    facts = found.facts()
    if not found.holds:
        share = f" and {found.share:.0%} of each" if found.share else ""
        raise CorruptArtifactError(
            f"On {found.documents} documents, {found.tokens} tokens, cache and live teacher differ by more than the"
            f" {found.tolerance:g} nats{share} that rounding may do: {_told(facts)}.", where=cache.folder.url,
            help="The cache was made by something else than it says, or by a defect. Do not train on it: score into a fresh store.",
        )  # fmt: skip
    return facts


def _check_teacher(cache: FoundCache, model: ModelFolder) -> None:
    """The very teacher: its weights, its settings, and what its ids mean."""
    own = {"weights": cache.identity["weights"], "vocabulary": cache.identity["vocabulary"]}
    given = {"weights": model.weights_identity(), "vocabulary": model.tokenizer_identity()["vocabulary"]}
    changed = differences(own, given)
    if changed:
        raise StaleArtifactError(
            f"This model is not the teacher of the cache. Cache and model differ in:\n{describe(changed)}", where=str(model.path),
            help="Give --model the folder of the teacher that `distft score` read.",
        )  # fmt: skip


def _chosen(cache: FoundCache, documents: Documents, count: int, staging: Path) -> Iterator[tuple[Row, Document]]:
    """Documents evenly spread over the sorted digests, which is as good as drawn: the same for the same cache."""
    holders = {
        digest: entry for part in read_parts(cache.folder) for digest in part.facts["digests"] for entry in part.files
    }  # fmt: skip
    known = sorted(digest for digest in holders if digest in documents)
    if not known:
        raise MissingArtifactError(
            f"None of the {len(holders)} documents of the cache is in a corpus of this store, and a cache holds no tokens itself.",
            where=cache.store.url if cache.store else cache.folder.url,
            help="Probe the cache in its store, with the corpus that it was made for: `distft tokenize` makes it again.",
        )  # fmt: skip
    wanted = {known[len(known) * n // count] for n in range(count)} if count < len(known) else set(known)
    for entry in {holders[digest].name: holders[digest] for digest in sorted(wanted)}.values():
        for row in rows(cache.folder, entry, staging):
            document = documents.get(row.digest) if row.digest in wanted else None
            if document is not None:
                wanted.discard(row.digest)
                yield row, document


def _compare(
    found: Agreement, teacher: LanguageModel, chosen: list[tuple[Row, Document]], score: Score, head: DenseHead | None
) -> None:  # fmt: skip
    """`head` is the stored one, where there are hidden states. The live teacher keeps twice as much, so that what rounding moved over
    the policy's edge can still be compared."""
    policy = score.distribution
    sparse = policy if isinstance(policy, TopK) else TopK()
    wider = TopK(k=min(65_535, 2 * sparse.k), min_prob=sparse.min_prob / 2)
    places = [scored_positions(document, score.positions) for _, document in chosen]
    live = score_documents(teacher, [document.tokens for _, document in chosen], places, wider)
    for (row, document), place, now in zip(chosen, places, live, strict=True):
        if not np.array_equal(row.scores.positions, place) or row.tokens != len(document):
            found.label_gap = found.worst = math.inf  # not even about the same tokens
            continue
        found.add(row.scores, now, bound_N=_bound(now, wider), kept=isinstance(policy, TopK))
    if head is not None:
        now_hidden = score_documents(teacher, [document.tokens for _, document in chosen], places, policy)
        for (row, _), place, now in zip(chosen, places, now_hidden, strict=True):
            if np.array_equal(row.scores.positions, place):
                found.add_hidden(*_hidden_gaps(row.scores, head, now, teacher))


@torch.no_grad()
def _hidden_gaps(
    stored: Scores, head: DenseHead, live: Scores, teacher: LanguageModel
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per token the relative distance of two hidden states, and KL(stored || live), each through its own head: the copy's, and the
    one that the teacher has."""
    device, live_head = teacher.device, DenseHead(teacher.weight, teacher.bias, teacher.shape)
    ours, theirs = dense_rows([stored], head).to(device), dense_rows([live], live_head)
    gaps, kls = [], []
    for start in range(0, len(live), size := chunk_tokens(teacher.shape.rows)):
        stored_CT, live_CT = ours.hidden_NT[start : start + size], theirs.hidden_NT[start : start + size].to(device)
        lengths_C = live_CT.double().norm(dim=1)
        gaps.append((stored_CT.double() - live_CT.double()).norm(dim=1) / lengths_C.clamp_min(torch.finfo(torch.float64).tiny))
        log_q_CV = ours.head.logprobs(stored_CT)
        kls.append((log_q_CV.double().exp() * (log_q_CV - live_head.logprobs(live_CT)).double()).sum(1))
    return torch.cat(gaps).cpu().numpy(), torch.cat(kls).cpu().numpy()


def _bound(live: Scores, policy: TopK) -> npt.NDArray[np.float64]:
    """The most that a token can have which was left out: less than the floor, or than the least likely of a full k."""
    floor = math.log(policy.min_prob) if policy.min_prob else -math.inf
    bound_N = np.full(len(live.positions), floor)
    ends = np.cumsum(live.counts, dtype=np.int64)
    for token in np.flatnonzero(live.counts == policy.k):
        bound_N[token] = max(floor, float(live.logprobs[ends[token] - policy.k : ends[token]].min()))
    return bound_N


def _larger(one: float, other: float) -> float:
    """As `max`, but NaN stays."""
    return float(np.maximum(one, other))


def _largest(values: npt.NDArray[Any]) -> float:
    """The largest absolute value; NaN where one is."""
    return float(np.abs(values.astype(np.float64)).max(initial=0.0))


def _told(facts: dict[str, Any]) -> str:
    agreement = "not kept" if facts["argmax_agreement"] is None else f"{facts['argmax_agreement']:.1%}"
    kept = "not kept" if facts["max_kept_gap"] is None else f"{facts['max_kept_gap']:.3g}"
    hidden = ""
    if facts["max_hidden_gap"] is not None:
        hidden = (
            f"; hidden states differ by up to {facts['max_hidden_gap']:.3g} of their length, where {facts['hidden_tolerance']:g} is"
            f" rounding, and their distributions by up to {facts['max_kl']:.3g} nats"
        )
    return (
        f"max |dlogp| of the label {facts['max_label_gap']:.3g}, of the kept {kept}, of the entropy {facts['max_entropy_gap']:.3g};"
        f" argmax agreement {agreement}, rank agreement {facts['rank_agreement']:.1%}{hidden}"
    )
