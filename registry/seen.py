"""What was last seen of datasets, recipes and clocks, so that a change is exactly one event, whoever notices it first.

Datasets and recipes are seen by branch: to check out another branch is no news, what comes to a branch by a merge is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from registry.events import append_within, new_event
from registry.project import Project
from registry.store import Connection, Store
from registry.tracked_data import tracked_datasets

Kind = Literal["dataset", "recipe", "schedule"]
DATASET = "dataset.versioned"


def note_value(
    store: Store, kind: Kind, name: str, value: str, type_: str, data: dict[str, Any], branch: str = ""
) -> bool:
    """Append the event if the value is another than was last seen (on that branch); False if it is the same.

    A value that comes back after another is a change as well, so the event's id counts the changes.
    """
    key = f"{branch}:{name}"
    with store.writing() as connection:
        row = connection.execute("SELECT value, count FROM seen WHERE kind = ? AND name = ?", (kind, key)).fetchone()
        if row and row["value"] == value:
            return False
        count = row["count"] + 1 if row else 1
        _note_within(connection, kind, key, value, count)
        event = new_event(f"ft/{kind}s", type_, name, {**data, "branch": branch}, key=f"{key}@{value}#{count}")
        append_within(connection, event)
        return True


def note_clock(store: Store, recipe: str, line: str, zone: str, due: float) -> bool:
    """Append that the recipe's cron line has come due, once for each time."""
    key = f"{recipe}: {line} {zone}"
    with store.writing() as connection:
        _note_within(connection, "schedule", key, str(due), 0)
        data = {"cron": line, "due": due}
        return append_within(connection, new_event("ft/schedules", "schedule.fired", recipe, data, key=f"{key}@{due}"))


def last_clock(store: Store, recipe: str, line: str, zone: str, now: float) -> float:
    """When the line was last done with. What was due before anybody watched is not made up for."""
    key = f"{recipe}: {line} {zone}"
    row = store.first("SELECT value FROM seen WHERE kind = 'schedule' AND name = ?", (key,))
    if row and float(row["value"]) <= now:
        return float(row["value"])
    with store.writing() as connection:  # not seen yet, or seen while the clock was wrong
        _note_within(connection, "schedule", key, str(now), 0)
    return now


def note_datasets(project: Project, store: Store) -> int:
    """An event for each dataset whose version in DVC's records has changed; how many."""
    values = {each.path: (each.hash, {"hash": each.hash}) for each in tracked_datasets(project)}
    return note_all(project, store, "dataset", DATASET, values)


def note_all(
    project: Project, store: Store, kind: Kind, type_: str, values: dict[str, tuple[str, dict[str, Any]]]
) -> int:
    """`note_value` of each (value, data) by name; how many were news. What was there at the first look is none."""
    branch = git_branch(project.root)
    if branch is None:  # in the middle of a rebase, or at an old commit: nothing that is there is meant to stay
        return 0
    known = {row["name"]: row["value"] for row in store.read("SELECT name, value FROM seen WHERE kind = ?", (kind,))}
    if f"{branch}:" not in known:
        first = {f"{branch}:": "", **{f"{branch}:{name}": value for name, (value, _) in values.items()}}
        with store.writing() as connection:
            rows = [(kind, name, value) for name, value in first.items()]
            connection.executemany("INSERT INTO seen VALUES (?,?,?,0) ON CONFLICT DO NOTHING", rows)
        return 0
    changed = {name: each for name, each in values.items() if known.get(f"{branch}:{name}") != each[0]}
    return sum(note_value(store, kind, name, value, type_, data, branch) for name, (value, data) in changed.items())


def _note_within(connection: Connection, kind: Kind, key: str, value: str, count: int) -> None:
    connection.execute(
        "INSERT INTO seen VALUES (?,?,?,?) "
        "ON CONFLICT (kind, name) DO UPDATE SET value = excluded.value, count = excluded.count",
        (kind, key, value, count),
    )


def git_branch(root: Path) -> str | None:
    """The branch that is checked out; '' outside of git, None on no branch. Read, because starting git takes longer."""
    place = next((each / ".git" for each in (root, *root.parents) if (each / ".git").exists()), None)
    if place is None:
        return ""
    if place.is_file():  # a worktree or a submodule: the file says where its folder is
        place = place.parent / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    text = (place / "HEAD").read_text(encoding="utf-8").strip()
    return text.removeprefix("ref: refs/heads/") if text.startswith("ref: ") else None
