"""The card that goes with an exported model: what it is, what it was made from and how, and how far it has moved.

Written from the resolved run, the manifests and the checkpoint's facts alone. It is for others to read: of a path it gives the last
part and never a user's folder or a server's address, and what came out of files or the run file is shown as code, which no reader of
Markdown takes for markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distft.config.schema import Run, Source
from distft.corpus.sources import source_files
from distft.errors import DataError
from distft.export.code import code_version, package_versions
from distft.store.manifest import Manifest, fingerprint
from distft.store.model_folder import ModelFolder
from distft.train.checkpoint import ORIGIN
from distft.train.identity import OPERATIONAL

CARD = "README.md"
LISTED = 8
"""So many digests stand one by one; more are counted."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,60}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """All that a card is written from."""

    run: Run
    model: ModelFolder
    checkpoint: Manifest
    corpus: Manifest | None
    """None where it is not known."""
    cache: str | None
    """The id of the teacher's cache; None where none was read or it is not known."""
    dtype: str


def model_card(known: Known) -> str:
    """README.md of the exported folder: front matter for the hub, and a page for people."""
    parts = [f"---\n{yaml.safe_dump(front_matter(known), sort_keys=False, allow_unicode=True)}---", *_page(known)]
    return "\n\n".join(parts) + "\n"


def front_matter(known: Known) -> dict[str, Any]:
    """What the hub files the model under. A base model or data set stands here only by a name that the hub knows it by, and a license
    only where the base model's own card names one."""
    run, found = known.run, dict[str, Any]()
    base, data = _hub_model(run.model.path), _hub_data(run.data.train)
    if base is not None:
        found["base_model"] = base
    found["library_name"] = "transformers"
    found["pipeline_tag"] = "text-generation"
    found["tags"] = ["distft", "full-fine-tuning", run.objective.kind.replace("_", "-")]
    if data is not None:
        found["datasets"] = [data]
    return found | _license(known.model)


def _page(known: Known) -> Iterable[str]:
    run, facts = known.run, known.checkpoint.facts
    identity, step = known.checkpoint.identity["run"], known.checkpoint.identity["step"]
    base = _hub_model(run.model.path) or _last(run.model.path)
    yield f"# {run.name}"
    yield (
        f"All weights of {_code(base)}, fine-tuned by distft with the objective {_code(run.objective.kind)}."
        + (f" **The run was not finished: these are the weights after step {step:,} of {facts['total_steps']:,}.**"
           if step < facts["total_steps"] else "")
    )  # fmt: skip
    yield f"```python\n{_USE}\n```"
    yield "## Base model"
    at = f", revision {_code(run.model.revision)}" if run.model.revision else ""
    yield _list([
        f"{_code(base)}{at}",
        *_digests("file of weights", identity["weights"]["files"]),
        f"settings (config.json without what does not change the model): {_code(identity['weights']['config'])}",
    ])  # fmt: skip
    yield "## Data"
    yield _list(_data(known))
    yield "## Teacher"
    yield _list(_teacher(known))
    yield "## Objective"
    yield _settings(run.objective.model_dump(mode="json"))
    yield "## Training"
    yield _list([
        f"steps: {step:,} of {facts['total_steps']:,}",
        f"loss of the last step: {_number(facts.get('loss'))}" if facts.get("loss") is not None else None,
        *_imported(facts.get(ORIGIN)),
        f"passes in {run.model.dtype}; weights, gradients and optimizer in float32; stored here in {known.dtype}",
        f"engine: {run.train.engine}; ranks that wrote the checkpoint: {len(known.checkpoint.files)}",
    ])  # fmt: skip
    yield _settings(run.train.model_dump(mode="json", exclude=OPERATIONAL - {"drift_every_steps"}))
    yield "## Drift"
    yield _drift(known)
    yield "## How it was made"
    yield _list([
        f"exported by distft {code_version()}",
        ", ".join(f"{name} {version}" for name, version in package_versions().items()),
        f"run: {_code(fingerprint('run', identity))}",
        f"checkpoint: {_code(known.checkpoint.id)}, step {step:,}",
        f"corpus: {_code(known.corpus.id)}" if known.corpus else None,
        f"teacher cache: {_code(known.cache)}" if known.cache else None,
        f"sha256 of each file here: {_code('MANIFEST.json')}, where this folder came with it",
    ])  # fmt: skip


