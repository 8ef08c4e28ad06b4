"""Pruning in the store: what there is to decide on, and the deletion of rows, which looks again before it acts.

What was deleted stays known: of runs in `pruned_runs`, of job folders and adapters by `pruned` in their rows. So the
folders that a killed prune left are found by the next one, also on another host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from typing import Any

from registry.events import causes, find
from registry.outbox import sink_of
from registry.retention import EndedRun, KnownVersion
from registry.store import Store

EVENTS_AT_ONCE = 5000
PRUNED = "store.pruned"  # what was deleted, and when, is kept for ever
ENDED = "state IN ('succeeded', 'refused', 'failed', 'cancelled') AND wish IS NULL"
UNNAMED = (
    "NOT EXISTS (SELECT 1 FROM versions AS v JOIN aliases AS a ON a.model = v.model AND a.version = v.version "
    "WHERE v.run_id = runs.id)"
)


def ended_runs(store: Store) -> list[EndedRun]:
    """Runs that have ended and of which nothing is wanted; folders are for the caller to fill in."""
    rows = store.read(f"SELECT id, state, created, finished, told FROM runs WHERE {ENDED} ORDER BY created")
    return [EndedRun(row["id"], row["state"], row["finished"] or row["created"], _is_told(row)) for row in rows]


def busy_runs(store: Store) -> frozenset[str]:
    return frozenset(row["id"] for row in store.read(f"SELECT id FROM runs WHERE NOT ({ENDED})"))


def known_versions(store: Store, loaded: Collection[str], now: float) -> list[KnownVersion]:
    """All versions; `loaded` are the names of those that a live server has."""
    aliased = {(row["model"], row["version"]) for row in store.read("SELECT model, version FROM aliases")}
    judged = store.read("SELECT model, version, outcome FROM verdicts ORDER BY id")
    outcomes = {(row["model"], row["version"]): row["outcome"] for row in judged}
    champions = _champion_until(store, now)
    rows = store.read("SELECT model, version, run_id, created, pruned FROM versions ORDER BY model, version")
    return [
        KnownVersion(
            name=f"{row['model']}@{row['version']}", run_id=row["run_id"], created=row["created"],
            outcome=outcomes.get(key, ""), aliased=key in aliased, champion_until=champions.get(key),
            loaded=f"{row['model']}@{row['version']}" in loaded, pruned=row["pruned"] is not None,
        )
        for row in rows if (key := (row["model"], row["version"]))
    ]  # fmt: skip


def passed_by_all(store: Store, sinks: Collection[str]) -> int:
    """The number of the last event that every reader of the log has done with; of sinks, those of these names.

    A sink that was taken out of ft.yaml never reads on.
    """
    rows = store.read("SELECT name, seq FROM cursors")
    return min((row["seq"] for row in rows if (name := sink_of(row["name"])) is None or name in sinks), default=0)


def causes_of(store: Store, run_ids: Collection[str]) -> frozenset[int]:
    """Numbers of the events that led to these runs."""
    found = [event for run_id in run_ids for event in find(store, run_id)]
    return frozenset(cause.seq for event in found for cause in causes(store, event))


def old_events(
    store: Store, before: float, up_to: int, kept: Collection[str], causing: Collection[int]
) -> Iterator[list[tuple[int, int]]]:
    """(number, size of the data) of events whose data may go, page by page."""
    at = 0
    while rows := store.read(
        "SELECT seq, type, subject, length(data) AS size FROM events WHERE seq > ? AND seq <= ? AND time < ? "
        "AND pruned = 0 AND length(data) > 2 AND seq NOT IN (SELECT seq FROM outbox) ORDER BY seq LIMIT ?",
        (at, up_to, before, EVENTS_AT_ONCE),
    ):  # fmt: skip
        at = rows[-1]["seq"]
        yield [
            (row["seq"], row["size"]) for row in rows
            if row["type"] != PRUNED and row["subject"] not in kept and row["seq"] not in causing
        ]  # fmt: skip


def empty_events(store: Store, numbers: list[int]) -> None:
    """Their data go; source, id, type, subject, time and cause stay."""
    with store.writing() as connection:
        connection.executemany(
            "UPDATE events SET data = '{}', pruned = 1 WHERE seq = ?", [(number,) for number in numbers]
        )


def old_scores(store: Store, before: float, kept: Collection[str]) -> Iterator[tuple[str, int]]:
    """(key, size) of kept scores of that age; those of versions in use stay."""
    for row in store.read("SELECT key FROM scores WHERE created < ? ORDER BY created", (before,)):
        found = store.first("SELECT body FROM scores WHERE key = ?", (row["key"],))
        if found and json.loads(found["body"])["scored"]["subject"] not in kept:
            yield row["key"], len(found["body"])


def delete_score(store: Store, key: str, before: float) -> int:
    with store.writing() as connection:
        return connection.execute("DELETE FROM scores WHERE key = ? AND created < ?", (key, before)).rowcount


def delete_run(store: Store, run_id: str) -> bool:
    """The row and its steps; False if the run is wanted again. That there was such a run stays known."""
    with store.writing() as connection:
        done = connection.execute(
            "INSERT INTO pruned_runs (id, recipe, model, state, created, pruned) "
            f"SELECT id, recipe, model, state, created, ? FROM runs WHERE id = ? AND {ENDED} AND {UNNAMED} "
            "ON CONFLICT DO NOTHING",
            (time.time(), run_id),
        )
        if done.rowcount:
            connection.execute("DELETE FROM steps WHERE run_id = ?", (run_id,))
            connection.execute("DELETE FROM runs WHERE id = ?", (run_id,))
        return done.rowcount == 1


def give_up_folder(store: Store, run_id: str) -> bool:
    """Write down that the run's job folder goes, before it does; False if the run is wanted again."""
    with store.writing() as connection:
        done = connection.execute(
            f"UPDATE runs SET pruned = ? WHERE id = ? AND pruned IS NULL AND {ENDED} AND {UNNAMED}",
            (time.time(), run_id),
        )
        return done.rowcount == 1


