"""The store's tests run on SQLite and on a real Postgres."""

from __future__ import annotations

import uuid

import pytest

from registry.project import Project
from registry.store import Store, open_store
from tests.postgres_server import PostgresServer


@pytest.fixture(params=["sqlite", "postgres"])
def store(project: Project, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        monkeypatch.setenv("FT_DATABASE_URL", server.new_database(uuid.uuid4().hex))
    return open_store(project)


@pytest.fixture
def sqlite_store(project: Project) -> Store:
    return open_store(project)
