"""HTTP/1.1 as cheaply as a client can speak it: ready-made requests, one blocking connection, times of the answer.

A library would take longer for a request than the gateway that is measured.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

MODEL, KEY = "tickets", "bench-internal-key-of-enough-length-000"
PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "My parcel has not come yet, and nobody answers the telephone. What can I do?"}]
END_OF_CHUNKS = b"0\r\n\r\n"


def chat_body(*, stream: bool = False, model: str = MODEL, **more: Any) -> bytes:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 64, "temperature": 0, "stream": stream, **more}
    return json.dumps(body, separators=(",", ":")).encode()


def post(port: int, body: bytes, headers: Mapping[str, str]) -> bytes:
    """The whole request, as it goes over the wire."""
    told = {"host": f"127.0.0.1:{port}", "content-type": "application/json", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"POST {PATH} HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One kept-alive connection; a context manager. Every answer must be a 200."""

    def __init__(self, port: int, seconds: float = 30.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def answer(self, request: bytes) -> float:
        """Seconds until the last byte of the answer."""
        began = time.perf_counter()
        self._socket.sendall(request)
        head, body = self._head()
        length = _length(head)
        if length is None:
            while not body.endswith(END_OF_CHUNKS):
                body += self._more()
        else:
            size = len(body)
            while size < length:
                size += len(self._more())
        return time.perf_counter() - began

    def first_event(self, request: bytes) -> float:
        """Seconds until the first byte of a stream's first event; the rest is read too."""
        began = time.perf_counter()
        self._socket.sendall(request)
        _, body = self._head()
        while b"data: " not in body:
            body += self._more()
        seconds = time.perf_counter() - began
        while not body.endswith(END_OF_CHUNKS):
            body = body[-len(END_OF_CHUNKS) :] + self._more()
        return seconds

    def _head(self) -> tuple[bytes, bytes]:
        raw = b""
        while b"\r\n\r\n" not in raw:
            raw += self._more()
        head, _, body = raw.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"it answered {raw[:400]!r}")
        return head, body

    def _more(self) -> bytes:
        part = self._socket.recv(1 << 16)
        if not part:
            raise ConnectionError("it closed before the end of its answer")
        return part


def _length(head: bytes) -> int | None:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return None
