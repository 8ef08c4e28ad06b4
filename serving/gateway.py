"""The gateway: OpenAI-compatible HTTP in front of the engines, as a raw ASGI app.

Nothing of a caller's headers goes on to the engine, its Authorization least of all. A request is sent once
more to a healthy engine if the first one broke before a byte of the answer had gone out; after that byte the
caller gets a clean error, never a second answer glued to the first.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

import aiohttp

from serving.engine import BASE
from serving.http_messages import (
    ClientGone,
    Headers,
    Receive,
    Refusal,
    Scope,
    Send,
    event_of,
    header,
    read_request,
    request_id,
    send_json,
    send_refusal,
)
from serving.routes import Away, Board, Route, Upstream

HOLD_SECONDS = 5.0
COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ANSWERS = {"/health": "GET", "/v1/models": "GET", **dict.fromkeys(COMPLETIONS, "POST")}
BROKEN = (
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
    RuntimeError,
)  # RuntimeError: its session was closed


class UpstreamBroke(Exception):
    """The engine failed before a byte of its answer had gone out."""


class Gateway:
    """An ASGI 3 app. `internal_key` opens versions that no gate has passed, and the bare base."""

    def __init__(self, board: Board, internal_key: str, hold_seconds: float = HOLD_SECONDS) -> None:
        self.board, self.hold_seconds = board, hold_seconds
        self._bearer = f"Bearer {internal_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: Headers = [(b"x-request-id", request_id(scope))]
        try:
            await self._answer(scope, receive, send, headers)
        except Refusal as refusal:
            await send_refusal(send, refusal, headers)
        except ClientGone:
            pass

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        path, method = scope["path"], scope["method"]
        if path not in ANSWERS:
            raise Refusal(404, f"nothing answers at {path[:200]}", "not_found")
        if method != ANSWERS[path]:
            raise Refusal(405, f"{path} takes {ANSWERS[path]}", "method_not_allowed")
        if path == "/health":
            await self._health(send, headers)
        elif path == "/v1/models":
            await send_json(send, 200, self._models(), headers)
        else:
            request = await read_request(scope, receive)
            await self._while_client_is_there(receive, self._complete(scope, request, send, headers))

    async def _health(self, send: Send, headers: Headers) -> None:
        routes = self.board.routes
        reasons = sorted({each.reason for each in routes.away.values()})
        # One model that was refused is no reason to take the whole gateway out of service.
        status = 200 if routes.internal or routes.remote else 503
        body = {
            "status": "ok" if status == 200 else "away",
            "generation": routes.generation,
            "reasons": reasons,
        }
        await send_json(send, status, body, headers)

    def _models(self) -> dict[str, Any]:
        routes = self.board.routes
        found = {**routes.remote, **routes.public}.items()
        data = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "ft",
                "root": route.adapter,
                "parent": BASE,
            }
            for name, route in found
        ]
        return {"object": "list", "data": data}

    async def _while_client_is_there(self, receive: Receive, work: Any) -> None:
        """Run `work`; when the client goes away, cancel it, and with it the engine's generation."""
        working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone
            await working
        finally:
            for task in (working, gone):
                task.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def _complete(self, scope: Scope, request: dict[str, Any], send: Send, headers: Headers) -> None:
        name = request["model"]
        internal = secrets.compare_digest(header(scope, b"authorization"), self._bearer)
        route = await self._route(name, internal)
        try:
            await self._pass_on(scope["path"], request, route, send, headers, last=False)
        except UpstreamBroke:
            route = await self._route(name, internal, broken=route.engine)
            try:
                await self._pass_on(scope["path"], request, route, send, headers, last=True)
            except UpstreamBroke as error:
                raise Refusal(503, f"the engine broke twice: {error}", "engine_away", retry_after=5) from error

    async def _route(self, name: str, internal: bool, broken: Upstream | None = None) -> Route:
        """Look once; while the name's engine is away (or has just broken), hold on for a moment."""
        deadline = time.monotonic() + self.hold_seconds
        while True:
            found = self.board.routes.find(name, internal=internal)
            if found is None:
                raise self._unknown(name)
            if isinstance(found, Route):
                if found.engine is not broken:
                    return found
                if await found.engine.healthy(1.0):
                    broken = None
                    continue  # and look again: the routes may have changed while it was asked
                found = Away("its engine has just broken")
            left = deadline - time.monotonic()
            if not found.hold or left <= 0:
                raise Refusal(503, f"{name} is away: {found.reason}", "engine_away", retry_after=found.retry_after)
            await self.board.change(min(left, 0.25))

    def _unknown(self, name: str) -> Refusal:
        routes = self.board.routes
        if name in routes.closed:
            return Refusal(404, f"{name} is not served: {routes.closed[name]}", "model_not_served", param="model")
        if name in routes.internal:
            return Refusal(404, f"{name} needs the internal key", "model_not_public", param="model")
        near = ", ".join(routes.nearest(name))
        hint = f"; there is: {near}" if near else "; nothing is served yet"
        return Refusal(404, f"no model {name[:100]!r}{hint}", "model_not_found", param="model")

    async def _pass_on(
        self, path: str, request: dict[str, Any], route: Route, send: Send, headers: Headers, *, last: bool
    ) -> None:
        # No await lies between the look at the routes and this count, so no unload can come between them.
        with self.board.counted(route):
            body = json.dumps({**request, "model": route.adapter}, separators=(",", ":")).encode()
            labelled = [*headers, (b"x-ft-adapter", route.adapter.encode())]
            try:
                answer = await route.engine.session.post(
                    route.engine.url + path, data=body, headers={"Content-Type": "application/json"}
                )
            except BROKEN as error:
                raise UpstreamBroke(_said(error)) from error
            async with answer:
                first = await _first_part(answer, last)
                if refusal := route.engine.refusal(answer.status, first):
                    raise refusal
                await send(
                    {
                        "type": "http.response.start",
                        "status": answer.status,
                        "headers": _kept(answer, labelled),
                    }
                )
                await _rest(answer, first, send)


async def _first_part(answer: aiohttp.ClientResponse, last: bool) -> bytes:
    """The first events of a stream, or the whole of another answer. Raises UpstreamBroke without any.

    Only then is the answer's start sent: a stream's headers come before its first token is even computed, and
    until a token has gone out the request can still go to another engine.
    """
    try:
        first = await (answer.content.readany() if _is_stream(answer) else answer.read())
    except BROKEN as error:
        raise UpstreamBroke(_said(error)) from error
    failed = answer.status >= 500 or first.startswith(b'data: {"error"')
    if (failed and not last) or (not first and _is_stream(answer)):
        raise UpstreamBroke(first[:200].decode(errors="replace") or "it closed without an answer")
    return first


async def _rest(answer: aiohttp.ClientResponse, part: bytes, send: Send) -> None:
    try:
        while part:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            part = await answer.content.readany()
    except BROKEN as error:
        broke = Refusal(502, f"the engine broke in the middle of its answer: {_said(error)}", "engine_broke")
        await send({"type": "http.response.body", "body": event_of(broke), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _kept(answer: aiohttp.ClientResponse, ours: Headers) -> Headers:
    kind = answer.headers.get("Content-Type", "application/json").encode()
    length = answer.headers.get("Content-Length")
    sized = [(b"content-length", length.encode())] if length and not _is_stream(answer) else []
    return [(b"content-type", kind), *sized, *ours]


def _is_stream(answer: aiohttp.ClientResponse) -> bool:
    return answer.content_type == "text/event-stream"


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
