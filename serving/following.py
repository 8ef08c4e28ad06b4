"""A gateway's side of several gateways: read what the leading server publishes, put it up, acknowledge it, again.

A renewal of the lease writes the row first and looks at the published generation in the same transaction. Only if that
is the one in force here does the lease go on: whoever was taken for dead meanwhile cannot answer by old routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from registry.errors import StoreError
from registry.gateways import GatewayRow, Ref, leave, renew
from registry.leases import RENEWED_AFTER, clock
from registry.served_routes import newer
from registry.store import Changes, Store
from serving.aside import aside
from serving.leased import Lease
from serving.published import Published, leads_to, refs
from serving.routes import Board

# A published flip is seen at once; where the database cannot tell of it, after so long.
LOOK_SECONDS, STEP_SECONDS = 0.25, 0.02
# While a request to an adapter that has gone is under way, its end is looked for so often.
DRAIN_STEP_SECONDS = 0.05
AGAIN_SECONDS = 0.2
Result = TypeVar("Result")


@dataclass(frozen=True)
class Followed:
    """What was last read: the published text as a whole, of which generation."""

    generation: int
    published: Published


class Follower:
    """`run` for as long as the gateway answers. `put` is called with what is published, in the event loop."""

    def __init__(
        self,
        opened: Callable[[], Store],
        row: GatewayRow,
        board: Board,
        put: Callable[[Published], Any],
        wanted: Callable[[], frozenset[str]] = frozenset,
        renewed: Callable[[], None] = lambda: None,
    ) -> None:
        """`opened` opens the store anew, for one that hangs. `put` puts up routes before it returns. `wanted`: which
        engines requests wait for, by name. `renewed` is called when the lease goes on."""
        self.board, self.lease, self.row = board, Lease(row.term), row
        self._opened, self._put, self._wanted, self._renewed = opened, put, wanted, renewed
        self._told = 0.0
        self.store: Store | None = None
        self._changes: Changes | None = None
        self._next = 0.0
        self._said = ""

    async def run(self) -> None:
        while True:
            try:
                await self.step()
                await self._wait()
                self._say("")
            except (StoreError, TimeoutError) as error:
                self.store = self._changes = None
                self._say(f"the database cannot be used: {error or 'it does not answer'}")
                await asyncio.sleep(AGAIN_SECONDS)
            except ValidationError as error:
                self._say(f"what is published cannot be read, upgrade ft: {error}")
                await asyncio.sleep(LOOK_SECONDS)

    async def step(self) -> None:
        """Follow what is published, and say so. Raises StoreError, TimeoutError, ValidationError."""
        while True:
            store = await self._usable()
            found = await self._aside(read, store, self.row.acknowledged)
            if found is not None:
                self._put(found.published)
                self.row = replace(self.row, acknowledged=found.generation)
            if not self._is_due(found is not None):
                return
            began = clock()
            # Both are of this moment, before anything else can run.
            used, self._told = self._asked(), time.monotonic()
            self.row = replace(self.row, in_flight=self._going(), wanted=self._wanted(), used=used)
            generation = await self._aside(renew, store, self.row)
            if self.lease.renewed(began, self.row.acknowledged, generation):
                self._renewed()
                self._next = began + self.row.term * RENEWED_AFTER
                return

    async def leave(self) -> None:
        """Say that it ends. Never raises."""
        with suppress(StoreError, TimeoutError):
            await self._aside(leave, await self._usable(), self.row.id)

    def _is_due(self, flipped: bool) -> bool:
        told = (self.row.in_flight, self.row.wanted)
        return flipped or clock() >= self._next or (self._going(), self._wanted()) != told

    def _going(self) -> frozenset[Ref]:
        """Under way to adapters that the routes in force do not lead to."""
        return refs(self.board.in_flight.keys() - leads_to(self.board.routes))

    def _asked(self) -> frozenset[str]:
        """Adapters, and addresses of engines, asked just now or since the last renewal."""
        since, routes = self.board.used, leads_to(self.board.routes) | self.board.in_flight.keys()
        lately = {each for each in routes if each in self.board.in_flight or since.get(each.adapter, 0.0) > self._told}
        return frozenset(name for each in lately for name in (each.adapter, each.engine.url))

    async def _wait(self) -> None:
        """Until something was written, something that goes has ended, or the lease wants renewal."""
        seconds = min(DRAIN_STEP_SECONDS if self._going() else LOOK_SECONDS, max(self._next - clock(), 0.0))
        await asyncio.sleep(STEP_SECONDS)  # who writes a thousand events makes no thousand looks
        if self._changes is None:
            self._changes = await self._aside((await self._usable()).database.changes)
        await self._aside(self._changes.wait, seconds, STEP_SECONDS)

    async def _usable(self) -> Store:
        if self.store is None:
            self.store = await self._aside(self._opened)
        return self.store

    async def _aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.wait_for(aside(work, *arguments), max(self.row.term / 2, 1.0))

    def _say(self, what: str) -> None:
        if what != self._said:
            print(f"{time.strftime('%H:%M:%S')} {what or 'follows again'}", flush=True)
            self._said = what


def read(store: Store, than: int) -> Followed | None:
    """What is published, unless it is of that generation. Before anything was, that nothing is."""
    found = newer(store, than)
    if found is None:
        return None
    return Followed(found.generation, Published.model_validate_json(found.body))
