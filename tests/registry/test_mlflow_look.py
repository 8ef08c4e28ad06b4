"""MLflow's aliases are read without its client, from a real server and a real file, and the client agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import TrackerError
from registry.mlflow_look import aliases_at
from registry.mlflow_store import Tracker
from registry.project import Project
from tests.fakes.sink_receiver import sink_receiver
from tests.mlflow_server import free_port, mlflow_server

# MLflow and SQLAlchemy warn of their own deprecations, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def move(tracker: Tracker, project: Project) -> None:
    with tracker._client("") as client:
        client.create_registered_model("m")
        client.create_registered_model("none & yet")
        for _ in range(2):
            client.create_model_version("m", source=str(project.root), run_id=None)
        client.set_registered_model_alias("m", "champion", "2")
        client.set_registered_model_alias("m", "other", "1")


def check(tracker: Tracker) -> None:
    for model, wanted in (("m", {"champion": 2, "other": 1}), ("none & yet", {}), ("unknown", None)):
        assert aliases_at(tracker, model) == tracker.aliases(model) == wanted


def test_from_a_file(project: Project) -> None:
    tracker = Tracker(project)
    assert aliases_at(tracker, "m") is None  # there is no file yet
    project.home.mkdir(parents=True, exist_ok=True)
    (project.home / "mlflow.db").touch()
    assert aliases_at(tracker, "m") is None
    move(tracker, project)
    check(tracker)
    (project.home / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(TrackerError, match="not a database"):
        aliases_at(tracker, "m")


def test_from_a_server(project: Project, tmp_path: Path) -> None:
    port = free_port()
    with mlflow_server(port, tmp_path / "server"):
        tracker = Tracker(project, f"http://user:secret@127.0.0.1:{port}/")
        with Tracker(project, f"sqlite:///{tmp_path}/server/mlflow.db")._client("") as client:
            client.create_registered_model("m")
            for _ in range(2):
                client.create_model_version("m", source=str(project.root), run_id=None)
        with tracker._client("") as client:
            client.create_registered_model("none & yet")
            client.set_registered_model_alias("m", "champion", "2")
        for model, wanted in (("m", {"champion": 2}), ("none & yet", {}), ("unknown", None)):
            assert aliases_at(tracker, model) == tracker.aliases(model) == wanted
    with pytest.raises(TrackerError, match="cannot read aliases") as caught:
        aliases_at(tracker, "m")
    assert "secret" not in str(caught.value)


def test_what_is_no_mlflow(project: Project) -> None:
    # It answers GET with 501 and an HTML page.
    with sink_receiver() as other, pytest.raises(TrackerError, match="501"):
        aliases_at(Tracker(project, f"http://127.0.0.1:{other.port}"), "m")
