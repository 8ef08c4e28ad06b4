"""Budgets: caps, reservations, warnings, and until when a pod may go on."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.budgets import (
    LEAST_SECONDS,
    Cap,
    Refused,
    RentedPod,
    Reservation,
    caps,
    end_of,
    paid_seconds,
    percents_reached,
    period_of,
    permit_end,
    reservation,
    run_cap,
    start_of,
    stop_allowance,
)
from registry.cloud_terms import Budgets
from registry.errors import BudgetError

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
MIDNIGHT = datetime(2026, 11, 21, tzinfo=UTC).timestamp()


def pod(created: float, ended: float | None, billed: float | None = None, final: bool = False) -> RentedPod:
    return RentedPod("p", "n", 0.6, created, ended, billed, final, job="job")


@pytest.mark.parametrize(
    ("max_usd", "budgets", "cap"),
    [
        (3.0, Budgets(run_usd=5, day_usd=1), 3),
        (None, Budgets(run_usd=5, day_usd=1), 5),
        (None, Budgets(day_usd=8, month_usd=6), 6),
        (None, Budgets(month_usd=6), 6),
    ],
)
def test_a_run_has_the_nearest_cap(max_usd: float | None, budgets: Budgets, cap: float) -> None:
    assert run_cap(max_usd, budgets) == cap


def test_without_any_cap_the_next_step_is_told() -> None:
    with pytest.raises(BudgetError) as error:
        run_cap(None, Budgets(), "tickets-1")
    assert "max_usd" in error.value.fix
    assert "run_usd" in error.value.fix


@pytest.mark.parametrize(
    ("rented", "usd"),
    [
        (pod(NOON - 3600, NOON), 0.6),
        (pod(NOON - 3600, None), 0.6),
        (pod(NOON - 3600, NOON, 0.9), 0.9),
        (pod(NOON - 3600, NOON, 0.1), 0.6),
        (pod(NOON - 3600, NOON, 0.1, final=True), 0.1),
        (pod(NOON, NOON - 5), 0.0),
    ],
)
def test_a_pod_costs_what_was_measured_until_the_bill_is_final(rented: RentedPod, usd: float) -> None:
    assert rented.usd(NOON) == pytest.approx(usd)


def test_what_was_spent_belongs_to_the_days_on_which_it_was() -> None:
    over_midnight = pod(MIDNIGHT - 1800, MIDNIGHT + 5400)
    assert over_midnight.usd_between(MIDNIGHT, MIDNIGHT + 86400, NOON) == pytest.approx(0.9)
    assert over_midnight.usd_between(MIDNIGHT - 86400, MIDNIGHT, NOON) == pytest.approx(0.3)


def test_reserved_and_spent_count_against_every_cap() -> None:
    budgets = Budgets(day_usd=4, month_usd=50)
    found = caps("job", 5, budgets, [pod(NOON - 3600, NOON)], [Reservation("job", 1), Reservation("other", 2)], NOON)
    assert [(each.scope, each.period, round(each.used_usd, 2)) for each in found] == [
        ("run", "job", 1.6), ("day", "2026-11-21", 3.6), ("month", "2026-11", 3.6),
    ]  # fmt: skip


RUN, DAY = Cap("run", "job", 5, 1), Cap("day", "2026-11-21", 10, 8)


@pytest.mark.parametrize(
    ("wanted", "found", "reserved"),
    [
        (None, [RUN], 4), (2, [RUN], 2), (9, [RUN], 4), (2, [RUN, DAY], 2), (1.5, [RUN, DAY], 1.5),
    ],
)  # fmt: skip
def test_what_is_reserved(wanted: float | None, found: list[Cap], reserved: float) -> None:
    assert reservation(wanted, 0.5, found) == reserved


@pytest.mark.parametrize(
    ("wanted", "found", "scope"),
    [
        (None, [RUN, DAY], "day"), (2.01, [RUN, DAY], "day"), (1, [Cap("run", "job", 5, 5)], "run"),
        (1, [Cap("run", "job", 5, 6)], "run"), (1, [Cap("run", "job", 5, 4.999)], "run"),
        (2, [RUN, Cap("day", "d", 10, 0), Cap("month", "m", 20, 18.5)], "month"),
    ],
)  # fmt: skip
def test_what_is_refused(wanted: float | None, found: list[Cap], scope: str) -> None:
    refused = reservation(wanted, 0.5, found)
    assert isinstance(refused, Refused)
    assert refused.cap.scope == scope
    assert scope in str(refused.error())
    assert refused.error().fix


def test_percentages() -> None:
    assert [percents_reached(Cap("day", "d", 10, used)) for used in (0, 4.99, 5, 7.9, 8, 10, 12)] == [
        [], [], [50], [50], [50, 80], [50, 80, 100], [50, 80, 100],
    ]  # fmt: skip


@given(st.floats(0.01, 100), st.floats(0.01, 20), st.floats(0, 1e6), st.floats(0, 1e9))
def test_a_permit_ends_before_the_money_does(usd: float, price: float, lived: float, now: float) -> None:
    """A pod that ends by its permit and takes the whole allowance to stop costs no more than was reserved."""
    end = permit_end(now, lived, usd, price)
    paid = paid_seconds(usd, price)
    assert end - now + lived + stop_allowance(paid) == pytest.approx(paid, abs=1e-3)
    assert 0 < stop_allowance(paid) <= min(120, paid / 4) + 1e-9


def test_a_permit_of_a_pod_whose_money_is_gone_has_ended() -> None:
    assert permit_end(1000.0, 50.0, -1.0, 0.5) == 950.0
    assert permit_end(1000.0, 50.0, 1.0, 0.0) == float("inf")


def test_the_least_that_is_rented_pays_for_a_little_while() -> None:
    least = LEAST_SECONDS / 3600 * 0.5
    assert isinstance(reservation(least * 0.99, 0.5, [RUN]), Refused)
    assert reservation(least * 1.01, 0.5, [RUN]) == least * 1.01


def test_periods_are_utc() -> None:
    new_year = datetime(2026, 12, 31, 23, 59, tzinfo=UTC).timestamp()
    assert (period_of("day", new_year), period_of("month", new_year)) == ("2026-12-31", "2026-12")
    assert end_of("month", new_year) == end_of("day", new_year) == start_of("day", new_year + 120)
    assert start_of("month", NOON) == datetime(2026, 11, 1, tzinfo=UTC).timestamp()
