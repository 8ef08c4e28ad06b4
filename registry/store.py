"""The project's own database: one SQLite file in WAL mode, with numbered, append-only migrations.

Standard library only: SQLAlchemy alone takes half a second to import, more than a whole `ft runs` may take.
Every write is one `BEGIN IMMEDIATE` transaction, so a read-then-write inside it is a compare-and-set.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from registry.errors import StoreError
from registry.file_locks import alone
from registry.project import Project

MIGRATIONS = [
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, recipe TEXT NOT NULL, model TEXT NOT NULL, digest TEXT NOT NULL,
        recipe_path TEXT NOT NULL, body TEXT NOT NULL, state TEXT NOT NULL, stage TEXT NOT NULL DEFAULT '',
        wish TEXT, created REAL NOT NULL, started REAL, finished REAL, error TEXT, result TEXT);
    CREATE INDEX runs_by_recipe ON runs (recipe, created);
    CREATE INDEX runs_by_state ON runs (state);
    CREATE TABLE steps (
        run_id TEXT NOT NULL, name TEXT NOT NULL, attempt INTEGER NOT NULL,
        started REAL NOT NULL, finished REAL, kind TEXT NOT NULL, note TEXT,
        PRIMARY KEY (run_id, name, attempt));
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL,
        subject TEXT NOT NULL, time REAL NOT NULL, data TEXT NOT NULL, cause TEXT, UNIQUE (source, id));
    CREATE TABLE versions (
        model TEXT NOT NULL, version INTEGER NOT NULL, run_id TEXT NOT NULL UNIQUE, folder TEXT NOT NULL,
        body TEXT NOT NULL, created REAL NOT NULL, rolled_back INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (model, version));
    CREATE TABLE verdicts (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, version INTEGER NOT NULL,
        outcome TEXT NOT NULL, body TEXT NOT NULL, run_id TEXT, created REAL NOT NULL);
    CREATE INDEX verdicts_by_version ON verdicts (model, version, id);
    CREATE TABLE promotions (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, version INTEGER NOT NULL,
        from_version INTEGER, kind TEXT NOT NULL, run_id TEXT UNIQUE, verdict INTEGER,
        by_whom TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL);
    CREATE TABLE aliases (
        model TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, changed REAL NOT NULL,
        projected INTEGER, PRIMARY KEY (model, alias));
    CREATE TABLE servers (
        id TEXT PRIMARY KEY, started REAL NOT NULL, heartbeat REAL NOT NULL, body TEXT NOT NULL);
    CREATE TABLE scores (
        key TEXT PRIMARY KEY, body TEXT NOT NULL, created REAL NOT NULL);
    """,
    # What MLflow was told of: it may be away when a verdict is given or a run ends.
    """
    ALTER TABLE verdicts ADD COLUMN projected INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN told TEXT;
    """,
    # Events that start runs: how far each reader has come, what was decided, what was last seen of each source.
    """
    CREATE TABLE cursors (name TEXT PRIMARY KEY, seq INTEGER NOT NULL);
    INSERT INTO cursors SELECT 'triggers', coalesce(max(seq), 0) FROM events;
    CREATE TABLE decisions (
        seq INTEGER NOT NULL, recipe TEXT NOT NULL, fired INTEGER NOT NULL, reason TEXT NOT NULL,
        run_id TEXT, replaces TEXT, created REAL NOT NULL, PRIMARY KEY (seq, recipe));
    CREATE INDEX decisions_by_run ON decisions (run_id);
    CREATE TABLE seen (
        kind TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, count INTEGER NOT NULL,
        PRIMARY KEY (kind, name));
    CREATE INDEX events_by_id ON events (id);
    CREATE INDEX events_by_type ON events (type, seq);
    CREATE INDEX events_by_subject ON events (subject, seq);
    CREATE INDEX runs_by_time ON runs (created);
    CREATE INDEX runs_with_wishes ON runs (wish) WHERE wish IS NOT NULL;
    """,
]


class Store:
    """Short-lived connections to one SQLite file; safe to share between threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        with self._connection() as connection:
            return [dict(row) for row in connection.execute(sql, values)]

    def first(self, sql: str, values: Sequence[Any] = ()) -> dict[str, Any] | None:
        rows = self.read(sql, values)
        return rows[0] if rows else None

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the write lock from its start; rolled back if the block raises."""
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:  # on a full disk SQLite has rolled back by itself
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            try:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA synchronous=NORMAL")
                yield connection
            finally:
                connection.close()
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error


def _unusable(path: Path, error: sqlite3.Error) -> StoreError:
    damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    fix = "free disk space or close what holds the file, then try again (`ft doctor` shows both)"
    if damaged:
        fix = "put a backup in its place; without one move it away, and MLflow and .ft/adapters still have the versions"
    return StoreError(f"the project's database cannot be used: {error}", place=str(path), fix=fix)


class Changes:
    """Notices writes of other connections at the price of one PRAGMA, so that waiting costs almost nothing."""

    def __init__(self, store: Store) -> None:
        self._path = store.path
        self._connection = sqlite3.connect(store.path, timeout=30, isolation_level=None, check_same_thread=False)
        self._seen = self._version()

    def wait(self, seconds: float, step: float) -> bool:
        """Return at the next change (True), or after so many seconds (False); looks every `step` seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (now := self._version()) != self._seen:
                self._seen = now
                return True
            time.sleep(step)
        return False

    def _version(self) -> int:
        try:
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from error


def open_store(project: Project) -> Store:
    """The project's store, made or brought up to date as needed."""
    store = Store(project.database)
    try:
        project.home.mkdir(parents=True, exist_ok=True)
        _migrate(store)
    except OSError as error:
        raise StoreError(f"cannot make the state folder or write to it: {error}", place=str(project.home)) from error
    return store


def _migrate(store: Store) -> None:
    version = store.read("PRAGMA user_version")[0]["user_version"]
    if version == len(MIGRATIONS):
        return
    if version > len(MIGRATIONS):
        raise StoreError(
            f"written by a newer ft (schema {version}, this one knows {len(MIGRATIONS)})",
            place=str(store.path),
            fix="upgrade ft",
        )
    # Two that turn a new file to WAL at once block each other, and SQLite refuses one of them without waiting.
    with alone(store.path.with_name(f"{store.path.name}.new")), store._connection() as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    with store.writing() as connection:
        # Read again under the lock: another process may have migrated while this one waited for it.
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in filter(str.strip, script.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number}")


def dump(value: Any) -> str:
    """JSON as it is kept in the store: sorted, so that equal values are equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
