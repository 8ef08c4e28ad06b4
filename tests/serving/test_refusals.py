"""Refusals in the log: the first of a kind at once, the others counted, ever more seldom while they go on."""

from __future__ import annotations

import asyncio
from typing import Any

from registry.event_types import TYPES
from registry.events import Event
from serving.http_messages import Refusal
from serving.refusals import Refusals


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time goes on only when it is told to."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def go_on(self, seconds: float) -> None:
        self.now += seconds
        self.run_until_complete(asyncio.sleep(0))


def refuse(clock: Clock, refusals: Refusals, code: str, times: int = 1) -> None:
    async def note() -> None:
        for _ in range(times):
            refusals.note("github", Refusal(401, f"no:\n{code}", code), "d1", "10.0.0.1")

    clock.run_until_complete(note())


def test_the_first_is_told_at_once_and_the_others_together() -> None:
    told: list[Event] = []
    clock, refusals = Clock(), Refusals(told.append)
    refuse(clock, refusals, "wrong", 1000)
    refuse(clock, refusals, "old")
    assert [each.data["count"] for each in told] == [1, 1]
    assert told[0].data == {"reason": "no: wrong", "delivery": "d1", "client": "10.0.0.1", "count": 1}
    clock.go_on(61)
    assert [each.data["count"] for each in told] == [1, 1, 999]
    refuse(clock, refusals, "wrong")
    clock.go_on(61)
    assert len(told) == 3, "the pause has grown to two minutes"
    clock.go_on(61)
    assert told[3].data["count"] == 1
    refuse(clock, refusals, "wrong", 7)
    refusals.close()
    assert told[4].data["count"] == 7
    clock.close()


def test_an_attacker_of_a_whole_day_leaves_few_events() -> None:
    told: list[Any] = []
    clock, refusals = Clock(), Refusals(told.append)
    for _ in range(24 * 60):
        refuse(clock, refusals, "wrong", 10)
        clock.go_on(60)
    refusals.close()
    clock.close()
    assert sum(each.data["count"] for each in told) == 24 * 60 * 10
    assert len(told) < 35


def test_after_a_quiet_time_the_next_is_told_at_once_again() -> None:
    told: list[Event] = []
    clock, refusals = Clock(), Refusals(told.append)
    refuse(clock, refusals, "wrong")
    clock.go_on(61)
    refuse(clock, refusals, "wrong")
    assert len(told) == 2
    refusals.close()
    clock.close()


def test_only_ft_may_append_them() -> None:
    assert not TYPES["webhook.refused"].outside
