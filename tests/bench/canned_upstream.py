"""`python -m tests.bench.canned_upstream PORT`: answers completions at once, whole or as a stream; breaks on demand.

A protocol of its own instead of a framework, so that it is not what is measured. What a request's body has under
"canned" decides: {"events": N} sets the length of a stream, {"pause": S} the seconds between events, {"fault":
"error" | "close" | "cut"} a 500, a connection closed without a byte, or one closed in the middle.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any, cast

from serving.listening import loop_factory

ANSWER = json.dumps({
    "id": "chatcmpl-00000000000000000000000000000000", "object": "chat.completion", "created": 1764000000,
    "model": "tickets@1", "choices": [{"index": 0, "message": {"role": "assistant", "content": "That I know. " * 6},
    "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 21, "completion_tokens": 24, "total_tokens": 45},
}).encode()  # fmt: skip
EVENT = b"data: " + json.dumps({
    "id": "chatcmpl-00000000000000000000000000000000", "object": "chat.completion.chunk", "created": 1764000000,
    "model": "tickets@1", "choices": [{"index": 0, "delta": {"content": " know"}, "logprobs": None,
    "finish_reason": None}],
}).encode() + b"\n\n"  # fmt: skip
DONE = b"data: [DONE]\n\n"
STREAM = re.compile(rb'"stream":\s*true')
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
EVENTS = 16


def plain(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunk(part: bytes) -> bytes:
    return f"{len(part):x}\r\n".encode() + part + b"\r\n"


WHOLE, FAILED = plain("200 OK", ANSWER), plain("500 Internal Server Error", b'{"error":{"message":"canned"}}')
OPENED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE, CLOSED = chunk(EVENT), chunk(DONE) + b"0\r\n\r\n"


class Pump:
    """Writes one event of every open stream, then lets the loop turn: each event is a write of its own."""

    def __init__(self) -> None:
        self._open: set[Answering] = set()
        self._running = False

    def add(self, stream: Answering) -> None:
        self._open.add(stream)
        if not self._running:
            self._running = True
            asyncio.get_running_loop().call_soon(self._turn)

    def remove(self, stream: Answering) -> None:
        self._open.discard(stream)

    def _turn(self) -> None:
        for stream in tuple(self._open):
            stream.write_event()
        self._running = bool(self._open)
        if self._running:
            asyncio.get_running_loop().call_soon(self._turn)


class Answering(asyncio.Protocol):
    """One connection. Requests on it come one after another, as HTTP clients send them."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._received, self._left, self._pause, self._cut = b"", 0, 0.0, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass

    def connection_lost(self, _: Exception | None) -> None:
        self._left = 0
        self._pump.remove(self)

    def pause_writing(self) -> None:
        self._pump.remove(self)

    def resume_writing(self) -> None:
        if self._left and not self._pause:
            self._pump.add(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if found and len(body) >= (int(length[1]) if length else 0):
            self._received = b""
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        wanted: dict[str, Any] = json.loads(body).get("canned", {}) if b'"canned"' in body else {}
        fault = wanted.get("fault")
        if fault == "close":
            self._transport.abort()
        elif fault == "error":
            self._transport.write(FAILED)
        elif STREAM.search(body):
            self._left, self._pause = wanted.get("events", EVENTS), wanted.get("pause", 0.0)
            self._cut = fault == "cut"
            self._transport.write(OPENED + PIECE)
            self._go_on()
        else:
            self._transport.write(plain("200 OK", b'{"data":[]}') if head.startswith(b"GET") else WHOLE)

    def _go_on(self) -> None:
        if self._pause:
            asyncio.get_running_loop().call_later(self._pause, self._paced)
        else:
            self._pump.add(self)

    def _paced(self) -> None:
        if self._left:
            self.write_event()
        if self._left:
            self._go_on()

    def write_event(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._transport.write(PIECE)
            return
        self._left = 0
        self._pump.remove(self)
        if self._cut:
            self._transport.abort()
        else:
            self._transport.write(CLOSED)


async def serve(port: int) -> None:
    pump = Pump()
    server = await asyncio.get_running_loop().create_server(lambda: Answering(pump), "127.0.0.1", port, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(int(sys.argv[1])))
