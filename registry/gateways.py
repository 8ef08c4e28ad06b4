"""Gateways without an engine of their own: who lives, which generation of the routes each follows, what it still asks.

A row says two things that were true at one moment: generation `acknowledged` was in force there, and `in_flight` were
the requests to adapters that this generation no longer leads to. So of an adapter that went with an acknowledged
generation, and is not in flight, that gateway asks nothing more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from registry.leases import MARGIN_SECONDS, clock
from registry.served_routes import NONE
from registry.store import Store, dump

# An adapter, and the address of the engine that has it.
Ref = tuple[str, str]
# A row whose gateway has been silent for so many of its terms is deleted; it makes a new one if it comes back.
FORGOTTEN_TERMS = 30


@dataclass(frozen=True)
class GatewayRow:
    """`beat` grows with each renewal of its lease of `term` seconds; `seen` is Unix time there, for people.

    `wanted`: engines of the serve recipe, and public names, that its callers wait for. `used`: adapters, and addresses
    of engines, that it asked since the renewal before.
    """

    id: str
    host: str
    url: str
    started: float
    term: float
    acknowledged: int = NONE
    in_flight: frozenset[Ref] = frozenset()
    wanted: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()
    beat: int = 0
    seen: float = 0.0

    def asks_no_more(self, ref: Ref, since: int) -> bool:
        """Can no request of it reach the adapter, which is in no generation from `since` on?"""
        return self.acknowledged >= since and ref not in self.in_flight


class Watch:
    """Which gateways may still answer, as far as this process has seen them beat. At first all that are known do."""

    def __init__(self, clock: Callable[[], float] = clock) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def living(self, rows: Iterable[GatewayRow]) -> list[GatewayRow]:
        return [row for row in rows if self.silent(row) <= row.term + MARGIN_SECONDS]

    def silent(self, row: GatewayRow) -> float:
        """Seconds since its beat was first seen to be what it is."""
        now = self._clock()
        beat, since = self._seen.get(row.id, (None, now))
        if beat != row.beat:
            since = now
        self._seen[row.id] = (row.beat, since)
        return now - since


def renew(store: Store, row: GatewayRow) -> int:
    """Write the row (its beat grows by one); the generation that is published at this moment, NONE without any."""
    sets = [dump(sorted(each)) for each in (row.in_flight, row.wanted, row.used)]
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO gateways (id, host, url, started, beat, term, seen, acknowledged, in_flight, wanted, used) "
            "VALUES (?,?,?,?,1,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET beat = gateways.beat + 1, "
            "seen = excluded.seen, acknowledged = excluded.acknowledged, in_flight = excluded.in_flight, "
            "wanted = excluded.wanted, used = excluded.used",
            (row.id, row.host, row.url, row.started, row.term, time.time(), row.acknowledged, *sets),
        )
        found = connection.execute("SELECT generation FROM served_routes WHERE one = 1").fetchone()
        return int(found["generation"]) if found else NONE


def gateways(store: Store) -> list[GatewayRow]:
    """All that have not left, the dead ones too; by host and address."""
    found = store.read("SELECT * FROM gateways ORDER BY host, url, id")
    return [GatewayRow(**{**row, **_sets(row["in_flight"], row["wanted"], row["used"])}) for row in found]


def leave(store: Store, id_: str) -> None:
    """A gateway ends in order: nobody need wait for its lease."""
    store.note("DELETE FROM gateways WHERE id = ?", (id_,))


def forget_silent(store: Store, watch: Watch, rows: Iterable[GatewayRow]) -> None:
    """Delete the rows of those that are long dead."""
    for row in rows:
        if watch.silent(row) > FORGOTTEN_TERMS * row.term:
            store.note("DELETE FROM gateways WHERE id = ? AND beat = ?", (row.id, row.beat))


def _sets(in_flight: str, wanted: str, used: str) -> dict[str, Any]:
    return {
        "in_flight": frozenset((adapter, url) for adapter, url in json.loads(in_flight)),
        "wanted": frozenset(json.loads(wanted)),
        "used": frozenset(json.loads(used)),
    }
