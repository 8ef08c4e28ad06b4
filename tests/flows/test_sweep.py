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


@pytest.mark.timeout(1200)
def test_one_run_killed_once_in_each_step(tmp_path: Path) -> None:
    with (
        canned_parts(tmp_path) as shared,
        swept_project(tmp_path, Parts(shared.base, shared.adapter, shared.engine)) as swept,
    ):
        trial = at_points(swept, chosen(), "each step")
    assert not trial.wrong, trial.line
    assert not trial.resumes, "nobody had to look after it"
    assert len(trial.killed) == len(chosen())


def chosen() -> list[Point]:
    """The next order is given a moment after a death: so each point lies behind something that takes a second."""
    names = [
        "take turn: done, before it is written down",
        "pin: before the engine of runs commits it",
        "plan: after write_spec",
        "train: the lease names a result that is not there (trainer)",
        "register: before the commit of the version",
        "evaluate: its engine dies (engine)",
        "judge: after add_verdict",
        "promote: before the commit of the move",
        "wait until served: the engine dies in the probe (engine)",
        "conclude: before the commit of the end",
    ]
    by_name = {each.name: each for each in POINTS}
    return [by_name[name] for name in names]
