"""The store in one SQLite file in WAL mode. Standard library only."""

from __future__ import annotations

import os
import sqlite3
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from registry.errors import StoreError
from registry.file_locks import alone

BUSY_SECONDS = 30
KEPT = 4
PAGES_OF_LOG = 10_000  # 40 MB
PAGES_AT_ONCE = 2000  # 8 MB, some 20 ms in which others cannot write


class SqliteDatabase:
    """Connections are kept and used again: to open one takes as long as three writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        self._idle: deque[tuple[sqlite3.Connection, object]] = deque()

    @contextmanager
    def connected(self) -> Iterator[sqlite3.Connection]:
        try:
            connection, file = self._take()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            self._give_back(connection, file)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    def _take(self) -> tuple[sqlite3.Connection, object]:
        while self._idle:
            with suppress(IndexError):  # another thread was faster
                connection, file = self._idle.pop()
                if file == self._file():
                    return connection, file
                connection.close()  # the file was removed, and perhaps made anew
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous=NORMAL")
        # Not after every 1,000 pages: in a log of a million events each append writes pages that no other wrote.
        connection.execute(f"PRAGMA wal_autocheckpoint={PAGES_OF_LOG}").fetchall()
        return connection, self._file()

    def _give_back(self, connection: sqlite3.Connection, file: object) -> None:
        if len(self._idle) < KEPT:
            self._idle.append((connection, file))
        else:
            connection.close()

    def _file(self) -> object:
        try:
            found = os.stat(self.path)
            return found.st_dev, found.st_ino
        except OSError:
            return None

    def begin(self, connection: Any) -> None:
        connection.execute("BEGIN IMMEDIATE")

    def version(self, connection: Any) -> int:
        number = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if number == 0 and not connection.in_transaction:
            # Two that turn a new file to WAL at once block each other, and SQLite refuses one of them without waiting.
            with alone(self.path.with_name(f"{self.path.name}.new")):
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # of a new file only, so it comes first
                connection.execute("PRAGMA journal_mode=WAL")
        return number

    def migrate(self, connection: Any, number: int, script: str) -> None:
        for statement in filter(str.strip, script.split(";")):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={number}")

    def changes(self) -> SqliteChanges:
        return SqliteChanges(self.path)

    def give_back(self, *, whole: bool = False) -> None:
        """In a file of an older ft only `whole` gives anything back: it writes the file anew, for the last time."""
        with self.connected() as connection:
            if whole:
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
                connection.execute("VACUUM")
                return
            free = _free_pages(connection)
            while free:
                connection.execute(f"PRAGMA incremental_vacuum({PAGES_AT_ONCE})").fetchall()
                before, free = free, _free_pages(connection)
                if free >= before:  # a file that was made without it
                    return


class SqliteChanges:
    """Looks at the file's change counter, at the price of one PRAGMA each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._seen = self._version()

    def wait(self, seconds: float, step: float) -> bool:
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


def _free_pages(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA freelist_count").fetchone()[0])


def _unusable(path: Path, error: sqlite3.Error) -> StoreError:
    damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
    fix = "free disk space or close what holds the file, then try again (`ft doctor` shows both)"
    if damaged:
        fix = "put a backup in its place; without one move it away, and MLflow and .ft/adapters still have the versions"
    elif "locked" in str(error):
        fix = f"another process has kept it for {BUSY_SECONDS} s: let it end (`fuser {path}` names it), then try again"
    return StoreError(f"the project's database cannot be used: {error}", place=str(path), fix=fix)
