"""A gateway answers while its lease lasts, by its own clock; after that its adapters may have been unloaded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from registry.leases import clock
from serving.http_messages import Receive, Refusal, Scope, Send, request_id, send_json, send_refusal

App = Callable[[Scope, Receive, Send], Awaitable[None]]
CUT_OFF = Refusal(503, "this gateway has lost touch with its project's database", "gateway_cut_off", retry_after=5)


class Lease:
    """`end` is on `clock`. It only moves on: an answer that comes late takes nothing back."""

    def __init__(self, term: float, clock: Callable[[], float] = clock) -> None:
        self.term, self._clock, self.end = term, clock, 0.0

    @property
    def lasts(self) -> bool:
        return self._clock() < self.end

    def renewed(self, began: float, in_force: int, published: int) -> bool:
        """A renewal that began at that moment was written, beside generation `published`: does the lease go on?

        Whoever watches saw the renewal later than it began. If it came too late, and this gateway was taken for dead,
        then adapters of `in_force` may have gone since, but not without a newer generation.
        """
        if published == in_force:
            self.end = max(self.end, began + self.term)
        return published == in_force


class Leased:
    """An ASGI 3 app: `app` while `lasts()` says so, else 503 to everybody."""

    def __init__(self, app: App, lasts: Callable[[], bool]) -> None:
        self._app, self._lasts = app, lasts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._lasts():
            await self._app(scope, receive, send)
        elif scope["path"] == "/health":
            body = {"status": "cut off", "reasons": [CUT_OFF.message]}
            await send_json(send, 503, body, [(b"x-request-id", request_id(scope)), (b"retry-after", b"5")])
        else:
            await send_refusal(send, CUT_OFF, [(b"x-request-id", request_id(scope))])
