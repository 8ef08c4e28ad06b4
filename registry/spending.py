"""What is spent and reserved of the budgets, until when a pod is paid for, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from registry import budgets as decide
from registry.budgets import Cap, Refused, RentedPod, Reservation
from registry.cloud_terms import Budgets
from registry.events import append, append_within, new_event
from registry.rentals import OPEN, POD_ROWS, Rental, pod_of, rental_of, rentals
from registry.store import Connection, Store

BUDGETS = "ft/budgets"
Rows = Callable[[str, Sequence[Any]], Iterable[Any]]


def reservations(store: Store, now: float) -> list[Reservation]:
    """What open rentals may still cost."""
    return book(store.read, now)[1]


def job_usd(store: Store, job: str, now: float, *, beside: str | None = None) -> float:
    """What all pods of a job have cost up to now, without the one `beside` which it is asked."""
    rows = store.read(f"{POD_ROWS} WHERE r.job = ?", (job,))
    return sum(pod_of(each).usd(now) for each in rows if each["pod"] != beside)


def left_for(store: Store, rental: Rental) -> float:
    """What the rental's pod may cost in its whole life: pods that came too late, or twice, took some of it."""
    now = time.time()
    of_job = [pod_of(each) for each in store.read(f"{POD_ROWS} WHERE r.job = ?", (rental.job,))]
    others = [each for each in of_job if each.pod != rental.pod]
    of_name = sum(each.usd(now) for each in others if each.name == rental.name)
    return min(
        rental.reserved_usd - of_name, float(rental.body["cap_usd"]) - sum(each.usd(now) for each in others)
    )  # fmt: skip


def paid_until(store: Store, rental: Rental) -> float | None:
    """When what was reserved is used up (Unix time of our clock), if the pod is there."""
    if rental.created is None:
        return None
    return rental.created + decide.paid_seconds(left_for(store, rental), rental.usd_per_hour)


def permit_until(store: Store, rental: Rental, now: float) -> float:
    """Until when its pod may go on, on the clock that `now` is of (the bucket's).

    Other pods of the job may take of the same money, so this changes: write the permit again when it does.
    """
    lived = 0.0 if rental.created is None else time.time() - rental.created
    return decide.permit_end(now, lived, left_for(store, rental), rental.usd_per_hour)


def warn(store: Store, budgets: Budgets, now: float | None = None) -> None:
    """Say of each budget, once per percentage and period, that 50, 80 or 100 % of it are used."""
    now = time.time() if now is None else now
    found = decide.period_caps(budgets, *book(store.read, now), now)
    found += [_run_cap(store, each, now) for each in rentals(store, open_=True)]
    told = {(row["scope"], row["period"], row["percent"]) for row in store.read("SELECT * FROM budget_warnings")}
    new = [each for each in found for percent in decide.percents_reached(each)
           if (each.scope, each.period, percent) not in told]  # fmt: skip
    if new:
        with store.writing() as connection:
            warn_within(connection, new)


def warn_within(connection: Connection, found: Iterable[Cap]) -> None:
    """The same for caps that are known, in a transaction of the caller's."""
    for cap in found:
        for percent in decide.percents_reached(cap):
            new = connection.execute(
                "INSERT INTO budget_warnings (scope, period, percent) VALUES (?,?,?) ON CONFLICT DO NOTHING",
                (cap.scope, cap.period, percent),
            )
            if new.rowcount:
                data = {"percent": percent, "usd": round(cap.used_usd, 4), "cap_usd": cap.cap_usd, "period": cap.period}
                subject = cap.period if cap.scope == "run" else cap.scope
                append_within(connection, new_event(BUDGETS, "budget.warned", subject, data))


