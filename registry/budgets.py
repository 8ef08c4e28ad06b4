"""What may be spent, decided without a database or a clock: caps, reservations, warnings, until when a pod may go on.

US dollars and Unix times (seconds). Days and months are UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from registry.cloud_terms import Budgets
from registry.errors import BudgetError

ScopeName = Literal["run", "day", "month"]
PERCENTS = (50, 80, 100)
# Of the time that a reservation pays for, the last quarter (of a long one: so many seconds) is for the checkpoint.
STOP_SECONDS, STOP_SHARE = 120.0, 0.25
# A pod that could not live for so long would be rented for nothing.
LEAST_SECONDS = 20.0
ROUNDING_USD = 1e-9
# RunPod charges 0.10 USD per GB and month for a pod's own disk, beside the price that it tells (docs, pods/pricing).
DISK_USD_PER_GB_HOUR = 0.10 / 730


@dataclass(frozen=True)
class RentedPod:
    """A pod that bore a name of ours. `billed_usd` is what RunPod says, which counts alone once it is `final`.

    `job` and `recipe` are '' for a pod that the ledger does not know. What is no pod but costs as well is of another
    `kind`, and costs what was billed.
    """

    pod: str
    name: str
    usd_per_hour: float
    created: float
    ended: float | None
    billed_usd: float | None
    final: bool
    job: str = ""
    recipe: str = ""
    kind: Literal["pod", "endpoint", "reference"] = "pod"

    def usd(self, now: float) -> float:
        """The bill where it is final; until then what was measured, or billed already if that is more."""
        if self.final and self.billed_usd is not None:
            return self.billed_usd
        return max(self.seconds(now) * self.usd_per_hour / 3600, self.billed_usd or 0.0)

    def seconds(self, now: float) -> float:
        return max(0.0, (now if self.ended is None else self.ended) - self.created)

    def usd_between(self, start: float, end: float, now: float) -> float:
        """The part of its cost that belongs to that time."""
        whole, last = self.seconds(now), now if self.ended is None else self.ended
        if whole <= 0:
            return self.usd(now) if start <= self.created < end else 0.0
        part = max(0.0, min(end, last) - max(start, self.created))
        return self.usd(now) * part / whole


@dataclass(frozen=True)
class Reservation:
    """What an open rental may still cost, beside what its pods have cost up to now."""

    job: str
    usd: float


@dataclass(frozen=True)
class Cap:
    """One budget: how much of it is spent or reserved. `period` is the run's id, the day or the month."""

    scope: ScopeName
    period: str
    cap_usd: float
    used_usd: float

    @property
    def left_usd(self) -> float:
        return max(0.0, self.cap_usd - self.used_usd)


def run_cap(max_usd: float | None, budgets: Budgets, place: str = "") -> float:
    """What one run may cost: its own budget, else `run_usd`, else that of a day or a month; or BudgetError."""
    if max_usd is not None:
        return max_usd
    if budgets.run_usd is not None:
        return budgets.run_usd
    if caps := [each for each in (budgets.day_usd, budgets.month_usd) if each is not None]:
        return min(caps)
    raise BudgetError(
        "nothing says what this run may cost, so nothing is paid for", place=place,
        fix="write `budget: {max_usd: 5}` into the recipe, or `budgets: {run_usd: 5, month_usd: 50}` into ft.yaml",
    )  # fmt: skip


def caps(
    job: str, cap_usd: float, budgets: Budgets, pods: Iterable[RentedPod], reserved: Iterable[Reservation], now: float
) -> list[Cap]:
    """The budgets that renting for `job` must respect, with what is used of each: that of the run comes first."""
    pods, reserved = list(pods), list(reserved)
    of_job = sum(each.usd(now) for each in pods if each.job == job)
    of_job += sum(each.usd for each in reserved if each.job == job)
    return [Cap("run", job, cap_usd, of_job), *period_caps(budgets, pods, reserved, now)]


