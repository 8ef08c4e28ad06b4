"""What a run does while the store is away: it waits, because Postgres that is restarted must not fail a night's run."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from registry.errors import StoreError

Value = TypeVar("Value")
PATIENCE_SECONDS = 300.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0


class Outage:
    """One time of waiting. What went well for longer than the patience lasts makes it a new one."""

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self.patience, self.pause = patience, FIRST_PAUSE
        self.began = self.last = time.monotonic() - 2 * patience

    async def wait(self, error: StoreError) -> None:
        """Longer each time. Raises `error` when the patience is at its end."""
        now = time.monotonic()
        if now - self.last > self.patience:
            self.began, self.pause = now, FIRST_PAUSE
            print(f"waits until it can be used again: {error}", file=sys.stderr, flush=True)
        if now - self.began > self.patience:
            raise error
        await asyncio.sleep(self.pause)
        self.pause, self.last = min(2 * self.pause, LONGEST_PAUSE), time.monotonic()


async def repeated(work: Callable[[], Awaitable[Value]], patience: float = PATIENCE_SECONDS) -> Value:
    """Do the work, which can be repeated, again as long as the store is away."""
    outage = Outage(patience)
    while True:
        try:
            return await work()
        except StoreError as error:
            await outage.wait(error)


async def through_outage(call: Callable[..., Value], *arguments: object) -> Value:
    """The same for a plain function, which is called in a thread: Postgres that is away would stop all runs."""
    return await repeated(lambda: asyncio.to_thread(call, *arguments))
