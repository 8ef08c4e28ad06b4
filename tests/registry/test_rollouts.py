"""Canaries as rows: what may begin, what moves `champion`, what is left of one that went wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry import adapters, rollouts
from registry.alias_requests import untold_refusals
from registry.errors import Conflict, GateClosed, NotFound, WrongInput
from registry.events import causes, read
from registry.project import Project
from registry.pruned_rows import give_up_adapter
from registry.rollout_terms import Rollout, parse_canary
from registry.sqlite_database import SqliteDatabase
from registry.store import Store, open_store

TERMS = parse_canary("5%:10m,50%:30m")
MODEL = "m"


def add(store: Store, number: int, base: str = "base") -> None:
    adapters.add_version(store, MODEL, number, f"run-{number}", f"adapters/m/{number}", {"base": {"digest": base}})


def judge(store: Store, number: int, outcome: str = "pass") -> adapters.Verdict:
    body = {"champion": adapters.aliases(store, MODEL).get("champion")}
    return adapters.add_verdict(store, MODEL, number, outcome, body, None)


def with_champion(store: Store) -> None:
    """Version 1 is champion, version 2 has passed."""
    for number in (1, 2):
        add(store, number)
    adapters.promote(store, judge(store, 1), by_whom="ann")


def begin(store: Store, number: int = 2, **more: Any) -> rollouts.Rollout:
    return rollouts.start(store, judge(store, number), TERMS, by_whom="ann", **more)


def told(store: Store) -> list[str]:
    return [each.type for each in read(store) if each.type.startswith("rollout.")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no steps"),
        ("5%", "no steps"),
        ("5%:10", "no steps"),
        ("5%:10m,,50%:1h", "no steps"),
        ("5%:0m", "no time at all"),
        ("0%:1m", "greater than 0"),
        ("101%:1m", "less than or equal to 100"),
        ("50%:1m,5%:1m", "more percent than the one before"),
        ("5%:1m,5%:1m", "more percent than the one before"),
    ],
)
def test_steps_that_make_no_sense_are_refused(text: str, why: str) -> None:
    with pytest.raises(WrongInput, match=why):
        parse_canary(text)


def test_steps_are_read_and_written() -> None:
    assert [(each.percent, each.for_) for each in TERMS.steps] == [(5.0, "10m"), (50.0, "30m")]
    again = Rollout.model_validate(TERMS.model_dump(mode="json", by_alias=True))
    assert again == TERMS
    assert [again.seconds_of(step) for step in (0, 1)] == [600, 1800]


def test_the_champion_moves_when_the_last_step_has_held(store: Store) -> None:
    with_champion(store)
    begun = begin(store, run_id="run-2")
    assert (begun.percent, begun.stable, begun.name) == (5.0, "m@1", "m@2")
    second = rollouts.advance(store, begun)
    assert (second.step, second.percent, second.state) == (1, 50.0, "running")
    assert adapters.aliases(store, MODEL)["champion"] == 1, "not before the last step has held"
    done = rollouts.advance(store, second)
    assert done.state == "done"
    assert adapters.aliases(store, MODEL) == {"candidate": 2, "champion": 2, "previous": 1}
    move = adapters.promotions(store, MODEL)[-1]
    assert (move.run_id, move.by_whom, move.from_version) == ("run-2", "ann", 1)
    assert told(store) == ["rollout.started", "rollout.advanced", "rollout.finished"]
    promoted = [each for each in read(store) if each.type == "adapter.promoted"][-1]
    assert [each.type for each in causes(store, promoted)][:2] == ["rollout.finished", "rollout.started"]


def test_what_is_decided_twice_or_late_changes_nothing(store: Store) -> None:
    with_champion(store)
    begun = begin(store, run_id="run-2")
    assert begin(store, run_id="run-2").id == begun.id, "the run's step was repeated"
    rollouts.advance(store, begun)
    assert rollouts.advance(store, begun).step == 1, "two servers saw the same step end"
    assert rollouts.roll_back(store, begun, "late").state == "running", "judged by numbers of the step before"
    ended = rollouts.cancel(store, begun, by_whom="ann")
    assert rollouts.advance(store, ended).state == "cancelled"
    assert told(store) == ["rollout.started", "rollout.advanced", "rollout.cancelled"]


def test_a_version_that_was_rolled_back_needs_a_person(store: Store) -> None:
    with_champion(store)
    back = rollouts.roll_back(store, begin(store), "3 of 20 failed", {"new_errors": 3})
    assert (back.state, back.reason) == ("rolled_back", "3 of 20 failed")
    assert adapters.aliases(store, MODEL)["champion"] == 1
    assert adapters.get_version(store, MODEL, 2).rolled_back
    assert [each.reason for each in untold_refusals(store)] == ["rolled back from 5%: 3 of 20 failed"]
    with pytest.raises(GateClosed, match="was rolled back"):
        begin(store)
    assert begin(store, person=True).state == "running"


def test_a_cancelled_one_may_begin_again(store: Store) -> None:
    with_champion(store)
    rollouts.cancel(store, begin(store), by_whom="ann")
    assert begin(store).state == "running"
    with pytest.raises(NotFound, match="no rollout of other"):
        rollouts.running_of(store, "other")


def test_beside_a_rollout_nothing_else_moves_the_champion(store: Store) -> None:
    with_champion(store)
    add(store, 3)
    begin(store)
    for other in (
        lambda: begin(store, 3),
        lambda: adapters.promote(store, judge(store, 3), by_whom="bob", person=True),
        lambda: adapters.promote(store, judge(store, 2), by_whom="bob"),
        lambda: adapters.roll_back(store, MODEL, by_whom="bob", to=3),
    ):
        with pytest.raises(Conflict, match="a rollout of m@2 is under way") as caught:
            other()
        assert "ft rollout cancel m" in caught.value.fix
    assert not give_up_adapter(store, "m@2")


@pytest.mark.parametrize(
    ("outcome", "why", "error"),
    [("fail", "no passing verdict", GateClosed), ("undecided", "no passing verdict", GateClosed)],
)
def test_what_no_gate_passed_does_not_begin(store: Store, outcome: str, why: str, error: type[Exception]) -> None:
    with_champion(store)
    with pytest.raises(error, match=why):
        rollouts.start(store, judge(store, 2, outcome), TERMS, by_whom="ft")
    assert rollouts.start(store, judge(store, 2, outcome), TERMS, by_whom="ann", person=True).person


def test_it_needs_a_champion_on_the_same_base(store: Store) -> None:
    add(store, 1)
    with pytest.raises(Conflict, match="no champion that m@1 could answer beside"):
        begin(store, 1)
    adapters.promote(store, judge(store, 1), by_whom="ann")
    add(store, 2, base="another")
    with pytest.raises(Conflict, match="on another base model"):
        begin(store, 2)


def test_counts_are_added_up_and_begin_anew_with_each_step(store: Store) -> None:
    with_champion(store)
    begun = begin(store)
    for seconds in (2.0, 3.0):
        rollouts.add_seen(store, begun, seconds, {"new": {"requests": 2, "times": {"7": 1}}, "stable": {"requests": 9}})
    seen = rollouts.get(store, begun.id)
    assert seen.counts == {"new": {"requests": 4, "times": {"7": 2}}, "stable": {"requests": 18}}
    assert 2.0 <= seen.held < 2.5, "two servers at the same time do not make the time pass twice as fast"
    rollouts.add_seen(store, begun, 0.0, {"new": {"requests": 1}})
    assert rollouts.get(store, begun.id).held == seen.held, "a gateway that only counts"
    second = rollouts.advance(store, begun)
    assert (second.held, second.counts) == (0.0, {})
    rollouts.add_seen(store, begun, 2.0, {"new": {"requests": 2}})
    assert rollouts.get(store, begun.id).counts == {}, "what was seen in another step"


def test_that_it_is_held_is_said_once(store: Store) -> None:
    with_champion(store)
    begun = begin(store)
    for reason in ("3 of 20 requests", "4 of 20 requests"):
        rollouts.note_held(store, begun, reason)
    assert rollouts.get(store, begun.id).reason == "4 of 20 requests"
    assert told(store) == ["rollout.started", "rollout.held"]


_numbers = itertools.count()
VERSIONS = (1, 2, 3, 4)


class Moves(RuleBasedStateMachine):
    """Promotions, rollbacks and rollouts in any order, against a model of a few lines."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        home = self.folder / f"{next(_numbers)}" / ".ft"
        self.store = open_store(Project(home.parent, home, home))
        assert isinstance(self.store.database, SqliteDatabase)
        for number in VERSIONS:
            add(self.store, number)
        self.champion: int | None = None
        self.previous: int | None = None
        self.back: set[int] = set()
        self.on: tuple[int, int] | None = None  # version, step
        self.moves = 0

    def _may(self, version: int, person: bool) -> bool:
        return self.on is None and version != self.champion and (person or version not in self.back)

    def _move(self, version: int) -> None:
        self.previous = self.champion if self.champion is not None else self.previous
        self.champion, self.moves = version, self.moves + 1

    @rule(version=st.sampled_from(VERSIONS), person=st.booleans())
    def promote(self, version: int, person: bool) -> None:
        try:
            adapters.promote(self.store, judge(self.store, version), by_whom="x", person=person)
            done = True
        except (GateClosed, Conflict):
            done = False
        assert done == self._may(version, person)
        if done:
            self._move(version)

    @rule()
    def go_back(self) -> None:
        can = self.on is None and None not in (self.champion, self.previous) and self.champion != self.previous
        try:
            adapters.roll_back(self.store, MODEL, by_whom="x")
            done = True
        except (NotFound, Conflict):
            done = False
        assert done == can
        if done:
            assert self.champion is not None
            assert self.previous is not None
            self.back.add(self.champion)
            self._move(self.previous)

    @rule(version=st.sampled_from(VERSIONS), person=st.booleans())
    def start(self, version: int, person: bool) -> None:
        try:
            rollouts.start(self.store, judge(self.store, version), TERMS, by_whom="x", person=person)
            done = True
        except (GateClosed, Conflict):
            done = False
        assert done == (self._may(version, person) and self.champion is not None)
        if done:
            self.on = (version, 0)

    @precondition(lambda self: self.on is not None)
    @rule(late=st.booleans())
    def advance(self, late: bool) -> None:
        assert self.on is not None
        version, step = self.on
        found = rollouts.running_of(self.store, MODEL)
        for _ in range(2 if late else 1):
            rollouts.advance(self.store, found)
        self.on = (version, 1) if step == 0 else None
        if self.on is None:
            self._move(version)

    @precondition(lambda self: self.on is not None)
    @rule(cancelled=st.booleans())
    def end(self, cancelled: bool) -> None:
        assert self.on is not None
        found = rollouts.running_of(self.store, MODEL)
        if cancelled:
            rollouts.cancel(self.store, found, by_whom="x")
        else:
            rollouts.roll_back(self.store, found, "worse")
            self.back.add(self.on[0])
        self.on = None

    @invariant()
    def is_as_the_model_says(self) -> None:
        aliases = adapters.aliases(self.store, MODEL)
        assert (aliases.get("champion"), aliases.get("previous")) == (self.champion, self.previous)
        assert {each.version for each in adapters.versions(self.store) if each.rolled_back} == self.back
        assert [(each.version, each.step) for each in rollouts.running(self.store)] == ([self.on] if self.on else [])
        assert len(adapters.promotions(self.store)) == self.moves


def test_any_order_of_promotions_rollbacks_and_rollouts(tmp_path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Moves.folder = tmp_path
    run_state_machine_as_test(
        Moves,
        settings=settings(
            max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
