"""A loopback server that speaks the part of vLLM's HTTP that we use, answers at once, and fails on demand."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

Fault = Literal[
    "close",
    "error",
    "cut",
    "stall",
    "stream-error",
    "refuse",
    "busy",
    "hang",
    "garbage",
    "redirect",
    "lost",
    "comments",
]
# Faults that are an answer like any other: its status, and vLLM's word for it.
SAID = {"error": (500, "InternalServerError"), "refuse": (400, "BadRequestError"), "busy": (429, "RateLimitError"),
        "lost": (404, "NotFoundError")}  # fmt: skip
CALL = {"name": "look_up", "arguments": '{"ticket": 7}'}
USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


@dataclass
class CannedEngine:
    """Each completion takes the next of `faults` if there is one, else `always`, and says the next of `answers`, else
    `words`. `seen` has (headers, body) of all requests."""

    url: str = ""
    words: tuple[str, ...] = ("one ", "two ", "three")
    faults: list[Fault] = field(default_factory=list)
    always: Fault | None = None
    answers: list[str] = field(default_factory=list)
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
        fault = self.faults.pop(0) if self.faults else self.always
        words = (self.answers.pop(0),) if self.answers else self.words
        if fault == "close" and request.transport:
            request.transport.abort()
        if fault in SAID:
            status, kind = SAID[fault]
            # As vLLM names the model that it does not have; and an address, which nobody must hear of.
            text = f"canned: the model `x` does not exist at {self.url}" if fault == "lost" else f"canned at {self.url}"
            error = {"message": text, "type": kind, "param": None, "code": status}
            return web.json_response({"error": error}, status=status, headers={"Retry-After": "7"})
        if fault == "hang":
            await self.gate.wait()
        if fault == "redirect":
            raise web.HTTPTemporaryRedirect(f"{self.url}/elsewhere")
        if fault == "garbage":
            return web.Response(text=f"<html>{self.url}", content_type="application/json")
        if body.get("stream"):
            return await self._stream(request, body, fault, words)
        kind, choice = _choice(request.path, body, "".join(words))
        return web.json_response({**_head(body, kind), "choices": [choice], "usage": USAGE})

    async def embed(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append((dict(request.headers), body))
        asked = body["input"] if isinstance(body["input"], list) else [body["input"]]
        vector: Any = [0.5, -0.25, 1.0]
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack("<3f", *vector)).decode()
        data = [{"object": "embedding", "index": place, "embedding": vector} for place in range(len(asked))]
        return web.json_response({"object": "list", "model": body["model"], "data": data, "usage": USAGE})

    async def _stream(
        self, request: web.Request, body: dict[str, Any], fault: Fault | None, words: tuple[str, ...]
    ) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        if fault == "stream-error":
            await answer.write(b'data: {"error": {"message": "canned"}}\n\n')
            return answer
        if fault == "comments":
            await answer.write(b": wait\n\n")
            await self.gate.wait()
        try:
            for place, piece in enumerate(_pieces(request.path, body, words)):
                if place == 1 and fault == "cut" and request.transport:
                    request.transport.abort()
                if place == 1 and fault == "stall":
                    await self.gate.wait()
                await answer.write(f"data: {json.dumps(piece)}\n\n".encode())
            await answer.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        except ConnectionError:
            self.aborted += 1
        return answer


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-canned", "object": kind, "created": 1_700_000_000, "model": body["model"]}


def _choice(path: str, body: dict[str, Any], text: str) -> tuple[str, dict[str, Any]]:
    if not path.endswith("/chat/completions"):
        return "text_completion", {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    ended = "stop"
    if body.get("tools"):
        called = {"id": "call-1", "type": "function", "function": CALL}
        message, ended = {"role": "assistant", "content": None, "tool_calls": [called]}, "tool_calls"
    return "chat.completion", {"index": 0, "message": message, "logprobs": None, "finish_reason": ended}


def _pieces(path: str, body: dict[str, Any], words: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The events of a stream as vLLM sends them: a word each, then why it ended, then the usage if it was asked for."""
    chat = path.endswith("/chat/completions")
    head = _head(body, "chat.completion.chunk" if chat else "text_completion")

    def piece(content: dict[str, Any], ended: str | None = None) -> dict[str, Any]:
        inside = {"delta": content} if chat else {"text": content.get("content", "")}
        return {**head, "choices": [{"index": 0, **inside, "logprobs": None, "finish_reason": ended}]}

    tools = chat and bool(body.get("tools"))
    for place, content in enumerate(_calls() if tools else [{"content": word} for word in words]):
        yield piece({"role": "assistant", **content} if place == 0 else content)
    yield piece({}, "tool_calls" if tools else "stop")
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**head, "choices": [], "usage": USAGE}


def _calls() -> list[dict[str, Any]]:
    """A call whose arguments come in two pieces."""
    name, arguments = CALL["name"], CALL["arguments"]
    begun = {"index": 0, "id": "call-1", "type": "function", "function": {"name": name, "arguments": ""}}
    parts = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:5], arguments[5:])]
    return [{"content": None, "tool_calls": [begun]}, *({"tool_calls": [part]} for part in parts)]


@asynccontextmanager
async def canned_engine() -> AsyncIterator[CannedEngine]:
    engine = CannedEngine()
    app = web.Application()
    app.add_routes([
        web.get("/health", engine.health),
        web.get("/v1/models", engine.models),
        web.post("/v1/chat/completions", engine.complete),
        web.post("/v1/completions", engine.complete),
        web.post("/v1/embeddings", engine.embed),
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
