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
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from distft import __version__
from distft.config.schema import Run
from distft.errors import ConfigError, StoreError
from distft.objectives.catalog import Stm
from distft.objectives.quadrants import LIKELY, QUADRANTS, UNSURE
from distft.plan.show import TREATMENT_WORDS, percent, sample_text
from distft.plan.tau_curve import tau_curve
from distft.plan.token_documents import STEPS, Shown, chosen_documents, document_html
from distft.plan.token_text import TokenTexts, coded
from distft.plan.tokens import BOTH, HELD, LEARNED, TAUS, TREATMENTS, Applied, TokenPlan
from distft.store.location import Location
from distft.store.model_folder import ModelFolder

TEMPLATES = Path(__file__).parent / "templates"

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
        likely=f"{LIKELY:g}", curve=tau_curve(plan, tau),
        sweep=[
            {"tau": f"{one['tau']:g}", "tokens": percent(one["tokens"]), "ce": percent(one["ce"]), "on": one["tau"] == tau}
            for one in plan.sweep(sorted({*TAUS, *([tau] if tau else [])}))
        ],
        reading=_reading(plan, shown, cut), documents=documents, begins=", where training starts" if plan.own_teacher else "",
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), script=script, script_hash=_script_hash(script),
    )  # fmt: skip


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
    bound = f"{UNSURE:.3g} nats"
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
