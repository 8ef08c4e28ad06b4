"""For other processes: start, stop and see this project's server, and borrow an engine for an evaluation."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from registry.base_models import BaseModel
from registry.cards import Card, CardLock, marker, pick_card, try_lock
from registry.errors import Conflict, EngineError, from_dict
from registry.project import Project
from registry.recipe import Serve
from registry.settings import Settings
from registry.store import Store
from serving.engine import Engine
from serving.engine_plan import planned_alone
from serving.reconciler import rank_needed
from serving.server_keys import engine_keys
from serving.server_record import (
    ERROR_LINE,
    WITHOUT_CARD,
    EngineStatus,
    ServerStatus,
    is_gone,
    last_words,
    server_status,
)
from serving.to_serve import IMPLIED, ToServe, refuse_cards
from serving.vllm_env import ensure_vllm
from serving.vllm_process import EngineConfig, engine_rank, start_vllm

POLL_SECONDS = 0.2
# A card that is being let go of (an evaluation's engine ends) is worth waiting for; a training is not.
CARD_SECONDS = 20.0
# Kept, because Python warns of a process that is forgotten while it runs; the server outlives this one by intent.
_started: list[subprocess.Popen[bytes]] = []

__all__ = ["ServerStatus", "engine_for", "server_command", "server_status", "start_server", "stop_server"]


def start_server(
    project: Project,
    store: Store,
    settings: Settings,
    what: ToServe,
    say: Callable[[str], None] = lambda _: None,
) -> ServerStatus:
    """Make sure that a server with these engines runs, and wait until it answers (or waits for its card).

    Raises Conflict if one with other engines runs, WrongInput for a card that is not for serving; Trouble (a port in
    use), EngineError, MissingPart, DoesNotFit if it ends.
    """
    refuse_cards(settings, what)
    running = server_status(store)
    if running is None:
        ensure_engines(project, settings, what, say)
        started = _spawn(project, what)
        return _until_ready(project, store, settings, started, say)
    _refuse_another(running, what)
    return _until_ready(project, store, settings, None, say)


def ensure_engines(project: Project, settings: Settings, what: ToServe, say: Callable[[str], None]) -> None:
    """Make vLLM's environment for each card where it is not there yet. Raises MissingPart."""
    for card in {card.is_cpu: card for card in (pick_card(each.card) for each in what.own().values())}.values():
        ensure_vllm(project, settings, card, say)


def server_command(project: Project, what: ToServe) -> list[str]:
    """The server's command line, for whoever starts it."""
    folders = json.dumps({name: base.folder for name, base in what.bases.items()})
    recipe = what.recipe.model_dump_json(by_alias=True)
    return [sys.executable, "-m", "serving.server", "--project", str(project.root), "--recipe", recipe,
            "--bases", folders]  # fmt: skip


def _refuse_another(running: ServerStatus, what: ToServe) -> None:
    here = {each.base["digest"] for each in running.all_engines()}
    if what.recipe.name == IMPLIED:  # `ft serve up MODEL`: any server that has an engine for it will do
        missing = [each.source for each in what.bases.values() if each.digest not in here]
        if not missing:
            return
        has = ", ".join(each.base["source"] for each in running.all_engines() if each.base) or "no base of ours"
        other = f"is for {has}, not {missing[0]}"
    elif running.recipe == what.recipe.model_dump(mode="json", by_alias=True):
        return
    else:
        other = f"was started with another recipe ({running.recipe.get('name') or 'an older one'})"
    raise Conflict(f"the server that runs {other}", place=running.gateway_url, fix="`ft serve down` stops it")


def stop_server(store: Store, settings: Settings, say: Callable[[str], None] = lambda _: None) -> bool:
    """Let the server finish what it answers, then end it and its engine. False if none runs."""
    running = last_words(store)
    if running is None or is_gone(store):
        return False
    say(f"stopping the server (pid {running.pid})")
    with suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGTERM)
    # Its drain, its engine's end, and some room.
    deadline = time.monotonic() + settings.drain_seconds + 60
    while not is_gone(store):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)  # its keeper then ends the engine
        time.sleep(POLL_SECONDS)
    return True


@asynccontextmanager
async def engine_for(
    project: Project,
    store: Store,
    settings: Settings,
    base: BaseModel,
    serve: Serve,
    card: Card,
    max_rank: int = 0,
) -> AsyncIterator[Engine]:
    """An engine that serves `base` as it will answer, for the length of the block.

    The engine of this project's server if that serves the base (it keeps its card meanwhile), else one of our own
    under the card's lock. `max_rank`: where versions that no alias names are to be loaded.
    """
    while True:
        aliased = engine_rank(await asyncio.to_thread(rank_needed, store, base))
        need = EngineConfig(base, serve, card, max(engine_rank(max_rank), aliased))
        if await asyncio.to_thread(_server_for, store, need, aliased):
            with marker(project, card, "eval"):
                engine = await _engine_of_server(project, store, settings, need, aliased)
                if engine is not None:
                    async with engine:
                        yield engine
                    return
        else:
            # The marker asks a server on this card (another base's, another project's) to give way.
            with marker(project, card, "train"):
                lock = await _lock_card(project, store, need, aliased)
                if lock is not None:
                    async with _own_engine(project, settings, need, lock) as engine:
                        yield engine
                    return