def give_up_adapter(store: Store, name: str) -> bool:
    """Write down that the version's folder goes, before it does; False if it is wanted again."""
    model, _, version = name.partition("@")
    values = (model, int(version))
    with store.writing() as connection:
        verdict = connection.execute(
            "SELECT outcome FROM verdicts WHERE model = ? AND version = ? ORDER BY id DESC LIMIT 1", values
        ).fetchone()
        if verdict is None or verdict["outcome"] != "fail":
            return False
        done = connection.execute(
            "UPDATE versions SET pruned = ? WHERE model = ? AND version = ? AND pruned IS NULL "
            "AND NOT EXISTS (SELECT 1 FROM aliases WHERE model = ? AND version = ?) "
            "AND NOT EXISTS (SELECT 1 FROM promotions WHERE model = ? AND version = ?) "
            "AND NOT EXISTS (SELECT 1 FROM rollouts WHERE model = ? AND version = ? AND state = 'running')",
            (time.time(), *values, *values, *values, *values),
        )
        return done.rowcount == 1


def folders_given_up(store: Store) -> tuple[set[str], list[str]]:
    """Ids of runs that have no job folder any more, and the folders (relative to `.ft`) of pruned versions."""
    runs = store.read("SELECT id FROM pruned_runs UNION SELECT id FROM runs WHERE pruned IS NOT NULL")
    versions = store.read("SELECT folder FROM versions WHERE pruned IS NOT NULL")
    return {row["id"] for row in runs}, [row["folder"] for row in versions]


def unforgotten(store: Store, limit: int) -> list[str]:
    """Pruned runs of which the engine of runs still has its own rows."""
    return [row["id"] for row in store.read("SELECT id FROM pruned_runs WHERE forgotten = 0 LIMIT ?", (limit,))]


def mark_forgotten(store: Store, run_ids: Collection[str]) -> None:
    with store.writing() as connection:
        connection.executemany("UPDATE pruned_runs SET forgotten = 1 WHERE id = ?", [(each,) for each in run_ids])


def _is_told(row: dict[str, Any]) -> bool:
    return row["state"] in ("succeeded", "refused") or row["told"] == row["state"]


def _champion_until(store: Store, now: float) -> dict[tuple[str, int], float]:
    """When each version last was champion: until the next move of its model, or until now."""
    until: dict[tuple[str, int], float] = {}
    for row in store.read("SELECT model, version, from_version, created FROM promotions ORDER BY id"):
        if row["from_version"] is not None:
            until[row["model"], row["from_version"]] = row["created"]
        until[row["model"], row["version"]] = now
    return until
