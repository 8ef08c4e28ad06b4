"""The parts of the platform on this machine, as data: what `ft up` has its supervisor keep on.

The supervisor imports this module and lives as long as the machine, so what is heavy is imported inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from registry.file_locks import is_held

if TYPE_CHECKING:
    from registry.project import Project
    from registry.settings import Settings

NAMES = ("mlflow", "worker", "receiver", "serving")


@dataclass(frozen=True)
class Part:
    """One program that is to be on.

    health: a URL that answers 200 when the part is well (another answer: it lives, but is not ready), or a path of a
    file that then holds its process's id. listens: host and port that must be free before it starts.
    other_lock: held by a process of the same kind that somebody else started; while it is, the part is not started.
    lock_variable: the program takes other_lock from the supervisor, as a descriptor whose number this variable has.
    then: a command to be run each time it has become well. announce: a file that has the address while it is.
    """

    name: str
    command: tuple[str, ...]
    lock: str
    log: str
    cwd: str
    env: dict[str, str] = field(default_factory=dict)
    health: str = ""
    address: str = ""
    listens: tuple[str, int] | None = None
    other_lock: str = ""
    lock_variable: str = ""
    then: tuple[str, ...] = ()
    announce: str = ""
    start_seconds: float = 60.0
    stop_seconds: float = 20.0
    stamp: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> Part:
        listens = stored["listens"]
        tuples = {name: tuple(stored[name]) for name in ("command", "then")}
        return Part(**{**stored, **tuples, "listens": (listens[0], listens[1]) if listens else None})


def stamped(part: Part, settings: str = "") -> Part:
    """With a digest of all that decides how it behaves: one that was left behind is kept only if it is the same."""
    # Not all of MLFLOW_*: our own clients set some of them in passing.
    known = {name: value for name, value in os.environ.items() if name.startswith(("FT_", "AWS_", "MLFLOW_TRACKING"))}
    known.pop("FT_DEBUG", None)
    text = json.dumps([replace(part, stamp="").as_dict(), settings, known], sort_keys=True)
    return replace(part, stamp=hashlib.sha256(text.encode()).hexdigest()[:16])


def parts_of(
    project: Project, serve: str = "", only: list[str] | None = None, say: Callable[[str], None] = print
) -> tuple[list[Part], dict[str, str]]:
    """The parts in the order in which they are started, and why others are not among them, by name.

    `serve` is a model, a recipe or 'auto'; without it the setting of that name decides. Raises what `ft serve up`
    raises where it cannot be served, WrongInput for a name in `only` that is no part.
    """
    from registry.settings import load_settings

    _refuse_unknown(only or [])
    settings, chosen, left_out = load_settings(project), only or NAMES, {}
    serve = serve or settings.serve
    foreign = _foreign_tracker(settings)
    if foreign:
        left_out["mlflow"] = f"MLFLOW_TRACKING_URI names another one: {foreign}"
    if not serve:
        left_out["serving"] = "not asked for: `ft up --serve MODEL`, or `serve: MODEL` in ft.yaml"
    make = {"mlflow": _mlflow, "worker": _worker, "receiver": _receiver}
    parts = [make[name](project, settings) for name in make if name in chosen and name not in left_out]
    if "serving" in chosen and "serving" not in left_out:
        parts.append(_serving(project, settings, serve, say))
    told = {name: why for name, why in left_out.items() if name in chosen}
    return [stamped(each, settings.model_dump_json()) for each in parts], told


def _refuse_unknown(names: list[str]) -> None:
    from registry.errors import WrongInput

    if unknown := [name for name in names if name not in NAMES]:
        raise WrongInput(f"no such part: {', '.join(unknown)}", place="--only", fix=f"there is: {', '.join(NAMES)}")


def _foreign_tracker(settings: Settings) -> str:
    from registry.mlflow_server import names_another

    named = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not named or not names_another(named, settings.mlflow_port):
        return ""
    return named.rpartition("@")[2]


def _mlflow(project: Project, settings: Settings) -> Part:
    from registry import mlflow_server

    port = _port(project, "mlflow", mlflow_server.HOST, settings.mlflow_port)
    keys, hook = mlflow_server.keys_of(project), _receiver_address(project, settings) + "/hooks/mlflow"
    address = f"http://{mlflow_server.HOST}:{port}"
    return replace(
        _part(project, "mlflow", mlflow_server.server_command(project, port)),
        env={**_here(project), **mlflow_server.server_env(keys), **_webhook_secret(project, settings)},
        health=f"{address}/health",
        address=address,
        listens=(mlflow_server.HOST, port),
        then=(sys.executable, "-m", "registry.mlflow_webhook", address, hook),
        announce=str(mlflow_server.address_file(project)),
        start_seconds=300.0,  # its first start makes the store: 24 s on two busy cores, 90 s on very busy ones
    )


def _worker(project: Project, _: Settings) -> Part:
    from jobs.worker_process import LOCK_VARIABLE, worker_lock

    ready = str(project.home / "up" / "worker.ready")
    return replace(
        _part(project, "worker", [sys.executable, "-m", "jobs.worker", "--forever", "--ready", ready]),
        health=ready,
        other_lock=str(worker_lock(project)),
        lock_variable=LOCK_VARIABLE,
        start_seconds=120.0,
    )


def _receiver(project: Project, settings: Settings) -> Part:
    address = _receiver_address(project, settings)
    host, port = _receiver_place(project, settings)
    return replace(
        _part(project, "receiver", [sys.executable, "-m", "serving.receiver"]),
        env={**_here(project), **_webhook_secret(project, settings), "FT_RECEIVER_PORT": str(port)},
        health=f"{address}/healthz",
        address=address,
        listens=(host, port),
        other_lock=str(project.home / "receiver.lock"),
    )


def _serving(project: Project, settings: Settings, serve: str, say: Callable[[str], None]) -> Part:
    from cli.serve import what_to_serve
    from registry.store import open_store
    from serving.control import ensure_engines, server_command

    what = what_to_serve(project, open_store(project), "" if serve == "auto" else serve, say)
    ensure_engines(project, settings, what, say)
    port = _port(project, "serving", settings.gateway_host, settings.gateway_port)
    address = _url(settings.gateway_host, port)
    return replace(
        _part(project, "serving", server_command(project, what)),
        log=str(project.logs / "server.log"),
        env={**_here(project), "FT_GATEWAY_PORT": str(port)},
        health=f"{address}/health",
        address=address,
        listens=(settings.gateway_host, port),
        other_lock=str(project.home / "server.lock"),
        start_seconds=settings.engine_start_seconds + 20,
        stop_seconds=settings.drain_seconds + 60,
    )


def _part(project: Project, name: str, command: list[str]) -> Part:
    lock, log = project.home / "up" / f"{name}.lock", project.logs / f"{name}.log"
    return Part(name, tuple(command), str(lock), str(log), str(project.root), _here(project))


def _here(project: Project) -> dict[str, str]:
    return {
        "FT_PROJECT": str(project.root),
        "FT_HOME": str(project.home),
        "FT_CACHE": str(project.cache),
        "PYTHONUNBUFFERED": "1",
    }


def _webhook_secret(project: Project, settings: Settings) -> dict[str, str]:
    """MLflow signs with it and the receiver checks it: one that is made here where nobody has set any."""
    from registry.mlflow_server import keys_of

    return {"FT_MLFLOW_WEBHOOK_SECRET": settings.mlflow_webhook_secret or keys_of(project)["webhook_secret"]}


def _receiver_address(project: Project, settings: Settings) -> str:
    return _url(*_receiver_place(project, settings))


def _receiver_place(project: Project, settings: Settings) -> tuple[str, int]:
    return settings.receiver_host, _port(project, "receiver", settings.receiver_host, settings.receiver_port)


def _url(host: str, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _port(project: Project, name: str, host: str, port: int) -> int:
    """The port that is set; for 0 the one of last time, unless somebody else has it now, or any free one."""
    if port:
        return port
    remembered = project.home / "up" / f"{name}.port"
    try:
        before = int(remembered.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = 0
    kept = before and (is_held(project.home / "up" / f"{name}.lock") or is_free(host, before))
    chosen = before if kept else _free_port(host)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_text(str(chosen), encoding="utf-8")
    return chosen


def is_free(host: str, port: int) -> bool:
    """Could a program listen there now?"""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
