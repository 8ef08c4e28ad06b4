"""One attempt: a request goes to one upstream, and its answer to the caller, piece by piece, labelled.

Nothing of a caller's headers goes on to the engine, its Authorization least of all.
"""

from __future__ import annotations

import json

import aiohttp

from serving.ask import Ask
from serving.http_messages import Headers, Refusal, Send, event_of
from serving.routes import Board, Route

BROKEN = (
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
    RuntimeError,
)  # RuntimeError: its session was closed


class UpstreamBroke(Exception):
    """The engine failed before a byte of its answer had gone out."""


async def pass_on(board: Board, ask: Ask, route: Route, send: Send, *, last: bool) -> None:
    """Send it to `route`, and the answer to the caller. Raises UpstreamBroke as long as nothing has gone out.

    `last`: nobody else will be asked, so an engine's own error is passed on. No await lies between the look at the
    routes and the count, so no unload can come between them.
    """
    with board.counted(route):
        body = json.dumps({**ask.request, "model": route.adapter}, separators=(",", ":")).encode()
        labelled = [*ask.headers, (b"x-ft-adapter", route.adapter.encode())]
        try:
            answer = await route.engine.session.post(
                route.engine.url + ask.path, data=body, headers={"Content-Type": "application/json"}
            )
        except BROKEN as error:
            raise UpstreamBroke(_said(error)) from error
        async with answer:
            first = await _first_part(answer, last)
            if refusal := route.engine.refusal(answer.status, first):
                raise refusal
            await send({"type": "http.response.start", "status": answer.status, "headers": _kept(answer, labelled)})
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


def _kept(answer: aiohttp.ClientResponse, ours: Headers) -> Headers:
    kind = answer.headers.get("Content-Type", "application/json").encode()
    length = answer.headers.get("Content-Length")
    sized = [(b"content-length", length.encode())] if length and not _is_stream(answer) else []
    return [(b"content-type", kind), *sized, *ours]


def _is_stream(answer: aiohttp.ClientResponse) -> bool:
    return answer.content_type == "text/event-stream"


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__
