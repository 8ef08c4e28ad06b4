"""The project's own database: SQLite (one file in WAL mode), or the Postgres that `FT_DATABASE_URL` names.

Every write is one transaction beside which nobody else writes, so a read-then-write inside it is a compare-and-set, and
rows are numbered in the order in which they are committed. SQL is written for both: `?` for values,
`ON CONFLICT DO NOTHING` and `DO UPDATE`, `RETURNING`, columns by name, no booleans.

Light on purpose: SQLAlchemy alone takes half a second to import, more than a whole `ft runs` may take.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from registry.errors import StoreError
from registry.migrations import MIGRATIONS
from registry.postgres_database import PostgresDatabase
from registry.project import Project
from registry.sqlite_database import SqliteDatabase


class Cursor(Protocol):
    """What a statement gave: rows by column name, how many it changed."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """An open transaction, as `Store.writing` gives it."""

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> Cursor: ...

    def executemany(self, sql: str, values: Iterable[Sequence[Any]], /) -> object: ...


class Changes(Protocol):
    """Notices writes of other processes, so that waiting for them costs almost nothing."""

    def wait(self, seconds: float, step: float) -> bool:
        """Return at the next change (True), or after so many seconds (False); may be `step` seconds late."""
        ...


class Database(Protocol):
    """What differs between SQLite and Postgres. `place` names it to people, without its password."""

    place: str

    def connected(self) -> AbstractContextManager[Connection]:
        """A connection without a transaction; what the database says against it comes as StoreError."""
        ...

    def begin(self, connection: Connection) -> None:
        """Begin a transaction beside which nobody else writes."""
        ...

    def version(self, connection: Connection) -> int:
        """How many migrations were made."""
        ...

    def migrate(self, connection: Connection, number: int, script: str) -> None: ...

    def changes(self) -> Changes: ...


class Store:
    """The rows of one project; safe to share between threads and processes. `home` is the project's state folder."""

    def __init__(self, database: Database, home: Path) -> None:
        self.database, self.home = database, home

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        with self.database.connected() as connection:
            return [dict(row) for row in connection.execute(sql, values)]

    def first(self, sql: str, values: Sequence[Any] = ()) -> dict[str, Any] | None:
        rows = self.read(sql, values)
        return rows[0] if rows else None

    def note(self, sql: str, values: Sequence[Any] = ()) -> None:
        """One statement on its own: cheaper than `writing`, for what nobody waits for or reads in order."""
        with self.database.connected() as connection:
            connection.execute(sql, values)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction that holds the write lock from its start; rolled back if the block raises."""
        with self.database.connected() as connection:
            self.database.begin(connection)
            try:
                yield connection
            except BaseException:
                with suppress(Exception):  # on a full disk, or a lost connection, it is rolled back already
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")


def open_store(project: Project) -> Store:
    """The project's store, made or brought up to date as needed."""
    try:
        project.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the state folder or write to it: {error}", place=str(project.home)) from error
    url = project.database_url
    store = Store(PostgresDatabase(url) if url else SqliteDatabase(project.database), project.home)
    _migrate(store)
    return store


def _migrate(store: Store) -> None:
    with store.database.connected() as connection:
        version = store.database.version(connection)
    if version == len(MIGRATIONS):
        return
    if version > len(MIGRATIONS):
        raise StoreError(
            f"written by a newer ft (schema {version}, this one knows {len(MIGRATIONS)})",
            place=store.database.place,
            fix="upgrade ft",
        )
    with store.writing() as connection:
        # Read again under the lock: another process may have migrated while this one waited for it.
        version = store.database.version(connection)
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            store.database.migrate(connection, number, script)


def dump(value: Any) -> str:
    """JSON as it is kept in the store: sorted, so that equal values are equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
