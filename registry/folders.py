"""The project's folder as its hosts know it: who works in the same one, and which one leads.

Hosts may share the folder, or only the database and a bucket. `.ft/folder.id` tells: a random name, made once. Of
several folders the first that a worker began in leads: recipes, data and servers are there, so runs are started,
registered, judged and served there. The hosts of the others lend it their cards, and get and send job folders through
the bucket.
"""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

from registry.errors import Conflict, Trouble
from registry.file_locks import alone
from registry.project import Project
from registry.store import Store

NAME = re.compile("[0-9a-f]{32}")


def folder_id(home: Path) -> str:
    """The name of the folder whose `.ft` is `home`; made at the first look. Raises Trouble where it is damaged."""
    path = home / "folder.id"
    if not path.exists():
        with alone(home / "folder.lock"):
            if not path.exists():
                partial = path.with_suffix(".partial")
                partial.write_text(secrets.token_hex(16), encoding="utf-8")
                partial.replace(path)
    return _read(path)


def is_away(folder: str, here: str) -> bool:
    """Is it another folder than `here`? An ft that knew no folders, or made such a plan, says ''."""
    return folder not in ("", here)


def leading(store: Store) -> str:
    """The name of the folder that leads, '' while none does."""
    row = store.first("SELECT folder FROM leading_folder WHERE one = 1")
    return str(row["folder"]) if row else ""


def leads(project: Project, store: Store) -> bool:
    """Does this folder lead? It does from now on if none did. A database in the folder itself has one folder only."""
    if not project.database_url:
        return True
    here = folder_id(project.home)
    found = leading(store)
    if not found:
        _write(store, here, "DO NOTHING")
        found = leading(store)
    return found == here


def take_lead(project: Project, store: Store) -> None:
    """This folder leads from now on."""
    _write(store, folder_id(project.home), "(one) DO UPDATE SET folder = excluded.folder, since = excluded.since")


def refuse_lending(project: Project, store: Store) -> None:
    """Raises Conflict in a folder that only lends its cards: its recipes and data may be others than where runs are."""
    if not leads(project, store):
        raise Conflict(
            "another folder leads this project, and this one only lends it cards", place=str(project.root),
            fix="do it on a host of that folder (`ft cards` shows them); `ft worker --lead` makes this one lead if "
            "that one is gone (docs/hosts.md)",
        )  # fmt: skip


def _read(path: Path) -> str:
    # An empty one would pass for the name of every folder, and two hosts for one that share theirs.
    try:
        found = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        found, why = "", f"cannot be read ({error})"
    else:
        why = f"is damaged: {found[:40]!r}"
    if not NAME.fullmatch(found):
        raise Trouble(
            f"the folder's name {why}", place=str(path),
            fix="delete it: a new one is made; if this folder led, start its worker with `ft worker --lead`",
        )  # fmt: skip
    return found


def _write(store: Store, folder: str, on_conflict: str) -> None:
    with store.writing() as connection:
        connection.execute(
            f"INSERT INTO leading_folder (one, folder, since) VALUES (1, ?, ?) ON CONFLICT {on_conflict}",
            (folder, time.time()),
        )
