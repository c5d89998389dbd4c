"""What a reader should take away, in one sentence that the numbers carry, and the numbers behind it.

It speaks of one task, the target. A ratio is said only where it means something: the same start, the same questions, the same
drift meter, and a reference whose own gain is clear of chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distft.report import intervals, words
from distft.report.data import RunData
from distft.report.results import Outcome, outcomes, reference, same_meter, same_start, target

NEGLIGIBLE_DRIFT = 1e-4
"""Nats per token: below, two drifts are rounding, and their ratio says nothing."""
MOST_CLAUSES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    sentence: str
    details: tuple[str, ...]
    target: str | None
    reference: str | None


def verdict(runs: Sequence[RunData]) -> Verdict:
    task = target(runs)
    found = outcomes(runs, task) if task else []
    evaluated = {o.run.name for o in found}
    rest = [run for run in runs if run.name not in evaluated]
    if len(found) < 2:
        details = [_detail(outcome) for outcome in found]
        sentences = [_alone(outcome) for outcome in found] + [_unknown(run) for run in rest]
        return Verdict(sentence=" ".join(sentences), details=tuple(details), target=task, reference=None)
    main = reference(found)
    others = [outcome for outcome in found if outcome is not main]
    crowded = len(others) > 1 and same_start(found) and _has_learned(main)
    details = [
        _detail(o) + (f"; {_share(o, main)} of the gain of {main.run.name}" if crowded and o is not main else "") for o in found
    ]
    sentence = _comparison(main, others)
    if rest:
        sentence += f" {_names(rest)} {'has' if len(rest) == 1 else 'have'} no score on {task}."
    return Verdict(sentence=sentence, details=tuple(details), target=task, reference=main.run.name)


def _comparison(main: Outcome, others: list[Outcome]) -> str:
    task, name = main.task.name, main.run.name
    if not same_start([main, *others]):
        return (
            f"These runs started from different models or were asked different questions on {task}, so their gains cannot be set "
            f"against each other: {'; '.join(_alone(o).rstrip('.') for o in [main, *others][:MOST_CLAUSES])}."
        )
    clauses = []
    learnt = _has_learned(main)
    for place, other in enumerate(others[:MOST_CLAUSES]):
        parts = [_learned(other, main, first=place == 0, alone=len(others) == 1)] if learnt else []
        parts += _drifted(other, main, named=not learnt and place == 0)
        clauses.append(f"{other.run.name} {' and '.join(parts)}" if parts else f"{other.run.name}: no drift was measured")
    if len(others) > MOST_CLAUSES:
        clauses.append(f"{len(others) - MOST_CLAUSES} more runs are in the table")
    if learnt:
        return f"{'; '.join(clauses)}."
    if main.gain_interval is None:
        why = f"How sure the gain of {name} on {task} is cannot be told without its items"
    elif main.clear:
        why = f"{name} got worse on {task}"
    else:
        why = f"{name} gained nothing on {task} that {main.task.after.count} {_unit(main)} can tell from chance"
    return f"{why}, so no share of it is given: {'; '.join(clauses)}."


def _has_learned(main: Outcome) -> bool:
    """Whether a share of its gain means anything."""
    return main.clear and main.gain > 0


def _learned(other: Outcome, main: Outcome, *, first: bool, alone: bool) -> str:
    """`learned 94 % of what sft learned on spell`; the interval is said where one other run leaves room for it."""
    what = f"of what {main.run.name} learned" + (f" on {main.task.name}" if first else "")
    if other.gain <= 0:
        return f"learned nothing {what}"
    if other.gain_interval is not None and not other.clear:
        return f"learned nothing {what} that {other.task.after.count} {_unit(other)} can tell from chance"
    share, _, span = _share(other, main).partition(" (")
    return f"learned {share} {what}" + (f" ({span}" if alone and span else "")


def _share(other: Outcome, main: Outcome) -> str:
    """`94 % (95 % interval 88 to 100)` of what the reference gained."""
    share = f"{words.number(100 * other.gain / main.gain, 0)}{words.NARROW}%"
    mine, theirs = other.item_gains, main.item_gains
    if mine is None or theirs is None:
        return share
    span = words.interval(intervals.ratio(mine, theirs), lambda value: words.number(100 * value, 0))
    return f"{share} (95{words.NARROW}% interval {span})"


def _drifted(other: Outcome, main: Outcome, *, named: bool) -> list[str]:
    """A ratio where both drifts are more than rounding and were measured alike; else the drift itself."""
    mine, theirs = other.run.drift, main.run.drift
    if mine is None:
        return []
    alike = theirs is not None and same_meter([other.run, main.run])
    if theirs is not None and alike and theirs.kl >= NEGLIGIBLE_DRIFT and mine.kl >= 0:
        return [f"drifted {words.times(mine.kl / theirs.kl)} times as far" + (f" as {main.run.name}" if named else "")]
    beside = f" ({main.run.name}: {words.drift(theirs.kl)}{'' if alike else ', not measured alike'})" if theirs else ""
    return [f"drifted {words.drift(mine.kl)} nats per token{beside}"]


def _alone(outcome: Outcome) -> str:
    run, task = outcome.run, outcome.task
    before, after = task.before, task.after
    judged = task.kind == "generate"
    form, unit = (words.percent, " right answers") if judged else (words.nats, " nats per token")
    name = task.name if judged else f"the NLL of {task.name}"
    if before.value == after.value:
        counts = f" ({before.right} of {before.count} before and after)" if judged else ""
        return f"{run.name} left {name} at {form(after.value)}{unit}{counts}{_and_drift(run)}."
    doubtful = outcome.gain_interval is not None and not outcome.clear
    verb = "took" if doubtful else "raised" if after.value > before.value else "lowered"
    doubt = f", which {after.count} {_unit(outcome)} cannot tell from no change" if doubtful else ""
    counts = f" ({before.right} to {after.right} of {after.count})" if judged else ""
    joint = ", and" if doubtful else " and"
    return (
        f"{run.name} {verb} {name} from {form(before.value)} to {form(after.value)}{unit}{counts}{doubt}{_and_drift(run, joint)}."
    )


def _unknown(run: RunData) -> str:
    if not run.metrics:
        return f"{run.name} has not been trained yet."
    steps = f"{words.whole(run.metrics[-1]['step'])} steps"
    lacking = "has no score on what it was to learn" if run.tasks else "was not evaluated"
    return f"{run.name} was trained for {steps} and {lacking}, so what it learned is not known{_and_drift(run, '; it')}."


def _and_drift(run: RunData, joint: str = " and") -> str:
    if run.drift is None:
        return ""
    return f"{joint} drifted {words.drift(run.drift.kl)} nats per token from {origin([run])} on held-out text"


def origin(runs: Sequence[RunData]) -> str:
    """What drift is measured from."""
    return "the untouched model" if all(run.own_teacher for run in runs) else "the teacher"


def _detail(outcome: Outcome) -> str:
    task, drift = outcome.task, outcome.run.drift
    form = words.percent if task.kind == "generate" else words.nats
    gain = words.points(outcome.gain) + " points" if task.kind == "generate" else words.signed(outcome.gain, 3) + " nats"
    text = f"{outcome.run.name}: {form(task.before.value)} to {form(task.after.value)} on {task.name} ({gain} gained"
    found = outcome.gain_interval
    if found is not None:
        span = words.interval(found, words.points if task.kind == "generate" else lambda v: words.signed(v, 3))
        text += f", 95{words.NARROW}% interval {span}"
    return text + ")" + (f"; drift {words.drift(drift.kl)} nats per token" if drift else "; drift not measured")


def _unit(outcome: Outcome) -> str:
    return "questions" if outcome.task.kind == "generate" else "documents"


def _names(runs: Sequence[RunData]) -> str:
    return words.listed([run.name for run in runs])
