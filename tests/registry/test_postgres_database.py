"""A Postgres that is restarted: who uses it connects anew."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from registry.errors import StoreError
from registry.events import append, new_event, read
from registry.project import Project
from registry.store import open_store
from tests.postgres_server import PostgresServer


def test_a_restart_costs_seconds_and_no_more(
    project: Project, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_DATABASE_URL", postgres.new_database("restarted"))
    store = open_store(project)
    append(store, new_event("test", "external.go", "", {}, key="before"))
    for number in range(3):
        postgres.restart()
        restarted = time.monotonic()
        while f"after {number}" not in {each.id for each in read(store)}:
            with suppress(StoreError):  # the first one to notice
                append(store, new_event("test", "external.go", "", {}, key=f"after {number}"))
        assert time.monotonic() - restarted < 15, "the pool gives out connections that the server has closed"
    assert [each.id for each in read(store)] == ["before", "after 0", "after 1", "after 2"]
