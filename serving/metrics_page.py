"""`GET /metrics`: for who is on this machine, or has the internal key. Names of keys and routes are nobody else's."""

from __future__ import annotations

import asyncio

from serving.http_messages import Headers, Refusal, Scope, Send
from serving.listening import is_loopback
from serving.metrics import CONTENT_TYPE, Metrics

# A proxy on this machine makes everybody look like somebody on it; these are what proxies add.
PROXIED = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via"})


async def answer_metrics(metrics: Metrics, scope: Scope, send: Send, headers: Headers, *, internal: bool) -> None:
    """`internal`: the caller has the internal key. Raises Refusal (403)."""
    if not (internal or is_here(scope)):
        raise Refusal(403, "/metrics is for this machine, or needs the internal key", "internal_key_needed")
    # In a thread: a long text, made in the event loop, would hold up every stream.
    text = await asyncio.to_thread(metrics.text)
    size = (b"content-length", str(len(text)).encode())
    whole = [(b"content-type", CONTENT_TYPE.encode()), size, *headers]
    await send({"type": "http.response.start", "status": 200, "headers": whole})
    await send({"type": "http.response.body", "body": text})


def is_here(scope: Scope) -> bool:
    """Is the caller a program on this machine?"""
    client = scope.get("client") or ("", 0)
    return is_loopback(client[0]) and not any(name in PROXIED for name, _ in scope["headers"])
