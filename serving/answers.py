"""What went out to a caller, seen as it passes: status, version, first token, events, usage. For what is counted."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Awaitable
from typing import Any

from serving.http_messages import Message, Send
from serving.metrics import Began

USAGE = re.compile(rb'"usage":\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
CODE = re.compile(rb'"code":\s*"([^"\\]{1,64})"')
MOST_REMEMBERED = 100_000


class Outgoing:
    """Stands in the place of `send`. No coroutine of its own: a stream has thousands of parts a second."""

    __slots__ = ("_began", "_first", "_send", "_started", "adapter", "code", "complete", "events", "status", "usage")

    def __init__(self, send: Send, began: Began | None) -> None:
        self._send, self._began = send, began
        self.status, self.events, self.adapter, self.code, self.complete = 0, 0, "", "", False
        self.usage: dict[str, Any] | None = None
        self._started, self._first = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def first(self) -> float | None:
        """Seconds until the first part went out."""
        return self._first - self._started if self._first else None

    def __call__(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            for name, value in message["headers"]:
                if name == b"x-ft-adapter":
                    self.adapter = value.decode()
        elif body := message.get("body"):
            if not self.events:
                self._first = time.monotonic()
                if self._began:
                    self._began.first()
            self.events += 1
            if self._began and b'"usage":' in body:
                self._read_usage(body)
            if self.status >= 400 and (found := CODE.search(body)):
                self.code = found[1].decode()
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True
        return self._send(message)

    def _read_usage(self, body: bytes) -> None:
        found = USAGE.findall(body)
        try:
            self.usage = json.loads(found[-1]) if found else self.usage
        except ValueError:  # somebody's answer may be anything
            self.usage = None


class Remembered:
    """The versions of the newest answers by key and request id, so that feedback need not say what it is about.

    `most` of them at most, and the newest half of these always. Two dicts in turn, of which the older goes whole: one
    that loses an entry for each that comes is made anew, with megabytes in a piece, again and again.
    """

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._half = most // 2
        self._new: dict[str, str] = {}
        self._old: dict[str, str] = {}

    def put(self, key: str, request: str, adapter: str) -> None:
        if len(self._new) >= self._half:
            self._old, self._new = self._new, {}
        # Two strings, of which one is there once: an object for each answer cost 400 bytes, 40 MB in all.
        self._new[f"{key} {request}"] = sys.intern(adapter)

    def get(self, key: str, request: str) -> str | None:
        found = f"{key} {request}"
        return self._new.get(found) or self._old.get(found)
