"""Who answers a request: the routes in force, waited for a moment, and somebody else when one breaks.

A request is sent once more to a healthy engine if the first one broke before a byte of the answer had gone out; after
that byte the caller gets a clean error, never a second answer glued to the first.
"""

from __future__ import annotations

import time

from serving.ask import Ask
from serving.http_messages import Refusal, Send
from serving.passing import UpstreamBroke, pass_on
from serving.routes import Away, Board, Route, Upstream

HOLD_SECONDS = 5.0


class Chain:
    """Made once for a gateway."""

    def __init__(self, board: Board, hold_seconds: float = HOLD_SECONDS) -> None:
        self.board, self.hold_seconds = board, hold_seconds

    async def answer(self, ask: Ask, send: Send) -> None:
        """Have it answered. Raises Refusal if nobody can."""
        route = await self._route(ask)
        try:
            await pass_on(self.board, ask, route, send, last=False)
        except UpstreamBroke:
            route = await self._route(ask, broken=route.engine)
            try:
                await pass_on(self.board, ask, route, send, last=True)
            except UpstreamBroke as error:
                raise Refusal(503, f"the engine broke twice: {error}", "engine_away", retry_after=5) from error

    async def _route(self, ask: Ask, broken: Upstream | None = None) -> Route:
        """Look once; while the name's engine is away (or has just broken), hold on for a moment."""
        deadline = time.monotonic() + self.hold_seconds
        while True:
            found = self._found(ask)
            if isinstance(found, Route):
                if found.engine is not broken:
                    return found
                if await found.engine.healthy(1.0):
                    broken = None
                    continue  # and look again: the routes may have changed while it was asked
                found = Away("its engine has just broken")
            left = deadline - time.monotonic()
            if not found.hold or left <= 0:
                raise Refusal(503, f"{ask.name} is away: {found.reason}", "engine_away", retry_after=found.retry_after)
            await self.board.change(min(left, 0.25))

    def _found(self, ask: Ask) -> Route | Away:
        name = ask.terms.model or ask.name
        found = self.board.routes.find(name, internal=ask.internal)
        if found is None:
            raise self._unknown(name)
        split = self.board.routes.splits.get(name)
        return split.pick(ask.subject) if split else found

    def _unknown(self, name: str) -> Refusal:
        routes = self.board.routes
        if name in routes.closed:
            return Refusal(404, f"{name} is not served: {routes.closed[name]}", "model_not_served", param="model")
        if name in routes.internal:
            return Refusal(404, f"{name} needs the internal key", "model_not_public", param="model")
        near = ", ".join(routes.nearest(name))
        hint = f"; there is: {near}" if near else "; nothing is served yet"
        return Refusal(404, f"no model {name[:100]!r}{hint}", "model_not_found", param="model")
