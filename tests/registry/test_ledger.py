"""The ledger of rentals: written ahead, compare-and-set, within all caps, on both databases."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from registry import ledger
from registry.cloud_terms import Budgets
from registry.errors import BudgetError, Conflict, NotFound
from registry.events import read
from registry.ledger import Intent
from registry.rentals import Rental, any_open, current, get, installation, is_ours, pod_name, rentals, rented_pods
from registry.spending import job_usd, left_for, paid_until, permit_until, reservations, warn
from registry.store import Store

BUDGETS = Budgets(run_usd=5)


def intend(store: Store, job: str = "job", budgets: Budgets = BUDGETS, **more: Any) -> Rental:
    intent = Intent(job, "tickets", "support", "NVIDIA A40", "secure", 0.5, **{"max_usd_per_hour": 0.8, **more})
    return ledger.intend(store, intent, budgets)


def live(store: Store, job: str = "job", pod: str = "p1", budgets: Budgets = BUDGETS, **more: Any) -> Rental:
    rental = ledger.note_live(store, intend(store, job, budgets, **more).name, pod, 0.5)
    assert rental is not None
    return rental


def aged(store: Store, pod: str, seconds: float) -> None:
    """As if the pod had been made so long ago."""
    then = time.time() - seconds
    store.note("UPDATE rented_pods SET created = ? WHERE pod = ?", (then, pod))
    store.note("UPDATE rentals SET created = ?, intended = ? WHERE pod = ?", (then, then, pod))


def test_an_installation_has_one_name_and_knows_its_pods(store: Store) -> None:
    ours = installation(store)
    assert ours == installation(store)
    assert len(ours) == 6
    assert pod_name(store, "tickets-1", 2) == f"ft-{ours}-tickets-1-a2"
    assert is_ours(store)(f"ft-{ours}-tickets-1-a2")
    assert not is_ours(store)(f"ft-{ours}-tickets-1-a2\n")


def test_a_rental_goes_its_way(store: Store) -> None:
    rental = intend(store)
    assert (rental.state, rental.attempt, rental.reserved_usd) == ("intended", 1, 5)
    assert ledger.re_aim(store, rental.name, "NVIDIA L40", "community", 0.7)
    assert get(store, rental.name).gpu == "NVIDIA L40"
    assert ledger.note_live(store, rental.name, "p1", 0.6)
    assert not ledger.re_aim(store, rental.name, "NVIDIA A40", "secure", 0.5)
    assert not ledger.void(store, rental.name, "too late")
    assert current(store, "job") == get(store, rental.name)
    assert ledger.want_ended(store, rental.name, "done")
    assert not ledger.want_ended(store, rental.name, "again")
    assert (current(store, "job"), any_open(store)) == (None, True)
    assert ledger.note_ended(store, rental.name)
    assert not ledger.note_ended(store, rental.name)
    assert (get(store, rental.name).state, get(store, rental.name).reason, any_open(store)) == ("ended", "done", False)
    assert [each.type for each in read(store)] == ["pod.created", "pod.ended"]


def test_a_job_has_one_pod(store: Store) -> None:
    live(store)
    with pytest.raises(Conflict):
        intend(store)


def test_a_voided_attempt_leaves_its_number(store: Store) -> None:
    ledger.void(store, intend(store).name, "never came")
    assert intend(store).attempt == 2
    assert [each.attempt for each in rentals(store, job="job")] == [1, 2]


def test_a_pod_for_a_rental_that_was_settled_otherwise_is_nobodys_but_on_the_books(store: Store) -> None:
    rental = intend(store)
    ledger.void(store, rental.name, "never came")
    assert ledger.note_live(store, rental.name, "late", 0.5) is None
    assert [each.pod for each in rented_pods(store)] == ["late"]


def test_a_pod_too_dear_is_to_be_ended_from_the_first_moment(store: Store) -> None:
    rental = intend(store)
    found = ledger.note_live(store, rental.name, "p1", 0.81)
    assert found is not None
    assert (found.state, found.usd_per_hour) == ("ending", 0.81)


def test_the_disk_is_paid_for_beside_the_card_which_alone_is_compared_with_the_highest_price(store: Store) -> None:
    intent = Intent("job", "r", "m", "NVIDIA A40", "secure", 0.5, max_usd_per_hour=0.6, disk_gb=730)
    rental = ledger.intend(store, intent, BUDGETS)
    assert rental.usd_per_hour == pytest.approx(0.6)
    ledger.re_aim(store, rental.name, "NVIDIA A40", "community", 0.4)
    assert get(store, rental.name).usd_per_hour == pytest.approx(0.5)
    found = ledger.note_live(store, rental.name, "p1", 0.6)
    assert found is not None
    assert (found.state, round(found.usd_per_hour, 6)) == ("live", 0.7)
    assert [round(each.usd_per_hour, 6) for each in rented_pods(store)] == [0.7]


def test_an_ending_rental_without_any_pod_was_for_nothing(store: Store) -> None:
    rental = intend(store)
    ledger.want_ended(store, rental.name, "cancelled")
    ledger.note_ended(store, rental.name)
    assert get(store, rental.name).state == "void"


def test_several_attempts_together_stay_within_the_runs_cap(store: Store) -> None:
    first = live(store)
    aged(store, "p1", 3600)
    ledger.want_ended(store, first.name, "lost")
    with pytest.raises(BudgetError, match="run"):
        intend(store)  # the first may still cost all that it has reserved
    ledger.note_gone(store, "p1", time.time())
    second = intend(store)
    assert second.reserved_usd == pytest.approx(4.5, abs=0.01)


def test_all_runs_together_stay_within_the_day(store: Store) -> None:
    budgets = Budgets(run_usd=5, day_usd=12)
    live(store, "one", "p1", budgets)
    live(store, "two", "p2", budgets)
    with pytest.raises(BudgetError, match="day"):
        intend(store, "three", budgets)
    assert intend(store, "three", budgets, reserved_usd=1.5).reserved_usd == 1.5
    refused = read(store, type_="budget.refused")
    assert [(each.subject, each.data["scope"], each.data["wanted_usd"]) for each in refused] == [("three", "day", 5)]
    assert sum(each.usd for each in reservations(store, time.time())) == pytest.approx(11.5, abs=0.01)


def test_what_orphans_cost_counts_too(store: Store) -> None:
    budgets = Budgets(run_usd=5, month_usd=9)
    ledger.note_pod(store, pod_name(store, "gone", 1), "orphan", 4.5, time.time() - 3600)
    with pytest.raises(BudgetError, match="month"):
        intend(store, "job", budgets)


def test_of_many_who_reserve_at_once_only_so_many_get_it_as_the_cap_pays_for(store: Store) -> None:
    budgets = Budgets(run_usd=1, month_usd=3)

    def one(number: int) -> bool:
        try:
            return bool(intend(store, f"job{number}", budgets))
        except BudgetError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(12))) == 3


def test_warnings_come_once_each(store: Store) -> None:
    budgets = Budgets(run_usd=5, day_usd=10)
    live(store, "one", "p1", budgets)
    live(store, "two", "p2", budgets)
    for _ in range(2):
        warn(store, budgets)
    told = [(each.subject, each.data["percent"]) for each in read(store, type_="budget.warned")]
    assert told == [("day", 50), ("day", 80), ("day", 100)]
    aged(store, "p1", 3600 * 5.2)
    for _ in range(2):
        warn(store, budgets)
    told = [(each.subject, each.data["percent"]) for each in read(store, type_="budget.warned")]
    assert told[3:] == [("one", 50)]


def test_the_last_warning_of_a_run_comes_when_its_permit_ends(store: Store) -> None:
    rental = live(store)
    aged(store, "p1", 10 * 3600 - 121)
    warn(store, BUDGETS)
    assert [each.data["percent"] for each in read(store, type_="budget.warned")] == [50, 80]
    aged(store, "p1", 10 * 3600 - 119)
    warn(store, BUDGETS)
    assert [each.data["percent"] for each in read(store, type_="budget.warned")] == [50, 80, 100]
    assert permit_until(store, get(store, rental.name), 1000.0) == pytest.approx(999, abs=1)


def test_a_permit_is_shortened_by_what_a_second_pod_takes(store: Store) -> None:
    rental = live(store)
    assert paid_until(store, rental) == pytest.approx(time.time() + 36000, abs=2)
    ledger.note_pod(store, rental.name, "twin", 0.5, time.time() - 7200)
    ledger.note_gone(store, "twin", time.time())
    assert left_for(store, rental) == pytest.approx(4, abs=0.01)
    assert paid_until(store, rental) == pytest.approx(time.time() + 28800, abs=9)


def test_a_permit_is_shortened_by_an_earlier_attempt_that_came_too_late(store: Store) -> None:
    """Voided because it was never seen, its pod came all the same."""
    first = intend(store)
    ledger.void(store, first.name, "never came")
    second = live(store)
    ledger.note_pod(store, first.name, "late", 1.0, time.time() - 3600)
    ledger.note_gone(store, "late", time.time())
    assert left_for(store, second) == pytest.approx(4, abs=0.01)


def test_more_is_reserved_when_a_person_raises_the_budget(store: Store) -> None:
    rental = live(store)
    with pytest.raises(BudgetError):
        ledger.reserve_more(store, rental.name, BUDGETS, 5)
    assert ledger.reserve_more(store, rental.name, BUDGETS, 8).reserved_usd == pytest.approx(8)
    with pytest.raises(BudgetError, match="day"):
        ledger.reserve_more(store, rental.name, Budgets(day_usd=9), 10)


def test_only_the_final_bill_counts(store: Store) -> None:
    live(store)
    aged(store, "p1", 3600)
    ledger.note_billed(store, "p1", 0.2, final=False)
    assert job_usd(store, "job", time.time()) == pytest.approx(0.5, abs=0.01)
    ledger.note_billed(store, "p1", 0.47, final=True)
    ledger.note_billed(store, "p1", 9.0, final=False)
    assert job_usd(store, "job", time.time()) == 0.47


def test_a_name_that_is_not_there(store: Store) -> None:
    with pytest.raises(NotFound, match="ft pods"):
        get(store, "nothing")
