"""What the gateway reads from clients and writes to them: bodies within limits, errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Rinse = Callable[[], Awaitable[None]]

MAX_BODY = 8 << 20
BODY_SECONDS = 30.0
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
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.retry_after, self.param = retry_after, param

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """Nobody is there to answer."""


def header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def request_id(scope: Scope) -> bytes:
    """The caller's own, if it is a plain one; else a new one."""
    given = header(scope, b"x-request-id")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()


async def read_request(scope: Scope, receive: Receive) -> dict[str, Any]:
    """The body as a JSON object with a `model`. Raises Refusal (400, 408, 413) and ClientGone."""
    body = await read_body(scope, receive, MAX_BODY)
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    if not isinstance(request.get("model"), str):
        raise Refusal(400, "`model` must be a name; GET /v1/models lists them", "invalid_model", param="model")
    return request


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, of at most `limit` bytes. Raises Refusal (408, 413) and ClientGone."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_parts(scope, receive, limit)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", "request_timeout") from None


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


async def send_refusal(send: Send, refusal: Refusal, headers: Headers, rinse: Rinse | None = None) -> None:
    """`rinse` takes in what is left of a body that is too long, while its sender may read the answer."""
    extra: Headers = []
    if refusal.retry_after is not None:
        extra.append((b"retry-after", str(refusal.retry_after).encode()))
    if refusal.status in (408, 413):
        # What is left of the body is not read, so the connection cannot be used again.
        extra.append((b"connection", b"close"))
    await send_json(send, refusal.status, refusal.body, [*headers, *extra], rinse if refusal.status == 413 else None)


def event_of(refusal: Refusal) -> bytes:
    """The error as the last event of a stream that has begun."""
    return b"data: " + json.dumps(refusal.body).encode() + b"\n\n"


async def _read_parts(scope: Scope, receive: Receive, limit: int) -> bytes:
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
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> Refusal:
    size = f"{limit >> 20} MiB" if limit % (1 << 20) == 0 else f"{limit} bytes"
    return Refusal(413, f"the body is larger than {size}", "request_too_large")
