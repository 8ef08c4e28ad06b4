"""`ft doctor`: what is missing on this machine, how to get it, and what settings are in force."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from registry.errors import FtError

if TYPE_CHECKING:
    from registry.project import Project

FREE_GB = 10


@dataclass(frozen=True)
class Finding:
    """`state` is 'ok', 'note' (works, but) or 'missing' (something needs it); `fix` is the next command."""

    subject: str
    state: str
    fact: str
    fix: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False) -> None:
    """Say what is missing on this machine and how to get it. Exit code 1 if something is.

    Example: ft doctor
    """
    from cli.console import print_json, say, table
    from registry.project import find_project
    from registry.settings import sources

    project = find_project()
    findings = list(examine(project))
    settings = {name: {"value": value, "from": origin} for name, (value, origin) in sources(project).items()}
    if as_json:
        print_json({"findings": [vars(each) for each in findings], "settings": settings})
    else:
        table(["", "", "", ""], [[each.subject, each.state, each.fact, each.fix] for each in findings])
        say("")
        rows = [[name, str(each["value"]), each["from"]] for name, each in settings.items()]
        table(["setting", "value", "from"], rows)
    if any(each.state == "missing" for each in findings):
        raise typer.Exit(1)


def examine(project: Project) -> Iterator[Finding]:
    """Every check, in the order in which a newcomer needs the parts. One that fails keeps nobody from the rest."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": lambda: [_python()],
        "programs": _programs,
        "packages": _packages,
        "cards": lambda: _cards(project),
        "disk": lambda: _disk(project),
        "datasets": lambda: [_data(project)],
        "base model": lambda: _models(project),
        "vLLM": lambda: [_vllm(project)],
        "database": lambda: _database(project),
        "gateway": lambda: [_port(project)],
        "MLflow": lambda: [_mlflow(project)],
        "worker": lambda: [_worker(project)],
        "receiver": lambda: [_receiver(project)],
        "ft up": lambda: [_up(project)],
        "bucket": lambda: _bucket(project),
        "RunPod": lambda: _runpod(project),
    }
    for subject, look in checks.items():
        try:
            yield from look()
        except FtError as error:
            yield Finding(subject, "missing", f"{error.place}: {error.what}", error.fix)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Finding("python", "ok" if fine else "missing", version, "" if fine else "use Python 3.11, 3.12 or 3.13")


def _programs() -> Iterator[Finding]:
    for name, fix in (
        ("git", "install git"),
        ("make", "install make (only `make demo` and `make test` need it)"),
    ):
        path = shutil.which(name)
        yield Finding(name, "ok" if path else "missing", path or "not found", "" if path else fix)


def _packages() -> Iterator[Finding]:
    groups = {
        "training": (("torch", "trl", "peft", "dbos"), "train"),
        "serving": (("uvicorn", "httptools"), "serve"),
    }
    for subject, (names, extra) in groups.items():
        lacking = [name for name in names if not _version(name)]
        have = ", ".join(f"{name} {_version(name)}" for name in names if name not in lacking)
        fix = f"uv pip install -e '.[{extra}]'" if lacking else ""
        state = "missing" if lacking else "ok"
        yield Finding(subject, state, f"not installed: {', '.join(lacking)}" if lacking else have, fix)


def _cards(project: Project) -> Iterator[Finding]:
    from registry.cards import holder, list_cards

    for card in list_cards():
        held = holder(project, card)
        fact = f"{card.title}, {card.memory / 1e9:.0f} GB" + (f", held by {held}" if held else ", free")
        fix = "trains and serves small models only; an NVIDIA card needs its driver" if card.is_cpu else ""
        yield Finding(f"card {card.name}", "note" if card.is_cpu else "ok", fact, fix)


def _bucket(project: Project) -> Iterator[Finding]:
    """Only who has named one needs one: with our key, then with that of pods."""
    from contextlib import closing

    from jobs.pod_env import pod_bucket
    from registry.bucket import open_bucket
    from registry.settings import load_settings

    settings = load_settings(project)
    if not settings.bucket:
        return
    for whose, opened in (("ours", open_bucket), ("the pods' key", pod_bucket)):
        with closing(opened(settings)) as bucket:
            bucket.check()
            yield Finding("bucket", "ok", f"{bucket.place} takes conditional writes ({whose})")


def _runpod(project: Project) -> Iterator[Finding]:
    from registry.runpod_api import has_key, open_runpod
    from registry.settings import load_settings

    settings = load_settings(project)
    if has_key(settings):
        with open_runpod(settings, patience_s=10) as cloud:
            yield Finding("RunPod", "ok", f"{settings.runpod_url} lists {len(cloud.gpus())} types of cards")


