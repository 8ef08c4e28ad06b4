"""A loopback server with OpenAI's chat completions as a provider has them: a key, rate limits, options that it refuses.

`with Provider(answer) as provider:` runs it in a thread; `provider.url` ends with /v1.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web

from tests.fakes.loopback import Loopback

KEY = "sk-canned-provider"


@dataclass(frozen=True)
class Refusal:
    """Instead of an answer. `drop`: the connection is closed without a word."""

    status: int = 500
    message: str = "canned"
    param: str | None = None
    code: str | None = None
    wait: str = ""
    drop: bool = False


@dataclass(frozen=True)
class Choice:
    """An answer with what else is said of it. `usage`: tokens of question and answer, if it tells."""

    text: str | None
    finish_reason: str = "stop"
    usage: tuple[int, int] | None = None


# (the request's body, how often these messages came before) -> the answer, or how it is refused.
Answerer = Callable[[dict[str, Any], int], str | Choice | Refusal]


@dataclass
class Provider:
    answer: Answerer
    asked: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    def __enter__(self) -> Provider:
        self._server = Loopback()
        self.url = self._server.start(self._app()) + "/v1"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.stop()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "")
        if given != f"Bearer {KEY}":
            said = f"Incorrect API key provided: {given.removeprefix('Bearer ')}."
            return _error(Refusal(401, said, code="invalid_api_key"))
        body = await request.json()
        before = sum(each["messages"] == body["messages"] for each in self.asked)
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await asyncio.sleep(0.005)
            return self._reply(request, body, self.answer(body, before))
        finally:
            self.at_once -= 1

    def _reply(self, request: web.Request, body: dict[str, Any], said: str | Choice | Refusal) -> web.Response:
        if isinstance(said, Refusal):
            if said.drop and request.transport:
                request.transport.abort()
            return _error(said)
        choice = said if isinstance(said, Choice) else Choice(said)
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        answer = {"index": 0, "message": message, "finish_reason": choice.finish_reason}
        told: dict[str, Any] = {"object": "chat.completion", "model": body["model"], "choices": [answer]}
        if choice.usage:
            told["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), choice.usage, strict=True))
        return web.json_response(told)


def _error(refusal: Refusal) -> web.Response:
    error = {"message": refusal.message, "type": "canned", "param": refusal.param, "code": refusal.code}
    headers = {"Retry-After": refusal.wait} if refusal.wait else {}
    return web.json_response({"error": error}, status=refusal.status, headers=headers)