def tell_refusal(store: Store, job: str, refused: Refused, now: float) -> None:
    """Once a day for each job and budget."""
    cap = refused.cap
    data = {"scope": cap.scope, "usd": round(cap.used_usd, 4), "cap_usd": cap.cap_usd,
            "wanted_usd": round(refused.wanted_usd, 4)}  # fmt: skip
    key = f"refused {job} {cap.scope} {decide.period_of('day', now)}"
    append(store, new_event(BUDGETS, "budget.refused", job, data, key=key))


def book(rows: Rows, now: float, job: str = "", *, endpoints: bool = True) -> tuple[list[RentedPod], list[Reservation]]:
    """The pods (and endpoints) of this month and the pods of the job, and what open rentals may still cost. Charges for
    references are among them.

    `rows` reads: `store.read`, or `connection.execute` inside a transaction.
    """
    month = decide.start_of("month", now)
    found = rows(f"{POD_ROWS} WHERE p.ended IS NULL OR p.ended >= ? OR r.job = ?", (month, job))
    pods = [pod_of(dict(row)) for row in found] + (endpoint_costs(rows, month) if endpoints else [])
    pods += charge_costs(rows, month, job)
    open_ = [rental_of(dict(row)) for row in rows(f"SELECT * FROM rentals WHERE {OPEN}", ())]
    return pods, [_held(each, pods, now) for each in open_] + _open_charges(rows)


def endpoint_costs(rows: Rows, since: float = 0.0, *, complete: float = 0.0) -> list[RentedPod]:
    """Serverless endpoints that were on after `since`: what RunPod has billed, spread over their life. The bill of
    those that ended before `complete` is final."""
    found = rows("SELECT * FROM endpoints WHERE ended IS NULL OR ended >= ? ORDER BY created, id", (since,))
    return [_endpoint(row, row["ended"] is not None and row["ended"] < complete) for row in found]


def _endpoint(row: Any, final: bool) -> RentedPod:
    name = f"endpoint {row['model']}"
    return RentedPod(
        row["id"], row["name"], 0.0, row["created"], row["ended"], row["billed_usd"], final, name, name, "endpoint"
    )


def charge_costs(rows: Rows, since: float = 0.0, job: str = "") -> list[RentedPod]:
    """What references were asked for after `since` or by the job, at the recipe's prices: no bill of theirs is read."""
    found = rows("SELECT * FROM charges WHERE created >= ? OR run_id = ? ORDER BY created, key", (since, job))
    return [
        RentedPod(row["key"], row["what"], 0.0, row["created"], row["created"], row["usd"], False, row["run_id"],
                  row["recipe"], "reference")
        for row in found
    ]  # fmt: skip


def _open_charges(rows: Rows) -> list[Reservation]:
    """A run that is over asks no more, also where its worker was killed before it could say so."""
    found = rows(
        "SELECT c.run_id, c.reserved_usd, c.usd FROM charges AS c JOIN runs AS r ON r.id = c.run_id "
        "WHERE c.ended IS NULL AND r.state IN ('submitted', 'running', 'paused')", (),
    )  # fmt: skip
    return [Reservation(row["run_id"], max(0.0, row["reserved_usd"] - row["usd"])) for row in found]


def _held(rental: Rental, pods: Iterable[RentedPod], now: float) -> Reservation:
    of_it = [each for each in pods if each.name == rental.name]
    if rental.state == "ending" and of_it and all(each.ended is not None for each in of_it):
        return Reservation(rental.job, 0.0)  # RunPod took the order to end it; only its list shows it still
    return Reservation(rental.job, max(0.0, rental.reserved_usd - sum(each.usd(now) for each in of_it)))


def _run_cap(store: Store, rental: Rental, now: float) -> Cap:
    """Of a run all is reserved from the start: what was spent counts, and the last part is for the checkpoint."""
    paid = decide.paid_seconds(rental.reserved_usd, rental.usd_per_hour)
    kept = decide.stop_allowance(paid) * rental.usd_per_hour / 3600
    return Cap("run", rental.job, float(rental.body["cap_usd"]) - kept, job_usd(store, rental.job, now))
