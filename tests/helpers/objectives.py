"""Objectives as tests train them: the whole catalog under several settings, and a step of each as its paper has it, on dense float64
logits of a whole model. Shares nothing with the training path but the model's own forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distft.corpus.reader import Document
from distft.corpus.render import token_rows
from distft.store.model_folder import ModelFolder
from tests.helpers import objective_reference as papers
from tests.helpers.objective_reference import FORMULAS, Doc
from tests.helpers.stores import Lab, document, loaded

TAU = 1000.0
"""The teachers of tests are sure of tokens that are no labels: about a fifth of the labels are likelier than 1/TAU."""

EKSFT = {"kind": "eksft", "rho": 0.3, "lambda_kl": 0.4, "lambda_entropy": 0.6}
LWF = {"kind": "lwf", "alpha": 3.0, "beta": 0.5, "c": 0.8, "p_star": 1 / TAU}

CATALOG: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft"},
    "sft, prompt held": {"kind": "sft", "prompt_kl": 0.7},
    "sft_kl": {"kind": "sft_kl", "kl": 0.7},
    "sft_kl backwards": {"kind": "sft_kl", "kl": 0.7, "direction": "student_to_teacher"},
    "stm": {"kind": "stm", "tau": TAU},
    "stm, a fraction": {"kind": "stm", "fraction": 0.4},
    "stm, a fraction of the lowest": {"kind": "stm", "fraction": 0.4, "select": "lowest"},
    "stm, a fraction at random": {"kind": "stm", "fraction": 0.4, "select": "random", "seed": 7},
    "stm, prompt held": {"kind": "stm", "tau": TAU, "prompt_kl": 0.7},
    "stm_kl": {"kind": "stm_kl", "tau": TAU, "kl": 2.0},
    "stm_kl, the lowest": {"kind": "stm_kl", "tau": TAU, "kl": 2.0, "select": "lowest"},
    "lwf": LWF,
    "lwf, by group": {**LWF, "normalise": "group_mean"},
    "lwf, by group, prompt held": {**LWF, "normalise": "group_mean", "prompt_kl": 0.7},
    "lwf, floor's confidence": {**LWF, "c": "floor", "p_star": 0.9},
    "kd": {"kind": "kd", "lam": 0.3},
    "eksft": EKSFT,
    "eksft, intersection": {**EKSFT, "rho": 0.6, "combine": "intersection"},
    "eksft, prompt held": {**EKSFT, "prompt_kl": 0.7},
    "eksft, published code": {**EKSFT, "variant": "published_code"},
    "eksft, published code, intersection": {**EKSFT, "variant": "published_code", "rho": 0.6, "combine": "intersection"},
    "eksft, published code, prompt held": {**EKSFT, "variant": "published_code", "prompt_kl": 0.7},
    "eaft": {"kind": "eaft", "alpha": 0.5},
    "eaft, prompt held": {"kind": "eaft", "alpha": 2.0, "prompt_kl": 0.7},
    "dft": {"kind": "dft"},
    "asft": {"kind": "asft", "kl": 0.3},
    "asft, prompt held": {"kind": "asft", "kl": 0.3, "prompt_kl": 0.7},
    "talr": {"kind": "talr", "w_min": 0.05},
    "talr, prompt held": {"kind": "talr", "w_min": 0.05, "prompt_kl": 0.7},
}

ALL_POSITIONS = {"positions": "all"}


def uneven(length: int = 16, *, alike: bool = True) -> list[Document]:
    """Eight documents, of equal length if they are `alike`, and one, a few or nearly all tokens supervised."""
    random = np.random.default_rng(3)
    supervised = [[1], [15], range(1, 16), [2, 3], range(4, 9), [7], range(1, 14), [1, 15]]
    longer = [0] * 8 if alike else [3, 0, 5, 9, 1, 0, 2, 14]
    return [
        document(random.integers(5, 270, length + more).tolist(), list(places))
        for places, more in zip(supervised, longer, strict=True)
    ]


@dataclass(frozen=True)
class Whole:
    """A step as the papers have it: its loss, and the gradient of every parameter."""

    loss: float
    gradients: dict[str, Tensor]


def step_of_the_paper(made: Lab, settings: dict[str, Any], student: ModelFolder, *, documents: list[Document]) -> Whole:
    """In float64, one document at a time."""
    model = loaded(student).whole.double()
    answers, prompts = dense(made, model, documents)
    loss = _formula(settings, answers)
    if settings.get("prompt_kl"):
        alike = settings.get("variant") == "published_code"  # every sequence weighs the same
        counts = [1 if alike else len(doc) - len(_masked(settings, doc) if settings["kind"] == "stm" else ()) for doc in answers]
        held = [n * papers.mean([papers.forward_kl(p, t) for t in range(len(p))]) for n, p in zip(counts, prompts, strict=True)]
        loss = loss + settings["prompt_kl"] * papers.total(held) / sum(counts)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Whole(float(loss.detach()), gradients)


def dense(made: Lab, model: Any, documents: list[Document]) -> tuple[list[Doc], list[Doc]]:
    """Answers and prompts with whole distributions of student and teacher. The teacher is its own whole model where hidden states are
    kept, and what the cache says, whose log-probabilities are float16, where those of all tokens are."""
    rows = token_rows(made.model)
    exact = made.run.score.distribution.kind == "hidden"
    teacher = loaded(made.model).whole.double() if exact else None
    answers, prompts = [], []
    for one in documents:
        tokens = torch.from_numpy(one.tokens.astype(np.int64))
        said = model(input_ids=tokens[None], use_cache=False).logits[0, :, :rows]
        if teacher is not None:
            with torch.no_grad():
                heard = teacher(input_ids=tokens[None], use_cache=False).logits[0, :, :rows]
        else:
            heard = _from_cache(made, one, rows)
        spoken = np.flatnonzero(one.supervised)
        rest = np.setdiff1d(np.arange(1, len(one.tokens)), spoken)
        for found, places in ((answers, spoken), (prompts, rest)):
            labels = one.tokens[places].astype(int).tolist()
            found.append(Doc(said[places - 1], heard[places - 1], labels, [False] * len(places), one.digest, places.tolist()))
    return answers, prompts


def _formula(settings: dict[str, Any], docs: list[Doc]) -> Tensor:
    if settings.get("select") == "random":
        return papers.mean([papers.cross_entropy(d, t) for d in docs for t in range(len(d)) if t not in _masked(settings, d)])
    given = {"anchors": "floor"} if settings["kind"] == "lwf" else {}
    return FORMULAS[settings["kind"]](
        docs, **given, **{k: v for k, v in settings.items() if k not in ("kind", "prompt_kl", "seed")}
    )


def _masked(settings: dict[str, Any], doc: Doc) -> set[int]:
    """What stm masks; at random as it is documented, from seed and digest. `name` is the digest here."""
    how = {key: settings[key] for key in ("tau", "fraction") if key in settings}
    if settings.get("select") != "random":
        return papers.dropped(doc, **how, select=settings.get("select", "highest"))
    generator = np.random.Generator(np.random.Philox(key=np.array([settings["seed"], int(doc.name[:16], 16)], np.uint64)))
    return set(generator.permutation(len(doc))[: len(papers.dropped(doc, **how))].tolist())


def _from_cache(made: Lab, one: Document, rows: int) -> Tensor:
    """Logits [tokens, rows] by the place before the token, from a cache that keeps every token of the vocabulary."""
    scores = made.cache().scores(one)
    assert (scores.counts == rows).all(), "the cache keeps less than all"
    heard = torch.zeros(len(one.tokens), rows, dtype=torch.float64)
    heard[scores.positions.astype(int) - 1] = torch.from_numpy(scores.logprobs.astype(np.float64)).reshape(-1, rows)
    return heard


def stranger(made: Lab, student: ModelFolder) -> Lab:
    """The same lab, where another model than the teacher is trained."""
    return replace(made, model=student)
