"""`python -m serving.server`: the one process that answers for a project: gateway, engines, swaps, heartbeat.

Its fleet keeps the engines of a serve recipe; what they put on the board the gateway answers by. `serving/control.py`
starts and stops it.
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
from pathlib import Path
from typing import Any

import uvicorn

from registry.errors import FtError, StoreError
from registry.folders import refuse_lending
from registry.host_name import host_name
from registry.project import Project, find_project
from registry.serve_recipe import ServeRecipe, unjudged_in
from registry.serving_lead import Lead, take_lead
from registry.settings import Settings, load_settings
from registry.store import Store, open_store
from serving.demand import Demand
from serving.engine_site import Site
from serving.fleet import Fleet
from serving.fleet_figures import FleetFigures
from serving.kept_gateway import ENDPOINTS, KeptGateway
from serving.leased import Leased
from serving.listening import calm_collector, http_server, listen, loop_factory, url_of
from serving.outside import REMOTE
from serving.publishing import Publisher
from serving.remote_engine import NOT_YET, is_plain
from serving.routes import Board
from serving.server_keys import write_keys
from serving.server_record import (
    ERROR_LINE,
    EngineState,
    EngineStatus,
    ServerStatus,
    last_words,
    only_server,
    write_status,
)
from serving.to_serve import ToServe, refuse_cards, with_bases

HEARTBEAT_SECONDS = 1.0


def run_server(project: Project, store: Store, settings: Settings, what: ToServe) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises Trouble for a port in use, Conflict beside another server or where another folder leads, WrongInput for a
    card that is not for serving, DoesNotFit for engines that have to be up at once and cannot.
    """
    refuse_lending(project, store)
    refuse_cards(settings, what)
    with only_server(project, store) as still:
        lead = take_lead(store, host_name(), settings.lease_seconds, alone=not project.database_url)
        listening = listen_as_gateway(settings)
        calm_collector()
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(Server(project, store, settings, what, lead).run(listening, still))


def listen_as_gateway(settings: Settings) -> socket.socket:
    return listen(settings.gateway_host, settings.gateway_port, "the gateway", "FT_GATEWAY_PORT")


