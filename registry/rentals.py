"""What is rented and what was: the rows of rentals and of the pods that bore their names, read."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from registry.budgets import RentedPod
from registry.errors import NotFound
from registry.store import Store

State = Literal["intended", "live", "ending", "ended", "void"]
OPEN = "state NOT IN ('ended', 'void')"
POD_ROWS = (
    "SELECT p.*, coalesce(r.job, '') AS job, coalesce(r.recipe, '') AS recipe "
    "FROM rented_pods AS p LEFT JOIN rentals AS r ON r.name = p.name"
)


@dataclass(frozen=True)
class Rental:
    """One attempt to have a pod for a job. `usd_per_hour` is all of it, the disk too.

    `body`: cap_usd, max_usd_per_hour, disk_usd_per_hour, touched, failures, error.
    """

    name: str
    job: str
    attempt: int
    recipe: str
    model: str
    state: State
    gpu: str
    cloud: str
    pod: str | None
    usd_per_hour: float
    reserved_usd: float
    intended: float
    created: float | None
    ended: float | None
    reason: str
    body: dict[str, Any]

    @property
    def is_open(self) -> bool:
        return self.state not in ("ended", "void")

    @property
    def max_usd_per_hour(self) -> float:
        limit = self.body.get("max_usd_per_hour")
        return float("inf") if limit is None else float(limit)

    @property
    def disk_usd_per_hour(self) -> float:
        return float(self.body.get("disk_usd_per_hour", 0.0))


def installation(store: Store) -> str:
    """Six hex digits that are this project's and no other's, made at the first call."""
    row = store.first("SELECT id FROM installation")
    if row is None:
        with store.writing() as connection:
            connection.execute(
                "INSERT INTO installation SELECT CAST(? AS TEXT) WHERE NOT EXISTS (SELECT 1 FROM installation)",
                (secrets.token_hex(3),),
            )
        row = store.first("SELECT id FROM installation")
    assert row is not None
    return str(row["id"])


def pod_name(store: Store, job: str, attempt: int) -> str:
    return f"ft-{installation(store)}-{job}-a{attempt}"


def is_ours(store: Store) -> Callable[[str], bool]:
    """Whether a pod of that name was made by this installation."""
    pattern = re.compile(rf"ft-{installation(store)}-.+-a[1-9][0-9]*")
    return lambda name: pattern.fullmatch(name) is not None


def get(store: Store, name: str) -> Rental:
    rows = store.read("SELECT * FROM rentals WHERE name = ?", (name,))
    if not rows:
        raise NotFound(f"no rental '{name}'", fix="`ft pods` lists them")
    return rental_of(rows[0])


def rentals(store: Store, *, open_: bool = False, job: str = "") -> list[Rental]:
    """Rentals in the order in which they were intended: all, those that are open, those of one job."""
    given = [*([OPEN] if open_ else []), *(["job = ?"] if job else [])]
    where = f"WHERE {' AND '.join(given)} " if given else ""
    rows = store.read(f"SELECT * FROM rentals {where}ORDER BY intended, attempt", [job] if job else [])
    return [rental_of(row) for row in rows]


def current(store: Store, job: str) -> Rental | None:
    """The job's rental that is intended or live, if there is one."""
    return next((each for each in rentals(store, open_=True, job=job) if each.state != "ending"), None)


def wanted_names(store: Store) -> set[str]:
    """Names of pods that may live."""
    return {each.name for each in rentals(store, open_=True) if each.state != "ending"}


def any_open(store: Store) -> bool:
    """Is anything rented, or not known to be gone?"""
    return store.first(f"SELECT 1 AS one FROM rentals WHERE {OPEN}") is not None


def rented_pods(store: Store, *, since: float = 0.0, name: str = "") -> list[RentedPod]:
    """Pods that lived after `since`, the oldest first; of one name only where it is given."""
    rows = store.read(
        f"{POD_ROWS} WHERE (p.ended IS NULL OR p.ended >= ?) AND (? = '' OR p.name = ?) ORDER BY p.created, p.pod",
        (since, name, name),
    )
    return [pod_of(row) for row in rows]


def rental_of(row: dict[str, Any]) -> Rental:
    return Rental(**{**row, "body": json.loads(row["body"])})


def pod_of(row: dict[str, Any]) -> RentedPod:
    return RentedPod(**{**row, "final": bool(row["final"])})
