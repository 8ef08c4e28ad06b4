"""kill -9 once in each step of a run: real worker, trainer, server and stores on SQLite; the engine is a fake."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flows.points import POINTS, Point
from tests.flows.shared_parts import canned_parts
from tests.flows.sweep import at_points
from tests.flows.swept_project import Parts, swept_project

# MLflow uses what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("default")


def test_one_run_killed_once_in_each_step(tmp_path: Path) -> None:
    with (
        canned_parts(tmp_path) as shared,
        swept_project(tmp_path, Parts(shared.base, shared.adapter, shared.engine)) as swept,
    ):
        trial = at_points(swept, chosen(), "each step")
    assert not trial.wrong, trial.line
    assert len(trial.killed) == len(chosen())


def chosen() -> list[Point]:
    names = [
        "decide: before the commit of the run's row",
        "take turn: done, before it is written down",
        "pin: before the engine of runs commits it",
        "plan: after write_spec",
        "train: the lease names a result that is not there (trainer)",
        "train: before the engine of runs commits it",
        "register: before the commit of the version",
        "evaluate: after keep_score",
        "judge: after add_verdict",
        "promote: after promote",
        "wait until served: after probe (server)",
        "wait until served: done, before it is written down",
        "conclude: before the commit of the end",
        "the engine of runs: before update_workflow_outcome",
    ]
    by_name = {each.name: each for each in POINTS}
    return [by_name[name] for name in names]
