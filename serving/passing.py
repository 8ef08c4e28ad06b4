"""One attempt: a request goes to one upstream, and its answer to the caller, piece by piece, labelled.

Nothing of a caller's headers goes on to the upstream, its Authorization least of all; nothing of an upstream's headers,
and of its errors neither its address nor a key, comes back.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from serving.http_messages import ClientGone, Headers, Refusal, Send, event_of
from serving.lost_answer import told_when_lost
from serving.routes import Board, Route
from serving.upstream_answer import EVENT_STREAM, ended_early, fault_in, headers_of

LOG = logging.getLogger("ft.gateway")
# RuntimeError: its session was closed. ValueError: an address or a key that no request can be made of.
BROKEN = (aiohttp.ClientError, OSError, TimeoutError, RuntimeError, ValueError)
AGAIN_SECONDS = 5
# A caller that does not read any more is not waited for when its answer has come to an end.
GOODBYE_SECONDS = 5.0
# The longest answer that is not a stream: what embeddings of a whole batch need, not what a broken upstream can send.
LONGEST = 64 << 20
# Made once: json.dumps with separators makes one for each call.
DENSE = json.JSONEncoder(separators=(",", ":"))
SENT = {"Content-Type": "application/json"}


class Unanswered(Exception):
    """Nothing has gone out, so somebody else can be asked. `refusal` is for the caller if nobody can.

    `again`: worth asking the same name once more, within `patience` seconds where that is longer than usual. `blame`:
    the upstream failed, and was not only busy.
    """

    def __init__(self, refusal: Refusal, *, again: bool = False, blame: bool = True, patience: float = 0.0) -> None:
        super().__init__(refusal.message)
        self.refusal, self.again, self.blame, self.patience = refusal, again, blame, patience


@dataclass(slots=True)  # frozen costs 2 microseconds of each request
class Attempt:
    """What is asked of whom. `first` and `whole`: until when (the loop's time) the answer begins and ends. `begun` is
    called when it has begun; `headers` go with it."""

    route: Route
    path: str
    request: dict[str, Any]
    headers: Headers
    first: float
    whole: float
    begun: Callable[[], None]


async def pass_on(board: Board, attempt: Attempt, send: Send) -> Refusal | None:
    """The answer, to the caller. What the caller was told as well, if it broke in the middle.

    Raises Unanswered as long as nothing has gone out, Refusal for an answer that nobody else would give otherwise. No
    await lies between the look at the routes and the count, so no unload can come between them.
    """
    with board.counted(attempt.route):
        answer, kind, first = await _begin(attempt)
        async with answer:
            _refuse(attempt, answer, kind, first)
            attempt.begun()
            headers = headers_of(answer.status, kind, answer.headers.get("Retry-After", ""), first)
            headers += attempt.headers
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            if kind == EVENT_STREAM:
                return await _stream(attempt, answer, first, send)
            await send({"type": "http.response.body", "body": first})
            return None


async def _begin(attempt: Attempt) -> tuple[aiohttp.ClientResponse, str, bytes]:
    """The answer, its content type, and its first events, or the whole of it where it is no stream.

    Only then is its start sent on: a stream's headers come before its first token is even computed, and until a
    token has gone out the request can still go to another upstream.
    """
    engine = attempt.route.engine
    body = DENSE.encode({**attempt.request, "model": attempt.route.adapter}).encode()
    waiting = asyncio.timeout_at(attempt.first)
    try:
        async with waiting:
            # A redirect could lead anywhere, with what the caller wrote.
            answer = await engine.session.post(
                engine.url + attempt.path, data=body, headers=SENT, allow_redirects=False
            )
            try:
                kind = answer.content_type
                return answer, kind, await _first_part(answer, kind)
            except BaseException:
                answer.close()
                raise
    except BROKEN as error:
        if waiting.expired():
            raise Unanswered(Refusal(504, "no answer began in time", "engine_timeout", retry_after=30)) from None
        raise _broke(attempt, error) from error


async def _first_part(answer: aiohttp.ClientResponse, kind: str) -> bytes:
    length = answer.content_length
    if kind != EVENT_STREAM and length is not None and length <= LONGEST:
        return await answer.read()
    async with told_when_lost(answer):
        if kind != EVENT_STREAM:
            return await _whole(answer)
        first = await answer.content.readany()
        # Comments keep a connection alive while nothing is said yet.
        while first.startswith(b":") and b"data:" not in first and (more := await answer.content.readany()):
            first += more
        return first


async def _whole(answer: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    while part := await answer.content.readany():
        parts.append(part)
        size += len(part)
        if size > LONGEST:
            raise aiohttp.ClientPayloadError("an answer without end")
    return b"".join(parts)


def _refuse(attempt: Attempt, answer: aiohttp.ClientResponse, kind: str, first: bytes) -> None:
    """Raises for everything that is no answer."""
    status = answer.status
    if status == 200 and kind == EVENT_STREAM and first.startswith(b"data: {") and not _is_error(first):
        return
    refusal = attempt.route.engine.refusal(status, first)
    if refusal is not None:
        if refusal.status == 429 or refusal.status >= 500:
            raise Unanswered(refusal, blame=refusal.status >= 500)
        raise refusal
    if status == 429:
        later = answer.headers.get("Retry-After", "")
        wait = int(later) if later.isdecimal() and len(later) < 6 else AGAIN_SECONDS
        raise Unanswered(Refusal(429, "the engine takes no more requests just now", "engine_busy", retry_after=wait),
                         blame=False)  # fmt: skip
    if status == 404:
        raise _not_there(attempt, first)
    fault = "the engine failed" if _is_error(first) else fault_in(status, kind, first)
    if fault:
        LOG.warning("%s at %s: %s", attempt.route.adapter, attempt.route.engine.url, fault)
        raise _unanswered(fault if first else "the engine closed without an answer")


def _is_error(first: bytes) -> bool:
    return first.startswith((b'data: {"error"', b'data:{"error"'))


def _not_there(attempt: Attempt, first: bytes) -> Exception:
    if b"does not exist" in first:
        # Its adapters were loaded when the routes were put up: it has lost them, and will get them back.
        failed = Refusal(503, "the engine does not have it just now", "engine_away", retry_after=AGAIN_SECONDS)
        return Unanswered(failed, again=True, blame=False)
    return Refusal(404, f"the engine behind this model does not answer {attempt.path}", "not_found")


async def _stream(attempt: Attempt, answer: aiohttp.ClientResponse, part: bytes, send: Send) -> Refusal | None:
    older = newer = b""
    read, broke = answer.content.readany, None
    lasting = asyncio.timeout_at(attempt.whole)
    try:
        async with lasting, told_when_lost(answer):
            while part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                older, newer = newer, part
                part = await read()
        if ended_early(EVENT_STREAM, older[-16:] + newer[-64:]):
            broke = _middle("it closed before the answer's end")
    except BROKEN as error:
        if lasting.expired():
            broke = Refusal(504, "the answer took longer than this route allows", "answer_timeout")
        else:
            broke = _middle(_said(attempt, error))
    await _end(send, broke, newer)
    return broke


def _middle(what: str) -> Refusal:
    return Refusal(502, f"the engine broke in the middle of its answer: {what}", "engine_broke")


async def _end(send: Send, broke: Refusal | None, last: bytes) -> None:
    """Raises ClientGone if the caller does not take the end."""
    try:
        async with asyncio.timeout(GOODBYE_SECONDS):
            if broke is not None:
                gap = b"" if last.endswith(b"\n\n") else b"\n\n"  # it may have broken in the middle of an event
                await send({"type": "http.response.body", "body": gap + event_of(broke), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except TimeoutError:
        raise ClientGone from None


def _broke(attempt: Attempt, error: BaseException) -> Unanswered:
    return _unanswered(f"the engine broke: {_said(attempt, error)}")


def _unanswered(what: str) -> Unanswered:
    return Unanswered(Refusal(503, what, "engine_away", retry_after=AGAIN_SECONDS), again=True)


def _said(attempt: Attempt, error: BaseException) -> str:
    """What the error says (addresses, whole headers) is for the log alone."""
    route = attempt.route
    LOG.warning("%s at %s: %s: %s", route.adapter, route.engine.url, type(error).__name__, str(error)[:200])
    return "it cannot be reached" if isinstance(error, aiohttp.ClientConnectorError) else "it broke off"
