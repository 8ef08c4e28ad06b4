"""Who tells MLflow of an alias just now. One at a time, so that a late write of ours is never taken for a person's.

MLflow has no compare-and-set. Before anything is written there, the row here says so, and that what MLflow has is not
known; so whoever is killed in the middle leaves an alias that is told again, and none that looks like a request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from registry.leases import is_gone, new_lease
from registry.store import Store

# Longer than anybody tries: a command's process is ended after 120 s (`mlflow_mirror.PATIENCE_SECONDS`).
LEASE_SECONDS = 150.0


@dataclass(frozen=True)
class Telling:
    """`version` is what to tell: ours as it was when the lease began; None where we have no such alias."""

    model: str
    alias: str
    version: int | None
    lease: str


def begin_telling(store: Store, model: str, alias: str) -> Telling | None:
    """None while somebody else tells it."""
    now, lease, key = time.time(), new_lease(), (model, alias)
    with store.writing() as connection:
        row = connection.execute("SELECT token, since FROM projections WHERE model = ? AND alias = ?", key).fetchone()
        if row and row["token"] and 0 <= now - row["since"] < LEASE_SECONDS and not is_gone(row["token"]):
            return None
        connection.execute(
            "INSERT INTO projections (model, alias, token, since, count) VALUES (?,?,?,?,1) "
            "ON CONFLICT (model, alias) DO UPDATE SET token = excluded.token, since = excluded.since, "
            "count = projections.count + 1",
            (model, alias, lease, now),
        )
        connection.execute("UPDATE aliases SET projected = NULL WHERE model = ? AND alias = ?", key)
        ours = connection.execute("SELECT version FROM aliases WHERE model = ? AND alias = ?", key).fetchone()
        return Telling(model, alias, int(ours["version"]) if ours else None, lease)


def end_telling(store: Store, telling: Telling) -> None:
    """MLflow has it. Nothing happens if the lease was lost: then somebody tells it again."""
    with store.writing() as connection:
        done = connection.execute("UPDATE projections SET token = NULL WHERE token = ?", (telling.lease,))
        if done.rowcount == 1:
            connection.execute(
                "UPDATE aliases SET projected = ? WHERE model = ? AND alias = ?",
                (telling.version, telling.model, telling.alias),
            )


def abandon_telling(store: Store, telling: Telling) -> None:
    """It failed, and MLflow may have it or not: the alias stays one that is to be told."""
    with store.writing() as connection:
        connection.execute("UPDATE projections SET token = NULL WHERE token = ?", (telling.lease,))
