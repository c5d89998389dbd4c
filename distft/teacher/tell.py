"""Teacher caches as text for a terminal of 100 columns. Takes the objects that `--json` prints; torch-free."""

from __future__ import annotations

import math
from typing import Any

BAR = 40
LINES = 40
"""Tokens of one document that are shown to a person."""
QUARANTINED = 10


def list_text(result: dict[str, Any]) -> str:
    """A line of figures per cache, and below it whose it is."""
    caches = result["caches"]
    if not caches:
        return f"no teacher cache in {result['store']}"
    lines = [f"{'cache':<16} {'documents':>11} {'tokens':>15} {'scored':>15} {'bytes':>10} {'a token':>8} {'age':>8}"]
    for cache in caches:
        if "documents" in cache:
            lines.append(
                f"{cache['id']:<16} {cache['documents']:>11,} {cache['tokens']:>15,} {cache['scored_tokens']:>15,} "
                f"{size(cache['bytes']):>10} {cache['bytes_per_token']:>8.0f} {_age(cache['age_seconds']):>8}"
            )
            files = cache["teacher"]["weights"]["files"]
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            first = next(iter(files.items()), ("no weights", ""))
            lines.append(f"  teacher  {first[0]} {first[1][:12]}{more}, {cache['teacher']['dtype']}")
            lines.append(f"  policy   {policy(cache['policy'])}")
            lines += [f"  and {cache['quarantined']:,} documents that the teacher could not read"] if cache["quarantined"] else []
            lines.append(f"  used by  {', '.join(cache['runs']) or 'no run with a checkpoint in this store'}")
        else:
            lines.append(f"{cache['id']:<16} cannot be read")
        if cache["problem"]:
            lines.append(f"  PROBLEM  {cache['problem']}")
    return "\n".join(lines)


def statistics_text(result: dict[str, Any]) -> str:
    """Figures in two columns, then the two histograms."""
    kept = result["mass_kept"]
    pairs = [
        ("documents", f"{result['documents']:,}", "mass kept, mean", f"{kept['mean']:.2%}"),
        ("tokens", f"{result['tokens']:,}", "mass kept, 95 % of tokens", f">= {kept['p5']:.2%}"),
        ("scored tokens", f"{result['scored_tokens']:,}", "the label is the first choice", f"{result['first_choice_share']:.1%}"),
        (*_kept(result), f"perplexity above {result['tau']:g}",
         f"{result['share_above_tau']:.1%}"),
        ("bytes", size(result["bytes"]), "mean NLL of the label, nats", f"{result['mean_nll']:.3f}"),
        ("bytes a token", f"{result['bytes_per_token']:.0f}", "mean entropy, nats", f"{result['mean_entropy']:.3f}"),
    ]  # fmt: skip
    lines = [result["cache"], f"{policy(result['identity'])}, teacher in {result['identity']['dtype']}", ""]
    lines += [f"{one:<18}{value:>14}     {two:<31}{other:>12}" for one, value, two, other in pairs]
    if result["quarantined"]:
        lines += ["", f"{len(result['quarantined']):,} documents that the teacher could not read"]
        lines += [f"  {digest}: {reason}" for digest, reason in list(result["quarantined"].items())[:QUARANTINED]]
    for name, title in (("perplexity", "perplexity of the label"), ("entropy", "entropy, nats")):
        lines += ["", f"{title:<18}{'tokens':>14}   share", *_histogram(result[name])]
    return "\n".join(lines)


def _kept(result: dict[str, Any]) -> tuple[str, str]:
    """What there is of a token's distribution."""
    if result["hidden_width"] is None:
        return "entries a token", f"{result['entries_per_token']:.1f}"
    return "kept a token", f"hidden {result['hidden_width']:,}"


def _histogram(histogram: dict[str, Any]) -> list[str]:
    """A line per bin, without the empty ones at both ends."""
    edges, counts = histogram["edges"], histogram["counts"]
    filled = [n for n, count in enumerate(counts) if count]
    total, most = max(1, sum(counts)), max(1, *counts)
    return [
        f"{_span(edges[n], edges[n + 1]):<18}{counts[n]:>14,}  {counts[n] / total:>6.1%}  "
        f"{'#' * math.ceil(BAR * counts[n] / most)}".rstrip()
        for n in (range(filled[0], filled[-1] + 1) if filled else ())
    ]


def _span(low: float, high: float | None) -> str:
    return f"{low:g} and more" if high is None else f"{low:g} to {high:g}"


def document_text(result: dict[str, Any]) -> str:
    """One document's first tokens."""
    tokens = result["tokens"]
    lines = [f"document {result['document']}: {result['token_count']:,} tokens, {len(result['positions']):,} scored"]
    if tokens is None:
        lines.append("no corpus of this store holds it: its token ids are not known")
    lines.append(
        f"{'position':>8} {'token':>8} {'log q':>9} {'perplexity':>11} {'entropy':>8} {'rank':>7} {'kept':>6} {'tail':>9}"
    )
    for n, position in enumerate(result["positions"][:LINES]):
        label, kept = result["label_logprob"][n], "all" if result["hidden_width"] else len(result["ids"][n])
        lines.append(
            f"{position:>8} {'-' if tokens is None else tokens[position]:>8} {label:>9.3f} {math.exp(min(700.0, -label)):>11.4g} "
            f"{result['entropy'][n]:>8.3f} {result['rank'][n]:>7,} {kept:>6} {result['tail'][n]:>9.2e}"
        )
    if len(result["positions"]) > LINES:
        lines.append(f"and {len(result['positions']) - LINES:,} more; --json prints all")
    return "\n".join(lines)


