"""`python -m serving.server`: the one process that answers for a project: gateway, engine, swaps, heartbeat.

It supervises one vLLM, keeps it in step with the aliases, and gives its card to training when that is asked for.
`serving/control.py` starts and stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import uvicorn

from registry.base_models import base_path, read_base
from registry.cards import (
    CardLock,
    as_set,
    holder,
    holder_beside,
    pick_card,
    refuse_serving,
    try_lock,
    try_lock_beside,
    wanted,
)
from registry.errors import BaseModelError, EngineError, FtError, StoreError, Trouble
from registry.folders import refuse_lending
from registry.project import Project, find_project
from registry.recipe import Serve
from registry.settings import Settings, load_settings
from registry.store import Store, open_store
from serving.endpoint_routes import EndpointRoutes
from serving.gateway import Gateway
from serving.listening import http_server, listen, loop_factory, url_of
from serving.reconciler import Reconciler, nothing_answers, rank_needed, wanted_models
from serving.routes import Away, Board, Routes
from serving.server_keys import write_keys
from serving.server_record import ERROR_LINE, ServerStatus, State, only_server, write_status
from serving.vllm_process import EngineConfig, VllmProcess, engine_memory, engine_rank, start_vllm

# Parts of the board.
ENGINE, ENDPOINTS = "engine", "endpoints"
POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 1.0
LONGEST_BACK_OFF = 60.0
HEALTH_SECONDS, UNWELL_ROUNDS = 10.0, 3
TRAINING_RETRY_AFTER = 30


def run_server(project: Project, store: Store, settings: Settings, config: EngineConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises Trouble for a port in use, Conflict beside another server or where another folder leads, WrongInput for a
    card that is not for serving.
    """
    refuse_lending(project, store)
    refuse_serving(config.card, settings.cards)
    with only_server(project, store) as still:
        listening = listen_as_gateway(settings)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(Server(project, store, settings, config).run(listening, still))


def listen_as_gateway(settings: Settings) -> socket.socket:
    return listen(settings.gateway_host, settings.gateway_port, "the gateway", "FT_GATEWAY_PORT")


