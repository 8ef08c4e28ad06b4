"""Renting a pod: create or adopt, by price, with answers lost, processes killed and races between two of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.rent import Offer, Wish, end_rental, rent
from registry import ledger
from registry.cloud_terms import Budgets
from registry.errors import AnswerLost, BucketError, BudgetError, CloudError, Conflict, NoCapacity, NoCredit, WrongKey
from registry.events import newest, read
from registry.ledger import Intent
from registry.rentals import Rental, current, get, installation, pod_name, rentals, rented_pods
from registry.runpod_api import RunPod
from registry.runpod_shapes import PodOrder
from registry.store import Store
from tests.fakes.runpod.started import standin
from tests.fakes.scripted_cloud import ScriptedCloud

JOB = "tickets-0123456789"
A40, ADA = Offer("NVIDIA A40", "secure", 0.4), Offer("NVIDIA L40", "secure", 0.7)
WISH = Wish(JOB, "tickets", "support", (ADA, A40), Budgets(run_usd=5), max_usd_per_hour=0.8)
LOST = ("lost", AnswerLost("no answer"))


def order_of(rental: Rental) -> PodOrder:
    env = {"FT_ATTEMPT": str(rental.attempt)}
    return PodOrder(rental.name, "image", rental.gpu, rental.cloud, env, "python -m jobs.pod", 20)


def rented(store: Store, cloud: ScriptedCloud, wish: Wish = WISH, settle: float = 0.2, **more: Any) -> Rental:
    return rent(store, cloud, wish, order_of, settle_seconds=settle, **more)


def test_the_cheapest_is_rented_and_the_ledger_knew_before(store: Store) -> None:
    cloud = ScriptedCloud()
    seen = []
    cloud.before = lambda verb: seen.append((verb, [each.state for each in rentals(store)]))
    live = rented(store, cloud)
    assert seen == [("create", ["intended"])]
    assert (live.name, live.state, live.gpu, live.usd_per_hour) == (pod_name(store, JOB, 1), "live", "NVIDIA A40", 0.5)
    assert [each.name for each in cloud.living.values()] == [f"ft-{installation(store)}-{JOB}-a1"]
    created = newest(store, 1, type_="pod.created")[0]
    assert (created.subject, created.data["pod"], created.data["reserved_usd"]) == (JOB, live.pod, 5)


def test_called_again_it_is_the_same_pod(store: Store) -> None:
    cloud = ScriptedCloud()
    first = rented(store, cloud)
    assert rented(store, cloud) == first
    assert len(cloud.orders) == 1


def test_a_card_that_is_not_free_is_passed_over(store: Store) -> None:
    cloud = ScriptedCloud(faults={"create": [NoCapacity("none left")]})
    live = rented(store, cloud)
    assert (live.gpu, live.attempt) == ("NVIDIA L40", 1)


def test_with_nothing_free_nothing_stays_reserved(store: Store) -> None:
    cloud = ScriptedCloud(faults={"create": [NoCapacity("none left"), NoCapacity("none either")]})
    with pytest.raises(NoCapacity, match=r"A40 \(secure\): none left; NVIDIA L40 \(secure\): none either"):
        rented(store, cloud)
    assert [each.state for each in rentals(store)] == ["void"]
    assert rented(store, cloud).attempt == 2


@pytest.mark.parametrize("error", [NoCredit("no money"), WrongKey("not yours"), CloudError("422")])
def test_what_another_card_cannot_mend_is_told_at_once(store: Store, error: CloudError) -> None:
    cloud = ScriptedCloud(faults={"create": [error]})
    with pytest.raises(type(error)):
        rented(store, cloud)
    assert len(cloud.calls) == 1
    assert [each.state for each in rentals(store)] == ["void"]


@pytest.mark.parametrize("lag", [0, 0.5])
def test_after_a_lost_answer_the_pod_is_found_and_adopted(store: Store, lag: float) -> None:
    cloud = ScriptedCloud(lag=lag, faults={"create": [LOST]})
    live = rented(store, cloud, settle=2)
    assert (live.attempt, live.pod, len(cloud.living)) == (1, "pod1", 1)
    assert newest(store, 1, type_="pod.created")[0].data["adopted"] is True


def test_without_a_pod_the_next_attempt_has_another_name_and_waits_first(store: Store) -> None:
    cloud, began = ScriptedCloud(faults={"create": [AnswerLost("cut off")]}), time.monotonic()
    live = rented(store, cloud, settle=0.5)
    assert time.monotonic() - began >= 0.5
    assert (live.attempt, [each.state for each in rentals(store)]) == (2, ["void", "live"])


def test_answers_that_are_lost_again_and_again_end_it(store: Store) -> None:
    cloud = ScriptedCloud(faults={"create": [AnswerLost("cut off")] * 9})
    with pytest.raises(AnswerLost):
        rented(store, cloud, settle=0.05)
    assert [each.state for each in rentals(store)] == ["void"] * 3


def test_of_two_pods_of_one_name_one_is_adopted(store: Store) -> None:
    name = pod_name(store, JOB, 1)
    ledger.intend(store, Intent(JOB, "tickets", "support", "NVIDIA A40", "secure", 0.4), WISH.budgets)
    cloud = ScriptedCloud()
    younger, older = cloud.start(name, created=time.time()), cloud.start(name, created=time.time() - 5)
    assert rented(store, cloud).pod == older.id
    assert list(cloud.living) == [older.id]
    assert {each.pod for each in rented_pods(store)} == {older.id, younger.id}, "each costs, so each is written down"


def test_a_pod_dearer_than_allowed_is_ended_at_once(store: Store) -> None:
    cloud = ScriptedCloud(faults={"create": [0.9]})
    live = rented(store, cloud)
    assert (live.attempt, live.gpu, list(cloud.gone)) == (2, "NVIDIA L40", ["pod1"])
    assert get(store, pod_name(store, JOB, 1)).reason == "$0.9 an hour, more than the allowed $0.8"
    assert live.reserved_usd == pytest.approx(5, abs=0.01), "what the first one had reserved is free again"


def test_a_pod_of_a_rental_that_was_voided_meanwhile_is_ended(store: Store) -> None:
    cloud = ScriptedCloud()

    def void_it(verb: str) -> None:
        if verb == "create" and len(cloud.calls) == 1:
            ledger.void(store, pod_name(store, JOB, 1), "taken for dead")

    cloud.before = void_it
    live = rented(store, cloud)
    assert (live.attempt, list(cloud.gone), list(cloud.living)) == (2, ["pod1"], ["pod2"])


def test_who_cancels_meanwhile_gets_no_new_pod(store: Store) -> None:
    cloud = ScriptedCloud()

    def cancel(_: str) -> None:
        ledger.want_ended(store, pod_name(store, JOB, 1), "cancelled")

    cloud.before = cancel
    with pytest.raises(Conflict, match="cancelled"):
        rented(store, cloud)
    assert not cloud.living


def test_two_at_once_rent_one_pod(store: Store) -> None:
    """The second comes while the first one's create is on its way."""
    cloud = ScriptedCloud()
    found: list[Rental] = []

    def second(verb: str) -> None:
        if cloud.calls == ["create NVIDIA A40"]:
            found.append(rented(store, cloud, settle=0.1))

    cloud.before = second
    first = rented(store, cloud)
    assert [each.id for each in cloud.living.values()] == [first.pod]
    assert first == found[0]


