"""`python -m tests.fakes.vllm_door URL KEY -m vllm... --port N ...`: a vLLM that starts at once.

It is a door to one that runs at URL, which answers all requests, and has what a vLLM that was just started has: its own
port and key, and no adapters. So one engine serves many starts, one at a time, and the door can be killed as vLLM can.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

HOP = {"transfer-encoding", "connection", "content-length", "content-encoding"}


class Door:
    """`key` is what this start asks for, `engine_key` what the engine behind it does."""

    def __init__(self, url: str, engine_key: str, key: str) -> None:
        self.url, self.engine_key, self.key = url, engine_key, key

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/load_lora_adapter", self.load)
        app.router.add_route("*", "/{path:.*}", self.pass_on)
        app.cleanup_ctx.append(self._behind)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self.pass_on(request)

    async def load(self, request: web.Request) -> web.StreamResponse:
        return await self.pass_on(request)

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/health" and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = await request.read()
        headers = {"Content-Type": request.headers.get("Content-Type", "application/json")}
        async with self.session.request(request.method, self.url + request.path_qs, data=body, headers=headers) as got:
            kept = {name: value for name, value in got.headers.items() if name.lower() not in HOP}
            answer = web.StreamResponse(status=got.status, headers=kept)
            await answer.prepare(request)
            async for chunk in got.content.iter_any():
                await answer.write(chunk)
            await answer.write_eof()
            return answer

    async def _behind(self, _: web.Application) -> AsyncIterator[None]:
        headers = {"Authorization": f"Bearer {self.engine_key}", "Accept-Encoding": "identity"}
        async with aiohttp.ClientSession(headers=headers) as self.session:
            await self._forget_adapters()
            yield

    async def _forget_adapters(self) -> None:
        async with self.session.get(f"{self.url}/v1/models") as got:
            loaded = [each["id"] for each in (await got.json())["data"] if each.get("parent")]
        for name in loaded:
            async with self.session.post(f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name}) as got:
                await got.read()


def main() -> None:
    url, engine_key, *arguments = sys.argv[1:]
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    asked, _ = parser.parse_known_args(arguments)
    door = Door(url, engine_key, os.environ["VLLM_API_KEY"])
    web.run_app(door.app(), host="127.0.0.1", port=asked.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
