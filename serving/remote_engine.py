"""Engines that somebody else runs: an OpenAI-compatible address as an upstream, looked at from time to time.

Neither its address nor its key is ever said to a caller: its own errors may hold both, so they become refusals of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from registry.recipe import expand
from registry.recipe_part import VARIABLE
from registry.serve_recipe import EngineTerms, ServeRecipe, is_local
from serving.engine import TIMEOUT
from serving.http_messages import Refusal
from serving.routes import Away, Route, Routes

# A healthy engine is looked at so often, one that is away more often.
PERIOD, PERIOD_AWAY, LOOK_SECONDS = 10.0, 2.0, 5.0
# A name from elsewhere goes into a header of ours.
PLAIN = re.compile(r"[\x21-\x7e]{1,200}")
LONGEST_LIST = 4 << 20
WENT_WRONG = (aiohttp.ClientError, OSError, TimeoutError, RuntimeError, ValueError)
OURS = {401: "it does not take our key", 403: "it does not take our key", 402: "the account there has no credit"}


class RemoteEngine:
    """One address. Made inside a running event loop; close it. `name` is what callers are told of it."""

    def __init__(self, name: str, url: str, key: str = "", *, local: bool) -> None:
        """`url` without /v1."""
        self.name, self.url, self.local = name, url, local
        self._secrets = [each for each in (key, url, url.partition("://")[2]) if each]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=TIMEOUT, headers={**headers, "Accept-Encoding": "identity"},
        )  # fmt: skip

    async def close(self) -> None:
        await self.session.close()

    async def healthy(self, seconds: float) -> bool:
        """Does it answer? Never raises."""
        try:
            return await self._status("/health", seconds) == 200 or await self._status("/v1/models", seconds) == 200
        except WENT_WRONG:
            return False

    async def models(self, seconds: float) -> list[str]:
        """The names of its models. Raises one of WENT_WRONG."""
        async with self._get("/v1/models", seconds) as answer:
            answer.raise_for_status()
            body = json.loads(await answer.content.read(LONGEST_LIST))
        return [each["id"] for each in body["data"]] if isinstance(body, dict) else []

    def refusal(self, status: int, first: bytes) -> Refusal | None:
        """Pure. None where it is an answer."""
        if status < 400:
            return None
        said = _error_of(first)
        if status in OURS or said.get("code") == "insufficient_quota":
            why = OURS.get(status, "the account there has no credit")
            return Refusal(503, f"{self.name} is away: {why}", "provider_away", retry_after=60)
        if status == 404:
            return Refusal(503, f"{self.name} is away: it does not have that model", "provider_away", retry_after=60)
        if status == 429:
            return Refusal(429, f"{self.name} takes no more requests just now", "provider_busy", retry_after=10)
        if status >= 500 or status == 408:
            return Refusal(503, f"{self.name} failed ({status})", "provider_away", retry_after=10)
        code, param = said.get("code"), said.get("param")
        return Refusal(
            status, self._without_secrets(str(said.get("message") or f"{self.name} refused it ({status})")),
            self._without_secrets(code) if isinstance(code, str) else "refused",
            param=self._without_secrets(param) if isinstance(param, str) else None,
        )  # fmt: skip

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text[:2000]

    async def _status(self, path: str, seconds: float) -> int:
        async with self._get(path, seconds) as answer:
            status: int = answer.status
            return status

    def _get(self, path: str, seconds: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=seconds)
        return self.session.get(self.url + path, timeout=timeout, allow_redirects=False)


NOT_YET = Away("it has not been looked at yet")


@dataclass
class _Watched:
    """An engine of the recipe, and how it stands."""

    terms: EngineTerms
    there: tuple[str, str] = ("", "")
    engine: RemoteEngine | None = None
    standing: Route | Away = NOT_YET
    due: float = 0.0
    looking: asyncio.Task[None] | None = None


class RemoteEngines:
    """The engines with a `url` of a recipe, but for those into which we load adapters."""

    def __init__(
        self, recipe: ServeRecipe, values: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`values`: the environment (that of the process otherwise), for `${VAR}`."""
        self._values, self._clock = values, clock
        self._all = {name: _Watched(each) for name, each in recipe.engines.items() if is_plain(each)}
        self._gone: list[RemoteEngine] = []

    async def look(self) -> Routes:
        """How they stand, at once; those that are due are asked meanwhile, and stand anew at the next look."""
        for name, each in self._all.items():
            self._address(name, each)
            if each.engine and each.looking is None and self._clock() >= each.due:
                each.looking = asyncio.create_task(self._ask(name, each))
        return Routes(engines={name: each.standing for name, each in self._all.items()})

    def put(self, values: Mapping[str, str]) -> None:
        """Addresses and keys by these values, from the next look on."""
        self._values = values

    async def close(self) -> None:
        tasks = [each.looking for each in self._all.values() if each.looking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in [*self._gone, *(each.engine for each in self._all.values() if each.engine)]:
            await engine.close()

    def _address(self, name: str, each: _Watched) -> None:
        """Its address and key may have changed with the environment."""
        values = os.environ if self._values is None else self._values
        named = [name for text in (each.terms.url, each.terms.key) for name in VARIABLE.findall(text or "")]
        if missing := [name for name in named if not values.get(name)]:
            self._leave(each, f"not set: {', '.join(missing)}")
            return
        place = f"engines.{name}"
        url, key = expand(each.terms.url, f"{place}.url", values), expand(each.terms.key, f"{place}.key", values)
        if not url:
            self._leave(each, "its url is empty")
        elif (url, key or "") != each.there:
            self._leave(each, "it has not been looked at yet", hold=True)
            each.there, each.due = (url, key or ""), 0.0
            local = is_local(each.terms.model_copy(update={"url": url}))
            each.engine = RemoteEngine(name, url.rstrip("/").removesuffix("/v1"), key or "", local=local)

    def _leave(self, each: _Watched, why: str, *, hold: bool = False) -> None:
        """Ask its old address no more; what is under way there may end."""
        each.standing = Away(why, retry_after=5 if hold else 60, hold=hold)
        if each.engine:
            self._gone.append(each.engine)
        each.engine, each.there = None, ("", "")

    async def _ask(self, name: str, each: _Watched) -> None:
        engine = each.engine
        assert engine is not None
        try:
            found = await _standing(engine, each.terms)
            if engine is each.engine:  # else its address has changed meanwhile
                each.standing = found
                each.due = self._clock() + (PERIOD if isinstance(found, Route) else PERIOD_AWAY)
        finally:
            each.looking = None


def is_plain(engine: EngineTerms) -> bool:
    """Somebody's engine that is taken as it is. Into one with a `base` and `adapters` ours are loaded."""
    return engine.url is not None and not (engine.base is not None and engine.adapters)


async def _standing(engine: RemoteEngine, terms: EngineTerms) -> Route | Away:
    if not await engine.healthy(LOOK_SECONDS):
        return Away("it does not answer")
    if terms.as_:
        return Route(terms.as_, engine)
    with suppress(*WENT_WRONG, KeyError, TypeError):
        for found in await engine.models(LOOK_SECONDS):
            if isinstance(found, str) and PLAIN.fullmatch(found):
                return Route(found, engine)
    return Away("it names no model; say which with `as`", hold=False)


def _error_of(first: bytes) -> dict[str, Any]:
    try:
        body = json.loads(first)
    except (ValueError, RecursionError):
        return {}
    said = body.get("error") if isinstance(body, dict) else None
    # vLLM's own errors of older versions are not wrapped.
    return said if isinstance(said, dict) else body if isinstance(body, dict) else {}
