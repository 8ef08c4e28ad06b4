"""The gateway with everything that it looks at, kept up to date: keys, `.env`, engines elsewhere, endpoints, figures.

The leading server has one of these, and so has each gateway without an engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from registry.errors import StoreError, Trouble
from registry.events import Event, append_all
from registry.objectives import Objectives
from registry.project import Project
from registry.request_log_terms import RequestLog
from registry.serve_recipe import ServeRecipe
from registry.settings import Settings
from registry.store import Store
from serving.answers import Outgoing
from serving.ask import Ask
from serving.callers import Callers
from serving.chain import Chain
from serving.endpoint_routes import EndpointRoutes
from serving.gateway import Gateway, Hooks
from serving.inbox import Inbox
from serving.listening import is_loopback
from serving.metrics import Metrics
from serving.objectives import Judge, broken_in_log, watch
from serving.outside import Outside
from serving.policy import Policy
from serving.request_log import Asked, RequestLogFile, excerpt
from serving.rollout_keeper import RolloutKeeper, split_here
from serving.routes import Board, Routes

# The part of the board behind all others.
ENDPOINTS = "endpoints"
KEYS_SECONDS, LOOK_SECONDS = 1.0, 0.5


class KeptGateway:
    """Made inside a running event loop; `app` answers from the start, `run` keeps it true, `close` ends it.

    `name`: of a gateway beside others. Raises StoreError if the keys cannot be read: without them it would let in
    anybody.
    """

    def __init__(
        self, project: Project, store: Store, settings: Settings, board: Board, internal_key: str,
        recipe: ServeRecipe | None, name: str = "",
    ) -> None:  # fmt: skip
        self.store, self.settings, self.board, self.recipe, self.name = store, settings, board, recipe, name
        self.outside, self.endpoints = Outside(project.root, recipe, board), EndpointRoutes(settings)
        self.callers = Callers(internal_key)
        self.callers.refresh(store)
        self.judge = Judge(objectives_of(recipe), time.monotonic(), broken_in_log(store, name))
        self.metrics = Metrics(*self._names(), _latencies(recipe), self.judge)
        self.inbox = Inbox(store)
        self.project, self.log = project, _log_file(project, recipe, name, self.metrics)
        board.demand.engines = recipe.engines if recipe else {}
        self.app = Gateway(
            board, internal_key, chain=Chain(board, providers=self.outside.providers, counts=self.metrics),
            policy=self._policy(), callers=self.callers,
            hooks=Hooks(self.metrics, self.inbox.append, self._write_down if self.log else None),
        )  # fmt: skip
        self._closing: set[asyncio.Future[None]] = set()

    def put(self, recipe: ServeRecipe | None) -> None:
        """Answer by this recipe from now on."""
        if recipe != self.recipe:
            if _log_terms(recipe) != _log_terms(self.recipe):
                self._put_log(recipe)
            self.recipe = recipe
            self.app.policy = self._policy()
            self.outside.serve(recipe)
            self.board.demand.engines = recipe.engines if recipe else {}
            self.judge.change(objectives_of(recipe), time.monotonic())

    async def run(self) -> None:
        """For ever; each look that fails is repeated."""
        looks = [self._keep_keys(), self.outside.run(), self._keep_endpoints(), self._count_for_canaries()]
        judging = watch(self.judge, self._answering, self._append, self.metrics.watched, self.name)
        tasks = [asyncio.create_task(each) for each in (*looks, judging)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await self.outside.close()
        await self.endpoints.close()
        if self.log:
            await asyncio.to_thread(self.log.close)
        await asyncio.gather(*self._closing)
        await asyncio.to_thread(self.inbox.close)

    def _put_log(self, recipe: ServeRecipe | None) -> None:
        """A gateway beside the leading server has its recipe from there, after it began."""
        if self.log:
            closing = asyncio.get_running_loop().run_in_executor(None, self.log.close)
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self.log = _log_file(self.project, recipe, self.name, self.metrics)
        self.app.hooks.log = self._write_down if self.log else None

    def _policy(self) -> Policy:
        return Policy.of(self.recipe, beyond_loopback=not is_loopback(self.settings.gateway_host))

    def _names(self) -> tuple[set[str], list[str]]:
        """Of routes and keys: what figures may be told apart by."""
        routes = self.board.routes
        models = {name for name in (*routes.public, *routes.away) if "@" not in name}
        return models | set(self.recipe.routes if self.recipe else ()), ["internal", *self.callers.names]

    async def _keep_keys(self) -> None:
        while True:
            await asyncio.sleep(KEYS_SECONDS)
            with suppress(StoreError):
                await asyncio.to_thread(self.callers.refresh, self.store)
            self.metrics.know(*self._names())
            public = self.board.routes.public.items()
            self.metrics.serves({name: each.adapter for name, each in public if "@" not in name})

    async def _keep_endpoints(self) -> None:
        while True:
            with suppress(Trouble):
                self.board.put(ENDPOINTS, Routes(public=await self.endpoints.look(self.store)))
            await asyncio.sleep(LOOK_SECONDS)

    async def _count_for_canaries(self) -> None:
        """Beside the leading server, whose reconciler decides: what is seen here is added."""
        keeper = RolloutKeeper(self.store, self.board, decides=False)
        while self.name:
            with suppress(StoreError):
                await keeper.look(await asyncio.to_thread(split_here, self.store, self.board), {})
            await asyncio.sleep(KEYS_SECONDS)

    def _answering(self) -> dict[str, bool]:
        """Of each route of the recipe: can it be answered now, by whomever?"""
        return {name: self.app.chain.can_answer(name, terms) for name, terms in self.app.policy.routes.items()}

    def _append(self, events: Sequence[Event]) -> None:
        append_all(self.store, events)

    def _write_down(self, ask: Ask, going: Outgoing) -> None:
        assert self.log is not None
        assert self.recipe is not None
        usage = going.usage or {}
        self.log.write(Asked(
            ask.headers[0][1].decode(), ask.route, ask.key, going.adapter, going.status, going.seconds, going.first,
            going.code, usage.get("prompt_tokens"), usage.get("completion_tokens"),
            prompt=excerpt(ask.request, self.recipe.log.prompt_characters),
        ))  # fmt: skip


def objectives_of(recipe: ServeRecipe | None) -> dict[str, Objectives]:
    """By route."""
    routes = recipe.routes.items() if recipe else ()
    return {name: terms.objectives for name, terms in routes if terms.objectives}


def _latencies(recipe: ServeRecipe | None) -> list[float]:
    return [each.limits["p95"] for each in objectives_of(recipe).values() if each.p95]


def _log_terms(recipe: ServeRecipe | None) -> RequestLog | None:
    return recipe.log if recipe and recipe.log.on else None


def _log_file(project: Project, recipe: ServeRecipe | None, name: str, metrics: Metrics) -> RequestLogFile | None:
    """One file for each gateway: two that rotate one file would lose lines."""
    terms = _log_terms(recipe)
    if terms is None:
        return None
    project.logs.mkdir(parents=True, exist_ok=True)
    return RequestLogFile(terms, project.logs / f"requests{'-' + name if name else ''}.jsonl", metrics.dropped)
