"""Where the public names lead, as the leading server publishes it for gateways that have no engine of their own.

One row. Its generation only grows, whoever leads. What is in `body` is serving's business (`serving/published.py`);
it never has a key of an engine in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from registry.serving_lead import Lead, check_lead
from registry.store import Store

NONE = 0


@dataclass(frozen=True)
class ServedRoutes:
    """`published` is Unix time by the leader's clock."""

    generation: int
    epoch: int
    published: float
    body: str


def publish(store: Store, lead: Lead, body: str) -> int:
    """Put the next generation in force; its number. Raises LeadLost, and then nothing is changed."""
    with store.writing() as connection:
        check_lead(connection, lead)
        row = connection.execute(
            "INSERT INTO served_routes (one, generation, epoch, published, body) VALUES (1,1,?,?,?) ON CONFLICT (one) "
            "DO UPDATE SET generation = served_routes.generation + 1, epoch = excluded.epoch, "
            "published = excluded.published, body = excluded.body RETURNING generation",
            (lead.epoch, time.time(), body),
        ).fetchone()
        return int(row["generation"])


def newer(store: Store, than: int) -> ServedRoutes | None:
    """The published routes, unless they are of generation `than`."""
    row = store.first(
        "SELECT generation, epoch, published, body FROM served_routes WHERE one = 1 AND generation <> ?", (than,)
    )
    return ServedRoutes(**row) if row else None
