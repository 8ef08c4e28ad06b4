"""What MLflow missed is told by the worker, whatever else is away."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.tell_mlflow import tell_the_rest
from registry import adapters, runs
from registry.errors import TrackerError
from registry.project import Project
from registry.store import Store
from tests.registry.test_mlflow_mirror import known_to

# MLflow and SQLAlchemy warn of their own deprecations, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def judged(store: Store, model: str, **tracking: Any) -> None:
    recipe = {
        "kind": "finetune", "name": model, "model": model, "base": {"model": "org/base"},
        "data": {"path": "datasets/m"}, "evaluate": {"task": "label"}, "tracking": tracking,
    }  # fmt: skip
    adapters.add_version(store, model, 1, f"run-{model}", f"adapters/{model}/1", {"recipe": recipe})
    adapters.add_verdict(store, model, 1, "pass", {"champion": None, "checks": []}, None)


def test_one_that_is_away_keeps_no_other_from_being_told(project: Project, store: Store) -> None:
    judged(store, "away", uri="http://127.0.0.1:9")
    judged(store, "m")
    tracker = known_to(project)
    with pytest.raises(TrackerError):
        tell_the_rest(project, store)
    with tracker._client("") as client:
        assert int(client.get_model_version_by_alias("m", "candidate").version) == 1
        assert client.get_model_version("m", "1").tags["ft.verdict"] == "pass"
    assert {each[0] for each in adapters.unprojected_aliases(store)} == {"away"}


def test_a_run_that_is_on_tells_of_its_model_itself(project: Project, store: Store) -> None:
    judged(store, "m")
    runs.submit(store, {"name": "m", "model": "m"}, "recipes/m.yaml", "d")
    tell_the_rest(project, store)
    assert adapters.unprojected_aliases(store)
