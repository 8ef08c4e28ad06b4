"""Who leads serving, what it publishes, and which gateways have come how far: on SQLite and Postgres."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from registry import gateways as rows
from registry.errors import Conflict
from registry.gateways import GatewayRow, Watch, forget_silent, renew
from registry.leases import MARGIN_SECONDS
from registry.served_routes import NONE, newer, publish
from registry.serving_lead import LeadLost, leader, release_lead, renew_lead, take_lead
from registry.store import Store

ROW = GatewayRow("g1", "desk", "http://desk:8101", 1.0, 10.0)


def elsewhere(store: Store) -> None:
    """As if the leader ran on another host, of whose processes nothing is known here."""
    store.note("UPDATE serving_lead SET lease = 'other-host 1 x'")


def test_the_generation_grows_across_leaders_and_a_leader_that_was_replaced_writes_nothing(store: Store) -> None:
    first = take_lead(store, "desk", 10, alone=False)
    assert [publish(store, first, body) for body in ("a", "b")] == [1, 2]
    second = take_lead(store, "desk", 10, alone=True)
    assert second.epoch == first.epoch + 1
    assert publish(store, second, "c") == 3
    with pytest.raises(LeadLost, match="a server on desk leads"):
        publish(store, first, "from the grave")
    with pytest.raises(LeadLost):
        renew_lead(store, first)
    release_lead(store, first)
    found = newer(store, NONE)
    assert found is not None
    assert (found.generation, found.epoch, found.body) == (3, second.epoch, "c")
    assert newer(store, 3) is None
    now = leader(store)
    assert now is not None
    assert not now.released


def test_a_leader_that_beats_keeps_the_lead(store: Store) -> None:
    lead = take_lead(store, "desk", 5, alone=False)
    elsewhere(store)
    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(take_lead, store, "attic", 5, alone=False)
        while not trying.done():
            renew_lead(store, lead)
            time.sleep(0.1)
        with pytest.raises(Conflict, match="a server on desk leads serving already") as caught:
            trying.result()
    assert "ft serve gateway" in str(caught.value.fix)


def test_a_silent_leader_is_replaced_at_its_leases_end_and_one_that_ended_at_once(store: Store) -> None:
    take_lead(store, "desk", 1, alone=False)
    elsewhere(store)
    began = time.monotonic()
    second = take_lead(store, "attic", 1, alone=False)
    assert 1 + MARGIN_SECONDS <= time.monotonic() - began < 8
    elsewhere(store)
    release_lead(store, second)
    began = time.monotonic()
    third = take_lead(store, "desk", 1, alone=False)
    assert time.monotonic() - began < 1
    assert third.epoch == 3


def test_of_many_that_want_the_lead_at_once_no_two_get_the_same(store: Store) -> None:
    def attempt(number: int) -> int:
        try:
            return take_lead(store, f"host-{number}", 10, alone=number % 2 == 0).epoch
        except Conflict:
            return 0

    with ThreadPoolExecutor(6) as pool:
        epochs = [epoch for epoch in pool.map(attempt, range(6)) if epoch]
    now = leader(store)
    assert now is not None
    assert sorted(epochs) == [*range(1, now.epoch + 1)]


def test_a_gateways_row_says_what_it_follows_and_the_renewal_what_is_published(store: Store) -> None:
    assert renew(store, ROW) == NONE
    lead = take_lead(store, "desk", 10, alone=True)
    generation = publish(store, lead, "{}")
    gone = ("tickets@1", "http://engine")
    told = dataclasses.replace(
        ROW, acknowledged=generation, in_flight=frozenset({gone}), wanted=frozenset({"big"}), used=frozenset({gone[1]})
    )
    assert renew(store, told) == generation
    [row] = rows.gateways(store)
    assert row == dataclasses.replace(told, beat=2, seen=row.seen)
    assert not row.asks_no_more(gone, 1)
    assert row.asks_no_more(("tickets@2", "http://engine"), 1)
    assert not row.asks_no_more(("tickets@2", "http://engine"), 2)
    rows.leave(store, row.id)
    assert rows.gateways(store) == []


def test_a_gateway_lives_until_its_beat_stood_still_for_its_term_and_is_forgotten_much_later(store: Store) -> None:
    now = 0.0
    watch = Watch(lambda: now)
    renew(store, ROW)
    assert watch.living(rows.gateways(store))
    now = ROW.term + MARGIN_SECONDS
    assert watch.living(rows.gateways(store))
    now += 0.1
    assert not watch.living(rows.gateways(store))
    renew(store, ROW)
    assert watch.living(rows.gateways(store)), "it has come back"
    forget_silent(store, watch, rows.gateways(store))
    assert rows.gateways(store)
    now += 1000
    forget_silent(store, watch, rows.gateways(store))
    assert rows.gateways(store) == []
