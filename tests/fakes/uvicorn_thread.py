"""An ASGI app behind our own uvicorn set-up, in a thread of its own, on a free port of loopback."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving.listening import http_server, listen, url_of


@contextmanager
def uvicorn_thread(app: Any) -> Iterator[str]:
    """Its address, when it answers; the thread is gone at the end."""
    listening = listen("127.0.0.1", 0, "the test's server", "nothing")
    server = http_server(app, drain_seconds=1, log_level="warning")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()
