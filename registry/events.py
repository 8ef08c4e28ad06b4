"""The append-only event log, with the attributes of CloudEvents 1.0.

An event is appended once, however often it comes: (source, id) is its name. SQLite gives `seq` in the order of commits,
because every append locks the file before it takes a number; so a cursor that has passed a number never misses one.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from registry.errors import StoreError
from registry.migrations import rating_of
from registry.store import Connection, Store, dump

RUNS = "ft/runs"
# Events in one statement: each is eight values, and Postgres takes 65,535 of them.
TOGETHER = 100
ROW = "(?,?,?,?,?,?,?,?)"
# From each source to the next by the index: a DISTINCT would read the whole log.
SOURCES = (
    "WITH RECURSIVE sources (source) AS (SELECT min(source) FROM events "
    "UNION ALL SELECT (SELECT min(source) FROM events AS e WHERE e.source > s.source) "
    "FROM sources AS s WHERE s.source IS NOT NULL)"
)
OF_THAT_ID = "SELECT e.* FROM sources AS s JOIN events AS e ON e.source = s.source AND e.id = ? ORDER BY e.seq"
COLUMNS = "source, id, type, subject, time, data, cause, rating"
FEEDBACK = "feedback.received"


@dataclass(frozen=True)
class Event:
    """One line of the log. `cause` is the `ref` of the event that led to it, if any.

    One that was `pruned` has no data any more; all else of it stays, so that it is never accepted again.
    """

    source: str
    id: str
    type: str
    subject: str
    time: float
    data: dict[str, Any]
    cause: str | None = None
    seq: int = 0
    pruned: bool = False

    @property
    def ref(self) -> str:
        """Its name in the log; a source is a URI reference, so it has no spaces."""
        return f"{self.source} {self.id}"

    def as_dict(self) -> dict[str, Any]:
        """As CloudEvents JSON, with `ftcause`, `ftseq` and `ftpruned` as extensions."""
        when = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        found = {
            "specversion": "1.0", "id": self.id, "source": self.source, "type": self.type, "subject": self.subject,
            "time": when, "datacontenttype": "application/json", "data": self.data, "ftcause": self.cause,
            "ftseq": self.seq, "ftpruned": self.pruned or None,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value not in (None, "")}


def new_event(
    source: str, type_: str, subject: str, data: dict[str, Any], *, key: str = "", cause: str | None = None
) -> Event:
    """An event of now. The same `key` from the same source is the same event, however often it is appended."""
    return Event(source, key or uuid.uuid4().hex, type_, subject, time.time(), data, cause)


def by_run(run_id: str | None) -> str | None:
    """The cause of what a run does: the event that it was submitted."""
    return f"{RUNS} {run_id}" if run_id else None


def append(store: Store, event: Event) -> bool:
    """Append; False if the log has it already (same source and id)."""
    with store.writing() as connection:
        return append_within(connection, event)


def append_within(connection: Connection, event: Event) -> bool:
    """The same inside a transaction of the caller's, so that a change and its event commit together."""
    done = connection.execute(f"INSERT INTO events ({COLUMNS}) VALUES {ROW} ON CONFLICT DO NOTHING", values_of(event))
    return done.rowcount == 1


def values_of(event: Event) -> tuple[Any, ...]:
    """Its row, without the number: source, id, type, subject, time, data, cause, rating."""
    rating = rating_of(event.data) if event.type == FEEDBACK else None
    return (event.source, event.id, event.type, event.subject, event.time, dump(event.data), event.cause, rating)


def append_all(store: Store, events: Sequence[Event]) -> list[bool]:
    """Append all of them in their order, in one transaction: all or none. For each: was it new?"""
    with store.writing() as connection:
        return list(_append_all_within(connection, events))


def _append_all_within(connection: Connection, events: Sequence[Event]) -> Iterator[bool]:
    for start in range(0, len(events), TOGETHER):
        part = events[start : start + TOGETHER]
        rows = connection.execute(
            f"INSERT INTO events ({COLUMNS}) VALUES {', '.join([ROW] * len(part))} "
            "ON CONFLICT DO NOTHING RETURNING source, id",
            [value for each in part for value in values_of(each)],
        )
        new = {(row["source"], row["id"]) for row in rows}
        for each in part:
            yield (each.source, each.id) in new
            new.discard((each.source, each.id))  # the same event twice in one part is new only once


