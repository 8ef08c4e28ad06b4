"""MLflow follows the store: in a process of its own, for a bounded time, and what it missed is told later."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from registry import adapters
from registry.alias_telling import begin_telling, end_telling
from registry.errors import TrackerError
from registry.mlflow_mirror import mirror, mirror_apart
from registry.mlflow_store import Tracker
from registry.project import Project
from registry.store import Store, open_store

# MLflow and SQLAlchemy warn of their own deprecations, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def store(project: Project) -> Store:
    """Version 1 of model m has passed and is the champion; MLflow knows only that there is a version 1."""
    store = open_store(project)
    recipe = {
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "org/base"},
        "data": {"path": "datasets/m"}, "evaluate": {"task": "label"},
    }  # fmt: skip
    adapters.add_version(store, "m", 1, "run-1", "adapters/m/1", {"recipe": recipe})
    verdict = adapters.add_verdict(store, "m", 1, "pass", {"champion": None, "checks": []}, None)
    adapters.promote(store, verdict, by_whom="ann")
    return store


@pytest.fixture
def silent() -> Iterator[str]:
    """A tracker that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def known_to(project: Project) -> Tracker:
    tracker = Tracker(project)
    with tracker._client("") as client:
        client.create_registered_model("m")
        client.create_model_version("m", source=str(project.root), run_id=None)
    return tracker


def test_aliases_and_the_verdict_are_told_once(project: Project, store: Store) -> None:
    tracker = known_to(project)
    mirror_apart(project, "m")
    with tracker._client("") as client:
        champion = client.get_model_version_by_alias("m", "champion")
    assert (int(champion.version), champion.tags["ft.verdict"]) == (1, "pass")
    assert mirror(store, tracker, "m") == 0
    adapters.add_verdict(store, "m", 1, "fail", {"checks": []}, None)
    assert mirror(store, tracker, "m") == 1


def test_what_a_worker_is_just_telling_is_waited_for(project: Project, store: Store) -> None:
    tracker = known_to(project)
    of_worker = begin_telling(store, "m", "champion")
    assert of_worker is not None
    command = threading.Thread(target=mirror_apart, args=[project, "m"], daemon=True)
    command.start()
    end = time.monotonic() + 60
    while ("m", "candidate", 1) in adapters.unprojected_aliases(store):
        assert time.monotonic() < end, "the rest is told meanwhile"
        time.sleep(0.05)
    command.join(timeout=1)
    assert command.is_alive(), "MLflow's champion is not ours yet"
    tracker.set_alias("m", "champion", 1)
    end_telling(store, of_worker)
    command.join(timeout=30)
    assert not command.is_alive()
    assert not adapters.unprojected_aliases(store)


def test_a_tracker_that_refuses_is_told_later(project: Project, store: Store) -> None:
    with pytest.raises(TrackerError, match="cannot set an alias"):
        mirror_apart(project, "m")  # it does not know the model
    assert mirror(store, known_to(project), "m") == 3


def test_a_tracker_that_never_answers_keeps_nobody(
    project: Project, store: Store, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    began = time.monotonic()
    with pytest.raises(TrackerError, match="no answer in 1 s"):
        mirror_apart(project, "m", patience=1)
    assert time.monotonic() - began < 10
    assert adapters.unprojected_aliases(store)