def period_caps(budgets: Budgets, pods: Iterable[RentedPod], reserved: Iterable[Reservation], now: float) -> list[Cap]:
    """Those of the day and of the month. What is reserved counts whole in both, whenever it will be spent."""
    pods, held = list(pods), sum(each.usd for each in reserved)
    found: list[Cap] = []
    for scope, cap in (("day", budgets.day_usd), ("month", budgets.month_usd)):
        if cap is not None:
            name: ScopeName = "day" if scope == "day" else "month"
            spent = sum(each.usd_between(start_of(name, now), end_of(name, now), now) for each in pods)
            found.append(Cap(name, period_of(name, now), cap, spent + held))
    return found


@dataclass(frozen=True)
class Refused:
    """Why nothing may be reserved: the cap, and what would have been needed."""

    cap: Cap
    wanted_usd: float

    def error(self) -> BudgetError:
        cap = self.cap
        used = f"${cap.used_usd:.2f} of ${cap.cap_usd:.2f} are spent or reserved"
        place = f"budget of the {cap.scope}" + ("" if cap.scope == "run" else f" {cap.period}")
        if cap.scope == "run":
            return BudgetError(f"it pays for no pod any more: {used}", place=place,
                               fix="raise `budget.max_usd` in the recipe, then `ft run` it again")  # fmt: skip
        return BudgetError(
            f"${self.wanted_usd:.2f} more would go beyond it: {used}", place=place,
            fix=f"lower `budget.max_usd` in the recipe, raise `budgets.{cap.scope}_usd` in ft.yaml, "
            f"or wait for the next {cap.scope}; `ft cost` shows what was spent",
        )  # fmt: skip


def reservation(wanted_usd: float | None, usd_per_hour: float, found: Sequence[Cap]) -> float | Refused:
    """What to reserve: as much as is wanted, or (None) all that the run has left; of both the smaller."""
    run = found[0]
    usd = run.left_usd if wanted_usd is None else min(wanted_usd, run.left_usd)
    if paid_seconds(usd, usd_per_hour) < LEAST_SECONDS or usd <= ROUNDING_USD:
        return Refused(run, usd)
    over = [each for each in found[1:] if each.used_usd + usd > each.cap_usd + ROUNDING_USD]
    return Refused(over[0], usd) if over else usd


def beyond(usd: float, found: Sequence[Cap]) -> Refused | None:
    """The first budget that has not so much left."""
    over = [each for each in found if each.used_usd + usd > each.cap_usd + ROUNDING_USD]
    return Refused(over[0], usd) if over else None


def percents_reached(cap: Cap) -> list[int]:
    """Of 50, 80 and 100: those that what is used has reached."""
    return [each for each in PERCENTS if cap.used_usd >= cap.cap_usd * each / 100 - ROUNDING_USD]


def paid_seconds(usd: float, usd_per_hour: float) -> float:
    """How long the money lasts at that price."""
    return max(0.0, usd) / usd_per_hour * 3600 if usd_per_hour > 0 else float("inf")


def stop_allowance(paid: float) -> float:
    """How many seconds before the money is gone a pod is told to stop: for its checkpoint and its end."""
    return min(STOP_SECONDS, paid * STOP_SHARE)


def permit_end(now: float, lived_seconds: float, left_usd: float, usd_per_hour: float) -> float:
    """Until when a pod may go on, on the clock that `now` is of (the bucket's).

    `lived_seconds` is for how long it costs already; `left_usd` what the reservation has for its whole life, that is
    without what other pods of the job took of it.
    """
    paid = paid_seconds(left_usd, usd_per_hour)
    return now - lived_seconds + paid - stop_allowance(paid)


def period_of(scope: ScopeName, moment: float) -> str:
    """`2026-11-21`, or `2026-11`."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d" if scope == "day" else "%Y-%m")


def start_of(scope: ScopeName, moment: float) -> float:
    day = datetime.fromtimestamp(moment, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day if scope == "day" else day.replace(day=1)).timestamp()


def end_of(scope: ScopeName, moment: float) -> float:
    start = datetime.fromtimestamp(start_of(scope, moment), UTC)
    later = start + timedelta(days=1 if scope == "day" else 32)
    return start_of(scope, later.timestamp())
