"""A plan as text for a terminal."""

from __future__ import annotations

from typing import Any

import yaml

_LATER = "known once the corpus is tokenised"
_UNREAD = "none: neither objective nor drift meter reads a teacher"
_SIGNS = {"have": "have   ", "partial": "partial", "stale": "STALE  ", "missing": "missing"}


def plan_text(result: dict[str, Any]) -> str:
    """The resolved run file, the state of each artifact, and the estimate."""
    lines = [
        "# the run, with every default",
        yaml.safe_dump(result["config"], sort_keys=False, allow_unicode=True).rstrip(),
        "",
        "# artifacts",
    ]
    for status in result["artifacts"]:
        note = status["note"].splitlines() or [""]
        made = "" if status["state"] == "have" else f"  (distft {status['verb']})"
        if status["artifact"] == "checkpoints" and status["state"] == "stale":
            made = "  (undo that, or give the new run another `name`)"
        lines.append(f"{status['artifact']:<12} {_SIGNS[status['state']]} {note[0]}{made}")
        lines.extend(f"{'':<21}{more}" for more in note[1:])
    figures = result["estimate"]
    read = any(status["artifact"] == "teacher" for status in result["artifacts"])
    lines += [
        "", "# estimate",
        f"parameters             {figures['parameters']:,}",
        f"memory per rank        {figures['memory_per_rank'] / 2**30:.1f} GiB",
        f"teacher cache          {_cache(figures) if read else _UNREAD}",
        f"steps                  {_LATER if figures['steps'] is None else format(figures['steps'], ',')}",
        f"scoring                {_hours(figures['score_hours']) if read else _UNREAD}",
        f"training               {_hours(figures['train_hours'])}",
    ]  # fmt: skip
    if "calibration" in result:
        lines += _calibration(result["calibration"], result["config"])
    return "\n".join(lines)


def _cache(figures: dict[str, Any]) -> str:
    basis, whole = figures["basis"], figures["teacher_bytes"]
    known = f"from {basis}" if basis.startswith("cache ") else basis
    total = "" if whole is None else f", {_bytes(whole)} in all"
    return f"about {figures['teacher_bytes_per_token']:.0f} bytes a scored token{total} ({known})"


def _calibration(found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    share = found["scored_tokens"] / found["tokens"]
    subject = "the whole corpus" if found["whole_corpus"] else "a million tokens"
    workers = found["workers"]
    scorers = "1 scorer" if workers == 1 else f"{workers} scorers like this one"
    lines = [
        "", f"# calibration: {found['documents']} documents on {found['device']}",
        f"tokens                 {found['tokens']:,}, of which {found['scored_tokens']:,} are scored ({100 * share:.0f} %)",
        f"speed                  {found['tokens_per_second']:,.0f} tokens/s in {found['seconds']:.1f} s, without loading the teacher",
        f"bytes                  {found['bytes_per_token']:.1f} a scored token; fewer in a large cache's files, more in a small one's",
        f"{subject:<22} {_bytes(found['teacher_bytes'])}, {_time(found['score_hours'])} with {scorers}",
    ]  # fmt: skip
    if found["device"] != "cpu" and found["tokens"] < config["score"]["tokens_per_batch"]:
        lines.append(f"{'':<22} faster than that: so few tokens do not fill a batch of score.tokens_per_batch")
    if config["cluster"]["address"] != "local":
        lines.append(f"{'':<22} measured on this machine; the cluster's may be others")
    return lines


def _bytes(amount: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount / 1e3:.3g} kB"


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} seconds"
    return f"{hours * 60:.2g} minutes" if hours < 2 else f"{hours:.3g} hours"


def _hours(hours: float | None) -> str:
    if hours is None:
        return _LATER
    if hours < 1 / 60:
        return "less than a minute (one H100 at 40 % of its bf16 peak)"
    return f"{hours:.2g} GPU-hours (one H100 at 40 % of its bf16 peak)"
