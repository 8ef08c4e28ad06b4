"""The gateway: OpenAI-compatible HTTP in front of the engines, as a raw ASGI app."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from registry.serve_recipe import RouteTerms
from serving.ask import Ask
from serving.chain import HOLD_SECONDS, Chain
from serving.engine import BASE
from serving.http_messages import (
    ClientGone,
    Headers,
    Receive,
    Refusal,
    Scope,
    Send,
    header,
    read_request,
    request_id,
    send_json,
    send_refusal,
)
from serving.routes import Board

COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ANSWERS = {"/health": "GET", "/v1/models": "GET", **dict.fromkeys(COMPLETIONS, "POST")}


class Gateway:
    """An ASGI 3 app. `internal_key` opens versions that no gate has passed, and the bare base."""

    def __init__(self, board: Board, internal_key: str, hold_seconds: float = HOLD_SECONDS) -> None:
        self.board, self.chain = board, Chain(board, hold_seconds)
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
        status = 200 if routes.internal or routes.public else 503
        body = {
            "status": "ok" if status == 200 else "away",
            "generation": routes.generation,
            "reasons": reasons,
        }
        await send_json(send, status, body, headers)

    def _models(self) -> dict[str, Any]:
        routes = self.board.routes
        found = routes.public.items()
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
        terms = RouteTerms.model_construct(model=name)
        subject = str(request.get("user") or headers[0][1].decode())
        await self.chain.answer(Ask(scope["path"], request, name, name, terms, internal, subject, headers), send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
