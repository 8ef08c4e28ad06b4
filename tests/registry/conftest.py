"""The store's tests run on SQLite and on a real Postgres."""

from __future__ import annotations

import pytest

from registry.project import Project
from registry.store import Store, open_store


@pytest.fixture
def store(either_store: Store) -> Store:
    return either_store


@pytest.fixture
def sqlite_store(project: Project) -> Store:
    return open_store(project)
