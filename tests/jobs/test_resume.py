"""`ft resume` of a run whose failure a child wrote down, while the workflow itself is still about to end."""

from __future__ import annotations

import pytest

from jobs import finetune, runtime
from registry import runs
from registry.errors import TimedOut
from registry.project import Project
from registry.settings import Settings
from registry.store import Store
from tests.registry.test_runs import submitted


def reopened(store: Store) -> runs.Run:
    """What the command leaves: the run is on again, and the worker is to see to it."""
    run = submitted(store)
    runs.finish(store, run.id, "failed", TimedOut("training took too long", place=run.id))
    runs.set_wish(store, run.id, "resume")
    runs.reopen(store, run.id)
    return runs.get(store, run.id)


def test_the_parent_that_ends_late_does_not_fail_the_run_again(project: Project, store: Store) -> None:
    run = reopened(store)
    finetune.bind(project, store, Settings())
    finetune._note_failure(run.id, RuntimeError("a child's error, as text"))
    found = runs.get(store, run.id)
    assert (found.active, found.wish, found.error) == (True, "resume", None)


def test_the_wish_stays_until_the_workflow_has_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = reopened(store)
    monkeypatch.setattr(runtime, "_status", lambda _: "PENDING")
    runtime.agree(store, lambda _: None, lambda *_: True, ())
    assert runs.get(store, run.id).wish == "resume"


def test_a_run_that_never_began_begins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = reopened(store)
    begun: list[str] = []
    monkeypatch.setattr(runtime, "_status", lambda _: "PENDING" if begun else None)
    runtime.agree(store, begun.append, lambda *_: True, ())
    assert (begun, runs.get(store, run.id).wish) == ([run.id], None)
