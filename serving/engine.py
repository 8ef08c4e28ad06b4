"""The client of one vLLM: its address, its key, and the few verbs that serving and evaluation need.

An Engine belongs to one start of one vLLM: after a restart there is a new one, with another port and key, so
nothing can reach a restarted engine under the belief that its adapters are still loaded.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from registry.errors import AdmissionError, EngineError

# The name under which every engine of ours serves its bare base model.
BASE = "base"
TIMEOUT = aiohttp.ClientTimeout(total=None, connect=5)
LOOK_SECONDS, MANAGE_SECONDS = 30.0, 120.0
# A long answer among many on a CPU takes minutes; the caller's own patience is usually shorter.
ANSWER_SECONDS = 1800.0
Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """One chat answer; `seconds` from the request to its end."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class Engine:
    """Made inside a running event loop; `close` it, or use it as an async context manager."""

    def __init__(self, url: str, key: str, *, local: bool = True) -> None:
        """`local`: does it run on a machine of ours?"""
        self.url, self.local = url, local
        self.key = key
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=TIMEOUT,
            headers={"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"},
        )
        # Is its base held in 4 bits? Then it does not say what was heard in bf16.
        self.in_4_bits = False

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.session.close()

    async def healthy(self, seconds: float = 3.0) -> bool:
        """Does it answer that it is well? Never raises."""
        try:
            timeout = aiohttp.ClientTimeout(total=seconds)
            async with self.session.get(f"{self.url}/health", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, RuntimeError):  # RuntimeError: the session is closed
            return False

    def refusal(self, status: int, first: bytes) -> None:
        """vLLM's own answers are in OpenAI's form, and are passed on as they are."""

    async def models(self) -> dict[str, str]:
        """What it has loaded: adapter name -> folder, without the base."""
        body = await self._json("GET", "/v1/models", seconds=LOOK_SECONDS)
        return {each["id"]: each["root"] for each in body["data"] if each["id"] != BASE}

    async def load(self, name: str, path: Path) -> None:
        """Load an adapter under a name; nothing to do if it is loaded from that path already.

        Raises AdmissionError if vLLM refuses it or the name means another path. Never `load_inplace`: it
        changes the weights under running answers, and vLLM 0.32 then reads them again at every step.
        """
        loaded = (await self.models()).get(name)
        if loaded == str(path):
            return
        if loaded is not None:
            raise AdmissionError(f"{name} is loaded already, from {loaded}", place=str(path))
        status, text = await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        if status != 200 and (await self.models()).get(name) != str(path):
            raise AdmissionError(f"vLLM refused to load {name} ({status}): {text[:500]}", place=str(path))

    async def unload(self, name: str) -> None:
        """Drop the name; answers that are under way are finished. Nothing to do if it is not loaded."""
        status, text = await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise EngineError(f"vLLM did not unload {name} ({status}): {text[:500]}", place=self.url)

    async def sleep(self) -> None:
        """Free the card but for a small rest, when what is under way has been answered. Needs vLLM's sleep mode."""
        await self._posted("/sleep?level=1&mode=wait")

    async def wake(self) -> None:
        await self._posted("/wake_up")

    async def _posted(self, path: str) -> None:
        status, text = await self._call("POST", path, None)
        if status != 200:
            raise EngineError(f"vLLM answered {status} to {path}: {text[:500]}", place=self.url)

    async def chat(self, name: str, messages: list[Message], **options: Any) -> Reply:
        """One answer; `options` are fields of OpenAI's chat completions (max_tokens, temperature, ...)."""
        began = time.monotonic()
        request = {"model": name, "messages": messages, **options}
        body = await self._json("POST", "/v1/chat/completions", request, ANSWER_SECONDS)
        choice, usage = body["choices"][0], body["usage"]
        return Reply(
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"] or "",
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            seconds=time.monotonic() - began,
        )

    async def tokenize(self, name: str, messages: list[Message]) -> list[int]:
        """Token ids of the prompt that the chat template makes of `messages`."""
        body = await self._json("POST", "/tokenize", {"model": name, "messages": messages})
        return [int(each) for each in body["tokens"]]

    async def prompt_logprobs(self, name: str, token_ids: list[int]) -> list[float]:
        """Natural-log probability of each token given those before it; the first has none, so one fewer."""
        request = {
            "model": name,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        body = await self._json("POST", "/v1/completions", request)
        found = body["choices"][0]["prompt_logprobs"][1:]
        return [float(each[str(token)]["logprob"]) for each, token in zip(found, token_ids[1:], strict=True)]

    async def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float = MANAGE_SECONDS
    ) -> dict[str, Any]:
        status, text = await self._call(method, path, body, seconds)
        try:
            parsed = json.loads(text) if status == 200 else None
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise EngineError(f"vLLM answered {status} to {path}: {text[:500]}", place=self.url)
        return parsed

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None, seconds: float = MANAGE_SECONDS
    ) -> tuple[int, str]:
        try:
            async with (
                asyncio.timeout(seconds),
                self.session.request(method, self.url + path, json=body) as got,
            ):
                return got.status, await got.text()
        except TimeoutError as error:
            raise EngineError(f"vLLM did not answer {path} within {seconds:.0f} s", place=self.url) from error
        except (aiohttp.ClientError, RuntimeError) as error:
            raise EngineError(f"vLLM cannot be reached: {error}", place=self.url) from error
