"""The append-only event log, with the attributes of CloudEvents 1.0."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from dataclasses import dataclass
from typing import Any

from registry.store import Store, dump


@dataclass(frozen=True)
class Event:
    """One line of the log. `cause` is the `source/id` of the event that led to it, if any."""

    source: str
    id: str
    type: str
    subject: str
    time: float
    data: dict[str, Any]
    cause: str | None = None
    seq: int = 0


def new_event(source: str, type_: str, subject: str, data: dict[str, Any], *, key: str = "") -> Event:
    """An event of now. The same `key` from the same source is the same event, however often it is appended."""
    return Event(source, key or uuid.uuid4().hex, type_, subject, time.time(), data)


def append(store: Store, event: Event) -> bool:
    """Append; False if the log has it already (same source and id)."""
    with store.writing() as connection:
        return append_within(connection, event)


def append_within(connection: sqlite3.Connection, event: Event) -> bool:
    """The same inside a transaction of the caller's, so that a change and its event commit together."""
    done = connection.execute(
        "INSERT OR IGNORE INTO events (source, id, type, subject, time, data, cause) VALUES (?,?,?,?,?,?,?)",
        (event.source, event.id, event.type, event.subject, event.time, dump(event.data), event.cause),
    )
    return done.rowcount == 1


def read(store: Store, *, after: int = 0, type_: str = "", subject: str = "", limit: int = 1000) -> list[Event]:
    """Events in order, those after sequence number `after`; an empty filter takes all."""
    rows = store.read(
        "SELECT * FROM events WHERE seq > ? AND (? = '' OR type = ?) AND (? = '' OR subject = ?) ORDER BY seq LIMIT ?",
        (after, type_, type_, subject, subject, limit),
    )
    return [Event(**{**row, "data": json.loads(row["data"])}) for row in rows]
