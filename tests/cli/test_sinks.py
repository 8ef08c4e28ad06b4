"""`ft events sinks` and `ft events tail -f` as a person meets them."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cli.waking import has_sinks
from registry import outbox
from registry.events import append, new_event, read
from registry.project import Project
from registry.store import Store, open_store
from tests.conftest import run_bounded, started
from tests.fakes.sink_receiver import Receiver, sink_receiver
from tests.postgres_server import PostgresServer

FT = [sys.executable, "-m", "cli.main"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with sink_receiver() as receiver:
        yield receiver


def ft(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_bounded([*FT, *arguments], 120, cwd=project.root, env={"FT_WORKER_IDLE_SECONDS": "1"})


def sinks(project: Project, receiver: Receiver, **more: Any) -> None:
    written = {"name": "chat", "url": receiver.url, "types": ["external.*"], **more}
    (project.root / "ft.yaml").write_text(yaml.safe_dump({"sinks": [written]}))


def test_without_sinks_it_says_how_to_name_them(project: Project) -> None:
    assert "docs/triggers.md" in ft(project, "events", "sinks").stdout
    assert json.loads(ft(project, "events", "sinks", "--json").stdout) == []
    assert not has_sinks(project)


def test_one_is_tested_at_once(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, receiver, template={"text": "{type}: {data.text}"})
    assert has_sinks(project)
    done = ft(project, "events", "sinks", "--test", "chat")
    assert (done.returncode, "chat: 200 ok (" in done.stdout) == (0, True)
    assert json.loads(receiver.received[0].body) == {"text": "sink.test: a test of the sink chat"}
    assert read(store) == []
    receiver.answer, receiver.text = lambda _: 403, b"no_team at /services/T0/very-secret"
    done = ft(project, "events", "sinks", "--test", "chat")
    assert (done.returncode, "did not take it: 403 no_team at ***" in done.stderr) == (1, True)
    assert "very-secret" not in done.stderr
    assert json.loads(ft(project, "events", "sinks", "--test", "chat", "--json").stdout)["error"] == "Trouble"
    assert "there is: chat" in ft(project, "events", "sinks", "--test", "other").stderr


def test_a_worker_is_started_for_them_sends_and_ends(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, receiver)
    ft(project, "events", "sinks")
    receiver.answer = lambda _: 404
    ft(project, "events", "emit", "external.go", "--id", "e1")
    receiver.wait_for(1, 120)
    assert json.loads(receiver.received[0].body)["id"] == "e1"
    shown = ft(project, "events", "sinks").stdout
    assert "http://127.0.0.1:" in shown
    assert "very-secret" not in shown
    [told] = json.loads(ft(project, "events", "sinks", "--json").stdout)
    assert (told["given_up"], told["waiting"], told["error"]) == (1, 0, "404 ok")
    receiver.answer = lambda _: 200
    assert "1 messages are due now" in ft(project, "events", "sinks", "--retry", "chat").stdout
    receiver.wait_for(2, 120)


def test_what_a_sink_lacks_is_shown(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, receiver, url=None, url_env="FT_HOOK")
    outbox.begin(store, "old")
    rows = {each["name"]: each for each in json.loads(ft(project, "events", "sinks", "--json").stdout)}
    assert rows["chat"]["state"] == "cannot be used here"
    assert rows["chat"]["error"] == "sink chat: FT_HOOK: is not set"
    assert rows["old"]["state"] == "not in ft.yaml"
    done = ft(project, "events", "sinks", "--test", "chat")
    assert (done.returncode, "FT_HOOK: is not set" in done.stderr) == (2, True)
    sinks(project, receiver, colour="red")
    done = ft(project, "events", "sinks")
    assert (done.returncode, "sinks.0.colour" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_what_comes_is_followed_through_a_restart_of_postgres(
    project: Project, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_DATABASE_URL", postgres.new_database(uuid.uuid4().hex))
    store = open_store(project)
    append(store, new_event("test", "external.go", "first", {}))
    with started([*FT, "events", "tail", "-f"], cwd=project.root) as following:
        assert following.stdout is not None
        assert "first" in following.stdout.readline()
        for n in range(2):
            append(store, new_event("test", "external.go", f"before {n}", {}))
            assert f"before {n}" in following.stdout.readline()
            postgres.restart()
            append(store, new_event("test", "external.go", f"after {n}", {}))
            assert f"after {n}" in following.stdout.readline()
        assert following.poll() is None
