"""The outbox: which event waits for which sink. Durable, filled by one cursor per sink, emptied by leases.

At least once: a row goes when its sink has taken the event. Of one sink one message is on its way at a time, on
whatever host, so that they come in the log's order where nothing fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from registry.events import Event, advance_within, append_within, cursor_within, new_event, read
from registry.leases import is_gone, new_lease
from registry.store import Connection, Store

BATCH = 200
PREFIX = "sink:"
# A due time or a lease further off than this was set while the clock was wrong.
NONSENSE_SECONDS = 2 * 86400.0


@dataclass(frozen=True)
class Claimed:
    """A message that this process alone may send until the lease ends; `first` is when it was first tried."""

    sink: str
    seq: int
    attempt: int
    first: float
    lease: str


def begin(store: Store, sink: str) -> None:
    """Make the sink known; what is in the log already is not for it."""
    if store.first("SELECT 1 AS one FROM cursors WHERE name = ?", (_cursor(sink),)):
        return
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO cursors (name, seq) SELECT ?, coalesce(max(seq), 0) FROM events WHERE true "
            "ON CONFLICT DO NOTHING",
            (_cursor(sink),),
        )
        connection.execute("INSERT INTO sinks (name) VALUES (?) ON CONFLICT DO NOTHING", (sink,))


def fill(store: Store, sink: str, wants: Callable[[Event], bool]) -> int:
    """Put what is new in the log and for the sink into its outbox; how many events were looked at."""
    row = store.first("SELECT seq FROM cursors WHERE name = ?", (_cursor(sink),))
    seen = int(row["seq"]) if row else 0
    events = read(store, after=seen, limit=BATCH)
    if not events:
        return 0
    rows = [(sink, each.seq, time.time()) for each in events if wants(each)]
    with store.writing() as connection:
        if cursor_within(connection, _cursor(sink)) == seen:
            connection.executemany("INSERT INTO outbox (sink, seq, state, due) VALUES (?,?,'waiting',?) "
                                   "ON CONFLICT DO NOTHING", rows)  # fmt: skip
            advance_within(connection, _cursor(sink), events[-1].seq)
    return len(events)


def claim(store: Store, sink: str, seconds: float) -> Claimed | None:
    """The first message that is due, leased for so many seconds; None if there is none, or one is on its way."""
    now, lease = time.time(), new_lease()
    with store.writing() as connection:
        if _blocked_until(connection, sink, now) > now:
            return None
        row = connection.execute(
            "SELECT seq FROM outbox WHERE sink = ? AND state = 'waiting' AND (due <= ? OR due > ?) "
            "ORDER BY seq LIMIT 1",
            (sink, now, now + NONSENSE_SECONDS),
        ).fetchone()
        if row is None:
            return None
        done = connection.execute(
            "UPDATE outbox SET lease = ?, leased_until = ?, attempts = attempts + 1, first = coalesce(first, ?) "
            "WHERE sink = ? AND seq = ? RETURNING attempts, first",
            (lease, now + seconds, now, sink, row["seq"]),
        ).fetchone()
        return Claimed(sink, int(row["seq"]), int(done["attempts"]), float(done["first"]), lease)


def delivered(store: Store, claimed: Claimed) -> None:
    """The sink has it. Nothing happens if the lease was lost meanwhile."""
    with store.writing() as connection:
        done = connection.execute(
            "DELETE FROM outbox WHERE sink = ? AND seq = ? AND lease = ?", (claimed.sink, claimed.seq, claimed.lease)
        )
        if done.rowcount == 1:
            connection.execute(
                "UPDATE sinks SET delivered = delivered + 1, delivered_at = ?, paused_until = NULL, away = 0, "
                "failing = 0, disabled = NULL WHERE name = ?",
                (time.time(), claimed.sink),
            )


def put_off(store: Store, claimed: Claimed, due: float, error: str, *, pause: float | None = None, away: bool) -> None:
    """Try again at `due`. `pause`: send the sink nothing at all until then; `away`: it did not answer at all."""
    with store.writing() as connection:
        if _let_go(connection, claimed, "waiting", due, error):
            connection.execute(
                "UPDATE sinks SET paused_until = ?, away = CASE WHEN ? = 1 THEN away + 1 ELSE 0 END WHERE name = ?",
                (pause, int(away), claimed.sink),
            )


def give_up(store: Store, claimed: Claimed, event: Event | None, error: str, *, disable: str | None = None) -> None:
    """Do not try again by ourselves, and append `sink.gave_up` if it is the first since the sink took something.

    `disable` is a digest of the address that is to be sent nothing any more.
    """
    with store.writing() as connection:
        if not _let_go(connection, claimed, "given up", time.time(), error):
            return
        row = connection.execute("SELECT failing FROM sinks WHERE name = ?", (claimed.sink,)).fetchone()
        connection.execute(
            "UPDATE sinks SET failing = 1, away = 0, paused_until = NULL, disabled = coalesce(?, disabled) "
            "WHERE name = ?",
            (disable, claimed.sink),
        )
        # Two sinks that fail and listen to each other's failures would go on for ever.
        if event is not None and not event.type.startswith("sink.") and not (row and row["failing"]):
            data = {"event": event.ref, "type": event.type, "reason": error, "attempts": claimed.attempt}
            append_within(connection, new_event("ft/sinks", "sink.gave_up", claimed.sink, data, cause=event.ref))


def note_error(store: Store, sink: str, error: str) -> None:
    """What keeps the sink from being sent anything; written once."""
    if store.first("SELECT 1 AS one FROM sinks WHERE name = ? AND error = ?", (sink, error)) is None:
        with store.writing() as connection:
            _note_error_within(connection, sink, error)


def retry(store: Store, sink: str) -> int:
    """Everything that waits or was given up is due now, also where the sink was disabled; how many messages."""
    with store.writing() as connection:
        done = connection.execute(
            "UPDATE outbox SET state = 'waiting', due = ?, attempts = 0, first = NULL WHERE sink = ? "
            "AND (leased_until IS NULL OR state <> 'waiting')",
            (time.time(), sink),
        )
        connection.execute(
            "UPDATE sinks SET paused_until = NULL, away = 0, failing = 0, disabled = NULL WHERE name = ?", (sink,)
        )
        return done.rowcount


def next_due(store: Store, sink: str) -> float | None:
    """When something can be sent to the sink; None if nothing waits."""
    with store.database.connected() as connection:
        row = connection.execute(
            "SELECT min(due) AS due FROM outbox WHERE sink = ? AND state = 'waiting'", (sink,)
        ).fetchone()
        if row["due"] is None:
            return None
        now = time.time()
        return max(_sane(row["due"], now), _blocked_until(connection, sink, now))


def is_behind(store: Store, sink: str) -> bool:
    """Are there events that were not looked at for this sink?"""
    row = store.first(
        "SELECT 1 AS one FROM events WHERE seq > (SELECT seq FROM cursors WHERE name = ?) LIMIT 1", (_cursor(sink),)
    )
    return row is not None


def away(store: Store, sink: str) -> int:
    """How often in a row the sink did not answer at all."""
    row = store.first("SELECT away FROM sinks WHERE name = ?", (sink,))
    return int(row["away"]) if row else 0


def disabled(store: Store, sink: str) -> str | None:
    row = store.first("SELECT disabled FROM sinks WHERE name = ?", (sink,))
    return row["disabled"] if row else None


def sink_of(cursor: str) -> str | None:
    """The sink that reads the log with this cursor; None if none does."""
    return cursor.removeprefix(PREFIX) if cursor.startswith(PREFIX) else None


def states(store: Store) -> dict[str, dict[str, Any]]:
    """What is known of each sink, also of those that ft.yaml no longer has: counts, last error, times."""
    rows = store.read(
        "SELECT name, delivered, delivered_at, error, error_at, paused_until, disabled, "
        "(SELECT count(*) FROM outbox WHERE sink = sinks.name AND state = 'waiting') AS waiting, "
        "(SELECT count(*) FROM outbox WHERE sink = sinks.name AND state = 'given up') AS given_up, "
        "(SELECT min(due) FROM outbox WHERE sink = sinks.name AND state = 'waiting') AS due FROM sinks ORDER BY name"
    )
    return {row["name"]: row for row in rows}


def _blocked_until(connection: Connection, sink: str, now: float) -> float:
    """The sink is paused, or a message is on its way to it, until then; the past if neither."""
    rows = connection.execute(
        "SELECT lease, leased_until AS until FROM outbox WHERE sink = ? AND state = 'waiting' AND lease IS NOT NULL "
        "UNION ALL SELECT NULL, paused_until FROM sinks WHERE name = ? AND paused_until IS NOT NULL",
        (sink, sink),
    )
    times = [_sane(row["until"], now) for row in rows if not (row["lease"] and is_gone(row["lease"]))]
    return max(times, default=0.0)


def _sane(moment: float, now: float) -> float:
    return float(moment) if moment < now + NONSENSE_SECONDS else now


def _let_go(connection: Connection, claimed: Claimed, state: str, due: float, error: str) -> bool:
    """False if the lease was lost: then somebody else sends it."""
    done = connection.execute(
        "UPDATE outbox SET state = ?, due = ?, error = ?, lease = NULL, leased_until = NULL "
        "WHERE sink = ? AND seq = ? AND lease = ?",
        (state, due, error, claimed.sink, claimed.seq, claimed.lease),
    )
    if done.rowcount == 1:
        _note_error_within(connection, claimed.sink, error)
    return done.rowcount == 1


def _note_error_within(connection: Connection, sink: str, error: str) -> None:
    connection.execute("UPDATE sinks SET error = ?, error_at = ? WHERE name = ?", (error, time.time(), sink))


def _cursor(sink: str) -> str:
    return f"{PREFIX}{sink}"