def test_giving_up_while_waiting_leaves_it_to_the_next_call(store: Store) -> None:
    class Enough(Exception):
        pass

    def give_up(_: float) -> None:
        raise Enough

    cloud = ScriptedCloud(lag=0.3, faults={"create": [LOST]})
    with pytest.raises(Enough):
        rented(store, cloud, sleep=give_up)
    assert [each.state for each in rentals(store)] == ["intended"]
    assert rented(store, cloud, settle=5).pod == "pod1"


def test_a_list_that_fails_does_not_count_as_a_look(store: Store) -> None:
    cloud = ScriptedCloud(faults={"create": [LOST], "pods": [CloudError("502")] * 8})
    assert rented(store, cloud, settle=0.1).pod == "pod1"


def test_without_any_cap_nothing_is_rented(store: Store) -> None:
    cloud = ScriptedCloud()
    with pytest.raises(BudgetError, match="max_usd"):
        rented(store, cloud, Wish(JOB, "tickets", "support", (A40,), Budgets(), 1.0))
    assert not cloud.calls


def test_an_order_that_cannot_be_made_reserves_nothing(store: Store) -> None:
    def no_bucket(_: Rental) -> PodOrder:
        raise BucketError("away")

    with pytest.raises(BucketError):
        rent(store, ScriptedCloud(), WISH, no_bucket, settle_seconds=9)
    assert [each.state for each in rentals(store)] == ["void"]


