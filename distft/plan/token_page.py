"""The page that shows what objectives do with tokens, in their text: one HTML file that opens from any disk without a network.

Documents, run files and tokenizers are untrusted text. All of it is escaped, the template escapes for itself, data for the script is
JSON without `<`, and the page's own content policy lets no other script run. Same documents and settings give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from distft import __version__
from distft.config.schema import Run
from distft.errors import ConfigError, StoreError
from distft.objectives.catalog import Stm
from distft.plan.show import TREATMENT_WORDS, percent, sample_text
from distft.plan.token_text import TokenTexts, coded, visible
from distft.plan.tokens import BOTH, HELD, LEARNED, LIKELY, QUADRANTS, TAUS, TREATMENTS, Applied, TokenPlan
from distft.store.location import Location
from distft.store.model_folder import ModelFolder

TEMPLATES = Path(__file__).parent / "templates"

PAGE_DOCUMENTS = 20
PAGE_TOKENS = 20_000
"""Supervised tokens on the page, which keep it below 3 MB; longer documents are cut."""
PROMPT_EDGE, PROMPT_TOKENS = 80, 1_500
"""A prompt shows so many tokens at both ends where it is longer; and a document so many outside its answers."""
STEPS = 4
"""Shades of a treatment, by weight."""
SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
"""Two of them name a row of an objective's palette of weights."""

QUADRANT_NAMES = ("Knew it", "Contradicts it", "Leans to it", "New and open")


def write_token_page(run: Run, plan: TokenPlan, model: ModelFolder, page: Path, *, store: Location) -> str:
    """Writes the page to a file of the user's own, and never into the store; returns where it is."""
    target = page.expanduser().absolute()
    if "://" not in store.url and target.resolve().is_relative_to(Path(store.url).resolve()):
        raise ConfigError(
            f"{page} lies in the store, which holds artifacts alone.", where="--page", help="Give a file elsewhere."
        )
    from distft.corpus.chat import load_tokenizer

    html = token_page(run, plan, TokenTexts(load_tokenizer(model)))
    partial = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(html.encode("utf-8", "replace"))
        os.replace(partial, target)
    except OSError as error:
        raise StoreError(f"The page cannot be written: {error.strerror or error}.", where=str(target),
                         help="Give another file to --page.") from error  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)
    return str(target)


def token_page(run: Run, plan: TokenPlan, texts: TokenTexts) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (TEMPLATES / "tokens.js").read_text(encoding="utf-8")
    facts = plan.facts()
    shown = chosen_documents(plan)
    marks = [_codes_with_shade(one) for one in plan.applied]
    documents = [_document(plan, one, marks[0], texts) for one in shown]
    data = {
        "treatments": TREATMENTS, "words": [TREATMENT_WORDS[name] for name in TREATMENTS],
        **_data(plan, facts, shown, marks),
    }  # fmt: skip
    tau = run.objective.tau if isinstance(run.objective, Stm) else None
    cut = sum(one.stop < plan.starts[one.number + 1] for one in shown)
    return environment.get_template("tokens.html.j2").render(
        version=__version__, title=f"What {plan.applied[0].name} will do with the tokens of {run.name}",
        subject=_subject(facts),
        objectives=[_objective(plan, one, found) for one, found in zip(plan.applied, facts["objectives"], strict=True)],
        likely=f"{LIKELY:g}", curve=_curve(plan, tau),
        sweep=[
            {"tau": f"{one['tau']:g}", "tokens": percent(one["tokens"]), "ce": percent(one["ce"]), "on": one["tau"] == tau}
            for one in plan.sweep(sorted({*TAUS, *([tau] if tau else [])}))
        ],
        reading=_reading(plan, shown, cut), documents=documents, begins=", where training starts" if plan.own_teacher else "",
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), script=script, script_hash=_script_hash(script),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown:
    """A document on the page: tokens `start` to `stop` of the plan's arrays, which may leave out its end."""

    number: int
    why: str
    start: int
    stop: int