class Server:
    """The state between rounds: at most one vLLM, with its card lock and its reconciler."""

    def __init__(self, project: Project, store: Store, settings: Settings, config: EngineConfig) -> None:
        [card] = as_set([config.card], settings.cards)
        self.project, self.store, self.settings, self.config = project, store, settings, replace(config, card=card)
        self.board = Board([ENGINE, ENDPOINTS])
        self.endpoints = EndpointRoutes(settings)
        self.internal_key = settings.internal_key or secrets.token_urlsafe(32)
        self.vllm: VllmProcess | None = None
        self.lock: CardLock | None = None
        self.reconciler: Reconciler | None = None
        self.failures, self.unwell, self.not_before = 0, 0, 0.0
        self.status = ServerStatus(
            pid=os.getpid(),
            state="starting",
            reason="",
            base=config.base.as_dict(),
            serve=config.serve.model_dump(),
            card=config.card.name,
            max_rank=config.max_rank,
            gateway_url="",
            started=time.time(),
        )
        self._beat, self._stop = asyncio.Event(), asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def run(self, listening: socket.socket, still: Callable[[], bool]) -> None:
        """Gateway, heartbeat and rounds, until asked to stop (or not `still` the project's server).

        Then drain, and stop the engine last.
        """
        self._listen_for_signals()
        self.status = replace(self.status, gateway_url=url_of(listening))
        self._write_keys()
        await self._flip_away(Away("the engine is starting"))
        gateway = self._gateway()
        answering = asyncio.create_task(gateway.serve(sockets=[listening]))
        beating, rounds = asyncio.create_task(self._heartbeats(still)), asyncio.create_task(self._rounds())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({answering, rounds, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if rounds.done():
                rounds.result()
        finally:
            for task in (rounds, stopping):
                task.cancel()
            await asyncio.gather(rounds, stopping, return_exceptions=True)
            self._say("stopping")
            gateway.should_exit = True  # takes no new connections, and waits for the answers under way
            await asyncio.gather(answering, return_exceptions=True)
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await self.endpoints.close()
            await self._stop_engine()

    async def _rounds(self) -> None:
        """One round after another. Only the first start of the engine may end the server."""
        while True:
            try:
                self.board.put(ENDPOINTS, Routes(public=await self.endpoints.look(self.store)))
                await self._round()
            except Trouble as error:
                if self.vllm is None:
                    self._back_off(error)
                else:
                    await self._look_after(self.vllm, error)
            await asyncio.sleep(POLL_SECONDS)

    async def _look_after(self, vllm: VllmProcess, error: Trouble) -> None:
        """A round that failed is repeated; an engine that lives but no longer answers is given up."""
        self._say(self.status.state, error.what)
        self.unwell = 0 if await vllm.engine.healthy(HEALTH_SECONDS) else self.unwell + 1
        if self.unwell >= UNWELL_ROUNDS:
            await self._lose_engine()

    async def _round(self) -> None:
        rank = engine_rank(await asyncio.to_thread(rank_needed, self.store, self.config.base))
        if self._training_waits():
            await self._give_way()
        elif self.vllm is None:
            await self._start_engine(max(rank, self.config.max_rank))
        elif not self.vllm.running:
            await self._lose_engine()
        elif rank > self.config.max_rank:
            await self._drain(Away("its engine restarts for a larger adapter"))
            await self._stop_engine()
        else:
            await self._reconcile()

    async def _reconcile(self) -> None:
        assert self.reconciler is not None
        await self.reconciler.step()
        self.failures = self.unwell = 0
        self._say("serving")

    async def _start_engine(self, max_rank: int) -> None:
        if time.monotonic() < self.not_before:
            return
        self.lock = self._try_lock()
        if self.lock is None:
            has = (holder_beside if self._shares else holder)(self.project, self.config.card)
            self._say("waiting for the card", f"held by {has}")
            return
        self._say("engine restarting" if self.status.engine_starts else "starting")
        self.config = replace(self.config, max_rank=max_rank)
        try:
            self.vllm = await start_vllm(self.project, self.settings, self.config, self.lock)
        except BaseException:
            self._release()
            raise
        self.reconciler = Reconciler(self.project, self.store, self.board, self.vllm.engine, self.config, ENGINE)
        self.status = replace(
            self.status,
            engine_url=self.vllm.engine.url,
            engine_pid=self.vllm.pid,
            engine_starts=self.status.engine_starts + 1,
            max_rank=max_rank,
        )
        self._write_keys()
        self._watching = asyncio.create_task(self._watch(self.vllm))

    def _try_lock(self) -> CardLock | None:
        card, name = self.config.card, f"ft serve, pid {os.getpid()}"
        if self._shares:
            given = engine_memory(base_path(self.project, self.config.base), self.config)
            return try_lock_beside(self.project, card, name, given)
        return try_lock(self.project, card, name)

    @property
    def _shares(self) -> bool:
        """Does the server stay on its card when a trainer wants it?"""
        return self.config.card.serve == "share"

    async def _watch(self, vllm: VllmProcess) -> None:
        """Take the routes away the moment the engine is gone, not at the next round."""
        await vllm.ended()
        if self.vllm is vllm:
            await self._flip_away(Away("its engine is restarting"))

    async def _lose_engine(self) -> None:
        assert self.vllm is not None
        lost = EngineError(f"vLLM ended:\n{self.vllm.last_words()}", place=str(self.vllm.log))
        await self._flip_away(Away("its engine is restarting"))
        await self._stop_engine()
        self._back_off(lost)

    def _back_off(self, error: Trouble) -> None:
        if not self.status.engine_starts:
            raise error
        self.failures += 1
        delay = min(LONGEST_BACK_OFF, 2.0 ** (self.failures - 1) - 1)
        self.not_before = time.monotonic() + delay
        self._say("engine restarting", error.what)

    def _training_waits(self) -> bool:
        card = self.config.card
        return not self._shares and wanted(self.project, card, "train") and not wanted(self.project, card, "eval")

    async def _give_way(self) -> None:
        away = Away("its card is given to training", retry_after=TRAINING_RETRY_AFTER, hold=False)
        if self.vllm is not None:
            self._say("giving the card to training")
            await self._drain(away)
            await self._stop_engine()
        if self.status.state != "card given to training":
            await self._flip_away(away)
            self._say("card given to training")

    async def _drain(self, away: Away) -> None:
        """No new requests; those under way may end within the time for it."""
        await self._flip_away(away)
        if self.vllm is not None:
            await self.board.drained(self.vllm.engine, self.settings.drain_seconds)

    async def _stop_engine(self) -> None:
        vllm, self.vllm, self.reconciler = self.vllm, None, None
        if vllm is not None:
            await vllm.stop()
        if self._watching is not None:
            self._watching.cancel()
        self.status = replace(self.status, engine_url="", engine_pid=None)
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    async def _flip_away(self, why: Away) -> None:
        models = await asyncio.to_thread(wanted_models, self.store, self.config.base)
        self.board.put(ENGINE, nothing_answers(models, why))

    def _gateway(self) -> uvicorn.Server:
        gateway = Gateway(self.board, self.internal_key)
        return http_server(gateway, int(self.settings.drain_seconds), log_level="warning")

    def _listen_for_signals(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, self._stop.set)

    def _say(self, state: State, reason: str = "") -> None:
        if (state, reason) != (self.status.state, self.status.reason):
            print(f"{time.strftime('%H:%M:%S')} {state}{': ' if reason else ''}{reason}", flush=True)
            self.status = replace(self.status, state=state, reason=reason)
            self._beat.set()

    async def _heartbeats(self, still: Callable[[], bool]) -> None:
        while True:
            if not still():
                print("the project's state was removed; this server ends", flush=True)
                self._stop.set()
                return
            self._beat.clear()
            with contextlib.suppress(StoreError):  # a full disk is no reason to stop answering
                await asyncio.to_thread(write_status, self.store, self._now())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._beat.wait(), HEARTBEAT_SECONDS)

    def _now(self) -> ServerStatus:
        public = self.board.part(ENGINE).public.items()
        routes = {name: route.adapter for name, route in public if "@" not in name}
        if self.reconciler is None:
            return replace(self.status, routes=routes, loaded=[])
        here = self.reconciler
        return replace(self.status, routes=routes, loaded=sorted(here.loaded), refused=here.refused, swaps=here.swaps)

    def _write_keys(self) -> None:
        engine = {"engine_url": self.vllm.engine.url, "engine_key": self.vllm.engine.key} if self.vllm else {}
        keys = {"internal_key": self.internal_key, "gateway_url": self.status.gateway_url, **engine}
        write_keys(self.project, keys)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line that `serving/control.py` writes, and serve."""
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=__doc__)
    parser.add_argument("--project", type=Path, required=True, help="the project's root")
    parser.add_argument("--base", required=True, help="folder name of the base model in the cache")
    parser.add_argument("--serve", required=True, help="the recipe's serve section, as JSON")
    parser.add_argument("--card", required=True)
    asked = parser.parse_args(arguments)
    project = find_project(asked.project)
    store = open_store(project)
    try:
        base = read_base(project.models / asked.base)
        if base is None:
            raise BaseModelError("no such base model in the cache", place=asked.base, fix="`ft run` fetches it")
        config = EngineConfig(base, Serve(**json.loads(asked.serve)), pick_card(asked.card))
        run_server(project, store, load_settings(project), config)
    except FtError as error:
        # For whoever started this process: see `_error_of` in control.py.
        print(ERROR_LINE + json.dumps(error.as_dict()), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
