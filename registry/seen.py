"""What was last seen of datasets and recipes, so that a change becomes exactly one event, whoever notices it first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from registry.events import append_within, new_event
from registry.project import Project
from registry.store import Store
from registry.tracked_data import tracked_datasets

Kind = Literal["dataset", "recipe", "schedule"]
# The name of no thing: that somebody has begun to watch this kind.
WATCHED = ""


def note_value(
    store: Store, kind: Kind, name: str, value: str, type_: str, data: dict[str, Any], subject: str = ""
) -> bool:
    """Append the event if the value is another than was last seen; False if it is the same.

    A value that comes back after another is a change as well, so the event's id counts the changes. The event's
    subject is the name where nothing else is said.
    """
    with store.writing() as connection:
        row = connection.execute("SELECT value, count FROM seen WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        if row and row["value"] == value:
            return False
        count = row["count"] + 1 if row else 1
        connection.execute("INSERT OR REPLACE INTO seen VALUES (?,?,?,?)", (kind, name, value, count))
        event = new_event(f"ft/{kind}s", type_, subject or name, data, key=f"{name}@{value}#{count}")
        append_within(connection, event)
        return True


def last_seen(store: Store, kind: Kind, name: str) -> str | None:
    row = store.first("SELECT value FROM seen WHERE kind = ? AND name = ?", (kind, name))
    return str(row["value"]) if row else None


def note_silently(store: Store, kind: Kind, values: dict[str, str]) -> None:
    """What was there before anybody watched is no news."""
    with store.writing() as connection:
        rows = [(kind, name, value) for name, value in values.items()]
        connection.executemany("INSERT OR IGNORE INTO seen VALUES (?,?,?,0)", rows)


def note_datasets(project: Project, store: Store) -> int:
    """An event for each dataset whose version in DVC's records has changed; how many."""
    data = {"branch": git_branch(project.root)}
    values = {each.path: (each.hash, {**data, "hash": each.hash}) for each in tracked_datasets(project)}
    return note_all(store, "dataset", "dataset.versioned", values)


def note_all(store: Store, kind: Kind, type_: str, values: dict[str, tuple[str, dict[str, Any]]]) -> int:
    """`note_value` of each (value, data) by name; how many were news."""
    known = {row["name"]: row["value"] for row in store.read("SELECT name, value FROM seen WHERE kind = ?", (kind,))}
    if WATCHED not in known:
        note_silently(store, kind, {**{name: value for name, (value, _) in values.items()}, WATCHED: ""})
        return 0
    changed = [name for name, (value, _) in values.items() if known.get(name) != value]
    return sum(note_value(store, kind, name, values[name][0], type_, values[name][1]) for name in changed)


def git_branch(root: Path) -> str:
    """The branch that is checked out; '' outside of git or on no branch. Read, because starting git takes longer."""
    head = root / ".git" / "HEAD"
    text = head.read_text(encoding="utf-8").strip() if head.is_file() else ""
    return text.removeprefix("ref: refs/heads/") if text.startswith("ref: ") else ""
