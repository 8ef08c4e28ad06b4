"""Run rows: one run of a recipe at a time unless queued, and each ends once."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from registry import runs
from registry.errors import Conflict, JobError, NotFound
from registry.events import read
from registry.project import Project
from registry.store import Store
from tests.conftest import all_at_once

PREPARE = """
from registry import runs
from registry.errors import Conflict
from registry.project import find_project
from registry.store import open_store
store = open_store(find_project())
"""
SUBMIT = """
try:
    print("run", runs.submit(store, {"name": "support", "model": "m"}, "recipes/support.yaml", "d").id)
except Conflict as error:
    print("conflict", error.what)
"""


def submitted(store: Store, name: str = "support", **more: Any) -> runs.Run:
    return runs.submit(store, {"name": name, "model": name}, f"recipes/{name}.yaml", "digest", **more)


def test_of_two_who_submit_one_recipe_at_once_one_is_told_of_the_other(store: Store, project: Project) -> None:
    said = all_at_once(2, PREPARE, SUBMIT, project.root)
    [run] = runs.listed(store)
    assert said == [f"conflict a run of recipe 'support' is on already: {run.id}", f"run {run.id}"]


def test_the_conflict_names_the_next_commands(store: Store) -> None:
    run = submitted(store)
    with pytest.raises(Conflict) as caught:
        submitted(store)
    for command in (f"ft logs -f {run.id}", f"ft cancel {run.id}", "ft run --queue"):
        assert command in caught.value.fix
    submitted(store, "another")
    runs.finish(store, run.id, "succeeded")
    submitted(store)


def test_queued_runs_wait_in_the_order_in_which_they_came(store: Store) -> None:
    queued = [submitted(store, queue=True) for _ in range(4)]
    submitted(store, "another")
    assert [runs.earlier_active(store, run) for run in queued] == [[run.id for run in queued[:n]] for n in range(4)]
    runs.finish(store, queued[0].id, "failed", JobError("it broke"))
    assert runs.earlier_active(store, queued[1]) == []
    assert [run.id for run in runs.listed(store, recipe="support")] == [run.id for run in reversed(queued)]


def test_a_run_is_created_when_it_is_seen(store: Store) -> None:
    """Else one that waited for the lock would come before one that has already found nobody before it."""
    made: list[runs.Run] = []
    with store.writing():
        thread = threading.Thread(target=lambda: made.append(submitted(store)))
        thread.start()
        time.sleep(0.3)
        let_go = time.time()
    thread.join(30)
    assert made[0].created >= let_go


def test_a_run_ends_once(store: Store) -> None:
    run = submitted(store)
    runs.set_stage(store, run.id, "train")
    runs.set_wish(store, run.id, "cancel")
    runs.finish(store, run.id, "failed", JobError("it broke", place="log.txt", fix="look"))
    runs.finish(store, run.id, "succeeded")
    runs.set_stage(store, run.id, "judge")
    ended = runs.get(store, run.id)
    assert (ended.state, ended.stage, ended.wish, ended.active) == ("failed", "train", None, False)
    assert ended.error == {"error": "JobError", "what": "it broke", "place": "log.txt", "fix": "look"}
    types = [event.type for event in read(store, subject=run.id)]
    assert types == ["run.submitted", "run.started", "run.failed"]


def test_a_reopened_run_goes_on_and_ends_again(store: Store) -> None:
    run = submitted(store)
    runs.finish(store, run.id, "failed", JobError("it broke"))
    time.sleep(0.05)
    runs.reopen(store, run.id)
    runs.reopen(store, run.id)  # the command and the worker both do
    again = runs.get(store, run.id)
    assert (again.error, again.active) == (None, True)
    assert 0.05 <= again.result["stopped"] < 5
    runs.finish(store, run.id, "succeeded")
    types = [event.type for event in read(store, subject=run.id)]
    assert types == ["run.submitted", "run.failed", "run.resumed", "run.finished"]


def test_results_add_up_and_the_start_stays(store: Store) -> None:
    run = submitted(store)
    runs.set_stage(store, run.id, "pin")
    began = runs.get(store, run.id).started
    runs.note_result(store, run.id, version=3, verdict="fail")
    runs.note_result(store, run.id, verdict="pass")
    runs.set_stage(store, run.id, "train")
    again = runs.get(store, run.id)
    assert again.result == {"version": 3, "verdict": "pass"}
    assert again.started == began
    assert (again.state, again.stage) == ("running", "train")


def test_a_wish_is_cleared_only_if_it_is_still_the_same(store: Store) -> None:
    run = submitted(store)
    runs.set_wish(store, run.id, "cancel")
    runs.set_wish(store, run.id, "resume")
    runs.clear_wish(store, run.id, "cancel")
    assert runs.get(store, run.id).wish == "resume"
    runs.clear_wish(store, run.id, "resume")
    assert runs.get(store, run.id).wish is None


def test_a_run_is_found_by_the_beginning_of_its_id(store: Store) -> None:
    run = submitted(store)
    assert runs.get(store, run.id[:-3]) == run
    with pytest.raises(NotFound, match="no run 'suppord'"):
        runs.get(store, "suppord")
    submitted(store, queue=True)
    with pytest.raises(NotFound, match="'support' is the beginning of 2 runs"):
        runs.get(store, "support")
    with pytest.raises(NotFound, match="no run '%'"):
        runs.get(store, "%")


def test_steps_count_their_attempts(store: Store) -> None:
    run = submitted(store)
    first = runs.begin_step(store, run.id, "train", "step")
    second = runs.begin_step(store, run.id, "train", "step")
    runs.begin_step(store, run.id, "judge", "step")
    runs.end_step(store, run.id, "train", second, {"spent": {"training": 2.0}})
    found = [(step.name, step.attempt, step.finished is None, step.note) for step in runs.steps(store, run.id)]
    assert (first, second) == (1, 2)
    assert found == [("train", 1, True, {}), ("train", 2, False, {"spent": {"training": 2.0}}), ("judge", 1, True, {})]


def test_bad_ends_are_told_once_and_again_after_a_resume(store: Store) -> None:
    run = submitted(store)
    assert runs.untold(store) == []
    runs.finish(store, run.id, "failed", JobError("it broke"))
    [ended] = runs.untold(store)
    runs.mark_told(store, ended)
    assert runs.untold(store) == []
    runs.reopen(store, run.id)
    runs.finish(store, run.id, "cancelled")
    assert [each.state for each in runs.untold(store)] == ["cancelled"]


def pause(store: Store, run: runs.Run) -> None:
    runs.set_wish(store, run.id, "pause")
    runs.stopped(store, runs.get(store, run.id))


def test_a_paused_run_holds_its_place_and_its_time_is_counted(store: Store) -> None:
    run = submitted(store)
    runs.set_stage(store, run.id, "train")
    pause(store, run)
    paused = runs.get(store, run.id)
    assert (paused.state, paused.stage, paused.active, paused.ended) == ("paused", "train", False, False)
    with pytest.raises(Conflict, match="is paused") as caught:
        submitted(store)
    assert f"ft resume {run.id}" in caught.value.fix
    later = submitted(store, queue=True)
    assert runs.earlier_active(store, later) == [run.id]
    assert [each.id for each in runs.listed(store, active=True)] == [later.id]
    assert [each.id for each in runs.listed(store, on=True)] == [later.id, run.id]
    runs.set_stage(store, run.id, "judge")  # a worker that was late
    runs.finish(store, run.id, "failed", JobError("late"))
    assert runs.get(store, run.id) == paused
    time.sleep(0.05)
    runs.reopen(store, run.id)
    again = runs.get(store, run.id)
    assert (again.state, again.paused) == ("running", None)
    assert 0.05 <= again.result["stopped"] < 5
    types = [event.type for event in read(store, subject=run.id)]
    assert types == ["run.submitted", "run.started", "run.paused", "run.resumed"]


def test_a_paused_run_is_cancelled_at_once(store: Store) -> None:
    run = submitted(store)
    pause(store, run)
    runs.set_wish(store, run.id, "cancel")
    ended = runs.get(store, run.id)
    assert (ended.state, ended.wish, ended.paused) == ("cancelled", None, None)
    assert ended.finished is not None
    assert ended.result["stopped"] > 0
    runs.set_wish(store, run.id, "pause")
    assert runs.get(store, run.id).wish is None


def test_who_pauses_does_not_undo_a_cancel(store: Store) -> None:
    run = submitted(store)
    seen = runs.get(store, run.id)
    runs.set_wish(store, run.id, "cancel")
    runs.set_wish(store, run.id, "pause")
    assert runs.get(store, run.id).wish == "cancel"
    other = submitted(store, "another")
    runs.set_wish(store, other.id, "pause")
    seen = runs.get(store, other.id)
    runs.set_wish(store, other.id, "cancel")  # between the worker's look and its act
    runs.stopped(store, seen)
    assert (runs.get(store, other.id).state, runs.get(store, other.id).wish) == ("submitted", "cancel")


def test_a_step_that_went_well_is_told_of_once(store: Store) -> None:
    run = submitted(store)
    bad, good = (runs.begin_step(store, run.id, "train", "step") for _ in range(2))
    runs.end_step(store, run.id, "train", bad, {"error": "it broke"})
    for _ in range(2):  # the store was away when the first was acknowledged
        runs.end_step(store, run.id, "train", good, {"spent": {}})
    [event] = read(store, type_="run.step")
    assert (event.subject, event.data["step"], event.data["attempt"]) == (run.id, "train", 2)
    assert 0 <= event.data["seconds"] < 5
    assert event.cause == f"ft/runs {run.id}"
    assert runs.steps(store, run.id)[0].note == {"error": "it broke"}
