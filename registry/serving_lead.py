"""Which server leads serving: reconciles, and says where the public names lead. A row, so that several hosts see it.

Each taking of the lead has a larger epoch, which goes with everything that a leader writes: one that was frozen, and
has lost the lead without knowing, writes nothing any more. A lease ends by the watcher's own clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from registry.errors import Conflict
from registry.leases import MARGIN_SECONDS, clock, is_gone, new_lease
from registry.store import Connection, Store

STEP_SECONDS = 0.2


class LeadLost(Conflict):
    """Another server leads since."""


@dataclass(frozen=True)
class Lead:
    """One taking of the lead; `beat` grows with each renewal, `since` is Unix time by that host's clock."""

    epoch: int
    lease: str
    host: str
    beat: int
    term: float
    since: float
    released: int = 0


def take_lead(store: Store, host: str, term: float, *, alone: bool) -> Lead:
    """Lead from now on. Raises Conflict where another server leads, which is seen when its beat grows.

    `alone`: a lock has shown that whoever led before is dead (one folder, one SQLite file), so nobody is waited for.
    """
    found, since = leader(store), clock()
    while True:
        free = found is None or alone or found.released or is_gone(found.lease)
        if free or (found and clock() - since > found.term + MARGIN_SECONDS):
            taken = _take(store, found, host, term)
            if taken:
                return taken
        time.sleep(0 if free else STEP_SECONDS)
        now = leader(store)
        if now and (found is None or (now.epoch, now.beat) != (found.epoch, found.beat)) and not now.released:
            raise Conflict(f"a server on {now.host} leads serving already", place=store.database.place,
                           fix="`ft serve gateway` adds a gateway here; `ft serve down` there ends it")  # fmt: skip
        found = now


def leader(store: Store) -> Lead | None:
    """Who led last; whether it lives only time tells."""
    row = store.first("SELECT epoch, lease, host, beat, term, since, released FROM serving_lead WHERE one = 1")
    return Lead(**row) if row else None


def renew_lead(store: Store, lead: Lead) -> None:
    """Raises LeadLost."""
    with store.writing() as connection:
        check_lead(connection, lead)
        connection.execute("UPDATE serving_lead SET beat = beat + 1 WHERE epoch = ?", (lead.epoch,))


def check_lead(connection: Connection, lead: Lead) -> None:
    """Within a transaction of the leader's. Raises LeadLost."""
    row = connection.execute("SELECT epoch, host FROM serving_lead WHERE one = 1").fetchone()
    if row is None or row["epoch"] != lead.epoch:
        whom = f"a server on {row['host']}" if row else "nobody"
        raise LeadLost(f"{whom} leads serving now, not this server", place=f"epoch {lead.epoch}",
                       fix="`ft serve gateway` adds a gateway here")  # fmt: skip


def release_lead(store: Store, lead: Lead) -> None:
    """It ends in order: the next need not wait."""
    store.note("UPDATE serving_lead SET released = 1 WHERE epoch = ?", (lead.epoch,))


def _take(store: Store, before: Lead | None, host: str, term: float) -> Lead | None:
    """None if somebody was faster, or the leader has beaten meanwhile."""
    new = Lead(before.epoch + 1 if before else 1, new_lease(), host, 1, term, time.time())
    with store.writing() as connection:
        row = connection.execute("SELECT epoch, beat FROM serving_lead WHERE one = 1").fetchone()
        if (tuple(row[each] for each in ("epoch", "beat")) if row else None) != (
            (before.epoch, before.beat) if before else None
        ):
            return None
        connection.execute("DELETE FROM serving_lead")
        connection.execute(
            "INSERT INTO serving_lead (one, epoch, lease, host, beat, term, since) VALUES (1,?,?,?,?,?,?)",
            (new.epoch, new.lease, new.host, new.beat, new.term, new.since),
        )
    return new
