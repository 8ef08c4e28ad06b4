"""The write-ahead ledger of what is rented: a rental is written down before RunPod is asked for its pod.

    intended -> live -> ending -> ended        intended -> void: nothing was created

Every change is a compare-and-set on the state, so who lost a race finds out and looks again. Times are Unix times of
the host that wrote them; how long ago something was is judged by who watches, on its own clock.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from registry import budgets as decide
from registry.budgets import Refused
from registry.cloud_terms import Budgets
from registry.errors import Conflict, NotFound
from registry.events import append_within, new_event
from registry.rentals import (
    OPEN,
    POD_ROWS,
    Rental,
    any_open,
    current,
    get,
    installation,
    pod_name,
    pod_of,
    rental_of,
    rentals,
    rented_pods,
    wanted_names,
)
from registry.spending import book, reservations, tell_refusal, warn_within
from registry.store import Connection, Store, dump

__all__ = [
    "Intent", "Rental", "any_open", "current", "get", "installation", "intend", "note_billed", "note_ended",
    "note_failure", "note_gone", "note_live", "note_pod", "pod_name", "re_aim", "rentals", "rented_pods",
    "reservations", "reserve_more", "touch", "void", "want_ended", "wanted_names",
]  # fmt: skip

PODS = "ft/pods"


@dataclass(frozen=True)
class Intent:
    """What is to be rented. `reserved_usd` None: all that the run has left; `max_usd` is the recipe's budget.

    `usd_per_hour` and `max_usd_per_hour` are of the card alone, as RunPod tells them; its disk is charged beside.
    """

    job: str
    recipe: str
    model: str
    gpu: str
    cloud: str
    usd_per_hour: float
    reserved_usd: float | None = None
    max_usd: float | None = None
    max_usd_per_hour: float | None = None
    disk_gb: int = 0


def intend(store: Store, intent: Intent, budgets: Budgets, now: float | None = None) -> Rental:
    """Reserve the money and write down the next attempt, in one transaction.

    Raises BudgetError where a cap forbids it (an event says so too), Conflict while the job has an open rental.
    """
    now = time.time() if now is None else now
    cap_usd = decide.run_cap(intent.max_usd, budgets, intent.job)
    installation(store)
    with store.writing() as connection:
        attempt = _next_attempt(connection, intent.job)
        found = decide.caps(intent.job, cap_usd, budgets, *book(connection.execute, now, intent.job), now)
        reserved = decide.reservation(intent.reserved_usd, intent.usd_per_hour + _disk(intent), found)
        if not isinstance(reserved, Refused):
            name = _insert(connection, intent, attempt, cap_usd, reserved, now)
            warn_within(connection, decide.period_caps(budgets, *book(connection.execute, now), now))
    if isinstance(reserved, Refused):
        tell_refusal(store, intent.job, reserved, now)
        raise reserved.error()
    return get(store, name)


def re_aim(store: Store, name: str, gpu: str, cloud: str, usd_per_hour: float) -> bool:
    """The next create is for that card; False if the rental is not intended any more."""
    whole = usd_per_hour + get(store, name).disk_usd_per_hour
    with store.writing() as connection:
        return _touch(connection, name, "gpu = ?, cloud = ?, usd_per_hour = ?", (gpu, cloud, whole))


def touch(store: Store, name: str) -> bool:
    """Whoever rents is still at it; False if the rental is not intended any more."""
    with store.writing() as connection:
        return _touch(connection, name, "reason = reason", ())


def note_live(
    store: Store, name: str, pod: str, usd_per_hour: float, *, created: float | None = None, adopted: bool = False
) -> Rental | None:
    """The pod is there and is the rental's; None if somebody else has settled the rental otherwise.

    `created` is when RunPod was asked for it; a pod that was found counts from when it was intended. A price above what
    was allowed makes the rental `ending` at once: the pod must be terminated then.
    """
    now = time.time()
    with store.writing() as connection:
        row = connection.execute("SELECT * FROM rentals WHERE name = ?", (name,)).fetchone()
        rental = rental_of(dict(row)) if row else None
        # RunPod says 0 of a pod that stands still.
        whole = (usd_per_hour + rental.disk_usd_per_hour if usd_per_hour else rental.usd_per_hour) if rental else 0.0
        created = min(created or (rental.intended if rental else now), now)
        _note_pod(connection, name, pod, whole or usd_per_hour, created)
        if rental is None or (rental.state, rental.pod) == ("live", pod):
            return rental
        if rental.state != "intended":
            return None
        dear = usd_per_hour > rental.max_usd_per_hour + decide.ROUNDING_USD
        reason = f"${usd_per_hour:g} an hour, more than the allowed ${rental.max_usd_per_hour:g}" if dear else ""
        connection.execute(
            "UPDATE rentals SET state = ?, pod = ?, usd_per_hour = ?, created = ?, reason = ? WHERE name = ?",
            ("ending" if dear else "live", pod, whole, created, reason, name),
        )
        data = {"pod": pod, "name": name, "gpu": rental.gpu, "usd_per_hour": whole,
                "reserved_usd": rental.reserved_usd, **({"adopted": True} if adopted else {})}  # fmt: skip
        append_within(connection, new_event(PODS, "pod.created", rental.job, data, key=f"created {pod}"))
    return get(store, name)


def want_ended(store: Store, name: str, reason: str) -> bool:
    """Nobody needs its pod any more. The reaper ends it if the caller does not; False if that was so already."""
    with store.writing() as connection:
        row = connection.execute("SELECT body FROM rentals WHERE name = ?", (name,)).fetchone()
        done = connection.execute(
            "UPDATE rentals SET state = 'ending', reason = ?, body = ? "
            "WHERE name = ? AND state IN ('intended', 'live')",
            (reason, _touched(row), name),
        )
        return done.rowcount == 1


def note_ended(store: Store, name: str, *, reason: str = "") -> bool:
    """Its pods are really gone (or there never was one). False if that was known."""
    now = time.time()
    with store.writing() as connection:
        row = connection.execute(f"SELECT * FROM rentals WHERE name = ? AND {OPEN}", (name,)).fetchone()
        if row is None:
            return False
        rental = rental_of(dict(row))
        connection.execute("UPDATE rented_pods SET ended = ? WHERE pod = ? AND ended IS NULL", (now, rental.pod))
        pods = [pod_of(dict(each)) for each in connection.execute(f"{POD_ROWS} WHERE p.name = ?", (name,))]
        ended = max([each.ended for each in pods if each.ended is not None], default=now)
        why = rental.reason or reason
        connection.execute(
            "UPDATE rentals SET state = ?, ended = ?, reason = ? WHERE name = ?",
            ("ended" if pods else "void", ended, why, name),
        )
        if pods:
            data = {"name": name, "reason": why or "it ended", "usd": round(sum(each.usd(now) for each in pods), 6),
                    "seconds": round(sum(each.seconds(now) for each in pods), 1)}  # fmt: skip
            pod = {"pod": rental.pod} if rental.pod else {}
            append_within(connection, new_event(PODS, "pod.ended", rental.job, {**data, **pod}, key=f"ended {name}"))
    return True


def void(store: Store, name: str, reason: str) -> bool:
    """Nothing was created. False if somebody else has settled the rental otherwise."""
    with store.writing() as connection:
        done = connection.execute(
            "UPDATE rentals SET state = 'void', ended = ?, reason = ? WHERE name = ? AND state = 'intended'",
            (time.time(), reason, name),
        )
        return done.rowcount == 1


def note_pod(store: Store, name: str, pod: str, usd_per_hour: float, created: float) -> None:
    """A pod that bears a name of ours was seen; what is known of it already stays."""
    if store.first("SELECT 1 AS one FROM rented_pods WHERE pod = ?", (pod,)) is None:
        with store.writing() as connection:
            _note_pod(connection, name, pod, usd_per_hour, created)


def note_gone(store: Store, pod: str, moment: float) -> None:
    """RunPod took the order to end it, or knows it no more: from then on it costs nothing."""
    with store.writing() as connection:
        connection.execute("UPDATE rented_pods SET ended = ? WHERE pod = ?", (moment, pod))


def note_failure(store: Store, name: str, error: str) -> int:
    """Ending its pod failed; how often in a row by now."""
    with store.writing() as connection:
        row = connection.execute("SELECT body FROM rentals WHERE name = ?", (name,)).fetchone()
        body = json.loads(row["body"]) if row else {}
        body |= {"failures": int(body.get("failures", 0)) + 1, "error": error}
        connection.execute("UPDATE rentals SET body = ? WHERE name = ?", (dump(body), name))
    return int(body["failures"])


def note_billed(store: Store, pod: str, usd: float, *, final: bool) -> None:
    with store.writing() as connection:
        connection.execute(
            "UPDATE rented_pods SET billed_usd = ?, final = ? WHERE pod = ? AND final = 0", (usd, int(final), pod)
        )


def reserve_more(store: Store, name: str, budgets: Budgets, max_usd: float) -> Rental:
    """Let an open rental cost all that the (raised) budget of its run has left. Raises BudgetError as `intend` does."""
    now = time.time()
    with store.writing() as connection:
        row = connection.execute(f"SELECT * FROM rentals WHERE name = ? AND {OPEN}", (name,)).fetchone()
        if row is None:
            raise NotFound(f"no open rental '{name}'", fix="`ft pods` lists them")
        rental = rental_of(dict(row))
        pods, held = book(connection.execute, now, rental.job)
        found = decide.caps(rental.job, max_usd, budgets, pods, held, now)
        more = decide.reservation(None, rental.usd_per_hour, found)
        if not isinstance(more, Refused):
            connection.execute(
                "UPDATE rentals SET reserved_usd = reserved_usd + ?, body = ? WHERE name = ?",
                (more, dump({**rental.body, "cap_usd": max_usd}), name),
            )
    if isinstance(more, Refused):
        tell_refusal(store, rental.job, more, now)
        raise more.error()
    return get(store, name)


def _next_attempt(connection: Connection, job: str) -> int:
    rows = list(connection.execute("SELECT attempt, state FROM rentals WHERE job = ?", (job,)))
    if any(row["state"] in ("intended", "live") for row in rows):
        raise Conflict(f"a pod is rented for {job} already", fix="`ft pods` shows it")
    return max((int(row["attempt"]) for row in rows), default=0) + 1


def _insert(connection: Connection, intent: Intent, attempt: int, cap_usd: float, reserved: float, now: float) -> str:
    ours = connection.execute("SELECT id FROM installation").fetchone()["id"]
    name = f"ft-{ours}-{intent.job}-a{attempt}"
    body = {"cap_usd": cap_usd, "max_usd_per_hour": intent.max_usd_per_hour, "touched": secrets.token_hex(4),
            "disk_usd_per_hour": _disk(intent)}  # fmt: skip
    connection.execute(
        "INSERT INTO rentals (name, job, attempt, recipe, model, state, gpu, cloud, usd_per_hour, reserved_usd, "
        "intended, body) VALUES (?,?,?,?,?,'intended',?,?,?,?,?,?)",
        (name, intent.job, attempt, intent.recipe, intent.model, intent.gpu, intent.cloud,
         intent.usd_per_hour + _disk(intent), reserved, now, dump(body)),
    )  # fmt: skip
    return name


def _disk(intent: Intent) -> float:
    return intent.disk_gb * decide.DISK_USD_PER_GB_HOUR


def _touch(connection: Connection, name: str, change: str, values: Sequence[Any]) -> bool:
    row = connection.execute("SELECT body FROM rentals WHERE name = ?", (name,)).fetchone()
    done = connection.execute(
        f"UPDATE rentals SET {change}, body = ? WHERE name = ? AND state = 'intended'", (*values, _touched(row), name)
    )
    return done.rowcount == 1


def _touched(row: Any) -> str:
    return dump({**(json.loads(row["body"]) if row else {}), "touched": secrets.token_hex(4)})


def _note_pod(connection: Connection, name: str, pod: str, usd_per_hour: float, created: float) -> None:
    connection.execute(
        "INSERT INTO rented_pods (pod, name, usd_per_hour, created) VALUES (?,?,?,?) ON CONFLICT DO NOTHING",
        (pod, name, usd_per_hour, created),
    )
