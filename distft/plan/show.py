"""A plan as text for a terminal."""

from __future__ import annotations

from typing import Any

import yaml

_LATER = "known once the corpus is tokenised"
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
    lines += [
        "", "# estimate",
        f"parameters             {figures['parameters']:,}",
        f"memory per rank        {figures['memory_per_rank'] / 2**30:.1f} GiB",
        f"teacher cache          about {figures['teacher_bytes_per_token']:.0f} bytes a scored token",
        f"steps                  {_LATER if figures['steps'] is None else format(figures['steps'], ',')}",
        f"scoring                {_hours(figures['score_hours'])}",
        f"training               {_hours(figures['train_hours'])}",
    ]  # fmt: skip
    return "\n".join(lines)


def _hours(hours: float | None) -> str:
    if hours is None:
        return _LATER
    if hours < 1 / 60:
        return "less than a minute (one H100 at 40 % of its bf16 peak)"
    return f"{hours:.2g} GPU-hours (one H100 at 40 % of its bf16 peak)"
