"""The project's database: one writer at a time, whole transactions or none, and one clear error when it cannot be."""

from __future__ import annotations

import gc
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from registry.errors import StoreError
from registry.migrations import MIGRATIONS
from registry.project import Project
from registry.sqlite_database import SqliteDatabase
from registry.store import Store, dump, open_store
from tests.conftest import all_at_once, run_bounded

PREPARE = """
from registry.project import find_project
from registry.store import open_store
"""
OPEN = """
print(open_store(find_project()).read("PRAGMA user_version")[0]["user_version"])
"""
# Files may not grow beyond what they have now, which SQLite meets as it meets a full disk.
FULL = """
import resource, signal, sys
from registry.errors import StoreError
from registry.project import find_project
from registry.store import open_store
store = open_store(find_project())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with store.writing() as connection:
        for key in range(10):
            connection.execute("INSERT INTO scores VALUES (?, ?, 0)", (str(key), "x" * 100_000))
except StoreError as error:
    print(error)
"""
NOBODY = 65534


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that another user can reach, which pytest's own cannot."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def count(store: Store) -> int:
    return int(store.read("SELECT count(*) AS n FROM scores")[0]["n"])


def test_processes_that_open_a_new_store_at_once_all_get_it(project: Project) -> None:
    assert all_at_once(6, PREPARE, OPEN, project.root) == [str(len(MIGRATIONS))] * 6


def test_who_waited_for_another_to_migrate_does_not_do_it_again(project: Project) -> None:
    project.home.mkdir()
    first = sqlite3.connect(project.database, isolation_level=None)
    first.execute("PRAGMA journal_mode=WAL")
    first.execute("BEGIN IMMEDIATE")
    opened: list[Store] = []
    second = threading.Thread(target=lambda: opened.append(open_store(project)))
    second.start()  # sees an empty database, and waits for the lock
    time.sleep(0.3)
    for statement in filter(str.strip, "".join(MIGRATIONS).split(";")):
        first.execute(statement)
    first.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    first.execute("COMMIT")
    first.close()
    second.join(30)
    assert count(opened[0]) == 0


def test_a_block_that_raises_changes_nothing(store: Store) -> None:
    with suppress(KeyError), store.writing() as connection:
        connection.execute("INSERT INTO scores VALUES ('a', '', 0)")
        raise KeyError
    assert count(store) == 0


def test_a_read_inside_a_write_is_a_compare_and_set(store: Store) -> None:
    def add_one() -> None:
        for _ in range(20):
            with store.writing() as connection:
                now = connection.execute("SELECT created FROM scores").fetchone()["created"]
                connection.execute("UPDATE scores SET created = ?", (now + 1,))

    with store.writing() as connection:
        connection.execute("INSERT INTO scores VALUES ('n', '', 0)")
    threads = [threading.Thread(target=add_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.first("SELECT created FROM scores") == {"created": 80}


def test_a_newer_ft_wrote_it(store: Store, project: Project) -> None:
    with store.writing() as connection:
        store.database.migrate(connection, 99, "")
    with pytest.raises(StoreError) as caught:
        open_store(project)
    assert caught.value.what == f"written by a newer ft (schema 99, this one knows {len(MIGRATIONS)})"
    assert (caught.value.place, caught.value.fix) == (store.database.place, "upgrade ft")


def test_a_file_that_is_no_database(project: Project) -> None:
    project.home.mkdir()
    project.database.write_text("not a database, but long enough to be looked at\n" * 100)
    with pytest.raises(StoreError, match="the project's database cannot be used: file is not a database"):
        open_store(project)


def test_a_state_folder_that_cannot_be_made(project: Project) -> None:
    project.home.write_text("a file")
    with pytest.raises(StoreError, match="cannot make the state folder or write to it"):
        open_store(project)


def test_a_database_that_may_only_be_read(shared_folder: Path) -> None:
    project = Project(shared_folder, shared_folder / ".ft", shared_folder)
    open_store(project)
    gc.collect()  # a file that this process has open would be written to whatever its mode
    project.home.chmod(0o555)
    project.database.chmod(0o444)
    store = Store(SqliteDatabase(project.database), project.home)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)  # root may write to anything
    try:
        with pytest.raises(StoreError, match="the project's database cannot be used: ") as caught, store.writing():
            pass
    finally:
        if was_root:
            os.seteuid(0)
        project.home.chmod(0o755)
    assert caught.value.place == store.database.place


def test_a_full_disk_is_said_and_leaves_what_was(project: Project, sqlite_store: Store) -> None:
    store = sqlite_store
    done = run_bounded([sys.executable, "-c", FULL], 60, cwd=project.root)
    assert done.stdout.startswith(f"{store.database.place}: the project's database cannot be used: "), done.stderr
    assert "rollback" not in done.stdout
    assert "-> free disk space" in done.stdout
    assert count(store) == 0
    with store.writing() as connection:
        connection.execute("INSERT INTO scores VALUES ('a', '', 0)")
    assert count(store) == 1


def test_equal_values_are_equal_text() -> None:
    assert dump({"b": 1, "a": "größe"}) == dump({"a": "größe", "b": 1}) == '{"a": "größe", "b": 1}'
