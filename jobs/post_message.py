"""One POST: bounded in time and size, redirects are not followed."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from jobs.sink_answer import Answer
from registry.sink_message import Message, scrubbed

REPLY_BYTES, REPLY_SECONDS = 2000, 1.0


def post(message: Message, timeout: float) -> Answer:
    """What came back within so many seconds; never raises for what the receiver or the network does."""
    return asyncio.run(_post(message, timeout))


async def _post(message: Message, timeout: float) -> Answer:
    import aiohttp
    from yarl import URL

    began = time.monotonic()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
            session.post(URL(message.url, encoded=True), data=message.body, headers=message.headers,
                         allow_redirects=False, proxy=proxy_for(message.url)) as reply,
        ):  # fmt: skip
            text = await _beginning(reply)
            wait = reply.headers.get("Retry-After", "")
            return Answer(reply.status, scrubbed(text, message), wait, time.monotonic() - began)
    except TimeoutError:
        return Answer(None, f"no answer within {timeout:g} s", "", time.monotonic() - began)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        said = scrubbed(f"{type(error).__name__}: {error}", message)
        return Answer(None, said, "", time.monotonic() - began)


async def _beginning(reply: object) -> str:
    """The first of what a receiver says; the status has come already, so whatever happens here changes nothing."""
    import aiohttp

    assert isinstance(reply, aiohttp.ClientResponse)
    found = b""
    with suppress(aiohttp.ClientError, OSError, ValueError):
        async with asyncio.timeout(REPLY_SECONDS):
            while len(found) < REPLY_BYTES and (part := await reply.content.read(REPLY_BYTES - len(found))):
                found += part
    return found.decode("utf-8", errors="replace")


def proxy_for(url: str) -> str | None:
    """As the environment says. Not aiohttp's own `trust_env`, which would send passwords of .netrc too."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
