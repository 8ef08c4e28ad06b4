"""The socket, the event loop and the set-up of our HTTP servers: the gateway, and the receiver of events."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn

from registry.errors import Trouble
from serving.bounded_head import MOST_SECONDS, BoundedHead


def listen(host: str, port: int, who: str, setting: str) -> socket.socket:
    """A listening socket, taken before anything slow is begun. Raises Trouble, which names the `setting` to change."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise Trouble(f"{who} cannot listen on port {port}: {error.strerror}", place=f"{host}:{port}",
                      fix=f"end what uses that port, or choose another with {setting}") from error  # fmt: skip
    return listening


def http_server(app: Any, drain_seconds: int, head_seconds: float = MOST_SECONDS, **more: Any) -> uvicorn.Server:
    """uvicorn with what both servers want, and `more` of its options. It leaves the signals to its caller: it would
    end by them itself, with the engine left running behind it, or with a code other than 0."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=partial(BoundedHead, head_seconds=head_seconds),  # type: ignore[arg-type]
            lifespan="off", ws="none", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=drain_seconds, **more,
        )
    )  # fmt: skip
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    return server


def calm_collector() -> None:
    """What is there when a server begins stays, so the garbage collector need not look at it again and again: with its
    defaults a sixth of a gateway's time went there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


def url_of(listening: socket.socket) -> str:
    """How a program on this machine reaches it."""
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def is_loopback(host: str) -> bool:
    """Does the name or address lead to this machine alone? What is not known to does not."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not there on Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop
