"""A loopback server that speaks the part of vLLM's HTTP that we use, answers at once, and fails on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

Fault = Literal["close", "error", "cut", "stall", "stream-error"]


@dataclass
class CannedEngine:
    """Each completion takes the next of `faults`, if there is one. `seen` has (headers, body) of all requests."""

    url: str = ""
    words: tuple[str, ...] = ("one ", "two ", "three")
    faults: list[Fault] = field(default_factory=list)
    seen: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: int = 0

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def models(self, _: web.Request) -> web.Response:
        data = [{"id": "base", "root": "base"}, *({"id": name, "root": root} for name, root in self.loaded.items())]
        return web.json_response({"data": data})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append((dict(request.headers), body))
        fault = self.faults.pop(0) if self.faults else None
        if fault == "close" and request.transport:
            request.transport.abort()
        if fault == "error":
            return web.json_response({"error": {"message": "canned", "type": "x", "code": 500}}, status=500)
        if body.get("stream"):
            return await self._stream(request, body, fault)
        text = "".join(self.words)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return web.json_response({"model": body["model"], "choices": [choice]})

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: Fault | None) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        if fault == "stream-error":
            await answer.write(b'data: {"error": {"message": "canned"}}\n\n')
            return answer
        try:
            for place, word in enumerate(self.words):
                if place == 1 and fault == "cut" and request.transport:
                    request.transport.abort()
                if place == 1 and fault == "stall":
                    await self.gate.wait()
                delta = {"model": body["model"], "choices": [{"index": 0, "delta": {"content": word}}]}
                await answer.write(f"data: {json.dumps(delta)}\n\n".encode())
            await answer.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        except ConnectionError:
            self.aborted += 1
        return answer


@asynccontextmanager
async def canned_engine() -> AsyncIterator[CannedEngine]:
    engine = CannedEngine()
    app = web.Application()
    app.add_routes([
        web.get("/health", engine.health),
        web.get("/v1/models", engine.models),
        web.post("/v1/chat/completions", engine.complete),
        web.post("/v1/completions", engine.complete),
    ])  # fmt: skip
    # handler_cancellation: as vLLM does, notice that the one who asked has gone.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    engine.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield engine
    finally:
        engine.gate.set()
        await runner.cleanup()
