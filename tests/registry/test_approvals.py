"""Approvals: the first answer counts, an answer that comes too late is none, and a clock that jumps takes no time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from registry import approvals, runs
from registry.errors import Conflict, NotFound
from registry.events import read
from registry.project import Project
from registry.store import Store
from tests.conftest import all_at_once

PREPARE = """
import sys
from registry import approvals
from registry.errors import Conflict
from registry.project import find_project
from registry.store import open_store
store = open_store(find_project())
"""
ANSWER = """
try:
    approvals.answer(store, "m-1", yes=True, by_whom="ann")
    print("said")
except Conflict as error:
    print("late")
"""


def asked(store: Store, run_id: str = "m-1", seconds: float = 3600, verdict: int = 7) -> approvals.Approval:
    with store.writing() as connection:
        runs.submit_within(connection, run_id, {"name": "m", "model": "m"}, "recipes/m.yaml", "d")
    return approvals.ask(store, run_id, verdict, "m", 3, seconds=seconds)


def types(store: Store) -> list[str]:
    return [event.type for event in read(store, subject="m-1") if event.type != "run.submitted"]


def test_the_first_answer_counts(store: Store) -> None:
    one = asked(store)
    assert approvals.ask(store, "m-1", 7, "m", 3, seconds=9) == one
    assert approvals.waiting(store) == [one]
    said = approvals.answer(store, "m-1", yes=False, by_whom="ann", reason="terse")
    assert (said.answer, said.by_whom, said.reason) == ("rejected", "ann", "terse")
    assert said.answered is not None
    with pytest.raises(Conflict, match="m@3 was rejected already, by ann at 2"):
        approvals.answer(store, "m-1", yes=True, by_whom="bob")
    assert approvals.expire(store, one) == said
    assert approvals.move_deadline(store, one, 99) == said
    assert approvals.waiting(store) == []
    assert types(store) == ["run.approval_wanted", "run.rejected"]
    assert read(store, type_="run.rejected")[0].data == {"version": "m@3", "verdict": 7, "by": "ann", "reason": "terse"}


def test_of_many_who_answer_at_once_one_is_heard(store: Store, project: Project) -> None:
    asked(store)
    assert all_at_once(3, PREPARE, ANSWER, project.root) == ["late", "late", "said"]


def test_an_answer_after_the_deadline_is_none(store: Store) -> None:
    """Though no worker was there to see that the time was over."""
    asked(store, seconds=-1)
    for _ in range(2):
        with pytest.raises(Conflict, match="the time to approve m@3 was over") as caught:
            approvals.answer(store, "m-1", yes=True, by_whom="ann")
        assert "ft promote m@3" in caught.value.fix
    assert types(store) == ["run.approval_wanted", "run.approval_timed_out"]


def test_a_paused_run_can_be_answered_and_its_time_stands_still(store: Store) -> None:
    before = asked(store, seconds=0.2)
    runs.set_wish(store, "m-1", "pause")
    runs.stopped(store, runs.get(store, "m-1"))
    time.sleep(0.3)
    assert approvals.waiting(store) == [before]
    runs.reopen(store, "m-1")
    moved = approvals.get(store, "m-1", 7)
    assert 0.3 <= moved.deadline - before.deadline < 5
    runs.set_wish(store, "m-1", "pause")
    runs.stopped(store, runs.get(store, "m-1"))
    time.sleep(0.3)
    assert approvals.answer(store, "m-1", yes=True, by_whom="ann").answer == "approved"


def test_a_run_that_has_ended_or_never_asked_gets_no_answer(store: Store) -> None:
    asked(store)
    runs.finish(store, "m-1", "cancelled")
    assert approvals.waiting(store) == []
    with pytest.raises(Conflict, match="has ended, and nobody had answered"):
        approvals.answer(store, "m-1", yes=True, by_whom="ann")
    with pytest.raises(Conflict, match="asks for no approval"):
        approvals.answer(store, "m-2", yes=True, by_whom="ann")
    with pytest.raises(NotFound):
        approvals.get(store, "m-1", 8)


def test_a_version_that_is_judged_again_is_asked_for_again(store: Store) -> None:
    asked(store)
    approvals.answer(store, "m-1", yes=True, by_whom="ann")
    again = asked(store, verdict=9)
    assert [each.answer for each in approvals.of_run(store, "m-1")] == ["approved", None]
    assert approvals.answer(store, "m-1", yes=False, by_whom="bob").verdict == again.verdict


def test_a_moved_deadline_leaves_as_much_time(store: Store) -> None:
    one = asked(store)
    moved = approvals.move_deadline(store, one, -500.0)
    assert moved.deadline - moved.asked == pytest.approx(3600)
    assert moved.deadline == pytest.approx(one.deadline - 500)


def test_by_hand_is_an_answer_too(store: Store) -> None:
    said: Any = approvals.promoted_by_hand(store, asked(store), "ann")
    assert (said.answer, said.by_whom, said.reason) == ("approved", "ann", "promoted by hand")
