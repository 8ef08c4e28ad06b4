"""The whole loop with real parts: train, evaluate in vLLM, judge, promote, serve, swap, roll back."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from registry import adapters, runs
from registry.event_types import TYPES
from registry.events import read
from tests.flows.conftest import Person
from tests.mlflow_server import free_port, mlflow_server

# MLflow uses what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.engine
@pytest.mark.training
@pytest.mark.timeout(1200)
def test_two_versions_swap_and_rollback(person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    run_id = person.ft("run", "recipes/tickets.yaml", "--detach").strip()
    _wait(lambda: runs.get(person.store, run_id).stage == "waiting for MLflow", "it trains while MLflow is away")
    with mlflow_server(port, tmp_path / "mlflow"):
        _wait(lambda: not runs.get(person.store, run_id).active, "it goes on when MLflow is there")
        _rest_of_the_story(person, person.json("show", run_id))
        _check_records(person, f"http://127.0.0.1:{port}", run_id)


def _rest_of_the_story(person: Person, first: Any) -> None:
    assert first["state"] == "succeeded"
    assert first["result"]["version"] == 1
    assert set(first["result"]["scores"]) == set(first["result"]["probes"]) == {"candidate", "base"}
    person.ft("serve", "up")
    assert _version_that_answers(person) == "tickets@1"

    second = person.json("run", "recipes/tickets.yaml")
    assert second["state"] == "succeeded"
    assert second["result"]["promoted"] == {"from": 1, "to": 2}
    assert second["result"]["served"], "a server was up, so the run waits for its swap"
    assert set(second["result"]["scores"]) == {"candidate", "champion", "base"}
    assert _version_that_answers(person) == "tickets@2"

    with _Callers(person) as callers:
        person.ft("rollback", "tickets")
    assert not callers.problems
    assert callers.versions["tickets@1"], "the version before answers again"
    assert _version_that_answers(person) == "tickets@1"


def _check_records(person: Person, mlflow: str, first_run: str) -> None:
    """One version a run, one move a run, nothing finished twice, and MLflow says the same."""
    from mlflow import MlflowClient

    store = person.store
    assert [each.version for each in adapters.versions(store, "tickets")] == [1, 2]
    assert [(each.kind, each.version) for each in adapters.promotions(store)] == [
        ("promote", 1), ("promote", 2), ("rollback", 1),
    ]  # fmt: skip
    assert adapters.get_version(store, "tickets", 2).rolled_back
    for event in read(store):
        Draft202012Validator(TYPES[event.type].schema()).validate(event.data)
        assert event.cause or event.type in ("run.submitted", "adapter.rolled_back"), "a person did the rest"
    served = [event.subject for event in read(store, type_="adapter.served")]
    assert served == ["tickets@1", "tickets@2", "tickets@1"]
    for run in runs.listed(store):
        assert {step.attempt for step in runs.steps(store, run.id)} == {1}
    client = MlflowClient(mlflow)
    assert {int(each.version) for each in client.search_model_versions("name = 'tickets'")} == {1, 2}
    assert int(client.get_model_version_by_alias("tickets", "champion").version) == 1
    run = client.get_run(client.get_model_version("tickets", "1").run_id)
    assert (run.data.tags["ft.run"], run.info.status) == (first_run, "FINISHED")
    assert [each.step for each in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]


def _wait(over: Callable[[], bool], what: str, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not over():
        assert time.monotonic() < end, what
        time.sleep(0.5)


def _version_that_answers(person: Person) -> str:
    return str(person.json("ask", "tickets", "Where is my parcel?")["version"])


class _Callers:
    """Four callers, without a pause, while the block runs."""

    def __init__(self, person: Person) -> None:
        self.address = person.json("serve", "status")["gateway_url"]
        self.versions: Counter[str] = Counter()
        self.problems: list[str] = []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._call) for _ in range(4)]

    def __enter__(self) -> _Callers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=120)

    def _call(self) -> None:
        body = {"model": "tickets", "messages": [{"role": "user", "content": "Where is my parcel?"}], "max_tokens": 8}
        while not self.over.is_set():
            request = urllib.request.Request(
                self.address + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    version = answer.headers["x-ft-adapter"]
                    said = json.loads(answer.read())["model"]
            except OSError as error:
                self.problems.append(repr(error))
                continue
            self.versions[version] += 1
            if said != version:
                self.problems.append(f"{version} in the header, {said} in the body")
