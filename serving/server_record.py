"""What other processes can know of this project's server: its row in the store, and its lock.

The row is a heartbeat with the state in it. Whether the server lives is read off its lock, which no dead process
can hold.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from registry.errors import Conflict
from registry.file_locks import is_held, try_exclusive
from registry.project import Project
from registry.recipe import Serve
from registry.store import Store, dump
from serving.server_keys import forget_keys
from serving.vllm_process import EngineConfig

ROW = "server"
STALE_SECONDS, DAY = 30.0, 86400.0
# How a server that ends by an error says so in the last line of its log.
ERROR_LINE = "error: "

State = Literal[
    "starting",
    "waiting for the card",
    "serving",
    "engine restarting",
    "giving the card to training",
    "card given to training",
    "stopping",
]


@dataclass(frozen=True)
class ServerStatus:
    """One heartbeat. `routes` is public name -> version; `swaps` the last flips with the seconds of their parts."""

    pid: int
    state: State
    reason: str
    base: dict[str, Any]
    serve: dict[str, Any]
    card: str
    max_rank: int
    gateway_url: str
    engine_url: str = ""
    engine_pid: int | None = None
    engine_starts: int = 0
    routes: dict[str, str] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    swaps: list[dict[str, Any]] = field(default_factory=list)
    started: float = 0.0
    heartbeat: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def serves(self, need: EngineConfig) -> bool:
        """Is this server's engine one that `need` asks for? Its rank may still grow, so it is not looked at."""
        here = Serve(**self.serve)
        same = self.base["digest"] == need.base.digest and self.card == need.card.name
        return same and here.max_context >= need.serve.max_context


def server_status(store: Store) -> ServerStatus | None:
    """The project's server; None if there is none, it is dead, or it has not been heard of for half a minute."""
    status = last_words(store)
    if status is None or not is_held(_lock_path(store)) or time.time() - status.heartbeat > STALE_SECONDS:
        return None
    return status


def last_words(store: Store) -> ServerStatus | None:
    """The last heartbeat, of a dead server too."""
    row = store.first("SELECT * FROM servers WHERE id = ?", (ROW,))
    return ServerStatus(**json.loads(row["body"]), started=row["started"], heartbeat=row["heartbeat"]) if row else None


def loaded_lately(store: Store, now: float) -> set[str]:
    """Names of the versions that a server had or answered with within a day, be it heard of at this moment or not."""
    found = [
        json.loads(row["body"]) for row in store.read("SELECT body FROM servers WHERE heartbeat > ?", (now - DAY,))
    ]
    return {name for each in found for name in [*each.get("loaded", []), *each.get("routes", {}).values()]}


def write_status(store: Store, status: ServerStatus) -> None:
    body = {name: value for name, value in status.as_dict().items() if name not in ("started", "heartbeat")}
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO servers (id, started, heartbeat, body) VALUES (?,?,?,?) ON CONFLICT (id) DO UPDATE "
            "SET started = excluded.started, heartbeat = excluded.heartbeat, body = excluded.body",
            (ROW, status.started, time.time(), dump(body)),
        )


@contextmanager
def only_server(project: Project, store: Store) -> Iterator[Callable[[], bool]]:
    """Be this project's server while the block runs. Raises Conflict if another process is.

    Gives a function that says whether this still is so: after `rm -rf .ft` another server may have begun there.
    """
    held = try_exclusive(_lock_path(store))
    if held is None:
        raise Conflict("a server of this project runs already", place=str(project.home),
                       fix="`ft serve status` shows it, `ft serve down` stops it")  # fmt: skip
    fd = held

    def still() -> bool:
        try:
            return os.path.samestat(os.stat(_lock_path(store)), os.fstat(fd))
        except OSError:
            return False

    try:
        yield still
    finally:
        if still():
            forget_keys(project)
        os.close(fd)


def is_gone(store: Store) -> bool:
    """Has the server let go of everything?"""
    return not is_held(_lock_path(store))


def _lock_path(store: Store) -> Path:
    return store.home / "server.lock"
