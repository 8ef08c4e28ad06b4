"""The caller's side of an ASGI app's `send`: what it has been told."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from serving.http_messages import Message


@dataclass
class Told:
    """`slow`: seconds that each piece of a body takes to get rid of; `begun` is set with the first message."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: int = 0
    is_over: bool = False
    slow: float = 0.0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: Message) -> None:
        assert not self.is_over
        if message["type"] == "http.response.start":
            assert not self.status
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            assert self.status
            self.body += message.get("body", b"")
            self.pieces += bool(message.get("body"))
            self.is_over = not message.get("more_body", False)
            await asyncio.sleep(self.slow)
        self.begun.set()

    @property
    def said(self) -> str:
        """The text of the answer, whole or a stream."""
        return "".join(_text(each) for each in self.events)

    @property
    def events(self) -> list[dict[str, Any]]:
        if not self.body.startswith(b"data:"):
            return [json.loads(self.body)]
        lines = [each.removeprefix("data: ") for each in self.body.decode().split("\n\n") if each.strip()]
        return [json.loads(each) for each in lines if each != "[DONE]"]

    @property
    def is_whole(self) -> bool:
        return self.is_over and self.body.endswith(b"data: [DONE]\n\n")


def _text(event: dict[str, Any]) -> str:
    choice = event["choices"][0] if "choices" in event else {}
    return str((choice.get("message") or choice.get("delta") or {}).get("content", ""))