def read(store: Store, *, after: int = 0, type_: str = "", subject: str = "", limit: int = 1000) -> list[Event]:
    """Events in order, those after sequence number `after`; an empty filter takes all."""
    where, values = _where(type_, subject)
    rows = store.read(f"SELECT * FROM events WHERE seq > ?{where} ORDER BY seq LIMIT ?", (after, *values, limit))
    return [_event(row) for row in rows]


def newest(store: Store, count: int, *, type_: str = "", subject: str = "") -> list[Event]:
    """The last so many events in order; filters as in `read`."""
    where, values = _where(type_, subject)
    rows = store.read(f"SELECT * FROM events WHERE seq > 0{where} ORDER BY seq DESC LIMIT ?", (*values, count))
    return [_event(row) for row in reversed(rows)]


def find(store: Store, id_: str) -> list[Event]:
    """The events of that id, of whatever source: looked up in each source that there is."""
    return [_event(row) for row in store.read(f"{SOURCES} {OF_THAT_ID}", (id_,))]


def at(store: Store, seq: str) -> list[Event]:
    """The event of that number in the log, as a person types it; empty if there is none."""
    number = int(seq) if re.fullmatch("[0-9]{1,18}", seq) else -1
    return [_event(row) for row in store.read("SELECT * FROM events WHERE seq = ?", (number,))]


def causes(store: Store, event: Event) -> list[Event]:
    """What led to the event: its cause, the cause of that, and so on to the first of all."""
    found: list[Event] = []
    passed = {event.ref}
    cause = _named(store, event.cause)
    while cause and cause.ref not in passed:  # who posts from outside could make a circle
        found.append(cause)
        passed.add(cause.ref)
        cause = _named(store, cause.cause)
    return found


def cursor(store: Store, name: str) -> int:
    """How far a reader has come: the sequence number of the last event that it has done with."""
    row = store.first("SELECT seq FROM cursors WHERE name = ?", (name,))
    return int(row["seq"]) if row else 0


def cursor_within(connection: Connection, name: str) -> int:
    """The same in a transaction of the caller's."""
    row = connection.execute("SELECT seq FROM cursors WHERE name = ?", (name,)).fetchone()
    return int(row["seq"]) if row else 0


def advance(store: Store, name: str, seq: int) -> None:
    with store.writing() as connection:
        advance_within(connection, name, seq)


def advance_within(connection: Connection, name: str, seq: int) -> None:
    """Move a reader on, in the transaction that does what its events asked for."""
    connection.execute(
        "INSERT INTO cursors (name, seq) VALUES (?,?) ON CONFLICT (name) DO UPDATE SET seq = excluded.seq "
        "WHERE excluded.seq > cursors.seq",
        (name, seq),
    )


def _where(type_: str, subject: str) -> tuple[str, list[str]]:
    """Only the filters that are given, so that SQLite can use the index of one."""
    given = {"type": type_, "subject": subject}
    return "".join(f" AND {name} = ?" for name, value in given.items() if value), [
        each for each in given.values() if each
    ]


def _named(store: Store, ref: str | None) -> Event | None:
    """The event of that `ref`, if the log has it."""
    source, _, id_ = (ref or "").partition(" ")
    row = store.first("SELECT * FROM events WHERE source = ? AND id = ?", (source, id_)) if id_ else None
    return _event(row) if row else None


def _event(row: dict[str, Any]) -> Event:
    known = {name: value for name, value in row.items() if name != "rating"}
    return Event(**{**known, "data": _data(row), "pruned": bool(row["pruned"])})


def _data(row: dict[str, Any]) -> dict[str, Any]:
    try:
        data = json.loads(row["data"])
    except ValueError as error:
        raise _damaged(row, f"its data are not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise _damaged(row, "its data are no JSON object")
    return data


def _damaged(row: dict[str, Any], why: str) -> StoreError:
    fix = f"put back what was there, or empty it: UPDATE events SET data = '{{}}', pruned = 1 WHERE seq = {row['seq']}"
    return StoreError(f"event {row['seq']} ({row['source']} {row['id']}) is damaged: {why}", place="events", fix=fix)
