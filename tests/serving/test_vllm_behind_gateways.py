"""A gateway beside a real server with a real vLLM: the server unloads nothing that the gateway still asks.

It comes behind test_swap.py, which counts the versions of the one server from 1, and before test_vllm_ends.py.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from registry.gateways import gateways
from tests.conftest import started
from tests.serving.conftest import MODEL, Served
from tests.serving.test_gateways import Process

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "Who are you?"}]


async def version(session: aiohttp.ClientSession, url: str) -> str:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 2}
    async with session.post(f"{url}/v1/chat/completions", json=body) as got:
        await got.read()
        return got.headers.get("x-ft-adapter", "")


async def until(session: aiohttp.ClientSession, url: str, name: str) -> None:
    deadline = time.monotonic() + 60
    while (last := await version(session, url)) != name:
        assert time.monotonic() < deadline, last
        await asyncio.sleep(0.1)


async def begin_long(session: aiohttp.ClientSession, url: str) -> aiohttp.ClientResponse:
    """A stream of some ten seconds, of which a part has come."""
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 300, "ignore_eos": True, "stream": True}
    answer = await session.post(f"{url}/v1/chat/completions", json=body)
    await answer.content.readany()
    return answer


def test_a_version_stays_loaded_while_another_gateway_streams_from_it(served: Served) -> None:
    async def run(url: str) -> None:
        async with aiohttp.ClientSession() as session:
            first = await version(session, served.url)
            await until(session, url, first)
            stream = await begin_long(session, url)
            reading = asyncio.create_task(stream.text())
            for word in ("beta", "alpha"):
                latest = served.register(word)
                served.promote(latest)
                await asyncio.gather(until(session, url, latest.name), until(session, served.url, latest.name))
            assert not reading.done(), "make the stream longer"
            [row] = gateways(served.store)
            assert {name for name, _ in row.in_flight} == {first}
            while not reading.done():
                assert first in served.status.loaded, "unloaded while a gateway streams from it"
                await asyncio.sleep(0.2)
            whole = await reading
            assert "[DONE]" in whole
            assert '"error"' not in whole
            deadline = time.monotonic() + 20
            while first in served.status.loaded:
                assert time.monotonic() < deadline, gateways(served.store)
                await asyncio.sleep(0.2)

    env = {"FT_GATEWAY_HOST": "127.0.0.1"}
    command = [sys.executable, "-m", "cli.main", "serve", "gateway", "--port", "0"]
    with started(command, env, Path(served.project.root), stderr=subprocess.STDOUT) as process:
        said = asyncio.run(Process(process).said("gateway http"))
        asyncio.run(run(said.split()[-1].removesuffix("/v1")))
