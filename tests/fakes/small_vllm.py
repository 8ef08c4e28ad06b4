"""`python -m tests.fakes.small_vllm -m vllm... --port N ...`: what a server takes for vLLM, up within a second.

It has what a vLLM that was just started has: its own port and key, and no adapters. It says of an adapter what the
adapter's own fingerprint says. A file `broken` in its base's folder makes it end while it starts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web


class SmallVllm:
    """`loaded` is adapter name -> folder."""

    def __init__(self, key: str, base: str) -> None:
        self.key, self.base = key, base
        self.loaded: dict[str, str] = {}
        self.asleep = False

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._with_key])
        app.add_routes([
            web.get("/health", self.health),
            web.get("/v1/models", self.models),
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.score),
            web.post("/tokenize", self.tokenize),
            web.post("/v1/load_lora_adapter", self.load),
            web.post("/v1/unload_lora_adapter", self.unload),
            web.post("/sleep", self.sleep),
            web.post("/wake_up", self.wake),
        ])  # fmt: skip
        return app

    @web.middleware
    async def _with_key(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/health" and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def models(self, _: web.Request) -> web.Response:
        loras = [{"id": name, "root": folder, "parent": "base"} for name, folder in self.loaded.items()]
        return web.json_response({"data": [{"id": "base", "root": self.base, "parent": None}, *loras]})

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loaded[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        found = self.loaded.pop((await request.json())["lora_name"], None)
        return web.Response(status=200 if found else 404)

    async def sleep(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "wait"
        self.asleep = True
        return web.json_response({"status": "sleeping"})

    async def wake(self, _: web.Request) -> web.Response:
        self.asleep = False
        return web.Response()

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.asleep or body["model"] not in {"base", *self.loaded}:
            return web.json_response({"error": {"message": "no", "type": "x", "code": 404}}, status=404)
        await asyncio.sleep(float(body.get("user") or 0))
        choice = {"index": 0, "message": {"role": "assistant", "content": self.base}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response({"model": body["model"], "choices": [choice], "usage": usage})

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": self._sample((await request.json())["model"])["prompt_ids"]})

    async def score(self, request: web.Request) -> web.Response:
        body = await request.json()
        sample = self._sample(body["model"])
        heard = [*[0.0] * (len(sample["prompt_ids"]) - 1), *sample["logprobs"]["train"]]
        scores = [{str(id_): {"logprob": each}} for id_, each in zip(body["prompt"][1:], heard, strict=True)]
        return web.json_response({"choices": [{"text": "", "prompt_logprobs": [None, *scores]}]})

    def _sample(self, name: str) -> dict[str, Any]:
        fingerprint = Path(self.loaded[name]) / "fingerprint.json"
        return dict(json.loads(fingerprint.read_text(encoding="utf-8"))["samples"][0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    asked, _ = parser.parse_known_args()
    if (asked.model / "broken").exists():
        sys.exit("canned: this base model cannot be served")
    vllm = SmallVllm(os.environ["VLLM_API_KEY"], asked.model.name)
    web.run_app(vllm.app(), host="127.0.0.1", port=asked.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