def chosen_documents(plan: TokenPlan, documents: int = PAGE_DOCUMENTS, tokens: int = PAGE_TOKENS) -> list[Shown]:
    """An even spread for one half, and for the other the documents of which most cross-entropy is not learned; in the corpus's order.
    Where the run's objective learns every token, most cross-entropy of all."""
    one = plan.applied[0]
    idle = ~np.isin(one.codes, (LEARNED, BOTH))
    lost = np.where(idle if idle.any() else True, plan.ce, 0.0)
    per_document = np.add.reduceat(np.append(lost, 0.0), plan.starts[:-1]) if len(plan.seen) else np.zeros(0)
    per_document[np.diff(plan.starts) == 0] = 0.0
    first: dict[str, int] = {}
    for number, seen in enumerate(plan.seen):
        first.setdefault(seen.document.digest, number)
    unique = list(first.values())
    even = unique if len(unique) <= documents else [unique[(2 * n + 1) * len(unique) // documents] for n in range(documents // 2)]
    reason = f"most CE that {one.name} does not learn" if idle.any() else "most CE"
    why = dict.fromkeys(even, "evenly spread" if len(unique) > documents else "")
    for number in sorted(unique, key=lambda number: -per_document[number]):
        if len(why) >= min(documents, len(unique)):
            break
        why.setdefault(number, reason)
    lengths = {number: int(plan.starts[number + 1] - plan.starts[number]) for number in sorted(why)}
    kept, left = {}, tokens
    for place, (number, length) in enumerate(sorted(lengths.items(), key=lambda item: item[1])):
        kept[number] = min(length, left // (len(lengths) - place))  # what short ones leave, long ones get
        left -= kept[number]
    return [Shown(n, why[n], int(plan.starts[n]), int(plan.starts[n]) + kept[n]) for n in lengths]


def _subject(facts: dict[str, Any]) -> str:
    level = f"{facts['mean_ce']:.3g} nats of cross-entropy each"
    basis = "where training starts" if facts["student_is_teacher"] else "under a teacher that is another model than the student"
    return f"{facts['supervised_tokens']:,} supervised tokens of {sample_text(facts)}; {level}, {basis}."


def _reading(plan: TokenPlan, shown: Sequence[Shown], cut: int) -> str:
    count = f"{len(shown)} of {len(plan.seen):,} documents" if len(shown) < len(plan.seen) else f"All {len(shown)} documents"
    told = f" {cut} of them are cut to keep the page small." if cut else ""
    return f"{count}.{told} Colours are what the chosen objective does with each token."


def _objective(plan: TokenPlan, one: Applied, found: dict[str, Any]) -> dict[str, Any]:
    shares = found["treatments"]
    told = [name for name in TREATMENTS if shares[name]["tokens"]]
    cells = [_cell(n, found["quadrants"][name], plan, one) for n, name in enumerate(QUADRANTS)]
    bound = f"{plan.threshold:.3g} nats"
    return {
        "name": one.name, "configured": one.configured, "notes": found["notes"], "sentence": _sentence(plan, one, found),
        "key": [
            {"name": name, "words": TREATMENT_WORDS[name], **{unit: percent(share) for unit, share in shares[name].items()}}
            for name in told
        ],
        "shaded": bool((_codes_with_shade(one) % STEPS).any()),
        "tokens_bar": [_part(name, shares[name]["tokens"]) for name in told],
        "ce_bar": [_part(name, shares[name]["ce"]) for name in told],
        "quadrants": [
            {"words": "Teacher sure", "bound": f"H(q) ≤ {bound}", "cells": cells[:2]},
            {"words": "Teacher unsure", "bound": f"H(q) > {bound}", "cells": cells[2:]},
        ],
    }  # fmt: skip


def _cell(number: int, done: dict[str, Any], plan: TokenPlan, one: Applied) -> dict[str, Any]:
    mine = plan.quadrant == number
    tokens, ce = float(mine.mean()) if len(mine) else 0.0, float(plan.ce[mine].sum() / max(plan.ce.sum(), 1e-30))
    parts = [(name, share) for name, share in done["treatments"].items() if share > 0]
    told = ", ".join(
        TREATMENT_WORDS[name] if share == 1 else f"{TREATMENT_WORDS[name]} {percent(share)}" for name, share in parts
    )
    if one.rule.live != "no" and done["mean_ce_weight"] is not None:
        told += f"; mean weight on CE {done['mean_ce_weight']:.2g}"
    return {
        "words": QUADRANT_NAMES[number], "tokens": percent(tokens), "ce": percent(ce), "bar": [_part(*part) for part in parts],
        "done": told,
    }  # fmt: skip


def _sentence(plan: TokenPlan, one: Applied, found: dict[str, Any]) -> str:
    """What the objective does, in one sentence."""
    shares = found["treatments"]
    if not one.known:
        return f"{one.name} decides by the student of each step, and what that says of these tokens is not known yet."
    told = []
    for name, verb in (("learned", "learns"), ("both", "learns and holds"), ("held", "only holds"),
                       ("entropy", "gives an entropy bonus alone to"), ("masked", "masks")):  # fmt: skip
        share = shares[name]
        if share["tokens"] == 1:
            told.append(f"{verb} every token")
        elif share["tokens"]:
            told.append(f"{verb} {percent(share['tokens'])} of the tokens ({percent(share['ce'])} of the cross-entropy)")
    listed = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    sentence = f"{'At step 0 ' if found['basis'] == 'step 0' else ''}{one.name} {listed}."
    if found["basis"] == "step 0" and plan.ce.sum() > 0:
        counted = float((one.weights[0] * plan.ce).sum() / plan.ce.sum())
        sentence += f" By its weights, {percent(counted)} of the cross-entropy counts."
    return sentence


def _part(name: str, share: float) -> dict[str, Any]:
    return {"name": name, "width": f"{100 * share:.2f}"}


def _codes_with_shade(one: Applied) -> npt.NDArray[np.int64]:
    """Treatment and shade of each token as one number: paler where the weight that names the treatment is a small part of the
    objective's largest."""
    weights = np.nan_to_num(one.weights)
    learned = np.isin(one.codes, (LEARNED, BOTH))
    weight = np.where(learned, weights[0], np.where(one.codes == HELD, weights[1] + weights[2], 0.0))
    shade = np.zeros(len(weight), np.int64)
    for chosen in (learned, one.codes == HELD):
        if chosen.any():
            shade[chosen] = np.digitize(-weight[chosen] / weight[chosen].max(), [-0.6, -0.3, -0.1], right=True)
    return one.codes.astype(np.int64) * STEPS + shade


def _document(plan: TokenPlan, one: Shown, marks: npt.NDArray[np.int64], texts: TokenTexts) -> dict[str, Any]:
    document = plan.seen[one.number].document
    codes = plan.applied[0].codes[one.start : one.stop]
    ce = plan.ce[one.start : one.stop]
    mass = np.bincount(codes, weights=ce, minlength=6) / max(float(ce.sum()), 1e-30)
    count = np.bincount(codes, minlength=6) / max(1, len(codes))
    there = [n for n in range(len(TREATMENTS)) if count[n]]
    total = int(plan.starts[one.number + 1] - plan.starts[one.number])
    size = f"{total:,} supervised tokens of {len(document):,}" + (
        f", the first {one.stop - one.start:,} shown" if one.stop - one.start < total else ""
    )
    return {
        "place": f"{coded(Path(document.file).name)}, row {document.row:,}", "digest": document.digest, "why": one.why,
        "size": size, "html": document_html(plan, one, marks, texts),
        "sums": " · ".join(f"{TREATMENT_WORDS[TREATMENTS[n]]} {percent(count[n])} of tokens, {percent(mass[n])} of CE" for n in there),
        "bar": [_part(TREATMENTS[n], float(mass[n])) for n in there],
    }  # fmt: skip


def document_html(plan: TokenPlan, one: Shown, marks: npt.NDArray[np.int64], texts: TokenTexts) -> str:
    """The document's text: an element per supervised token, in the arrays' order; the rest as plain text, long runs shortened."""
    document = plan.seen[one.number].document
    supervised = np.flatnonzero(document.supervised)[: one.stop - one.start]
    whole = one.stop == plan.starts[one.number + 1]
    end = len(document) if whole else int(supervised[-1]) + 1 if len(supervised) else 0
    ids = document.tokens[:end].tolist()
    pieces = texts.pieces(ids)
    out: list[str] = []
    place, plain_left = 0, PROMPT_TOKENS
    for at, position in enumerate([*supervised.tolist(), end]):
        if position > place:
            run = list(zip(ids[place:position], pieces[place:position], strict=True))
            edge = max(10, min(PROMPT_EDGE, plain_left // 2))
            plain_left = max(0, plain_left - min(len(run), 2 * edge))
            out.append(f'<span class="prompt">{_plain(run, edge, texts)}</span>')
        if position < end:
            code = int(marks[one.start + at])
            name, shade = TREATMENTS[code // STEPS], code % STEPS
            given = f'"{name} s{shade}"' if shade else name
            out.append(f"<i class={given}>{_token(ids[position], pieces[position], texts)}</i>")
        place = position + 1
    return "".join(out) + ("" if whole else " <em>… the rest is not shown</em>")


def _plain(run: Sequence[tuple[int, str]], edge: int, texts: TokenTexts) -> str:
    parts = [_token(number, piece, texts, alone=False) for number, piece in run]
    if len(parts) > 2 * edge + 20:
        parts[edge:-edge] = [f" <em>… {len(parts) - 2 * edge:,} tokens …</em> "]
    return "".join(parts)


def _token(number: int, piece: str, texts: TokenTexts, *, alone: bool = True) -> str:
    text = visible(piece, alone=alone)
    return f"<u>{text}</u>" if number in texts.special and piece.strip() else text


def _data(
    plan: TokenPlan, facts: dict[str, Any], shown: Sequence[Shown], marks: Sequence[npt.NDArray[np.int64]]
) -> dict[str, Any]:
    """What the script reads: signals of the tokens on the page, and of each objective their codes and weights."""
    chosen = np.concatenate([np.zeros(0, np.int64), *(np.arange(one.start, one.stop) for one in shown)])
    starts = np.cumsum([0, *(one.stop - one.start for one in shown)])
    palettes = [_palette(one.weights[:, chosen]) if one.known else None for one in plan.applied]
    documents = []
    for number, one in enumerate(shown):
        seen, length = plan.seen[one.number], one.stop - one.start
        positions = np.flatnonzero(seen.document.supervised)[:length]
        documents.append({
            "ids": seen.document.tokens[positions].tolist(), "positions": positions.tolist(),
            "ce": _thousandths(plan.ce[one.start : one.stop]), "entropy": _thousandths(plan.entropy[one.start : one.stop]),
            "rank": seen.signals.rank[:length].tolist(), "entries": seen.entries[:length].tolist(),
            "codes": ["".join(chr(65 + code) for code in column[one.start : one.stop].tolist()) for column in marks],
            "weights": [
                palette and _packed(palette[1][starts[number] : starts[number + 1]]) for palette in palettes
            ],
        })  # fmt: skip
    objectives = [
        {"name": one.name, "basis": found["basis"], "palette": palette[0] if palette else None}
        for one, found, palette in zip(plan.applied, facts["objectives"], palettes, strict=True)
    ]
    return {"objectives": objectives, "documents": documents}


def _palette(weights: npt.NDArray[np.float32]) -> tuple[list[list[float]], npt.NDArray[np.int64]]:
    """The different weights of all tokens and each token's place among them, to as many decimals as leave 4096 at most: hundred
    thousandths of a unit, or more where weights are large or many."""
    exact = weights.T.astype(np.float64)
    decimals = 5 - max(0, math.ceil(math.log10(max(1.0, float(np.abs(exact).max(initial=0.0))))) - 2)
    while True:
        rows, places = np.unique(np.round(exact, decimals), axis=0, return_inverse=True)
        if len(rows) <= len(SIGNS) ** 2:
            return [[round(value, max(0, decimals)) for value in row] for row in rows.tolist()], places.reshape(-1)
        decimals -= 1


def _packed(places: npt.NDArray[np.int64]) -> str:
    return "".join(SIGNS[n // len(SIGNS)] + SIGNS[n % len(SIGNS)] for n in places.tolist())


def _thousandths(values: npt.NDArray[Any]) -> list[int]:
    return np.round(values.astype(np.float64) * 1000).astype(np.int64).tolist()


def _script_hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _curve(plan: TokenPlan, tau: float | None) -> str:
    """What is masked against tau, as a picture."""
    left, right, top, bottom, width, height = 40.0, 14.0, 12.0, 40.0, 440.0, 250.0
    low, high = math.log(1.05), math.log(3000)

    def x(value: float) -> float:
        return left + (math.log(value) - low) / (high - low) * (width - left - right)

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid-line" x1="{left}" x2="{width - right}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f} %</text>')
    for value in TAUS:
        parts.append(f'<line class="axis" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y(0):.1f}" y2="{y(0) + 4:.1f}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{y(0) + 17:.1f}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    parts.append(
        f'<text x="{(left + width - right) / 2:.1f}" y="{height - 4:.1f}" text-anchor="middle">'
        "tau: the highest perplexity that is learned</text>"
    )
    if tau is not None and low <= math.log(tau) <= high:
        parts.append(f'<line class="at" x1="{x(tau):.1f}" x2="{x(tau):.1f}" y1="{y(1):.1f}" y2="{y(0):.1f}"/>')
        parts.append(f'<text class="at-name" x="{x(tau) + 5:.1f}" y="{y(0) - 6:.1f}">this run</text>')
    fine = plan.sweep([math.exp(low + (high - low) * n / 90) for n in range(91)])
    marked = plan.sweep(TAUS)
    for unit, name, near in (("ce", "cross-entropy masked", 25.0), ("tokens", "tokens masked", 10.0)):
        points = "L".join(f"{x(one['tau']):.1f} {y(one[unit]):.1f}" for one in fine)
        parts.append(f'<path class="line {unit}" d="M{points}"/>')
        parts += [f'<circle class="dot {unit}" cx="{x(one["tau"]):.1f}" cy="{y(one[unit]):.1f}" r="3"/>' for one in marked]
        at = plan.sweep([near])[0][unit]
        parts.append(f'<text class="name {unit}" x="{x(near) + 8:.1f}" y="{y(at) - 8:.1f}">{name}</text>')
    told = "; ".join(f"tau {one['tau']:g}: {percent(one['tokens'])} of tokens, {percent(one['ce'])} of CE" for one in marked)
    return f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(told)}">{"".join(parts)}</svg>'
