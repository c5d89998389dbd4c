"""A plan as text for a terminal."""

from __future__ import annotations

from typing import Any

import yaml

from distft.plan.show_memory import largest_lines, memory_lines

_LATER = "known once the corpus is tokenised"
_UNSCORED = "known once documents are scored; a trial (score.limit=200) is enough"
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
        *memory_lines(figures["memory"]),
        *largest_lines(figures["largest"]),
        f"checkpoint             {figures['checkpoint_bytes'] / 2**30:.1f} GiB each, and as much memory of all ranks' hosts",
        f"teacher cache          {_cache(figures) if read else _UNREAD}",
        f"steps                  {_LATER if figures['steps'] is None else format(figures['steps'], ',')}",
        f"scoring                {_hours(figures['score_hours']) if read else _UNREAD}",
        f"training               {_hours(figures['train_hours'])}",
    ]  # fmt: skip
    if read and result.get("tokens", "untold") is None:
        lines.append(f"{'learned, held, masked':<22} {_UNSCORED}")
    if "calibration" in result:
        lines += _calibration(result["calibration"], result["config"])
    if result.get("tokens"):
        lines += _tokens(result["tokens"])
    if "page" in result:
        lines += ["", f"page                   {result['page']}"]
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


TREATMENT_WORDS = {
    "learned": "learned", "both": "learned and held", "held": "held", "entropy": "entropy bonus alone", "masked": "masked",
    "live": "decided live",
}  # fmt: skip
QUADRANT_WORDS = {
    "sure_likely": "sure, likely", "sure_unlikely": "sure, unlikely", "unsure_likely": "unsure, likely",
    "unsure_unlikely": "unsure, unlikely",
}  # fmt: skip


def _tokens(found: dict[str, Any]) -> list[str]:
    """What the objective will do with the tokens, in which quadrants; the sweep of tau; and the other objectives, a line each."""
    mine = found["objectives"][0]
    level = "" if found["mean_ce"] is None else f", {found['mean_ce']:.3g} nats each"
    lines = [
        "", f"# what {mine['name']} will do with {found['supervised_tokens']:,} supervised tokens of {sample_text(found)}",
        f"{'':<22} {'tokens':>9} {'CE':>9}   CE: -log q(y) of the teacher{level}{_begins(found)}",
    ]  # fmt: skip
    for key, words in TREATMENT_WORDS.items():
        share = mine["treatments"][key]
        if share["tokens"]:
            lines.append(f"{words:<22} {percent(share['tokens']):>9} {percent(share['ce']):>9}")
    lines += [f"{'note':<22} {note}" for note in mine["notes"]]
    lines += _quadrants(found, mine)
    lines += [
        "", "# what stm would mask, by tau",
        f"{'tau':<22} " + " ".join(f"{one['tau']:>9g}" for one in found["sweep"]),
        f"{'tokens':<22} " + " ".join(f"{percent(one['tokens']):>9}" for one in found["sweep"]),
        f"{'CE':<22} " + " ".join(f"{percent(one['ce']):>9}" for one in found["sweep"]),
    ]  # fmt: skip
    return lines + _catalog(found)


def _begins(found: dict[str, Any]) -> str:
    return ", where training starts" if found["student_is_teacher"] else "; the student's own is not known"


def _quadrants(found: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    lines = [
        "", f"# by the teacher's entropy (sure: at most {found['entropy_threshold']:.3g} nats) and q(y) "
        f"(likely: at least {found['probability_threshold']:g})",
        f"{'':<22} {'tokens':>9} {'CE':>9}   {mine['kind']}",
    ]  # fmt: skip
    for key, words in QUADRANT_WORDS.items():
        share, done = found["quadrants"][key], mine["quadrants"][key]
        told = ", ".join(
            f"{TREATMENT_WORDS[name]} {percent(part)}" for name, part in done["treatments"].items() if part > 0
        )  # fmt: skip
        weight = done["mean_ce_weight"]
        told += "" if weight is None or mine["basis"] == "fixed" else f"; mean weight on CE {weight:.2g}"
        lines.append(f"{words:<22} {percent(share['tokens']):>9} {percent(share['ce']):>9}   {told}")
    return lines


def _catalog(found: dict[str, Any]) -> list[str]:
    """Every objective on the same tokens; `live` are those that will decide anew at each step."""
    lines = [
        "", "# every objective on these tokens: shares of tokens, and of CE",
        f"{'':<12} {'learned':>15} {'both':>15} {'held':>15} {'masked':>15} {'loss':>9} at step 0",
    ]  # fmt: skip
    for one in found["objectives"]:
        shares = one["treatments"]
        cells = [_pair(shares[key]) for key in ("learned", "both", "held")]
        none = {unit: shares["masked"][unit] + shares["entropy"][unit] for unit in ("tokens", "ce")}
        loss = "" if one["loss_at_step_0"] is None else f"{one['loss_at_step_0']:.3g}"
        told = "" if one["basis"] == "fixed" else " live"
        name = one["name"] if len(one["name"]) <= 12 else f"{one['name'][:11]}…"
        lines.append(f"{name:<12} " + " ".join(f"{cell:>15}" for cell in [*cells, _pair(none)]) + f" {loss:>9}{told}")
    lines += [f"{kind:<12} left out: {why}" for kind, why in found["left_out"].items()]
    return lines


def _pair(share: dict[str, float]) -> str:
    return "" if not share["tokens"] else f"{percent(share['tokens'])}, {percent(share['ce'])}"


def sample_text(found: dict[str, Any]) -> str:
    """Which documents were looked at."""
    looked, held, rows = found["documents"], found["documents_held"], found["documents_in_corpus"]
    if looked == rows:
        return f"all {rows:,} training documents"
    if looked == held:
        return f"the {held:,} training documents that are scored, of {rows:,}"
    scored = "" if held == rows else f", of which {held:,} are scored"
    return f"{looked:,} training documents, evenly spread over {rows:,}{scored}"


def percent(share: float) -> str:
    """A share as a person reads it; what is not quite nothing or all does not look so."""
    value = 100 * share
    if 0 < value < 0.1:
        return "<0.1 %"
    if 99.9 < value < 100:
        return ">99.9 %"
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %"
