"""The gate: may this version become champion? Pure: scores in, judgement out, every number in it.

Three checks: a least score (`min`), a margin above the bare base (`beat_base_by`), and "not worse than the
champion" by a paired bootstrap. Without a champion the bare base takes its place in the last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry.errors import Trouble
from registry.recipe import Gate
from registry.resampling import RESAMPLES, Difference, paired_difference, score
from registry.scores import Scored, metric_for

Outcome = Literal["pass", "fail", "undecided"]
SEED = 20_251_121
# Scores are sums of fractions: 0.7 must not fail a minimum of 0.7 by the last bit.
SLACK = 1e-9


@dataclass(frozen=True)
class Check:
    """One condition, its outcome, and a sentence with the numbers for people."""

    name: str
    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Judgement:
    """`fail` if any check fails, else `undecided` if any is, else `pass`."""

    outcome: Outcome
    checks: list[Check]
    numbers: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        """As a verdict keeps it. `champion` is what `registry.adapters.promote` compares and sets against."""
        return {**self.numbers, "checks": [asdict(check) for check in self.checks]}


def judge(gate: Gate, task: str, candidate: Scored, champion: Scored | None, base: Scored) -> Judgement:
    """Judge the candidate.

    Raises RecipeError for a metric of another task, Trouble for scores of different rows (or of none).
    """
    metric = metric_for(task, gate.metric)
    _same_rows(candidate, base, *([champion] if champion and not champion.missing else []))
    reference = champion or base
    difference = _compare(gate, metric, candidate, reference)
    checks = [
        *_check_min(gate, metric, candidate),
        *_check_base(gate, metric, candidate, base),
        _check_not_worse(gate, metric, reference, difference),
    ]
    numbers = _numbers(gate, metric, candidate, champion, base) | _numbers_of(reference, difference)
    return Judgement(_overall(checks), checks, numbers)


def _check_min(gate: Gate, metric: str, candidate: Scored) -> list[Check]:
    if gate.min is None:
        return []
    got = score(metric, candidate)
    outcome: Outcome = "pass" if got >= gate.min - SLACK else "fail"
    return [Check("min", outcome, f"{metric} {got:.3f}, at least {gate.min:.3f} is asked for")]


def _check_base(gate: Gate, metric: str, candidate: Scored, base: Scored) -> list[Check]:
    if gate.beat_base_by is None:
        return []
    above = score(metric, candidate) - score(metric, base.with_failures_forgiven())
    outcome: Outcome = "pass" if above >= gate.beat_base_by - SLACK else "fail"
    text = f"{above:+.3f} against the bare base, at least {gate.beat_base_by:+.3f} is asked for"
    return [Check("beat_base_by", outcome, text)]


def _check_not_worse(gate: Gate, metric: str, reference: Scored, difference: Difference | None) -> Check:
    if difference is None:
        return Check("not_worse", "undecided", f"{reference.subject} could not be asked: {reference.missing}")
    outcome: Outcome = "undecided"
    if difference.low >= -gate.may_lose - SLACK:
        outcome = "pass"
    elif difference.high < -gate.may_lose - SLACK:
        outcome = "fail"
    against = "the bare base" if reference.version is None else f"the champion, {reference.subject}"
    text = (
        f"{metric} {difference.measured:+.3f} against {against}; {gate.confidence:.0%} interval "
        f"{difference.low:+.3f} to {difference.high:+.3f}, may lose {gate.may_lose:.3f}"
    )
    if outcome == "undecided":
        text += f"; with these rows a loss below {difference.detectable:.3f} cannot be told from luck"
    return Check("not_worse", outcome, text)


def _compare(gate: Gate, metric: str, candidate: Scored, reference: Scored) -> Difference | None:
    if reference.missing:
        return None
    forgiven = reference.with_failures_forgiven()
    return paired_difference(metric, candidate, forgiven, confidence=gate.confidence, seed=SEED)


def _numbers(gate: Gate, metric: str, candidate: Scored, champion: Scored | None, base: Scored) -> dict[str, Any]:
    asked = {"candidate": candidate, "base": base} | ({"champion": champion} if champion else {})
    return {
        "metric": metric,
        "rows": candidate.count,
        "rows_digest": candidate.rows,
        "subject": candidate.subject,
        "version": candidate.version,
        "champion": champion.version if champion else None,
        "scores": {role: each.metrics for role, each in asked.items()},
        "failures": {role: len(each.failed) for role, each in asked.items()},
        "gate": gate.model_dump(mode="json"),
        "seed": SEED,
        "resamples": RESAMPLES,
    }


def _numbers_of(reference: Scored, difference: Difference | None) -> dict[str, Any]:
    return {
        "reference": "base" if reference.version is None else "champion",
        "difference": difference.measured if difference else None,
        "interval": [difference.low, difference.high] if difference else None,
        "detectable": difference.detectable if difference else None,
    }


def _same_rows(candidate: Scored, *others: Scored) -> None:
    if candidate.count == 0:
        raise Trouble(f"{candidate.subject} was asked nothing, so there is nothing to judge")
    for other in others:
        if (other.rows, other.count) != (candidate.rows, candidate.count):
            raise Trouble(f"{candidate.subject} and {other.subject} were scored on different rows")


def _overall(checks: list[Check]) -> Outcome:
    outcomes = {check.outcome for check in checks}
    return "fail" if "fail" in outcomes else "undecided" if "undecided" in outcomes else "pass"
