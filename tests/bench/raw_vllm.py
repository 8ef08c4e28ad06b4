"""A vLLM without anything of ours in front of it, as by hand: the two other ways to change an adapter."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from registry.base_models import base_path
from serving.vllm_env import ensure_vllm
from serving.vllm_process import EngineConfig, free_port, vllm_arguments
from tests.bench.real_server import words_in
from tests.bench.swap_replies import Callers, Reply
from tests.conftest import started
from tests.serving.conftest import SERVE, Served

NAME = "tickets"
START_SECONDS = 300.0
# Who restarts an engine in a hurry does not wait for longer.
END_SECONDS = 5.0
FOREIGN = ("PYTHON", "FT_", "MLFLOW_")


async def restarts(here: Served, rounds: int, callers: int) -> dict[str, Any]:
    """The adapter named on vLLM's command line: to change it, stop vLLM and start it with the other one."""
    port, seconds, word = free_port(), list[float](), "alpha"
    async with AsyncExitStack() as running:
        await running.enter_async_context(vllm(here, port, word))
        asking = Callers(f"http://127.0.0.1:{port}", NAME, callers)
        try:
            await _until_said(asking, word, time.time())
            for _ in range(rounds):
                word, began = _other(word), time.time()
                await running.aclose()
                await running.enter_async_context(vllm(here, port, word))
                seconds.append(await _until_said(asking, word, began) - began)
        finally:
            replies = await asking.stop()
    failed = sum(bool(each.error) for each in replies)
    return {"changes": rounds, "seconds": [round(each, 2) for each in seconds], "answered": len(replies) - failed,
            "failed": failed}  # fmt: skip


async def loads_in_place(here: Served, rounds: int, callers: int) -> dict[str, Any]:
    """`load_inplace` under one name, as vLLM offers it: other weights under answers that are being written."""
    port, seconds, loads = free_port(), list[float](), list[tuple[str, float, float]]()
    word, failed_loads = "alpha", 0
    async with vllm(here, port, word), aiohttp.ClientSession() as session:
        asking = Callers(f"http://127.0.0.1:{port}", NAME, callers)
        try:
            await _until_said(asking, word, time.time())
            for _ in range(rounds):
                word = _other(word)
                began = time.time()
                body = {"lora_name": NAME, "lora_path": str(here.made / word), "load_inplace": True}
                async with session.post(f"http://127.0.0.1:{port}/v1/load_lora_adapter", json=body) as got:
                    failed_loads += got.status != 200
                loads.append((word, began, time.time()))
                seconds.append(await _until_said(asking, word, began) - began)
        finally:
            replies = await asking.stop()
    good = [each for each in replies if not each.error]
    return {"changes": rounds, "seconds": [round(each, 3) for each in seconds], "answered": len(good),
            "failed": len(replies) - len(good) + failed_loads,
            "mixed": sum(len(words_in(each.text)) != 1 for each in good),
            "of_the_version_before": sum(_is_late(each, loads) for each in good)}  # fmt: skip


def _is_late(reply: Reply, loads: list[tuple[str, float, float]]) -> bool:
    """Did it begin after a load was over, end before the next one, and come from what was there before?"""
    nexts = [*(began for _, began, _ in loads[1:]), float("inf")]
    return any(done <= reply.began and reply.ended <= after and word not in words_in(reply.text)
               for (word, _, done), after in zip(loads, nexts, strict=True))  # fmt: skip


@asynccontextmanager
async def vllm(here: Served, port: int, word: str) -> AsyncIterator[None]:
    """vLLM with the adapter `word` under NAME, until the end of the block."""
    python = ensure_vllm(here.project, here.settings, here.card)
    config = EngineConfig(here.base, SERVE, here.card)
    arguments = vllm_arguments(config, base_path(here.project, here.base), port)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments, "--lora-modules",
               f"{NAME}={here.made / word}"]  # fmt: skip
    environment = {name: "" for name in os.environ if name.startswith(FOREIGN)}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1",
                    "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": ""}  # fmt: skip
    log = Path(here.project.root / "raw-vllm.log").open("ab")  # noqa: SIM115 (it is closed by what it is given to)
    with log, started(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
        await _until_healthy(process, port)
        yield
        process.terminate()
        await asyncio.to_thread(_wait, process)


def _wait(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"vLLM did not end within {END_SECONDS:.0f} s; it is killed", file=sys.stderr)


async def _until_healthy(process: subprocess.Popen[str], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession() as session:
        while True:
            assert process.poll() is None, "vLLM ended while it started"
            assert time.monotonic() < end, "vLLM did not start"
            try:
                async with session.get(f"http://127.0.0.1:{port}/health") as got:
                    if got.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


async def _until_said(asking: Callers, word: str, after: float) -> float:
    """When a reply with that word and no other came, after `after`."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        for each in reversed(asking.replies):
            if each.ended < after:
                break
            if words_in(each.text) == {word}:
                return each.first
        await asyncio.sleep(0.01)
    raise AssertionError(f"nobody said {word}")


def _other(word: str) -> str:
    return "beta" if word == "alpha" else "alpha"
