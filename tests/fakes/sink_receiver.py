"""A real receiver of webhooks on loopback, which can fail in every way that real ones do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Besides a status: no answer, half an answer, or the connection closed without a word.
HANG, CUT, CLOSE = "hang", "cut", "close"


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes
    at: float


@dataclass
class Receiver:
    """`answer` decides what comes back: a status, (status, headers), or one of HANG, CUT, CLOSE."""

    port: int = 0
    answer: Callable[[Received], Any] = lambda _: 200
    received: list[Received] = field(default_factory=list)
    text: bytes = b"ok"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/services/T0/very-secret"

    def wait_for(self, count: int, seconds: float = 30) -> list[Received]:
        end = time.monotonic() + seconds
        while len(self.received) < count:
            assert time.monotonic() < end, f"{len(self.received)} of {count} came"
            time.sleep(0.02)
        return self.received


@contextmanager
def sink_receiver(port: int = 0) -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found = Received(self.path, {key.lower(): value for key, value in self.headers.items()}, body, time.time())
            receiver.received.append(found)
            self._reply(receiver.answer(found))

        def _reply(self, answer: Any) -> None:
            self.close_connection = True
            if answer == HANG:
                closed.wait(60)
            elif answer == CUT:
                self.wfile.write(b"HTTP/1.1 200 O")
            elif answer != CLOSE:
                status, headers = answer if isinstance(answer, tuple) else (answer, {})
                self.send_response(status)
                for name, value in {"Content-Length": str(len(receiver.text)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(receiver.text)

        def log_message(self, *_: Any) -> None:
            pass

    closed = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        receiver.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield receiver
        finally:
            closed.set()
            server.shutdown()
            thread.join()
