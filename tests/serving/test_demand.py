"""What is wanted of engines that are off, and what those who wait are told."""

from __future__ import annotations

from typing import Any

import pytest

from registry.recipe import Base
from registry.serve_recipe import EngineTerms, Volume
from serving.demand import REMEMBERED_SECONDS, Demand


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def demand(clock: Clock, **terms: Any) -> Demand:
    base = Base(model="org/big")
    engines = {"big": EngineTerms(base=base, start="demand", hold="90s", **terms), "small": EngineTerms(base=base)}
    return Demand(engines, clock)


def test_a_wish_lasts_from_the_first_who_waits_until_nobody_has_for_a_while(clock: Clock) -> None:
    here = demand(clock)
    for _ in range(10):
        here.want("big")
        clock.now += here.hold("big") + REMEMBERED_SECONDS - 1
    assert here.wanted_since("big") == 1000.0
    clock.now += 2
    assert here.wanted_since("big") is None
    here.want("big")
    here.is_up("big", took=30.0)
    assert here.wanted_since("big") is None


def test_only_engines_on_demand_can_be_wanted(clock: Clock) -> None:
    here = demand(clock)
    for name in ("small", "nobody"):
        here.want(name)
        here.count(name, "text")
        assert here.wanted_since(name) is None
    assert (here.hold("big"), here.hold("nobody")) == (90.0, 0.0)


def test_progress_is_told_by_how_long_the_last_start_took(clock: Clock) -> None:
    here = demand(clock)
    assert (here.progress("big"), here.header("big")) == ("off", "off")
    here.start_seconds["big"] = 50.0
    here.starts("big")
    clock.now += 20
    assert here.progress("big") == "starting, 40 %, about 30 s left"
    assert here.header("big") == "starting; eta=30"
    clock.now += 60
    assert here.progress("big") == "starting, 99 %, about 1 s left", "later than the last time"
    here.is_up("big", took=80.0)
    assert (here.header("big"), here.start_seconds["big"]) == ("up", 80.0)
    here.waits("big", clock.now + 100)
    assert here.header("big") == "waiting for its turn; eta=180"


def test_so_many_requests_within_the_time_start_it(clock: Clock) -> None:
    here = demand(clock, volume=Volume(requests=3, within="1m"))
    for _ in range(3):
        here.count("big", "")
        clock.now += 31
    assert here.wanted_since("big") is None, "the first of three was too long ago"
    here.count("big", "")
    assert here.wanted_since("big") is None
    clock.now += 1
    here.count("big", "")
    assert here.wanted_since("big") == clock.now


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Ｌｅｇａｌ  question", True),
        ("the LEGAL\nQUESTION here", True),
        ("illegal", False),
        ("법률 상담", True),
        ("", False),
    ],
)
def test_words_count_whatever_their_width_case_and_spaces(clock: Clock, text: str, counts: bool) -> None:
    here = demand(clock, volume=Volume(requests=1, keywords=["legal question", "법률"]))
    here.count("big", text)
    assert (here.wanted_since("big") is not None) is counts