def test_an_end_that_fails_is_left_to_the_reaper(store: Store) -> None:
    cloud = ScriptedCloud(faults={"terminate": [CloudError("500")]})
    live = rented(store, cloud)
    assert not end_rental(store, cloud, live.name, "the job is done")
    assert current(store, JOB) is None
    assert get(store, live.name).state == "ending"
    assert end_rental(store, cloud, live.name, "again")
    assert (get(store, live.name).reason, cloud.living) == ("the job is done", {})


def test_events_tell_the_story(store: Store) -> None:
    cloud = ScriptedCloud()
    live = rented(store, cloud)
    end_rental(store, cloud, live.name, "the job is done")
    ledger.note_ended(store, live.name)
    assert [each.type for each in read(store)] == ["pod.created", "pod.ended"]


SLEEP = f"{sys.executable} -c 'import time; time.sleep(600)'"
CREATE = "POST /v2/pods"


def real_order(rental: Rental) -> PodOrder:
    return PodOrder(rental.name, "ft", rental.gpu, rental.cloud, {}, SLEEP, 20)


@pytest.mark.parametrize(
    ("rules", "attempt", "gone"),
    [
        ([], 1, 0),
        ([{"fault": "no_capacity", "times": 1}], 1, 0),
        ([{"fault": "rate_limit", "match": CREATE, "times": 1, "seconds": 0.2}], 1, 0),
        ([{"fault": "error_after", "match": CREATE, "times": 1}], 1, 0),
        ([{"fault": "reset_after", "match": CREATE, "times": 1}, {"fault": "list_lag", "seconds": 1}], 1, 0),
        ([{"fault": "garbage", "match": CREATE, "times": 1}], 1, 0),
        ([{"fault": "error", "match": CREATE, "times": 1}], 2, 0),
        ([{"fault": "error", "match": CREATE, "times": 1}, {"fault": "error", "match": "GET *", "times": 3}], 2, 0),
        ([{"fault": "price", "times": 1, "factor": 9}], 2, 1),
    ],
)  # fmt: skip
def test_with_the_stand_in_there_is_one_pod_in_the_end(
    store: Store, tmp_path: Path, rules: list[dict[str, Any]], attempt: int, gone: int
) -> None:
    with standin(tmp_path / "runpod", rules=rules) as cloud, RunPod(cloud.url, cloud.key) as runpod:
        wish = Wish(JOB, "tickets", "support", (A40, ADA), Budgets(run_usd=5), max_usd_per_hour=2, disk_gb=20)
        live = rent(store, runpod, wish, real_order, settle_seconds=2)
        truth = cloud.truth()["pods"]
    assert (live.attempt, live.name) == (attempt, pod_name(store, JOB, attempt))
    assert [each["id"] for each in truth if each["alive"]] == [live.pod]
    assert len(truth) == 1 + gone
    assert {each.pod for each in rented_pods(store)} == {each["id"] for each in truth}