class Server:
    """The gateway and its board, the fleet behind it, and what other processes are told of both."""

    def __init__(self, project: Project, store: Store, settings: Settings, what: ToServe, lead: Lead) -> None:
        self.project, self.store, self.settings, self.what = project, store, settings, what
        self.board = Board([*what.recipe.engines, REMOTE, ENDPOINTS], _demand(store, what))
        self._beat, self._stop = asyncio.Event(), asyncio.Event()
        self.publisher = Publisher(store, lead, self.board, what.recipe, self.board.demand.want)
        self.fleet = Fleet(
            Site(project, store, settings, self.board, self._changed, self.publisher, unjudged_in(what.recipe)), what
        )
        self.internal_key = settings.internal_key or secrets.token_urlsafe(32)
        self.gateway_url, self.started = "", time.time()
        self.ends = False
        self.kept: KeptGateway | None = None
        self.figures: FleetFigures | None = None
        self._written: dict[str, Any] = {}

    async def run(self, listening: socket.socket, still: Callable[[], bool]) -> None:
        """Gateway, heartbeat and engines, until asked to stop (or not `still` the project's server).

        Then drain, and stop the engines last.
        """
        self._listen_for_signals()
        self.gateway_url = url_of(listening)
        self._write_keys()
        await self.fleet.prepare()
        kept = KeptGateway(self.project, self.store, self.settings, self.board, self.internal_key, self.what.recipe)
        self.kept, self.figures = kept, FleetFigures(kept.metrics)
        gateway = self._server_of(kept)
        answering = asyncio.create_task(gateway.serve(sockets=[listening]))
        beating, keeping = asyncio.create_task(self._heartbeats(still)), asyncio.create_task(kept.run())
        engines, stopping = asyncio.create_task(self.fleet.run()), asyncio.create_task(self._stop.wait())
        publishing = asyncio.create_task(self.publisher.run())
        working = (engines, keeping, stopping)
        try:
            await asyncio.wait({answering, publishing, *working}, return_when=asyncio.FIRST_COMPLETED)
            for each in (engines, keeping, publishing):
                if each.done():
                    each.result()
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            self.ends = True
            self._changed()
            gateway.should_exit = True  # takes no new connections, and waits for the answers under way
            await asyncio.gather(answering, self.publisher.close(self.settings.drain_seconds), return_exceptions=True)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await kept.close()
            await self.fleet.close()

    def _changed(self) -> None:
        """An engine says something else than before."""
        self._beat.set()

    def _server_of(self, kept: KeptGateway) -> uvicorn.Server:
        # In one folder nobody else can lead: there a full disk is no reason to stop answering.
        lasts = (lambda: self.publisher.leads) if self.project.database_url else (lambda: True)
        return http_server(Leased(kept.app, lasts), int(self.settings.drain_seconds), log_level="warning")

    def _listen_for_signals(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, self._stop.set)

    async def _heartbeats(self, still: Callable[[], bool]) -> None:
        while True:
            if not still():
                print("the project's state was removed; this server ends", flush=True)
                self._stop.set()
                return
            self._beat.clear()
            self._write_keys()
            with contextlib.suppress(StoreError):  # a full disk is no reason to stop answering
                await asyncio.to_thread(write_status, self.store, self._now())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._beat.wait(), HEARTBEAT_SECONDS)

    def _now(self) -> ServerStatus:
        engines = self.fleet.statuses()
        if self.figures:
            self.figures.look(engines)
        state, reason = whole_state(list(engines.values()), self.ends)
        first, kept = next(iter(engines.values()), None), self.kept
        return ServerStatus(
            pid=os.getpid(),
            state=state,
            reason=reason,
            base=first.base if first else {},
            serve=first.serve if first else {},
            card=first.card if first else "",
            max_rank=first.max_rank if first else 0,
            gateway_url=self.gateway_url,
            engine_url=first.url if first else "",
            engine_pid=first.pid if first else None,
            engine_starts=first.starts if first else 0,
            routes={name: version for each in engines.values() for name, version in each.routes.items()},
            loaded=sorted({name for each in engines.values() for name in each.loaded}),
            refused={name: why for each in engines.values() for name, why in each.refused.items()},
            swaps=sorted((swap for each in engines.values() for swap in each.swaps), key=lambda swap: swap["at"]),
            engines=engines,
            elsewhere=self._elsewhere(),
            recipe=self.what.recipe.model_dump(mode="json", by_alias=True),
            objectives=[each.as_dict() for each in kept.judge.standings(time.monotonic())] if kept else [],
            started=self.started,
        )

    def _elsewhere(self) -> dict[str, str]:
        stand = self.board.part(REMOTE).engines
        names = [name for name, each in self.what.recipe.engines.items() if is_plain(each)]
        return {name: getattr(stand.get(name, NOT_YET), "reason", "") for name in names}

    def _write_keys(self) -> None:
        engines = self.fleet.keys()
        first = next(iter(self.what.recipe.engines))
        keys = {"internal_key": self.internal_key, "gateway_url": self.gateway_url, **engines.get(first, {})}
        wanted = {**keys, "engines": engines}
        if wanted != self._written:
            write_keys(self.project, wanted)
            self._written = wanted


def whole_state(engines: list[EngineStatus], ends: bool = False) -> tuple[EngineState, str]:
    """Pure. Of all engines: `serving` when those that always are up answer, else what the first of the others does."""
    if ends:
        return "stopping", ""
    for each in engines:
        if each.start == "always" and each.state != "serving" and not each.is_off:
            named = f"engine '{each.name}'" if len(engines) > 1 else ""
            return each.state, ": ".join(filter(None, (named, each.reason)))
    return "serving", next((each.reason for each in engines if len(engines) == 1), "")


def _demand(store: Store, what: ToServe) -> Demand:
    """With how long the engines took to start the last time."""
    before = last_words(store)
    known = {name: each.start_seconds for name, each in before.engines.items()} if before else {}
    return Demand(what.recipe.engines, start_seconds={name: took for name, took in known.items() if took})


def main(arguments: list[str] | None = None) -> int:
    """Read the command line that `serving/control.py` writes, and serve."""
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=__doc__)
    parser.add_argument("--project", type=Path, required=True, help="the project's root")
    parser.add_argument("--recipe", required=True, help="the serve recipe, as JSON")
    parser.add_argument("--bases", required=True, help="JSON: folder in the cache of each engine's base model")
    asked = parser.parse_args(arguments)
    project = find_project(asked.project)
    store = open_store(project)
    try:
        what = with_bases(project, ServeRecipe.model_validate_json(asked.recipe), json.loads(asked.bases))
        run_server(project, store, load_settings(project), what)
    except FtError as error:
        # For whoever started this process: see `_error_of` in control.py.
        print(ERROR_LINE + json.dumps(error.as_dict()), flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
