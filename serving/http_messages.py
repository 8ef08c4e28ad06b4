"""What the gateway reads from clients and writes to them: bodies within limits, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Rinse = Callable[[], Awaitable[None]]

BODY_SECONDS = 30.0
# Of what is too long the rest is read and thrown away for so long: who still sends would not hear the answer.
RINSE_SECONDS = 5.0
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Refusal(Exception):
    """A request that is answered with an error; `code` as OpenAI's clients read it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        retry_after: int | None = None,
        param: str | None = None,
        allow: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.retry_after, self.param, self.allow = retry_after, param, allow
        # The engine on demand that it is about, if it is about one.
        self.engine = ""

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """Nobody is there to answer."""


def header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def request_id(scope: Scope) -> bytes:
    """The caller's own, if it is a plain one; else a new one."""
    given = header(scope, b"x-request-id")
    return given if REQUEST_ID.fullmatch(given) else b"%032x" % random.getrandbits(128)


async def read_body(
    scope: Scope,
    receive: Receive,
    limit: int,
    grow: Callable[[int], None] = lambda _: None,
    seconds: float = BODY_SECONDS,
) -> bytes:
    """The body, of at most `limit` bytes; `grow` hears of each part. Raises Refusal (408, 413) and ClientGone."""
    try:
        async with asyncio.timeout(seconds):
            return await _read_parts(scope, receive, limit, grow)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {seconds:.0f} s", "request_timeout") from None


async def send_json(
    send: Send, status: int, body: dict[str, Any], headers: Headers, before_the_end: Rinse | None = None
) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode(errors="replace")
    whole = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": whole})
    if before_the_end:
        await send({"type": "http.response.body", "body": raw, "more_body": True})
        await before_the_end()
        raw = b""
    await send({"type": "http.response.body", "body": raw})


async def send_refusal(send: Send, refusal: Refusal, headers: Headers, rinsed: Rinse | None = None) -> None:
    """`rinsed` takes in what is left of a body that is too long, while its sender may read the answer."""
    extra: Headers = []
    if refusal.retry_after is not None:
        extra.append((b"retry-after", str(refusal.retry_after).encode()))
    if refusal.allow is not None:
        extra.append((b"allow", refusal.allow.encode()))
    if refusal.status in (408, 413):
        # What is left of the body is not read, so the connection cannot be used again.
        extra.append((b"connection", b"close"))
    await send_json(send, refusal.status, refusal.body, [*headers, *extra], rinsed if refusal.status == 413 else None)


async def rinse(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(RINSE_SECONDS):
            while (await receive()).get("more_body"):
                pass


def event_of(refusal: Refusal) -> bytes:
    """The error as the last event of a stream that has begun."""
    return b"data: " + json.dumps(refusal.body).encode() + b"\n\n"


async def _read_parts(scope: Scope, receive: Receive, limit: int, grow: Callable[[int], None]) -> bytes:
    announced = header(scope, b"content-length")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > limit):
        raise _too_large(limit)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        grow(len(parts[-1]))
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> Refusal:
    size = f"{limit >> 20} MiB" if limit % (1 << 20) == 0 else f"{limit} bytes"
    return Refusal(413, f"the body is larger than {size}", "request_too_large")