def _disk(project: Project) -> Iterator[Finding]:
    for subject, folder in (("project disk", project.root), ("cache disk", project.cache)):
        nearest = next(each for each in [folder, *folder.parents] if each.exists())
        free = shutil.disk_usage(nearest).free / 1e9
        fix = f"free space, or point {'FT_CACHE' if subject.startswith('cache') else 'FT_HOME'} to a larger disk"
        yield Finding(
            subject,
            "ok" if free > FREE_GB else "note",
            f"{free:.0f} GB free at {folder}",
            fix if free <= FREE_GB else "",
        )


def _data(project: Project) -> Finding:
    from registry.tracked_data import tracked_datasets

    found = [each.path for each in tracked_datasets(project)]
    return Finding("datasets", "ok" if found else "note", ", ".join(sorted(found)) or "none yet",
                   "" if found else "`ft data add NAME FILE`")  # fmt: skip


def _models(project: Project) -> Iterator[Finding]:
    from registry.base_models import read_base

    found = [base for folder in project.models.glob("*@*") if (base := read_base(folder))]
    for base in found:
        yield Finding("base model", "ok", f"{base.source}, licence {base.licence}")
    if not found:
        yield Finding(
            "base model",
            "note",
            f"none in {project.models}",
            "the first `ft run` fetches what its recipe names",
        )


def _vllm(project: Project) -> Finding:
    from registry.cards import pick_card
    from registry.settings import load_settings
    from serving.vllm_env import vllm_is_ready, vllm_package

    settings, card = load_settings(project), pick_card("auto")
    package = vllm_package(settings, card)
    if vllm_is_ready(project, settings, card):
        return Finding("vLLM", "ok", f"{package} in {project.envs}")
    fix = "made at the first `ft run` or `ft serve up` (some 3 GB)"
    return Finding("vLLM", "note", f"{package} is not yet in {project.envs}", fix)


def _database(project: Project) -> Iterator[Finding]:
    from registry.folders import leads
    from registry.store import open_store

    store = open_store(project)
    yield Finding("database", "ok", store.database.place)
    if project.database_url and not leads(project, store):
        yield Finding("folder", "note", "another leads; this host lends its cards through the bucket",
                      "runs are started on a host of that folder; `ft worker --lead` if it is gone")  # fmt: skip


def _port(project: Project) -> Finding:
    from registry.settings import load_settings
    from registry.store import open_store
    from serving.control import server_status

    settings = load_settings(project)
    where = f"{settings.gateway_host}:{settings.gateway_port}"
    if server_status(open_store(project)):
        return Finding("gateway", "ok", f"up, see `ft serve status` ({where})")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.gateway_host, settings.gateway_port))
        except OSError as error:
            return Finding("gateway", "missing", f"{where}: {error.strerror}", "set FT_GATEWAY_PORT to a free port")
    return Finding("gateway", "ok", f"not up; {where} is free")


def _receiver(project: Project) -> Finding:
    from serving.receiver_lock import receiver_url

    url = receiver_url(project)
    return Finding("receiver", "ok", f"up at {url}" if url else "not up; `ft events receive` takes webhooks")


def _mlflow(project: Project) -> Finding:
    import os

    from registry.mlflow_server import own_server

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or not uri.startswith("http"):
        own = own_server(project) or "no server is needed; `ft up` starts one"
        return Finding("MLflow", "ok", uri or f"the project's own: .ft/mlflow.db ({own})")
    import urllib.request

    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5):
            return Finding("MLflow", "ok", uri)
    except OSError as error:
        return Finding("MLflow", "missing", f"{uri}: {error}", "start the server, or unset MLFLOW_TRACKING_URI")


def _worker(project: Project) -> Finding:
    from jobs.worker_process import worker_is_on

    return Finding("worker", "ok", "on" if worker_is_on(project) else "none is on; `ft run` starts one")


def _up(project: Project) -> Finding:
    from cli.up_folder import FINE, UpFolder

    up = UpFolder(project.home)
    if not up.is_up():
        left = [lock.stem for lock in up.left_behind()]
        fact = f"its supervisor is gone, but not {', '.join(left)}" if left else "not up"
        return Finding("ft up", "note" if left else "ok", fact, "`ft up` takes over, `ft down` stops" if left else "")
    bad = [each["name"] for each in up.now() if each["state"] not in FINE]
    return Finding("ft up", "note" if bad else "ok", f"not on: {', '.join(bad)}" if bad else "up",
                   "`ft up --status` says why" if bad else "")  # fmt: skip


def _version(name: str) -> str:
    # Never find_spec: our own datasets/ folder looks like Hugging Face's package.
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
