"""Places of a route: in turn, bounded, and given back whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from registry.serve_recipe import Limits
from serving.http_messages import Refusal
from serving.queueing import Places, Room


def limits(concurrent: int = 1, queue: int = 2, wait: str = "5s") -> Limits:
    return Limits(concurrent=concurrent, queue=queue, wait=wait)


class Work:
    """Tasks that take a place and keep it until they are told."""

    def __init__(self, places: Places) -> None:
        self.places, self.order = places, list[int]()
        self.most = self.now = 0
        self.done: dict[int, asyncio.Event] = {}

    def start(self, number: int) -> asyncio.Task[None]:
        self.done[number] = asyncio.Event()
        return asyncio.create_task(self._run(number))

    async def _run(self, number: int) -> None:
        async with self.places.place():
            self.order.append(number)
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await self.done[number].wait()
            finally:
                self.now -= 1


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_first_come_first_served_and_the_rest_is_told_when() -> None:
    async def test() -> None:
        places = Places("support", limits())
        work = Work(places)
        tasks = [work.start(number) for number in range(3)]
        await settle()
        assert (work.order, places.under_way, places.waiting) == ([0], 1, 2)
        places.mean = 4.0
        with pytest.raises(Refusal) as refusal:
            await work.start(9)
        assert (refusal.value.status, refusal.value.code, refusal.value.retry_after) == (429, "queue_full", 12)
        for number in range(3):
            work.done[number].set()
            await tasks[number]
            await settle()
        assert (work.order, work.most, places.under_way, places.waiting) == ([0, 1, 2], 1, 0, 0)

    run(test)


def test_who_waits_too_long_is_told_to_come_again() -> None:
    async def test() -> None:
        places = Places("support", limits(wait="0s"))
        work = Work(places)
        first = work.start(0)
        await settle()
        with pytest.raises(Refusal, match="no place within 0 s"):
            await work.start(1)
        assert (places.under_way, places.waiting) == (1, 0)
        work.done[0].set()
        await first
        assert places.under_way == 0

    run(test)


@pytest.mark.parametrize("turn_has_come", [False, True])
def test_a_caller_that_goes_leaves_its_place_to_the_next(turn_has_come: bool) -> None:
    async def test() -> None:
        places, leave = Places("support", limits()), asyncio.Event()
        work = Work(places)

        async def first() -> None:
            async with places.place():
                await leave.wait()
            if turn_has_come:  # the place was given away a moment ago, and nobody has run since
                tasks[1].cancel()

        tasks = [asyncio.create_task(first()), work.start(1), work.start(2)]
        await settle()
        if not turn_has_come:
            tasks[1].cancel()
        leave.set()
        await settle()
        assert (work.order, tasks[1].cancelled()) == ([2], True)
        work.done[2].set()
        await tasks[2]
        assert (places.under_way, places.waiting) == (0, 0)

    run(test)


def test_an_error_gives_the_place_back() -> None:
    async def test() -> None:
        places = Places("support", limits())
        with suppress(KeyError):
            async with places.place():
                raise KeyError
        assert places.under_way == 0

    run(test)


def test_new_limits_let_more_in_at_once() -> None:
    async def test() -> None:
        places = Places("support", limits())
        work = Work(places)
        tasks = [work.start(number) for number in range(3)]
        await settle()
        places.limit_to(limits(concurrent=3))
        await settle()
        assert sorted(work.order) == [0, 1, 2]
        places.limit_to(limits(concurrent=1))
        for each in work.done.values():
            each.set()
        await asyncio.gather(*tasks)
        assert places.under_way == 0

    run(test)


def test_any_order_of_comings_and_goings_loses_no_place() -> None:
    async def test() -> None:
        import random

        chance = random.Random(7)
        places = Places("support", limits(concurrent=3, queue=5, wait="1s"))
        work = Work(places)
        tasks: dict[int, asyncio.Task[None]] = {}
        for number in range(3000):
            tasks[number] = work.start(number)
            for each in chance.sample(sorted(tasks), min(3, len(tasks))):
                match chance.randrange(4):
                    case 0:
                        work.done[each].set()
                    case 1:
                        tasks[each].cancel()
                    case _:
                        await asyncio.sleep(0)
            tasks = {each: task for each, task in tasks.items() if not task.done()}
            assert places.under_way <= 3
            assert places.waiting <= 5
        for done in work.done.values():
            done.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert (places.under_way, places.waiting, work.most) == (0, 0, 3)

    run(test)


def test_the_whole_gateway_holds_so_many_requests_and_bytes() -> None:
    room = Room(most=2, most_bytes=100)
    with room.taken() as grow:
        grow(90)
        with room.taken() as other:
            with pytest.raises(Refusal, match="2 requests"), room.taken():
                pass
            with pytest.raises(Refusal) as refusal:
                other(11)
            assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
            other(10)
        with room.taken() as third:
            third(10)
    assert (room.requests, room.bytes) == (0, 0)
