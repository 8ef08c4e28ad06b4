"""Places of a route: so many requests under way, so many more that wait in turn.

Who comes after them is told at once when to come again: a queue without end would only make everybody wait longer than
they have patience.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from registry.durations import seconds
from registry.serve_recipe import Limits
from serving.http_messages import Refusal

# Of the newest answers, how much each one moves the mean.
WEIGHT = 0.1
LONGEST_RETRY = 120
# Of all routes together, those that wait too.
MOST_AT_ONCE, MOST_BYTES = 4096, 512 << 20


class Full(Refusal):
    """Too many ask the route already. Its fallbacks may have room."""


class Places:
    """Of one route. `around` is given its name, and entered for as long as somebody waits."""

    def __init__(
        self, name: str, limits: Limits, around: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.name, self.under_way, self.mean, self._around = name, 0, 1.0, around
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self.limit_to(limits)

    def limit_to(self, limits: Limits) -> None:
        """From now on; those who have a place keep it."""
        self.limits = limits
        self._most, self._queue, self._wait = limits.concurrent, limits.queue, float(seconds(limits.wait))
        self._wake()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def place(self) -> Place:
        """Have a place within the block. Raises Refusal (429) where the queue is full, or too slow."""
        return Place(self)

    async def take(self) -> None:
        if self.under_way < self._most and not self._waiting:
            self.under_way += 1
        else:
            await self._turn()

    def leave(self, seconds: float) -> None:
        self.mean += WEIGHT * (seconds - self.mean)
        self.under_way -= 1
        self._wake()

    async def _turn(self) -> None:
        """Wait for a place; whoever gives one up counts it for us, so that nobody slips in between."""
        if len(self._waiting) >= self._queue:
            raise self._full("is full")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            # wait_for would swallow a cancellation that comes with the turn, and answer somebody who has gone.
            with self._around(self.name):
                async with asyncio.timeout(self._wait):
                    await turn
        except TimeoutError:
            if turn.cancelled():
                raise self._full(f"had no place within {self._wait:.0f} s") from None
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place was ours already
                self.under_way -= 1
                self._wake()
            raise
        finally:
            self._waiting.pop(turn, None)

    def _wake(self) -> None:
        while self._waiting and self.under_way < self._most:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():
                self.under_way += 1
                turn.set_result(None)

    def _full(self, what: str) -> Full:
        again = math.ceil(self.mean * (self.waiting + 1) / self._most)
        return Full(429, f"{self.name} {what}: {self.under_way} requests are under way, {self.waiting} wait",
                       "queue_full", retry_after=min(max(again, 1), LONGEST_RETRY))  # fmt: skip


class Place:
    """Of one request. Not an @asynccontextmanager, which costs ten times as much."""

    __slots__ = ("_began", "_places")

    def __init__(self, places: Places) -> None:
        self._places, self._began = places, 0.0

    async def __aenter__(self) -> None:
        await self._places.take()
        self._began = time.monotonic()

    async def __aexit__(self, *_: object) -> None:
        self._places.leave(time.monotonic() - self._began)


class Room:
    """Of the whole gateway: so many requests, with so many bytes of bodies, are in memory at once."""

    def __init__(self, most: int = MOST_AT_ONCE, most_bytes: int = MOST_BYTES) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.requests = self.bytes = 0

    @contextmanager
    def taken(self) -> Iterator[Callable[[int], None]]:
        """Around a request; what it yields is called with the bytes that have come of its body. Both raise Refusal
        (429). What is only announced does not count: anybody could fill the room with promises."""
        if self.requests >= self.most:
            raise self._full()
        size = 0

        def grow(by: int) -> None:
            nonlocal size
            if self.bytes + by > self.most_bytes:
                raise self._full()
            size += by
            self.bytes += by

        self.requests += 1
        try:
            yield grow
        finally:
            self.requests -= 1
            self.bytes -= size

    def _full(self) -> Refusal:
        return Refusal(429, f"{self.requests} requests are here already", "gateway_full", retry_after=1)
