"""A loopback server that speaks the part of vLLM's protocol that we use, and fails as vLLM does.

It answers from a function instead of a model. Faults are asked for by the answer: return a `Fault` instead of text.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web

from tests.fakes.loopback import Loopback

KEY = "answering-key"


@dataclass(frozen=True)
class Fault:
    """`status` with an error body; `garbage` is sent with 200; `hang` seconds pass before anything is sent."""

    status: int = 200
    garbage: str = ""
    hang: float = 0.0
    drop: bool = False


# (model, messages, attempt at these messages) -> the answer's text, or how to fail.
Answerer = Callable[[str, list[dict[str, str]], int], str | Fault]


@dataclass
class AnsweringEngine:
    """`with AnsweringEngine(answer) as engine:` runs it in a thread. `asked` has every chat request's body."""

    answer: Answerer
    loaded: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    refuse_load: bool = False
    url: str = ""

    def __enter__(self) -> AnsweringEngine:
        self._server = Loopback()
        self.url = self._server.start(self._app())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.stop()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/v1/completions", self._score)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        base = {"id": "base", "object": "model", "root": "/models/base", "parent": None}
        loras = [{"id": name, "object": "model", "root": path, "parent": "base"} for name, path in self.loaded.items()]
        return web.json_response({"object": "list", "data": [base, *loras]})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        self.calls.append(("load", name))
        assert not body.get("load_inplace")
        if name in self.loaded:
            return _error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if self.refuse_load:
            return _error(500, "InternalServerError", "LoRA rank 64 is greater than max_lora_rank 16.")
        self.loaded[name] = path
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        self.calls.append(("unload", name))
        if self.loaded.pop(name, None) is None:
            return _error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return _error(401, "Unauthorized", "Unauthorized")
        body = await request.json()
        if body["model"] != "base" and body["model"] not in self.loaded:
            return _error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        attempt = 1 + sum(
            each["model"] == body["model"] and each["messages"] == body["messages"] for each in self.asked
        )
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await asyncio.sleep(0.002)
            return await self._reply(request, self.answer(body["model"], body["messages"], attempt))
        finally:
            self.at_once -= 1

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids = [each["prompt_ids"] for each in self._samples(body["model"]) if each["messages"] == body["messages"]]
        return web.json_response({"tokens": ids[0] if ids else []})

    async def _score(self, request: web.Request) -> web.Response:
        """Prompt logprobs, for prompts of the adapter's own fingerprint: those that the trainer heard."""
        body = await request.json()
        for sample in self._samples(body["model"]):
            if body["prompt"] == sample["prompt_ids"] + sample["continuation_ids"]:
                heard = [*[0.0] * (len(sample["prompt_ids"]) - 1), *sample["logprobs"]["bf16"]]
                scores = [{str(id_): {"logprob": value}} for id_, value in zip(body["prompt"][1:], heard, strict=True)]
                return web.json_response({"choices": [{"text": "", "prompt_logprobs": [None, *scores]}]})
        return _error(400, "BadRequestError", "no such prompt in the fingerprint")

    def _samples(self, name: str) -> list[dict[str, Any]]:
        """Of the fingerprint of a loaded adapter."""
        content = json.loads((Path(self.loaded[name]) / "fingerprint.json").read_text(encoding="utf-8"))
        return list(content["samples"])

    async def _reply(self, request: web.Request, answer: str | Fault) -> web.StreamResponse:
        if isinstance(answer, str):
            message = {"role": "assistant", "content": answer}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})
        await asyncio.sleep(answer.hang)
        if answer.drop:
            assert request.transport is not None
            request.transport.close()
        if answer.status != 200:
            return _error(answer.status, "InternalServerError", "EngineDeadError")
        return web.Response(text=answer.garbage, content_type="application/json")


def _error(status: int, kind: str, message: str) -> web.Response:
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(body, status=status)
