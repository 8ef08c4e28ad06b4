"""OpenAI as an upstream, and which provider answers where a route does not say: from the environment and `.env`.

    FT_PROVIDER       local (default) or openai
    OPENAI_API_KEY    the key; without one OpenAI is away
    OPENAI_BASE_URL   https://api.openai.com/v1 otherwise

`put` takes new values at any time; requests that are under way end with the old ones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from registry.serve_recipe import is_loopback
from serving.remote_engine import RemoteEngine
from serving.routes import Away, Board, Route

Provider = Literal["local", "openai"]
DEFAULT_URL = "https://api.openai.com/v1"
# No answer takes longer; a key that was replaced is forgotten then at the latest.
LONGEST_ANSWER = 3600.0


def _print(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


class Providers:
    """Made inside a running event loop; close it."""

    def __init__(
        self, board: Board, values: Mapping[str, str] | None = None, say: Callable[[str], None] = _print
    ) -> None:
        self.default: Provider = "local"
        self._board, self._say = board, say
        self._openai: RemoteEngine | None = None
        self._there: tuple[str, str] = ("", "")
        self._retiring: set[asyncio.Task[None]] = set()
        self.put(values or {})

    def put(self, values: Mapping[str, str]) -> None:
        """Take these from now on. An FT_PROVIDER that is none leaves what was before."""
        wanted = values.get("FT_PROVIDER", "").strip().lower() or "local"
        if wanted in ("local", "openai"):
            self.default = cast(Provider, wanted)
        else:
            self._say(f"FT_PROVIDER is {wanted[:40]!r}, and must be openai or local; it stays {self.default}")
        there = (
            (values.get("OPENAI_BASE_URL", "").strip() or DEFAULT_URL).rstrip("/").removesuffix("/v1"),
            values.get("OPENAI_API_KEY", "").strip(),
        )
        if there != self._there:
            self._retire()
            self._there, (url, key) = there, there
            self._openai = RemoteEngine("OpenAI", url, key, local=is_loopback(url)) if key else None

    def openai(self, model: str) -> Route | Away:
        """A model of OpenAI's."""
        if self._openai is None:
            return Away("OPENAI_API_KEY is not set", retry_after=60, hold=False)
        return Route(model, self._openai)

    async def close(self) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if self._openai is not None:
            await self._openai.close()

    def _retire(self) -> None:
        if self._openai is not None:
            task = asyncio.get_running_loop().create_task(self._when_through(self._openai))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            self._openai = None

    async def _when_through(self, old: RemoteEngine) -> None:
        try:
            await self._board.drained(old, LONGEST_ANSWER)
        finally:
            await old.close()


def for_openai(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Pure. OpenAI's newer models refuse `max_tokens`, and all of its chat models take `max_completion_tokens`."""
    if "max_tokens" not in request or not path.endswith("/chat/completions"):
        return request
    rest = {name: value for name, value in request.items() if name != "max_tokens"}
    return {"max_completion_tokens": request["max_tokens"], **rest}
