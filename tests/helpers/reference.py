"""The loss, slowly: float64, one token at a time, straight from the formulas. Shares no code and no trick with the fast one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-37
"""Stands for a mass of 0 inside a logarithm, as the fast loss does: both sides must mean the same by KL(p||q) where q is 0."""


@dataclass(frozen=True)
class Row:
    """The teacher's word on one token."""

    ids: list[int]
    logprobs: list[float]
    tail: float


@dataclass(frozen=True)
class TokenTerms:
    """The four terms of one token, in float64."""

    ce: Tensor
    kl: Tensor
    rkl: Tensor
    entropy: Tensor


def token_terms(logits_V: Tensor, label: int, row: Row | None) -> TokenTerms:
    """From float64 logits of all tokens. p and q have len(ids)+1 categories: each kept token, and everything else."""
    logprobs_V = logits_V - torch.logsumexp(logits_V, 0)
    ce = -logprobs_V[label]
    entropy = -(logprobs_V.exp() * logprobs_V).sum()
    zero = logits_V.new_zeros(())
    if row is None:
        return TokenTerms(ce, zero, zero, entropy)
    kl, rkl = zero, zero
    for token, logq in zip(row.ids, row.logprobs, strict=True):
        kl = kl + math.exp(logq) * (logq - logprobs_V[token])
        rkl = rkl + logprobs_V[token].exp() * (logprobs_V[token] - logq)
    others = [token for token in range(len(logits_V)) if token not in row.ids]
    log_tail_q = math.log(max(row.tail, FLOOR))
    if others:
        log_tail_p = torch.logsumexp(logprobs_V[others], 0)
        kl = kl + row.tail * (log_tail_q - log_tail_p)
        rkl = rkl + log_tail_p.exp() * (log_tail_p - log_tail_q)
    return TokenTerms(ce, kl, rkl, entropy)


def shaped_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, rows: int, scale: float, softcap: float | None
) -> Tensor:
    """Logits of the head's first `rows` rows, token by token."""
    logits = []
    for hidden_D in hidden_ND:
        z_V = weight_VD[:rows] @ hidden_D
        if bias_V is not None:
            z_V = z_V + bias_V[:rows]
        z_V = z_V * scale
        logits.append(softcap * torch.tanh(z_V / softcap) if softcap is not None else z_V)
    return torch.stack(logits)


def reference_loss(
    logits_NV: Tensor, labels: list[int], weights_N4: Tensor, teacher: list[Row] | None
) -> tuple[Tensor, list[TokenTerms]]:
    """The weighted sum over tokens, differentiable in the logits. Columns of the weights: ce, kl, rkl, entropy."""
    loss, terms = logits_NV.new_zeros(()), []
    for n, label in enumerate(labels):
        term = token_terms(logits_NV[n], label, teacher[n] if teacher is not None else None)
        ce, kl, rkl, entropy = weights_N4[n]
        loss = loss + ce * term.ce + kl * term.kl + rkl * term.rkl - entropy * term.entropy
        terms.append(term)
    return loss, terms
