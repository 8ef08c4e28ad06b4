"""Objectives are judged over a sliding window: exactly, with a minimum sample, and told once for each turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from registry.errors import StoreError
from registry.event_types import TYPES
from registry.events import Event, append_all, read
from registry.objectives import Objectives
from registry.store import Store
from serving.objectives import Judge, Standing, broken_in_log, event_of, watch

TERMS = Objectives(p95="2s", error_rate=0.05, availability=0.9, concurrent=4, window="1m", requests=10)


def judge_of(terms: Objectives = TERMS) -> Judge:
    return Judge({"tickets": terms}, 0.0)


def ask(judge: Judge, count: int, now: float, seconds: float = 1.0, status: int = 200) -> None:
    for _ in range(count):
        judge.began("tickets", now)
        judge.ended("tickets", now, seconds, status)


def standing(judge: Judge, objective: str, now: float) -> Standing:
    return next(each for each in judge.standings(now) if each.objective == objective)


def turned(judge: Judge, now: float) -> list[tuple[str, bool]]:
    return [(each.objective, each.broken) for each in judge.turned(now)]


@pytest.mark.parametrize(("slow", "broken"), [(5, []), (6, [("p95", True)])])
def test_p95_breaks_when_more_than_five_of_a_hundred_are_over_the_limit(
    slow: int, broken: list[tuple[str, bool]]
) -> None:
    judge = judge_of()
    ask(judge, 100 - slow, 1.0, seconds=2.0)  # just within
    ask(judge, slow, 1.0, seconds=2.001)
    assert turned(judge, 1.0) == broken


def test_p95_is_near_the_true_one() -> None:
    judge, chance = judge_of(), random.Random(5)
    times = sorted(chance.lognormvariate(-1, 1) for _ in range(5000))
    for each in times:
        ask(judge, 1, 1.0, seconds=each)
    true, said = times[4749], standing(judge, "p95", 1.0).value
    assert said is not None
    assert true <= said <= true * 1.1


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 86_400.0, 1e9])
def test_times_beyond_all_buckets_are_counted_too(seconds: float) -> None:
    judge = judge_of()
    ask(judge, 10, 1.0, seconds=seconds)
    assert standing(judge, "p95", 1.0).broken == (seconds > 2)


def test_too_few_requests_say_nothing() -> None:
    judge = judge_of()
    ask(judge, 9, 1.0, seconds=50)
    assert not turned(judge, 1.0)
    assert not standing(judge, "p95", 1.0).judged
    ask(judge, 1, 1.0, seconds=50)
    assert turned(judge, 1.0) == [("p95", True)]


def test_each_turn_is_told_once() -> None:
    judge = judge_of()
    ask(judge, 20, 1.0, status=503)
    assert turned(judge, 1.0) == [("error_rate", True)]
    assert not turned(judge, 2.0)
    ask(judge, 500, 3.0)
    assert turned(judge, 3.0) == [("error_rate", False)]
    assert not turned(judge, 4.0)


def test_who_hovers_at_the_limit_is_broken_once() -> None:
    judge = judge_of()
    ask(judge, 94, 1.0)
    ask(judge, 6, 1.0, status=500)
    assert turned(judge, 1.0) == [("error_rate", True)]
    ask(judge, 25, 2.0)  # 6 of 125: 4.8%, within the limit but not by a tenth
    assert not turned(judge, 2.0)
    ask(judge, 10, 3.0)  # 4.4%
    assert turned(judge, 3.0) == [("error_rate", False)]


@pytest.mark.parametrize("status", [400, 404, 429, 499])
def test_what_callers_do_wrong_or_give_up_is_not_judged(status: int) -> None:
    judge = judge_of()
    ask(judge, 1000, 1.0, seconds=99, status=status)
    assert not turned(judge, 1.0)
    assert standing(judge, "error_rate", 1.0).requests == 0


def test_quick_errors_do_not_make_answers_quick() -> None:
    judge = judge_of()
    ask(judge, 20, 1.0, seconds=9)
    ask(judge, 5000, 1.0, seconds=0.001, status=500)
    assert ("p95", True) in turned(judge, 1.0)


def test_a_window_forgets_and_only_what_it_should() -> None:
    judge = judge_of()
    ask(judge, 20, 1.5, status=500)
    ask(judge, 20, 31.5)
    assert standing(judge, "error_rate", 31.5).value == 0.5
    assert standing(judge, "error_rate", 60.5).value == 0.5
    assert standing(judge, "error_rate", 61.5).value == 0.0
    assert standing(judge, "error_rate", 92.0).value is None


def test_a_window_is_what_counting_anew_gives() -> None:
    judge, chance = judge_of(), random.Random(3)
    asked: list[tuple[float, float, int]] = []
    now = 0.0
    for _ in range(3000):
        now += chance.choice([0.0, 0.05, 0.4, 3.0]) if chance.random() < 0.98 else 70.0
        asked.append((now, chance.choice([0.5, 1.9, 2.5]), chance.choice([200, 200, 200, 500, 404])))
        ask(judge, 1, *asked[-1])
        inside = [each for each in asked if int(each[0]) > int(now) - 60]  # slots of one second
        answers, errors = sum(each[2] == 200 for each in inside), sum(each[2] == 500 for each in inside)
        said = standing(judge, "error_rate", now)
        assert said.requests == answers + errors
        assert said.value == (errors / (answers + errors) if answers + errors else None)
        p95 = standing(judge, "p95", now)
        assert p95.requests == answers
        if p95.value is not None:
            times = sorted(each[1] for each in inside if each[2] == 200)
            true = times[ceil(0.95 * len(times) - 1e-9) - 1]
            assert true <= p95.value <= 1.1 * true


def test_what_nobody_asks_any_more_is_not_broken_for_ever() -> None:
    judge = judge_of()
    ask(judge, 20, 1.0, status=500)
    assert turned(judge, 1.0) == [("error_rate", True)]
    ask(judge, 1, 58.0)  # too few to judge by: it stays as it was
    assert not turned(judge, 100.0)
    (met,) = judge.turned(120.0)
    assert (met.broken, met.value, met.requests) == (False, None, 0)


def test_availability_is_of_time_and_needs_half_a_window() -> None:
    judge = judge_of()
    for second in range(29):
        judge.looked({"tickets": False}, float(second))
    assert not turned(judge, 28.9)
    judge.looked({"tickets": False, "unknown": False}, 29.0)
    assert turned(judge, 29.0) == [("availability", True)]
    for second in range(30, 89):
        judge.looked({"tickets": True}, float(second))
    assert turned(judge, 88.9) == [("availability", False)]
    assert standing(judge, "availability", 88.9).value == 59 / 60


def test_the_peak_of_requests_at_once_leaves_with_its_window() -> None:
    judge = judge_of()
    for _ in range(5):
        judge.began("tickets", 1.0)
    assert turned(judge, 1.0) == [("concurrent", True)]
    judge.ended("tickets", 5.0, 4.0, 200)
    assert not turned(judge, 30.0)
    assert turned(judge, 66.0) == [("concurrent", False)]
    assert standing(judge, "concurrent", 500.0).value == 4.0  # four are still under way, though nothing has happened


def test_new_objectives_keep_the_windows_of_the_others() -> None:
    judge = Judge({"tickets": TERMS, "notes": TERMS}, 0.0)
    ask(judge, 20, 1.0, status=500)
    judge.began("notes", 1.0)
    assert turned(judge, 1.0) == [("error_rate", True)]
    judge.change({"tickets": TERMS, "notes": Objectives(concurrent=1)}, 2.0)
    assert not turned(judge, 2.0)
    judge.began("notes", 3.0)
    assert turned(judge, 3.0) == [("concurrent", True)]
    judge.change({}, 4.0)
    assert not turned(judge, 4.0)
    judge.ended("notes", 5.0, 1.0, 200)  # what is under way ends without harm


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "at least one of p95"), ({"window": "5m"}, "at least one of p95"), ({"p95": "3"}, "like 800ms"),
        ({"p95": "0s"}, "like 800ms"), ({"p95": "48h"}, "like 800ms"), ({"p95": "3s", "window": "5s"}, "30s to 1d"),
        ({"p95": "3s", "window": "2d"}, "30s to 1d"), ({"error_rate": 1}, "less than 1"),
        ({"error_rate": float("nan")}, "finite"), ({"availability": 0}, "greater than 0"),
        ({"concurrent": 0}, "greater than or equal to 1"), ({"p99": "3s", "p95": "2s"}, "not permitted"),
        ({"p95": "${FT_P95}"}, "environment variable"),
    ],
)  # fmt: skip
def test_bad_objectives_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Objectives(**given)


async def run_watch(
    judge: Judge, append: Callable[[Sequence[Event]], object], told: list[Standing], seconds: float
) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await watch(judge, lambda: {"tickets": True}, append, lambda _, all_: told.extend(all_), every=0.02)


def test_transitions_become_events_once_also_when_the_store_was_away(either_store: Store) -> None:
    judge = Judge({"tickets": Objectives(concurrent=1)}, 0.0)
    for _ in range(2):
        judge.began("tickets", 1.0)
    failures = [StoreError("the disk is full", place="here"), StoreError("still", place="here")]
    told: list[Standing] = []

    def append(events: Sequence[Event]) -> None:
        if failures:
            raise failures.pop()
        append_all(either_store, events)

    asyncio.run(run_watch(judge, append, told, 1.0))
    (event,) = read(either_store)
    assert (event.type, event.subject) == ("serving.objective_broken", "tickets")
    assert event.data["limit"] == 1.0
    assert told[-1].broken
    assert broken_in_log(either_store) == {("tickets", "concurrent")}

    again = Judge({"tickets": Objectives(concurrent=1)}, 0.0, broken_in_log(either_store))
    for _ in range(2):
        again.began("tickets", 1.0)
    assert not again.turned(1.0)  # a restart does not tell it once more
    for now in (2.0, 3.0):
        again.ended("tickets", now, 1.0, 200)
    assert not again.turned(20.0)  # nor does it say that all is well before it has watched for a window
    append_all(either_store, [event_of(each) for each in again.turned(900.0)])
    assert not broken_in_log(either_store)


def test_a_restart_in_a_quiet_time_says_nothing_for_a_window() -> None:
    judge = Judge({"tickets": TERMS}, 100.0, {("tickets", "p95"), ("tickets", "gone")})
    assert not judge.turned(101.0)
    assert turned(judge, 160.0) == [("p95", False)]


def test_gateways_do_not_take_each_others_word(either_store: Store) -> None:
    broken = Standing("tickets", "p95", 3.5, 3.0, 300, 40, judged=True, broken=True)
    append_all(either_store, [event_of(broken, "one"), event_of(replace(broken, broken=False), "two")])
    assert [broken_in_log(either_store, each) for each in ("one", "two", "")] == [{("tickets", "p95")}, set(), set()]


def test_events_fit_their_published_types() -> None:
    for broken, value in ((True, 3.5), (False, None)):
        event = event_of(Standing("tickets", "p95", value, 3.0, 300, 40, judged=True, broken=broken))
        Draft202012Validator(TYPES[event.type].schema()).validate(event.data)
