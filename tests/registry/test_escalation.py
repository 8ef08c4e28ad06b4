"""Escalation: the condition as a table, recipes that lead to recipes, and at most one run of each."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from registry import approvals, escalation, runs
from registry.cloud_terms import Escalation
from registry.errors import Conflict, RecipeError
from registry.event_types import TYPES
from registry.events import by_run, causes, read
from registry.migrations import MIGRATIONS
from registry.project import Project
from registry.recipe import Finetune, load_recipe
from registry.store import Store, open_store
from tests.conftest import all_at_once

BODY = {"kind": "finetune", "base": "org/base", "data": {"path": "datasets/plans"}, "evaluate": {"task": "text"}}
FOUND = {"score": 0.3, "limit": 0.56, "max_usd": 20.0}
PREPARE = """
from registry import escalation
from registry.project import find_project
from registry.recipe import load_recipe
from registry.store import open_store
project = find_project()
store, other = open_store(project), load_recipe(project.root / "recipes" / "a100.yaml")
"""
ASKED = {"to": "recipes/a100.yaml", **FOUND}
START = f'print(escalation.start(store, "small-1", other, "recipes/a100.yaml", {FOUND!r}))'


def write(project: Project, name: str, to: str = "", **keys: Any) -> Path:
    path = project.root / "recipes" / f"{name}.yaml"
    section = {"escalate": {"to": f"recipes/{to}.yaml", "max_usd": 50, "reference": 0.8}} if to else {}
    path.write_text(yaml.safe_dump({**BODY, "model": "plans", **section, **keys}), encoding="utf-8")
    return path


def submit(store: Store, run_id: str, cause: str | None = None) -> None:
    recipe = {"name": run_id.rpartition("-")[0], "model": "plans"}
    with store.writing() as connection:
        runs.submit_within(connection, run_id, recipe, "recipes/x.yaml", "d", cause=cause)


def check(project: Project, path: Path) -> None:
    escalation.check_escalation(project.root, load_recipe(path), str(path))


@pytest.mark.parametrize(
    ("when", "score", "reference", "escalates"),
    [
        ("score < 0.7 * reference", 0.55, 0.8, True),
        ("score < 0.7 * reference", 0.57, 0.8, False),
        ("score<0.7*reference", 0.0, 0.8, True),
        ("  score  <  1  ", 0.99, None, True),
        ("score < 0.7", 0.69, None, True),
        ("score < 0.7", 0.7, None, False),
        ("score < 0.7", 0.71, 1.0, False),  # a reference that is not asked for changes nothing
        ("score < 0.7 * reference", 0.7 * 0.9, 0.9, False),
        ("score < 0.9 * reference", 0.72, 0.8, False),  # equal but for the last bit
        ("score < 1.5 * reference", 0.7, 0.5, True),
        ("score < 0.7 * reference", 0.0, 0.0, False),
        ("score < 0", 0.0, None, False),
    ],
)
def test_the_condition(when: str, score: float, reference: float | None, escalates: bool) -> None:
    assert escalation.decide(when, score, reference) is escalates


def test_a_condition_that_needs_a_reference_is_not_decided_without_one() -> None:
    for when in ("score < 0.7 * reference", "score > 0.7"):
        with pytest.raises(RecipeError):
            escalation.decide(when, 0.5, None)


@pytest.mark.parametrize(
    ("when", "reference", "asked"),
    [
        ("score < 0.7 * reference", {"model": "gpt", "url": "http://h/v1"}, True),
        ("score < 0.7", {"model": "gpt", "url": "http://h/v1"}, False),
        ("score < 0.7 * reference", 0.8, False),
        ("score < 0.7", None, False),
    ],
)
def test_a_model_is_asked_only_where_its_score_is_needed(when: str, reference: Any, asked: bool) -> None:
    terms = Escalation.model_validate({"when": when, "reference": reference, "to": "recipes/b.yaml", "max_usd": 1})
    assert bool(escalation.model_to_ask(terms)) is asked


def test_a_chain_of_recipes_of_one_model_is_fine(project: Project) -> None:
    write(project, "large")
    write(project, "medium", "large")
    check(project, write(project, "small", "medium"))
    check(project, write(project, "alone"))


@pytest.mark.parametrize(
    ("large", "what"),
    [
        (None, "escalate.to: .*large.yaml: no such recipe"),
        ({"model": "other"}, "escalate.to: recipes/large.yaml is of model 'other', and this recipe of 'plans'"),
        ({"to": "small"}, "it would go round in a circle: small -> large -> small"),
        ({"to": "large"}, "it would go round in a circle: large -> large"),
        ({"to": "gone"}, "escalate.to: .*gone.yaml: no such recipe"),
        ({"gate": {"mni": 1}}, "escalate.to: .*large.yaml:.*: gate.mni: unknown key"),
    ],
)
def test_what_could_not_be_started_is_told_at_once(project: Project, large: dict[str, Any] | None, what: str) -> None:
    if large is not None:
        write(project, "large", **large)
    path = write(project, "small", "large")
    with pytest.raises(RecipeError, match=what) as caught:
        check(project, path)
    assert caught.value.fix
    assert caught.value.place


@pytest.mark.parametrize(
    ("own", "run_usd", "allowed", "least"),
    [(None, None, 50, 50), (20, None, 50, 20), (80, None, 50, 50), (None, 5, 50, 5), (20, 5, 50, 20), (80, 5, 50, 50)],
)
def test_the_other_run_may_cost_the_least_that_anybody_says(
    project: Project, own: float | None, run_usd: float | None, allowed: float, least: float
) -> None:
    other = load_recipe(write(project, "large", budget={"max_usd": own}))
    assert escalation.bounded(other, allowed, run_usd).budget.max_usd == least


def test_a_run_starts_another_once_and_says_why(project: Project, store: Store) -> None:
    other = load_recipe(write(project, "a100"))
    submit(store, "small-1")
    submit(store, "small-2")
    started = escalation.start(store, "small-1", other, "recipes/a100.yaml", FOUND)
    assert started.startswith("a100-")
    assert escalation.start(store, "small-1", other, "recipes/a100.yaml", {**FOUND, "score": 0.4}) == started
    renamed = other.model_copy(update={"name": "renamed"})
    assert escalation.start(store, "small-1", renamed, "recipes/a100.yaml", FOUND) == started
    assert escalation.started_by(store, "small-1") == started
    assert escalation.started_by(store, "small-2") == ""
    assert escalation.start(store, "small-2", other, "recipes/a100.yaml", FOUND) != started
    run = runs.get(store, started)
    assert (run.recipe, run.model, run.recipe_path, run.state) == ("a100", "plans", "recipes/a100.yaml", "submitted")
    assert Finetune.model_validate(run.body) == other
    [event] = read(store, type_="run.escalated", subject="small-1")
    assert event.data == {"to": "recipes/a100.yaml", "run": started, **FOUND}
    [submitted] = read(store, type_="run.submitted", subject=started)
    assert [each.type for each in causes(store, submitted)] == ["run.escalated", "run.submitted"]
    assert event.cause == by_run("small-1")


def test_of_many_who_escalate_at_once_one_starts_a_run(project: Project, store: Store) -> None:
    write(project, "a100")
    submit(store, "small-1")
    said = all_at_once(3, PREPARE, START, project.root)
    assert len(set(said)) == 1
    assert [run.id for run in runs.listed(store, recipe="a100")] == said[:1]


def test_a_recipe_whose_run_led_here_is_not_started_again(project: Project, store: Store) -> None:
    """By triggers: the recipe files alone have no circle."""
    other = load_recipe(write(project, "a100"))
    submit(store, "a100-1")
    submit(store, "small-1", cause=by_run("a100-1"))
    submit(store, "small-2")
    escalation.refuse_circle(store, "small-2", other)
    with pytest.raises(RecipeError, match="in a circle: a100 -> small -> a100"):
        escalation.refuse_circle(store, "small-1", other)


@pytest.mark.parametrize("outcome", ["not needed", "wanted", "started", "rejected", "timed_out", "promoted"])
def test_every_outcome_is_told_with_its_numbers(outcome: str) -> None:
    found = {"outcome": outcome, "to": "recipes/a100.yaml", "metric": "token_f1", "reference": 0.8,
             "reference_model": "gpt", "by": "ann", "run": "a100-1", **FOUND}  # fmt: skip
    said = escalation.told(found)
    assert "token_f1 0.300, escalates below 0.560 (reference 0.800 of gpt)" in said
    assert ("$20" in said) == (outcome in ("wanted", "started"))
    assert ("no escalation" in said) == (outcome not in ("wanted", "started"))


def test_what_is_undecided_says_why() -> None:
    assert "no key" in escalation.told({"outcome": "undecided", "to": "recipes/a100.yaml", "why": "no key"})


def test_of_one_verdict_a_person_may_be_asked_twice(store: Store) -> None:
    submit(store, "small-1")
    approvals.ask(store, "small-1", 7, "plans", 3, seconds=60)
    approvals.answer(store, "small-1", yes=False, by_whom="ann", reason="terse")
    asked = approvals.ask(store, "small-1", 7, "plans", 3, seconds=60, escalation=ASKED)
    assert (asked.starts, asked.what) == ("recipes/a100.yaml", "recipes/a100.yaml, after plans@3")
    assert approvals.ask(store, "small-1", 7, "plans", 3, seconds=9, escalation=ASKED) == asked
    assert approvals.waiting(store) == [asked]
    moved = approvals.move_deadline(store, asked, 9.0)
    assert moved.deadline == pytest.approx(asked.deadline + 9)
    said = approvals.answer(store, "small-1", yes=True, by_whom="bob")
    assert [each.answer for each in approvals.of_run(store, "small-1")] == ["rejected", "approved"]
    assert approvals.expire(store, asked) == said
    [wanted] = read(store, type_="run.escalation_wanted")
    assert wanted.data == {**ASKED, "deadline": asked.deadline}
    [yes] = read(store, type_="run.approved")
    assert yes.data == {"version": "plans@3", "verdict": 7, "by": "bob", "reason": "", "to": "recipes/a100.yaml"}
    for event in read(store, subject="small-1"):
        Draft202012Validator(TYPES[event.type].schema()).validate(event.data)
    with pytest.raises(Conflict, match=r"recipes/a100.yaml, after plans@3 was approved already") as caught:
        approvals.answer(store, "small-1", yes=True, by_whom="ann")
    assert "ft show small-1" in caught.value.fix


def test_an_answer_is_of_one_question(store: Store) -> None:
    submit(store, "small-1")
    promotion = approvals.ask(store, "small-1", 7, "plans", 3, seconds=60)
    approvals.ask(store, "small-1", 7, "plans", 3, seconds=60, escalation=ASKED)
    assert approvals.answer(store, "small-1", yes=True, by_whom="ann").starts
    assert approvals.waiting(store) == [promotion]


def test_the_time_for_a_yes_is_over_and_a_person_can_still_run_it(store: Store) -> None:
    submit(store, "small-1")
    approvals.ask(store, "small-1", 7, "plans", 3, seconds=-1, escalation=ASKED)
    with pytest.raises(Conflict, match=r"the time to approve recipes/a100\.yaml") as caught:
        approvals.answer(store, "small-1", yes=True, by_whom="ann")
    assert "`ft run recipes/a100.yaml`" in caught.value.fix


def test_who_promotes_the_version_by_hand_wants_no_other(store: Store) -> None:
    submit(store, "small-1")
    asked = approvals.ask(store, "small-1", 7, "plans", 3, seconds=60, escalation=ASKED)
    assert approvals.promoted_by_hand(store, asked, "ann").answer == "rejected"


def test_answers_of_before_are_still_there(project: Project) -> None:
    """The table was made anew, because a verdict can have two questions since."""
    before = next(at for at, script in enumerate(MIGRATIONS) if "CREATE TABLE questions" in script)
    project.home.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(project.database, isolation_level=None)) as old:
        for script in MIGRATIONS[:before]:
            old.executescript(script)
        old.execute("INSERT INTO approvals VALUES ('m-1', 7, 'm', 3, 1.0, 2.0, 'rejected', 'ann', 'terse', 1.5)")
        old.execute("INSERT INTO approvals VALUES ('m-2', 8, 'm', 4, 1.0, 2.0, NULL, NULL, NULL, NULL)")
        old.execute(f"PRAGMA user_version={before}")
    store = open_store(project)
    [one], [two] = approvals.of_run(store, "m-1"), approvals.of_run(store, "m-2")
    assert one == approvals.Approval("m-1", 7, "m", 3, 1.0, 2.0, "rejected", "ann", "terse", 1.5)
    assert (two.verdict, two.answer, two.starts) == (8, None, "")
