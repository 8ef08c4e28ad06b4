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
from registry.serve_recipe import ServeRecipe, unjudged_in
from registry.store import Store, dump
from serving.server_keys import forget_keys
from serving.vllm_process import ONLY, EngineConfig

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
# Of an engine also: nobody wants it, it sleeps, or it is somebody's and does not answer.
EngineState = State | Literal["off", "asleep", "away"]
WITHOUT_CARD = ("waiting for the card", "card given to training")


@dataclass(frozen=True)
class EngineStatus:
    """One engine. `precision` of its base; `given_up`: what of the recipe the planner could not give it; `need` and
    `room`: bytes of its card; `start_seconds`: of its last start, until its adapters answered."""

    name: str
    state: EngineState
    reason: str
    base: dict[str, Any]
    serve: dict[str, Any]
    card: str
    max_rank: int
    precision: str = "bf16"
    start: Literal["always", "demand"] = "always"
    given_up: list[str] = field(default_factory=list)
    need: int = 0
    room: int = 0
    url: str = ""
    pid: int | None = None
    starts: int = 0
    failed_starts: int = 0
    start_seconds: float | None = None
    progress: str = ""
    loaded: list[str] = field(default_factory=list)
    routes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    swaps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_off(self) -> bool:
        """Does it not answer because nobody wants it to, or because it is somebody's that is away?"""
        return self.state in ("off", "asleep", "away")

    def serves(self, need: EngineConfig) -> bool:
        """Is this engine one that `need` asks for? Its rank may still grow, so it is not looked at."""
        same = self.base["digest"] == need.base.digest and self.card == need.card.name
        return same and Serve(**self.serve).max_context >= need.serve.max_context


@dataclass(frozen=True)
class ServerStatus:
    """One heartbeat. `routes` is public name -> version; `swaps` the last flips with the seconds of their parts.

    `engines` has each of them; the fields from `base` to `engine_starts` are the first one's, the lists those of all.
    """

    pid: int
    state: EngineState
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
    engines: dict[str, EngineStatus] = field(default_factory=dict)
    # Somebody's engines that are used as they are: how each stands ('' while it answers).
    elsewhere: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    objectives: list[dict[str, Any]] = field(default_factory=list)
    started: float = 0.0
    heartbeat: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def all_engines(self) -> list[EngineStatus]:
        """The first one comes first; of a record without `engines` the only one."""
        if self.engines or self.recipe:
            return list(self.engines.values())
        return [
            EngineStatus(ONLY, self.state, self.reason, self.base, self.serve, self.card, self.max_rank,
                         url=self.engine_url, pid=self.engine_pid, starts=self.engine_starts)
        ]  # fmt: skip

    def engine_on(self, digest: str) -> EngineStatus | None:
        """The engine for the base with that digest; of two the one that is up."""
        found = [each for each in self.all_engines() if each.base.get("digest") == digest]
        return min(found, key=lambda each: (each.state != "serving", each.is_off), default=None)

    def engine_for(self, need: EngineConfig) -> EngineStatus | None:
        """The engine that is what `need` asks for; none that would have to be started first."""
        found = [each for each in self.all_engines() if each.serves(need) and not each.is_off]
        return min(found, key=lambda each: each.state != "serving", default=None)


def server_status(store: Store) -> ServerStatus | None:
    """The project's server; None if there is none, it is dead, or it has not been heard of for half a minute."""
    status = last_words(store)
    if status is None or not is_held(_lock_path(store)) or time.time() - status.heartbeat > STALE_SECONDS:
        return None
    return status


def unjudged_models(store: Store) -> frozenset[str]:
    """Models of which the server that runs takes versions that no gate has passed.

    A recipe that only lies in the project allows nothing: by a draft, whoever may move an alias in MLflow could have
    made such a version the champion.
    """
    status = last_words(store)
    if status is None or not status.recipe or time.time() - status.heartbeat > STALE_SECONDS:
        return frozenset()
    return unjudged_in(ServeRecipe.model_validate(status.recipe))


def last_words(store: Store) -> ServerStatus | None:
    """The last heartbeat, of a dead server too."""
    row = store.first("SELECT * FROM servers WHERE id = ?", (ROW,))
    if row is None:
        return None
    body = json.loads(row["body"])
    # An older server's record has no engines. A list, because keys are stored in the order of the alphabet.
    engines = {each["name"]: EngineStatus(**each) for each in body.pop("engines", [])}
    return ServerStatus(**body, engines=engines, started=row["started"], heartbeat=row["heartbeat"])


def loaded_lately(store: Store, now: float) -> set[str]:
    """Names of the versions that a server had or answered with within a day, be it heard of at this moment or not."""
    found = [
        json.loads(row["body"]) for row in store.read("SELECT body FROM servers WHERE heartbeat > ?", (now - DAY,))
    ]
    return {name for each in found for name in [*each.get("loaded", []), *each.get("routes", {}).values()]}


def write_status(store: Store, status: ServerStatus) -> None:
    body = {name: value for name, value in status.as_dict().items() if name not in ("started", "heartbeat")}
    body["engines"] = list(body["engines"].values())
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
