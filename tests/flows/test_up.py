"""`ft up` with the real MLflow server and the real worker: one store, whichever way it is written to."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cli.up_folder import UpFolder
from jobs.worker_process import ensure_worker, worker_is_on
from registry.mlflow_server import address_file, keys_of, own_server, own_store
from registry.mlflow_store import Tracker
from registry.mlflow_webhook import register_webhook
from registry.project import Project
from tests.cli.small_parts import is_alive, kill_all, state, until
from tests.conftest import run_bounded, started
from tests.registry.test_mlflow_store import FACTS

# MLflow and SQLAlchemy warn of their own deprecations, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

WRITES = 40
WRITE = """
import sys
from registry.mlflow_store import Tracked, Tracker
from registry.project import find_project
tracker = Tracker(find_project(), sys.argv[1])
for number in range(int(sys.argv[4])):
    tracker.log_scores(Tracked(sys.argv[2], sys.argv[3]), {"file": {f"n{number}": number}})
"""


class Hooks:
    """Stands for the receiver: keeps what MLflow posts."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, dict[str, str], bytes]] = []
        hooks = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hooks.posted.append((self.path, dict(self.headers), body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @contextmanager
    def listening(self) -> Iterator[None]:
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        yield
        self.server.shutdown()
        self.server.server_close()
        thread.join()


def ft(project: Project, *arguments: str, timeout: float = 240) -> tuple[int, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=timeout, cwd=project.root)
    return done.returncode, done.stdout + done.stderr


def test_mlflow_and_worker_are_up(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    up, hooks = UpFolder(project.home), Hooks()
    monkeypatch.setenv("FT_MLFLOW_PORT", "0")
    monkeypatch.setenv("FT_RECEIVER_PORT", str(hooks.server.server_port))
    try:
        with hooks.listening():
            assert Tracker(project).uri == own_store(project)
            code, out = ft(project, "up", "--only", "mlflow", "--only", "worker")
            assert code == 0, out
            assert worker_is_on(project)
            assert not ensure_worker(project), "`ft run` uses the worker that is on"
            address = own_server(project)
            assert Tracker(project).uri == address == state(up, "mlflow")["address"]
            _both_ways_lead_to_one_store(project)
            _an_alias_is_told(project, hooks, address)
            _a_killed_supervisor_is_followed(project, up)
            mlflow = state(up, "mlflow")["pid"]
            assert ft(project, "down")[0] == 0
            assert not worker_is_on(project)
            assert not is_alive(mlflow)
            assert not address_file(project).exists()
        _the_file_has_it_all(project)
    finally:
        kill_all(up)


def _both_ways_lead_to_one_store(project: Project) -> None:
    """One process writes to the file, as `ft run` did when it began before `ft up`, while another uses the server."""
    tracker = Tracker(project)
    tracked = tracker.begin(FACTS)
    command = [sys.executable, "-c", WRITE, own_store(project), tracked.experiment_id, tracked.run_id, str(WRITES)]
    with started(command, cwd=project.root) as other:
        for number in range(WRITES):
            tracker.log_scores(tracked, {"server": {f"n{number}": number}})
        out, err = other.communicate(timeout=120)
        assert other.returncode == 0, out + err
    _has_all_scores(tracker)


def _has_all_scores(tracker: Tracker) -> None:
    run = _client(tracker).get_run(tracker.begin(FACTS).run_id)
    scores = [name for name in run.data.metrics if name.startswith(("test/file/", "test/server/"))]
    assert len(scores) == 2 * WRITES
    assert run.info.artifact_uri.startswith("file://")
    assert {each.path for each in _client(tracker).list_artifacts(run.info.run_id)} == {
        "recipe.json",
        "environment.json",
    }


def _an_alias_is_told(project: Project, hooks: Hooks, address: str) -> None:
    receiver = f"http://127.0.0.1:{hooks.server.server_port}/hooks/mlflow"
    secret = keys_of(project)["webhook_secret"]
    log = project.logs / "mlflow.log"
    until(lambda: f"webhook to {receiver}: made" in log.read_text(), "the webhook", 60)
    assert register_webhook(address, receiver, secret) == "there"
    tracker, adapter = Tracker(project), project.root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    assert tracker.register(tracker.begin(FACTS), "tickets", FACTS.run_id, adapter, {}) == 1
    tracker.set_alias("tickets", "champion", 1)
    until(lambda: hooks.posted, "the alias")
    path, headers, body = hooks.posted[0]
    assert path == "/hooks/mlflow"
    assert json.loads(body)["data"] == {"name": "tickets", "alias": "champion", "version": "1"}
    signed = f"{headers['X-MLflow-Delivery-Id']}.{headers['X-MLflow-Timestamp']}.".encode() + body
    signature = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    assert headers["X-MLflow-Signature"] == f"v1,{signature}"
    assert register_webhook(address, receiver, "another") == "changed"


def _a_killed_supervisor_is_followed(project: Project, up: UpFolder) -> None:
    before = {name: state(up, name)["pid"] for name in ("mlflow", "worker")}
    os.kill(up.supervisor() or 0, signal.SIGKILL)
    until(lambda: not up.is_up(), "its end")
    assert own_server(project), "MLflow lives on, and is used"
    code, out = ft(project, "up", "--only", "mlflow", "--only", "worker")
    assert code == 0, out
    assert {name: state(up, name)["pid"] for name in before} == before


def _the_file_has_it_all(project: Project) -> None:
    tracker = Tracker(project)
    assert tracker.uri == own_store(project)
    _has_all_scores(tracker)
    assert _client(tracker).get_model_version_by_alias("tickets", "champion").version in ("1", 1)
    where = Path(urlsplit(_client(tracker).get_model_version_download_uri("tickets", "1")).path)
    assert where.is_relative_to(project.home / "mlartifacts")
    assert (where / "adapter_config.json").read_text(encoding="utf-8") == '{"r": 8}'


def _client(tracker: Tracker) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri, registry_uri=tracker.uri)
