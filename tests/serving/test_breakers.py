"""The circuit breaker as the pure state machine that it is, with a clock and dice of the test's own."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.breakers import Bounds, Breaker, Breakers, State
from serving.engine import Engine

BOUNDS = Bounds(ratio=0.5, least=4, samples=10, window=30.0, cool_down=5.0, longest=20.0, jitter=0.0)


@dataclass
class Bench:
    now: float = 1000.0
    chance: float = 0.5
    bounds: Bounds = BOUNDS
    states: list[State] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.breaker = Breaker(self.bounds, lambda: self.now, lambda: self.chance, self.states.append)

    def ends(self, *worked: bool) -> None:
        for each in worked:
            ticket = self.breaker.admits()
            assert ticket is not None
            (self.breaker.worked if each else self.breaker.failed)(ticket)

    @property
    def state(self) -> str:
        return self.breaker.state

    def open(self) -> None:
        self.ends(False, False, False, False)
        assert self.state == "open"


def test_few_failures_open_nothing() -> None:
    here = Bench()
    here.ends(False, False, False)
    assert here.state == "closed"
    here.ends(False)
    assert here.state == "open"
    assert here.breaker.admits() is None


def test_it_opens_at_the_ratio_and_says_whether_there_is_hope() -> None:
    here = Bench()
    here.ends(True, True, True, False, False)
    assert here.state == "closed"
    here.ends(False)
    assert (here.state, here.breaker.hopeless) == ("open", False)
    worse = Bench()
    worse.open()
    assert worse.breaker.hopeless


def test_old_ends_are_forgotten_and_only_so_many_kept() -> None:
    here = Bench()
    here.ends(False, False, False)
    here.now += 31
    here.ends(False)
    assert here.state == "closed"
    many = Bench()
    many.ends(*[True] * 50, *[False] * 4)
    assert many.state == "closed"
    many.ends(False)
    assert many.state == "open"


def test_one_trial_after_the_cool_down_decides() -> None:
    here = Bench()
    here.open()
    here.now += 4.9
    assert here.breaker.admits() is None
    assert 0 < here.breaker.seconds_left() < 0.2
    here.now += 0.2
    trial = here.breaker.admits()
    assert trial is not None
    assert here.breaker.admits() is None
    here.breaker.worked(trial)
    assert (here.state, here.breaker.hopeless) == ("closed", False)
    assert here.states == ["open", "half-open", "closed"]


def test_each_failed_trial_doubles_the_cool_down_up_to_a_bound() -> None:
    here = Bench()
    here.open()
    for expected in (5.0, 10.0, 20.0, 20.0):
        assert here.breaker.seconds_left() == expected
        here.now += expected
        here.ends(False)
    here.now += 20
    here.ends(True)
    here.open()
    assert here.breaker.seconds_left() == 5.0


def test_jitter_spreads_the_cool_down() -> None:
    for chance, expected in ((0.0, 4.0), (0.5, 5.0), (1.0, 6.0)):
        here = Bench(chance=chance, bounds=Bounds(least=4, cool_down=5.0, jitter=0.2))
        here.open()
        assert abs(here.breaker.seconds_left() - expected) < 1e-9


def test_a_trial_that_showed_nothing_lets_the_next_one_through() -> None:
    here = Bench()
    here.open()
    here.now += 5
    trial = here.breaker.admits()
    assert trial is not None
    here.breaker.spared(trial)
    assert here.state == "half-open"
    assert here.breaker.admits() is not None


def test_who_began_before_a_change_has_no_more_say() -> None:
    here = Bench()
    early = here.breaker.admits()
    assert early is not None
    here.open()
    here.now += 5
    trial = here.breaker.admits()
    assert trial is not None
    here.breaker.worked(early)
    here.breaker.failed(early)
    here.breaker.spared(early)
    assert here.state == "half-open"
    assert here.breaker.admits() is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["worked", "failed", "spared"]), st.floats(0, 40)), max_size=60))
def test_whatever_happens_it_never_stays_shut(steps: list[tuple[str, float]]) -> None:
    here = Bench(bounds=Bounds(least=3, cool_down=5, longest=20, jitter=0.2))
    for end, wait in steps:
        here.now += wait
        ticket = here.breaker.admits()
        if ticket is not None:
            getattr(here.breaker, end)(ticket)
    here.now += 25
    ticket = here.breaker.admits()
    assert ticket is not None
    here.breaker.worked(ticket)
    assert here.state == "closed"


def test_an_upstream_that_is_gone_is_forgotten() -> None:
    async def run() -> None:
        said: list[State] = []
        breakers = Breakers(Bounds(least=1), lambda _, state: said.append(state))
        engine: Engine | None = Engine("http://127.0.0.1:9", "key")
        assert engine is not None
        fail(breakers.of(engine))
        assert breakers.of(engine).state == "open"
        assert said == ["open"]
        await engine.close()
        engine = None
        gc.collect()
        assert not breakers._all

    asyncio.run(run())


def fail(breaker: Breaker) -> None:
    ticket = breaker.admits()
    assert ticket is not None
    breaker.failed(ticket)