def verify_text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['cache']} is sound",
        f"{result['files']:,} files, {size(result['bytes'])}: every byte is as its manifest says",
        f"{result['documents']:,} documents, {result['scored_tokens']:,} scored tokens: every row is well-formed; "
        f"{result['compared_with_corpus']:,} compared with a corpus of the store",
        *([f"{result['quarantined']:,} documents that the teacher could not read"] if result["quarantined"] else []),
        ("1 corpus" if result["corpora_covered"] == 1 else f"{result['corpora_covered']:,} corpora")
        + " covered whole"
        + ("" if result["corpora_covered"] else ": the cache is unfinished"),
    ]
    probe = result["probe"]
    if probe is not None:
        lines.append(f"live teacher on {probe['documents']:,} documents, {probe['tokens']:,} tokens: agrees within rounding")
        share = f" + {probe['tolerance_share']:.0%} of it" if probe["tolerance_share"] else ""
        rows = [
            ("max |dlogp| of the label", probe["max_label_gap"], f"at most {probe['tolerance']:g} nats{share}"),
            (
                "max |dlogp| of kept ids",
                probe["max_kept_gap"],
                f"at most {probe['tolerance']:g} nats{share} beyond float16 rounding",
            ),
            ("max difference of entropy", probe["max_entropy_gap"], f"at most {probe['tolerance']:g} nats{share}"),
            ("argmax agreement", probe["argmax_agreement"], f"{probe['argmax_beyond_tolerance']} beyond what rounding explains"),
            ("rank agreement", probe["rank_agreement"], f"{probe['rank_beyond_tolerance']} beyond what rounding explains"),
        ]
        if probe["max_hidden_gap"] is not None:
            rows += [
                ("max |dh| of hidden states", probe["max_hidden_gap"], f"at most {probe['hidden_tolerance']:g} of their length"),
                ("max KL(stored || live)", probe["max_kl"], f"at most {probe['tolerance']:g} nats, whole vocabulary"),
                ("mean KL(stored || live)", probe["mean_kl"], "nats a token"),
            ]
        lines += [f"  {name:<27}{_figure(name, value):>10}   {note}" for name, value, note in rows]
    return "\n".join(lines)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if "agreement" in name else f"{value:.2e}"


def trial_text(result: dict[str, Any]) -> str:
    """What a scoring with `score.limit` found out: what the rest would take."""
    rest, pace = result["rest"], result["rest"]["tokens_per_second"]
    if not rest["documents"]:
        return "score: nothing is left to score; every document of the corpus is in the cache"
    told = f"score: a trial. {rest['documents']:,} documents, {rest['tokens']:,} tokens, are left; they would take about"
    told += f" {size(rest['bytes'])}, at {result['bytes_per_token']:.0f} bytes a scored token,"
    return told + (
        f" and {_hours(rest['hours'])}, at {pace:,.0f} tokens/s" if pace else " and a time that is not known: nothing was scored"
    )


def _hours(hours: float) -> str:
    for unit, share in (("h", 1.0), ("min", 60.0)):
        if hours * share >= 2:
            return f"{hours * share:,.3g} {unit}"
    return f"{hours * 3600:.2g} s"


def prune_text(result: dict[str, Any]) -> str:
    """What went, or would go, and what stays because it is young."""
    verb = "would remove" if result["dry_run"] else "removed"
    lines = []
    for cache in result["caches"]:
        lines.append(cache["cache"])
        lines += [f"  {verb} {name}, {size(count)}" for name, count in cache["files"].items()]
        lines += [f"  {verb} {name}, unfinished" for name in cache["unfinished"]]
        young = f"kept {len(cache['young'])} unnamed files younger than {result['grace_hours']:g} h: a build may be running"
        lines += [f"  {young}"] if cache["young"] else []
        if not (cache["files"] or cache["unfinished"] or cache["young"]):
            lines.append("  every data file is named by a manifest")
    return "\n".join([*lines, f"{verb} {result['files_removed']:,} files, {size(result['bytes_removed'])}"])


def policy(identity: dict[str, Any]) -> str:
    """What is kept of each token, in a few words."""
    kept = identity["distribution"]
    details = ", ".join(f"{key} {value:g}" for key, value in kept.items() if key != "kind")
    if kept["kind"] == "hidden":
        return f"hidden states and the teacher's head, {identity['positions']}"
    return f"{kept['kind']} ({details}), {identity['positions']}" if details else f"signals only, {identity['positions']}"


def size(count: float) -> str:
    """Bytes with three digits that count."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
