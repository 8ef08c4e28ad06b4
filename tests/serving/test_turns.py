"""Which engines of a card are up: nobody starves, nobody thrashes, and the card is never overfull."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.turns import Stand, decide

START, DRAIN = 20.0, 5.0


def up(name: str, needs: int = 6, **more: object) -> Stand:
    return replace(Stand(name, "up", needs), **more)  # type: ignore[arg-type]


def off(name: str, needs: int = 6, **more: object) -> Stand:
    return replace(Stand(name, "off", needs), **more)  # type: ignore[arg-type]


def test_what_always_is_up_is_started_and_what_nobody_wants_is_not() -> None:
    found = decide([off("a", always=True), off("b", needs=2)], 10, 0.0)
    assert (found.start, found.stop) == (("a",), ())


def test_two_that_fit_are_both_up() -> None:
    assert decide([up("a", 4), off("b", 4, wanted=1.0)], 8, 2.0).start == ("b",)


def test_one_that_does_not_fit_waits_for_the_others_residence() -> None:
    stands = [up("a", since=0.0, used=50.0), off("b", wanted=60.0)]
    early = decide(stands, 10, 100.0)
    assert (early.start, early.stop, early.waits) == ((), (), {"b": 120.0})
    assert decide(stands, 10, 120.0).stop == ("a",), "its residence is over, though requests may be under way"
    going = [replace(stands[0], place="going"), stands[1]]
    assert decide(going, 10, 121.0).start == (), "it is still on the card"
    assert decide([off("a"), stands[1]], 10, 122.0).start == ("b",)


def test_nobody_is_let_in_before_the_oldest_waiter() -> None:
    stands = [up("a", 6, since=0.0), off("big", 8, wanted=1.0), off("small", 2, wanted=2.0)]
    assert decide(stands, 10, 5.0).start == ()


def test_what_is_used_least_lately_makes_room() -> None:
    stands = [up("a", 4, used=300.0), up("b", 4, used=200.0), up("c", 2, used=100.0, busy=True)]
    assert decide([*stands, off("d", 4, wanted=400.0)], 10, 500.0).stop == ("b",)


def test_what_always_is_up_never_makes_room() -> None:
    assert decide([up("a", always=True), off("b", wanted=1.0)], 10, 1000.0).stop == ()


def test_what_is_idle_is_stopped() -> None:
    stand = up("a", since=0.0, used=100.0, idle=900.0)
    assert decide([stand], 10, 999.0).stop == ()
    assert decide([stand], 10, 1000.0).stop == ("a",)
    assert decide([replace(stand, busy=True)], 10, 1000.0).stop == ()
    assert decide([replace(stand, always=True)], 10, 1000.0).stop == ()


def test_a_sleeper_ends_when_its_rest_is_in_the_way() -> None:
    stands = [replace(off("a"), place="asleep", rests=2), off("b", 9, wanted=1.0)]
    found = decide(stands, 10, 5.0)
    assert (found.evict, found.stop, found.start) == (("a",), (), ())
    assert decide([replace(stands[0], wanted=0.5), off("b", 4)], 10, 5.0).start == ("a",), "it wakes in its own room"


@dataclass
class World:
    """Engines whose starts and stops take time, and requests that come at random and are answered when it is up."""

    stands: dict[str, Stand]
    room: int
    now: float = 0.0
    longest: float = 0.0
    came_up: list[tuple[float, str]] = None  # type: ignore[assignment]

    def step(self, wants: set[str], seconds: float = 1.0) -> None:
        self.now += seconds
        for name, each in self.stands.items():
            if each.place == "coming" and self.now - each.since >= START:
                self.longest = max(self.longest, self.now - (each.wanted or self.now))
                self.came_up.append((self.now, name))
                each = replace(each, place="up", since=self.now, wanted=None)  # noqa: PLW2901
            if each.place == "going" and self.now - each.since >= DRAIN:
                each = replace(each, place="off", since=self.now)  # noqa: PLW2901
            if name in wants and each.place == "up":
                each = replace(each, used=self.now)  # noqa: PLW2901
            elif name in wants and each.wanted is None:
                each = replace(each, wanted=self.now)  # noqa: PLW2901
            self.stands[name] = each
        found = decide(list(self.stands.values()), self.room, self.now)
        for name in found.start:
            self._put(name, "coming")
        for name in found.stop:
            assert self.stands[name].place == "up"
            self._put(name, "going")
        assert sum(each.holds for each in self.stands.values()) <= self.room, "the card is overfull"

    def _put(self, name: str, place: str) -> None:
        self.stands[name] = replace(self.stands[name], place=place, since=self.now)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    needs=st.lists(st.integers(1, 10), min_size=2, max_size=5),
    residence=st.sampled_from([30.0, 60.0, 120.0]),
    rate=st.floats(0.005, 1.0),
    seed=st.integers(0, 1 << 30),
)
def test_nobody_starves_and_nobody_thrashes(needs: list[int], residence: float, rate: float, seed: int) -> None:
    chance = random.Random(seed)
    stands = {f"e{at}": off(f"e{at}", each, residence=residence, idle=300.0) for at, each in enumerate(needs)}
    world = World(stands, 10, came_up=[])
    for _ in range(1500):
        world.step({name for name in stands if chance.random() < rate})
    turn = START + DRAIN + residence + 2
    waiting = [world.now - each.wanted for each in world.stands.values() if each.wanted is not None]
    assert max([world.longest, *waiting]) <= len(needs) * turn, "somebody waits for more than everybody's turn"
    for name in stands:
        times = [at for at, each in world.came_up if each == name]
        gaps = [after - before for before, after in pairwise(times)]
        assert all(gap >= residence for gap in gaps), "it came up twice within its residence"


@pytest.mark.parametrize("both", [True, False])
def test_two_that_are_wanted_all_the_time_change_places_once_in_a_residence(both: bool) -> None:
    stands = {name: off(name, residence=60.0) for name in ("a", "b")}
    world = World(stands, 10, came_up=[])
    for _ in range(3600):
        world.step({"a", "b"} if both else {"a"})
    assert len(world.came_up) == (pytest.approx(3600 / (60 + START + DRAIN), abs=3) if both else 1)