def _server_for(store: Store, need: EngineConfig, aliased: int) -> EngineStatus | None:
    """The server's engine that is what is needed, or soon will be: it grows to the rank that aliases need."""
    status = server_status(store)
    engine = status.engine_for(need) if status is not None else None
    return engine if engine is not None and need.max_rank <= max(engine.max_rank, aliased) else None


@asynccontextmanager
async def _own_engine(
    project: Project, settings: Settings, need: EngineConfig, lock: CardLock
) -> AsyncIterator[Engine]:
    try:
        config = await asyncio.to_thread(planned_alone, project, settings, need)
        vllm = await start_vllm(project, settings, config, lock)
        try:
            yield vllm.engine
        finally:
            await asyncio.shield(vllm.stop())
    finally:
        lock.release()


async def _engine_of_server(
    project: Project, store: Store, settings: Settings, need: EngineConfig, aliased: int
) -> Engine | None:
    """Wait until the server's engine is up. None if the server has gone, or will not have what is needed.

    Waits for a card that is in use as long as it takes; raises EngineError if an engine does not come up.
    """
    patience = time.monotonic() + settings.engine_start_seconds + CARD_SECONDS
    while True:
        status = await asyncio.to_thread(_server_for, store, need, aliased)
        if status is None:
            return None
        if status.state in WITHOUT_CARD:
            patience = time.monotonic() + settings.engine_start_seconds + CARD_SECONDS
        if time.monotonic() > patience:
            raise EngineError(f"the server's engine does not come up: {status.state}: {status.reason}",
                              place=str(_log(project)), fix="`ft serve down`, then `ft serve up`")  # fmt: skip
        if status.state == "serving" and status.max_rank >= need.max_rank:
            keys = await asyncio.to_thread(engine_keys, project, status.name)
            if keys is not None:
                engine = Engine(*keys)
                if await engine.healthy():
                    return engine
                await engine.close()
        await asyncio.sleep(POLL_SECONDS)


async def _lock_card(project: Project, store: Store, need: EngineConfig, aliased: int) -> CardLock | None:
    """Wait for the card. None if meanwhile a server for the same base has come up."""
    while True:
        lock = try_lock(project, need.card, f"ft evaluation, pid {os.getpid()}")
        if lock is not None:
            return lock
        await asyncio.sleep(POLL_SECONDS)
        if await asyncio.to_thread(_server_for, store, need, aliased):
            return None


def _spawn(project: Project, what: ToServe) -> subprocess.Popen[bytes]:
    project.logs.mkdir(parents=True, exist_ok=True)
    here = {**os.environ, "FT_HOME": str(project.home), "FT_CACHE": str(project.cache)}
    with _log(project).open("wb") as output:
        started = subprocess.Popen(
            server_command(project, what),
            env=here,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _started[:] = [*(each for each in _started if each.poll() is None), started]
    return started


def _until_ready(
    project: Project,
    store: Store,
    settings: Settings,
    started: subprocess.Popen[bytes] | None,
    say: Callable[[str], None],
) -> ServerStatus:
    began, said = time.monotonic(), ""
    while True:
        status = server_status(store)
        if status is not None and (started is None or status.pid == started.pid):
            now = f"{status.state}{': ' if status.reason else ''}{status.reason}"
            if now != said:
                say(f"server: {now}")
                said = now
            if _is_settled(status, time.monotonic() - began):
                return status
        elif started is None:
            raise EngineError("the server ended", place=str(_log(project)), fix="its log says why; then `ft serve up`")
        if started is not None and started.poll() is not None:
            raise _error_of(project)
        if time.monotonic() - began > settings.engine_start_seconds + CARD_SECONDS:
            raise EngineError("the server is not ready", place=str(_log(project)), fix="`ft serve status` shows it")
        time.sleep(POLL_SECONDS)


def _is_settled(status: ServerStatus, waited: float) -> bool:
    if status.state == "waiting for the card":
        return waited > CARD_SECONDS
    return status.state in ("serving", "card given to training")


def _error_of(project: Project) -> Exception:
    """What the server that has just ended said last."""
    lines = _log(project).read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if line.startswith(ERROR_LINE):
            return from_dict(json.loads(line.removeprefix(ERROR_LINE)))
    last = "\n".join(lines[-12:])
    return EngineError(f"the server ended:\n{last}", place=str(_log(project)), fix="`ft serve up` starts it again")


def _log(project: Project) -> Path:
    return project.logs / "server.log"
