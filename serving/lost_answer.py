"""Notices that the connection on which an upstream answers is gone, where aiohttp does not tell who reads from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

LOOK_SECONDS = 1.0


@asynccontextmanager
async def told_when_lost(answer: aiohttp.ClientResponse) -> AsyncIterator[None]:
    """Reads inside the block end with ClientPayloadError when the connection was lost before the answer's end.

    aiohttp 3.14 closes a connection on which half of an answer came in good order and then something that is no chunk,
    and leaves whoever is reading from it to wait for ever.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer
        if _is_lost(answer):
            answer.content.set_exception(aiohttp.ClientPayloadError("the connection is gone"))
        else:
            timer = loop.call_later(LOOK_SECONDS, look)

    timer = loop.call_later(LOOK_SECONDS, look)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _is_lost(answer: aiohttp.ClientResponse) -> bool:
    connection, content = answer.connection, answer.content
    return connection is not None and connection.transport is None and not content.is_eof() and not content.exception()
