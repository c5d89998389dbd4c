"""The objectives, slowly: float64, token by token, from the formulas of the papers. Shares nothing with the catalog but the settings.

Each function takes the documents of one step, with whole distributions of student and teacher, and gives the step's loss as a number
that is differentiable in the student's logits. What a paper treats as constant (masks, gates, weights) is computed from detached
logits. A step is what the paper's formula is on one batch that holds all of its documents; where the paper speaks of a sequence, the
step is the mean over sequences weighted by their tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Doc:
    """The supervised tokens of one document: logits [tokens, vocabulary] of both models, labels, and which are annotated."""

    student: Tensor
    teacher: Tensor
    labels: list[int]
    anchors: list[bool]
    name: str
    places: list[int] | None = None
    """Where the tokens stand in their document; None: one behind the other, from 1 on."""

    @property
    def standing(self) -> list[int]:
        return list(range(1, len(self) + 1)) if self.places is None else self.places

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.labels)


def invent(lengths: list[int], *, seed: int, vocabulary: int = 29, moved: float = 1.0, sure: float = 1.0) -> list[Doc]:
    """Documents of random distributions; `moved` is how far the student is from its teacher, and logits of both are `sure` times as
    large. Labels lean towards likely tokens, so that there are some on both sides of every threshold. Supervised tokens come in runs
    of five."""
    random = torch.Generator().manual_seed(seed)
    docs = []
    for number, length in enumerate(lengths):
        teacher = 2.0 * sure * torch.randn(length, vocabulary, generator=random, dtype=torch.float64)
        student = teacher + sure * moved * torch.randn(length, vocabulary, generator=random, dtype=torch.float64)
        drawn = torch.multinomial(torch.softmax(1.5 * teacher, 1), 1, generator=random).squeeze(1)
        anchors = (torch.rand(length, generator=random) < 0.3).tolist()
        runs = [1 + t + 2 * (t // 5) for t in range(length)]
        docs.append(Doc(student, teacher, drawn.tolist(), anchors, f"document {number} of seed {seed}", runs))
    return docs


def moved_student(docs: list[Doc], *, seed: int) -> list[Doc]:
    """The same documents and teacher under another student."""
    random = torch.Generator().manual_seed(seed)
    return [
        replace(d, student=d.student.detach() + torch.randn(d.student.shape, generator=random, dtype=torch.float64)) for d in docs
    ]


def log_p(logits_V: Tensor) -> Tensor:
    return logits_V - torch.logsumexp(logits_V, 0)


def cross_entropy(doc: Doc, t: int) -> Tensor:
    return -log_p(doc.student[t])[doc.labels[t]]


def forward_kl(doc: Doc, t: int) -> Tensor:
    """KL(q||p) = sum over v of q log q/p."""
    p, q = log_p(doc.student[t]), log_p(doc.teacher[t])
    return sum((q[v].exp() * (q[v] - p[v]) for v in range(len(q))), torch.zeros((), dtype=torch.float64))


def reverse_kl(doc: Doc, t: int) -> Tensor:
    """KL(p||q) = sum over v of p log p/q."""
    p, q = log_p(doc.student[t]), log_p(doc.teacher[t])
    return sum((p[v].exp() * (p[v] - q[v]) for v in range(len(q))), torch.zeros((), dtype=torch.float64))


def entropy(logits_V: Tensor) -> Tensor:
    p = log_p(logits_V)
    return -sum((p[v].exp() * p[v] for v in range(len(p))), torch.zeros((), dtype=torch.float64))


def total(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64))


def mean(values: list[Tensor]) -> Tensor:
    """Of nothing: 0, as in a loss term over an empty set."""
    return total(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def places(docs: list[Doc]) -> list[tuple[Doc, int]]:
    return [(doc, t) for doc in docs for t in range(len(doc))]


def teacher_probability(doc: Doc, t: int) -> float:
    return float(log_p(doc.teacher[t])[doc.labels[t]].exp())


def student_probability(doc: Doc, t: int) -> float:
    return float(log_p(doc.student[t].detach())[doc.labels[t]].exp())


def sft(docs: list[Doc]) -> Tensor:
    return mean([cross_entropy(*place) for place in places(docs)])


def sft_kl(docs: list[Doc], *, kl: float, direction: str = "teacher_to_student") -> Tensor:
    divergence = forward_kl if direction == "teacher_to_student" else reverse_kl
    return mean([cross_entropy(*place) + kl * divergence(*place) for place in places(docs)])


def perplexity(doc: Doc, t: int) -> float:
    return 1 / teacher_probability(doc, t)


def dropped(doc: Doc, *, tau: float | None = None, fraction: float | None = None, select: str = "highest") -> set[int]:
    """Places that stm masks in one document."""
    worst_first = sorted(range(len(doc)), key=lambda t: (-perplexity(doc, t), t))
    if tau is not None:
        highest = [t for t in range(len(doc)) if perplexity(doc, t) > tau]
    else:
        highest = worst_first[: int(Decimal(str(fraction)) * len(doc))]
    if select == "highest":
        return set(highest)
    best_first = sorted(range(len(doc)), key=lambda t: (perplexity(doc, t), t))
    return set(best_first[: len(highest)])


def stm(docs: list[Doc], **how: Any) -> Tensor:
    """L = - sum over t of m_t log p_y / sum of m_t."""
    learned = [(doc, t) for doc, t in places(docs) if t not in dropped(doc, **how)]
    return mean([cross_entropy(*place) for place in learned])


def stm_kl(docs: list[Doc], *, kl: float, **how: Any) -> Tensor:
    terms = [kl * forward_kl(d, t) if t in dropped(d, **how) else cross_entropy(d, t) for d, t in places(docs)]
    return mean(terms)


def eksft_sequence(doc: Doc, *, rho: float, lambda_kl: float, lambda_entropy: float, combine: str = "union") -> Tensor:
    """L = CE over R without M - lambda_H mean over M_H of H/log V + lambda_KL mean over M_KL of KL(p||q)."""
    k, still = int(Decimal(str(rho)) * len(doc)), replace(doc, student=doc.student.detach())
    by_entropy = sorted(range(len(doc)), key=lambda t: (-float(entropy(still.student[t])), t))
    by_kl = sorted(range(len(doc)), key=lambda t: (-float(reverse_kl(still, t)), t))
    m_h, m_kl = set(by_entropy[:k]), set(by_kl[:k])
    m = m_h | m_kl if combine == "union" else m_h & m_kl
    most = math.log(doc.student.shape[1])
    return (
        mean([cross_entropy(doc, t) for t in range(len(doc)) if t not in m])
        - lambda_entropy * mean([entropy(doc.student[t]) / most for t in m_h])
        + lambda_kl * mean([reverse_kl(doc, t) for t in m_kl])
    )


def eksft_published_sequence(
    doc: Doc, *, rho: float, lambda_kl: float, lambda_entropy: float, combine: str = "union",
    nudges: list[tuple[float, float]] | None = None,
) -> Tensor:  # fmt: skip
    """As the authors' code has it, in its own terms: at position i there are the label of token i, -100 where it is not supervised,
    and logits about token i + 1. Scores and masks are by position. What follows a run is left out: nobody knows its teacher. `nudges`
    gets what the two lambdas were multiplied by, where anything was chosen."""
    token_at = {place: t for t, place in enumerate(doc.standing)}
    about = {place: token_at[place + 1] for place in token_at if place + 1 in token_at}  # of positions with a label: which token
    still, k = doc.student.detach(), int(Decimal(str(rho)) * len(doc))
    by_entropy = sorted(about, key=lambda i: (-float(entropy(still[about[i]])), i))
    by_kl = sorted(about, key=lambda i: (-float(reverse_kl(replace(doc, student=still), about[i])), i))
    entropy_mask, kl_mask = set(by_entropy[:k]), set(by_kl[:k])
    masked = entropy_mask | kl_mask if combine == "union" else entropy_mask & kl_mask
    labels = [t for place, t in token_at.items() if place not in masked]

    def regulariser(t: int) -> Tensor:
        p, log_q = torch.softmax(doc.student[t], 0), log_p(doc.teacher[t])
        return (p * (p - log_q)).sum()

    normalised_entropy = mean([entropy(doc.student[about[i]]) / math.log(doc.student.shape[1]) for i in entropy_mask])
    kl = mean([regulariser(about[i]) for i in kl_mask])
    target_entropy, target_kl = 0.5, 2.0
    lambda_entropy_now = lambda_entropy * (1.05 if float(normalised_entropy.detach()) < target_entropy else 0.95)
    lambda_kl_now = lambda_kl * (1.05 if float(kl.detach()) > target_kl else 0.95)
    if nudges is not None and kl_mask:
        nudges.append((lambda_entropy_now / lambda_entropy, lambda_kl_now / lambda_kl))
    return mean([cross_entropy(doc, t) for t in labels]) - lambda_entropy_now * normalised_entropy + lambda_kl_now * kl


def eksft(docs: list[Doc], *, variant: str = "paper", **how: Any) -> Tensor:
    if variant == "published_code":
        return mean([eksft_published_sequence(doc, **how) for doc in docs])
    return total([len(doc) * eksft_sequence(doc, **how) for doc in docs]) / sum(len(doc) for doc in docs)


def lwf(
    docs: list[Doc],
    *,
    alpha: float,
    beta: float,
    c: float | str,
    anchors: str,
    p_star: float = 0.9,
    normalise: str = "token_mean",
) -> Tensor:
    """q^A = c delta + (1 - c) q; alpha KL(q^A||p) on anchors, beta KL(q||p) on the rest; (alpha |A| L_A + beta |R| L_R) / (|A| + |R|),
    or alpha L_A + beta L_R."""
    learned, held = [], []
    for doc, t in places(docs):
        probability = teacher_probability(doc, t)
        if not (doc.anchors[t] if anchors == "given" else probability < p_star):
            held.append(forward_kl(doc, t))
            continue
        q, p = log_p(doc.teacher[t]).exp(), log_p(doc.student[t])
        confidence = (p_star - probability) / (1 - probability) if c == "floor" else float(c)
        target = (1 - confidence) * q
        target[doc.labels[t]] += confidence
        learned.append(total([m * (m.log() - p[v]) for v, m in enumerate(target) if m > 0]))
    if normalise == "group_mean":
        return alpha * mean(learned) + beta * mean(held)
    return (alpha * len(learned) * mean(learned) + beta * len(held) * mean(held)) / (len(learned) + len(held))


def eaft(docs: list[Doc], *, alpha: float) -> Tensor:
    gates = [(float(entropy(doc.student[t].detach().topk(20).values)) / 3.0) ** alpha for doc, t in places(docs)]
    return mean([gate * cross_entropy(*place) for gate, place in zip(gates, places(docs), strict=True)])


def dft(docs: list[Doc]) -> Tensor:
    return mean([student_probability(*place) * cross_entropy(*place) for place in places(docs)])


def asft(docs: list[Doc], *, kl: float) -> Tensor:
    return dft(docs) + kl * mean([forward_kl(*place) for place in places(docs)])


def talr(docs: list[Doc], *, w_min: float) -> Tensor:
    """w = max(p_y^(1/tau), w_min), with each sequence's own mean NLL as its tau."""
    terms = []
    for doc in docs:
        probabilities = [student_probability(doc, t) for t in range(len(doc))]
        tau = sum(-math.log(p) for p in probabilities) / len(doc)
        terms += [max(p ** (1 / tau), w_min) * cross_entropy(doc, t) for t, p in enumerate(probabilities)]
    return mean(terms)


def kd(docs: list[Doc], *, lam: float) -> Tensor:
    return mean([(1 - lam) * cross_entropy(*place) + lam * forward_kl(*place) for place in places(docs)])


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "sft": sft, "sft_kl": sft_kl, "stm": stm, "stm_kl": stm_kl, "eksft": eksft, "lwf": lwf,
    "eaft": eaft, "dft": dft, "asft": asft, "talr": talr, "kd": kd,
}  # fmt: skip