_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)"""


def _data(known: Known) -> Iterable[str | None]:
    data = known.run.data
    for split, source, told in (("train", data.train, "trained on"), ("heldout", data.heldout, "held out, for drift alone")):
        if source is None:
            continue
        name = _hub_data(source) or _last(source.path)
        options = [
            f"{key} {_code(value)}" for key in ("subset", "split", "revision") if (value := getattr(source, key)) is not None
        ]
        counts = known.corpus.facts.get(split, {}) if known.corpus else {}
        sizes = [
            f"{counts[key]:,} {key.replace('_', ' ')}" for key in ("documents", "tokens", "supervised_tokens") if key in counts
        ]
        dropped = [f"{counts['dropped']:,} rows dropped"] if counts.get("dropped") else []
        yield f"{told}: {', '.join([_code(name), *options, f'format {source.format}', *sizes, *dropped])}"
        rows = known.corpus.identity.get(split) if known.corpus else None
        content = (rows or {}).get("content") or []
        yield from _digests("file of rows" if len(content) > 1 else "rows", dict(enumerate(content)))
    if data.train.anchors is not None:
        yield f"anchors: {_code(_last(data.train.anchors))}"
    if data.exclude:
        yield f"documents left out by digest: {len(data.exclude)}"
    yield f"longest document: {data.max_tokens:,} tokens"


def _teacher(known: Known) -> Iterable[str | None]:
    run, objective = known.run, known.run.objective
    reads = objective.needs_signals or objective.needs_distribution
    if not run.needs_teacher:
        yield "none: neither the objective nor a drift meter reads one"
        return
    if run.teacher.path is None:
        yield "the base model itself, as it was before training"
    else:
        at = f", revision {_code(run.teacher.revision)}" if run.teacher.revision else ""
        yield f"another model: {_code(_hub_model(run.teacher.path) or _last(run.teacher.path))}{at}"
    yield (
        "read by the objective" + (" and the drift meter" if run.data.heldout else "")
        if reads
        else "read by the drift meter alone"
    )
    yield f"cache: {_code(known.cache)}, in {run.teacher_model.dtype}, of {run.score.positions} tokens" if known.cache else None
    kept = run.score.distribution.model_dump(mode="json")
    kind = kept.pop("kind")
    yield f"kept of each token: {_code(kind)}" + "".join(f", {key} {_number(value)}" for key, value in kept.items())


def _imported(told: dict[str, Any] | None) -> Iterable[str]:
    """Where the run was taken up from weights and moments that another program had trained."""
    if told is not None:
        yield (
            f"steps 1 to {told['step']:,} were taken elsewhere, and imported from {_code(_last(told['from']))}, sha256 of its files' "
            f"sha256: {_code(told['sha256'])}"
        )


def _drift(known: Known) -> str:
    """The figure with what it means; a distance from another teacher is not one from the base model."""
    run, facts = known.run, known.checkpoint.facts
    drift, allowed = facts.get("drift"), run.objective.drift_budget
    budget = f"The budget was {_number(allowed)} nats per token." if allowed is not None else ""
    if drift is None:
        return f"Not measured. {budget}".strip()
    kl, kind, own = float(drift["kl"]), run.score.distribution.kind, run.teacher.path is None
    teacher = "the base model" if own else "its teacher, which is another model"
    bound = " It is a lower bound, for the cache counts unlikely tokens as one." if kind == "topk" else ""
    bound += " It is an estimate from draws." if kind == "sample" else ""
    told = [
        f"**{_number(kl)} nats per token** from {teacher}, on {drift['tokens']:,} held-out tokens: KL(teacher‖model), as last "
        f"measured in training.{bound}",
        f"0 would be {'no change' if own else 'the same as the teacher'} on such text; at this drift a token that "
        f"{'the base model' if own else 'the teacher'} would say has here, in the geometric mean, {math.exp(-max(kl, 0.0)):.1%} of "
        "the probability that it has there.",
        f"Negative log-likelihood of these tokens: {_number(drift['nll'])} here, {_number(drift['teacher_nll'])} for the teacher.",
        budget,
    ]
    return " ".join(sentence for sentence in told if sentence)


def _license(model: ModelFolder) -> dict[str, str]:
    """What the base model's card says of its license, for it goes on to hold."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", model.card(), flags=re.DOTALL)
    try:
        told = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(told, dict):
        return {}
    kept = {key: told.get(key) for key in ("license", "license_name")}
    return {key: value for key, value in kept.items() if isinstance(value, str) and _LICENSE.fullmatch(value) and kept["license"]}


def _hub_model(path: str) -> str | None:
    """The hub's name of a model, where it was given by that and not as a folder."""
    return path if _HUB_NAME.fullmatch(path) and not Path(path).is_dir() else None


def _hub_data(source: Source) -> str | None:
    """The hub's name of a data set, likewise."""
    try:
        given_as_files = bool(source_files(source))
    except DataError:
        return None
    return source.path if not given_as_files and _HUB_NAME.fullmatch(source.path) else None


def _last(path: str) -> str:
    """The last part of a path or an address, without what may be a user's name, a secret or a query."""
    if "://" in path:
        path = re.split(r"[?#]", path)[0].rsplit("@", 1)[-1]
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _digests(what: str, digests: dict[Any, str]) -> Iterable[str]:
    """Each with its file's name where it has one; many as one digest of them all."""
    if len(digests) > LISTED:
        together = fingerprint("files", {str(name): digest for name, digest in digests.items()})
        yield f"{len(digests)} times a {what}, sha256 of their sha256: {_code(together)}"
        return
    for name, digest in digests.items():
        named = f" {_code(name)}" if isinstance(name, str) else ""
        yield f"{what}{named}, sha256: {_code(digest)}"


def _settings(told: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True)}```"


def _list(lines: Iterable[str | None]) -> str:
    return "\n".join(f"- {line}" for line in lines if line)


def _code(text: Any) -> str:
    """Text that is shown as it is, on one line."""
    shown = " ".join(str(text).replace("`", "'").split())
    return f"`{shown}`"


def _number(value: Any) -> str:
    """Four digits that count; counts whole."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
