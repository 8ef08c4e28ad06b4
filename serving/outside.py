"""What answers from outside of this server: OpenAI, and engines at other addresses, as an environment says that may
change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from registry.serve_recipe import ServeRecipe
from serving.env_file import LOOK_SECONDS, EnvFile
from serving.providers import Providers
from serving.remote_engine import RemoteEngines
from serving.routes import Board

# The part of the board; behind those of our own engines.
REMOTE = "remote"
POLL_SECONDS = 0.5


class Outside:
    """Made inside a running event loop; `run` it for as long as the gateway answers, then close it."""

    def __init__(
        self, root: Path, recipe: ServeRecipe | None, board: Board, poll_seconds: float = POLL_SECONDS
    ) -> None:
        """`root`: the project's, with its `.env`."""
        self._env, self._board, self._poll = EnvFile(root), board, poll_seconds
        self.providers = Providers(board, self._env.values)
        self._recipe: ServeRecipe | None = None
        self._engines: list[RemoteEngines] = []
        self.serve(recipe)

    def serve(self, recipe: ServeRecipe | None) -> None:
        """The engines of this recipe from now on. What others are being asked ends as it began."""
        if recipe is not None and recipe != self._recipe:
            self._recipe = recipe
            self._engines.append(RemoteEngines(recipe, self._env.values))

    async def run(self) -> None:
        due = 0.0
        while True:
            now = time.monotonic()
            if now >= due:
                due = now + LOOK_SECONDS
                if self._env.look():
                    self._take(self._env.values)
            if self._engines:
                self._board.put(REMOTE, await self._engines[-1].look())
            await asyncio.sleep(self._poll)

    async def close(self) -> None:
        await self.providers.close()
        for each in self._engines:
            await each.close()

    def _take(self, values: Mapping[str, str]) -> None:
        self.providers.put(values)
        for each in self._engines:
            each.put(values)
