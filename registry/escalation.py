"""Escalation: another recipe of the same model is run where a version is not good enough. At most one of a run.

`decide` is pure. The run that is started has an id made of the run that escalated and of the recipe, and its cause is
that run's `run.escalated`, as if a trigger had started it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from registry.cloud_terms import WHEN, Escalation, ReferenceModel
from registry.decisions import chain_to
from registry.errors import RecipeError
from registry.events import RUNS, Event, append_within, by_run, find, new_event
from registry.recipe import Recipe, digest, load_recipe
from registry.runs import submit_within
from registry.store import Store
from registry.triggers import run_id_of

# 0.72 must not be below 0.9 * 0.8, which is 0.7200000000000001.
SLACK = 1e-9


def decide(when: str, score: float, reference: float | None) -> bool:
    """Is the score below the condition's limit? One that is just at it is not."""
    return score < limit_of(when, reference) - SLACK


def limit_of(when: str, reference: float | None) -> float:
    """What `when` compares the score with. Raises RecipeError where it names a reference and there is none."""
    found = WHEN.fullmatch(when.strip())
    if found is None:
        raise RecipeError(f"a condition is `score < 0.7` or `score < 0.7 * reference`: {when!r}", place="escalate.when")
    if found["reference"] is None:
        return float(found["factor"])
    if reference is None:
        raise RecipeError("`when` compares with reference, and there is none", place="escalate.when")
    return float(found["factor"]) * reference


def model_to_ask(terms: Escalation) -> ReferenceModel | None:
    """The model whose score the condition needs; None where a number will do."""
    return terms.reference if isinstance(terms.reference, ReferenceModel) and "reference" in terms.when else None


def check_escalation(root: Path, recipe: Recipe, place: str) -> None:
    """Follow `escalate.to` from recipe to recipe. Raises RecipeError for what could not be started when it comes to it.

    `place` is the recipe's file, `root` the project's folder, from which `to` is read.
    """
    passed = [recipe.name]
    while terms := recipe.escalate:
        other = other_recipe(root, recipe, place)
        if other.name in passed:
            circle = " -> ".join([*passed[passed.index(other.name) :], other.name])
            raise RecipeError(f"escalate.to: it would go round in a circle: {circle}", place=place,
                              fix="take `escalate` out of the last of them")  # fmt: skip
        passed.append(other.name)
        recipe, place = other, terms.to


def other_recipe(root: Path, recipe: Recipe, place: str) -> Recipe:
    """The recipe that `escalate.to` names. Raises RecipeError if it is not there, is wrong, or is of another model."""
    assert recipe.escalate is not None
    to = recipe.escalate.to
    try:
        other = load_recipe(root / to)
    except RecipeError as error:
        what = f"{error.place}: {error.what}" if error.place else error.what
        raise RecipeError(f"escalate.to: {what}", place=place, fix=error.fix) from error
    if other.model != recipe.model:
        raise RecipeError(
            f"escalate.to: {to} is of model '{other.model}', and this recipe of '{recipe.model}'", place=place,
            fix=f"write `model: {recipe.model}` into {to}: what answers keeps its public name",
        )  # fmt: skip
    return other


def bounded(other: Recipe, max_usd: float, run_usd: float | None) -> Recipe:
    """The recipe with a budget of `max_usd` at most; `run_usd` is what a run may cost that says nothing of it."""
    own = other.budget.max_usd if other.budget.max_usd is not None else run_usd
    least = min(max_usd, own) if own is not None else max_usd
    return other.model_copy(update={"budget": other.budget.model_copy(update={"max_usd": least})})


def refuse_circle(store: Store, run_id: str, other: Recipe) -> None:
    """Raises RecipeError if a run of the other recipe led to this one, by whatever events."""
    chain = chain_to(store, _event(run_id, {}))
    if other.name in chain:
        circle = " -> ".join([*chain[chain.index(other.name) :], other.name])
        raise RecipeError(f"it would go round in a circle: {circle}", place="escalate.to")


def start(store: Store, run_id: str, other: Recipe, to: str, found: dict[str, Any]) -> str:
    """Submit the run of the other recipe and say so, in one transaction; its id. Nothing happens the second time.

    `found` has score, limit and max_usd.
    """
    event = _event(run_id, {})
    started = run_id_of(other.name, event)
    data = {"to": to, "run": started, **{name: found[name] for name in ("score", "limit", "max_usd")}}
    with store.writing() as connection:
        if append_within(connection, _event(run_id, data)):
            body = other.model_dump(mode="json")
            submit_within(connection, started, body, to, digest(other), cause=event.ref)
            return started
    return started_by(store, run_id)


def started_by(store: Store, run_id: str) -> str:
    """The run that this one has started; '' if none."""
    found = [each for each in find(store, _event(run_id, {}).id) if each.source == RUNS]
    return str(found[0].data.get("run", "")) if found else ""


def told(escalated: dict[str, Any]) -> str:
    """A run's `escalated` in one sentence."""
    outcome, to = escalated["outcome"], escalated.get("to", "")
    if outcome == "undecided":
        return f"no escalation, because it could not be decided: {escalated['why']}"
    measured = f"{escalated['metric']} {escalated['score']:.3f}, escalates below {escalated['limit']:.3f}"
    if reference := escalated.get("reference"):
        named = escalated.get("reference_model")
        measured += f" (reference {reference:.3f}{f' of {named}' if named else ''})"
    said = {
        "not needed": "no escalation",
        "wanted": f"may start {to} for at most ${escalated.get('max_usd', 0):g}",
        "started": f"escalated to {to} for at most ${escalated.get('max_usd', 0):g}: {escalated.get('run', '')}",
        "rejected": f"no escalation to {to}: {escalated.get('by', '')} said no",
        "timed_out": f"no escalation to {to}: nobody approved it in time",
        "promoted": "no escalation: the version was promoted by hand",
    }[outcome]
    return f"{said}; {measured}"


def _event(run_id: str, data: dict[str, Any]) -> Event:
    return new_event(RUNS, "run.escalated", run_id, data, key=f"{run_id}/escalated", cause=by_run(run_id))
