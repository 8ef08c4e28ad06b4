"""The project's own MLflow server, which `ft up` starts over `.ft/mlflow.db`: its command, its keys, its address.

Whoever writes to the store while the server is up goes through it, because only what goes through it fires webhooks;
without it the same file is written directly. Artifacts lie at file addresses for both: an experiment that the server
had made with its own `mlflow-artifacts:/` could not be written to without it. Standard library only.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from registry.file_locks import is_held
from registry.project import Project

HOST = "127.0.0.1"
KEY_VARIABLE = "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"


def own_store(project: Project) -> str:
    return f"sqlite:///{project.home / 'mlflow.db'}"


def artifact_root(project: Project) -> str:
    return (project.home / "mlartifacts").as_uri()


def own_server(project: Project) -> str:
    """Address of the project's server while it is up; '' otherwise."""
    try:
        address = address_file(project).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return address if is_held(lock_file(project)) else ""


def address_file(project: Project) -> Path:
    """Has the server's address while it answers."""
    return project.home / "mlflow.url"


def lock_file(project: Project) -> Path:
    """Held while the server lives."""
    return project.home / "up" / "mlflow.lock"


def names_another(uri: str, port: int) -> bool:
    """Does MLFLOW_TRACKING_URI lead anywhere else than to this machine's port `port`?"""
    try:
        parts = urlsplit(uri)
        return parts.hostname not in (HOST, "localhost", "::1") or parts.port != port
    except ValueError:
        return True


def server_command(project: Project, port: int) -> list[str]:
    # One worker: several deliver a webhook each by its own cache, and each is 260 MB.
    return [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", own_store(project), "--default-artifact-root", artifact_root(project),
        "--no-serve-artifacts", "--uvicorn-opts=--no-access-log",
    ]  # fmt: skip


def server_env(keys: dict[str, str]) -> dict[str, str]:
    """What the server needs in its environment; `keys` are those of `keys_of`."""
    return {
        # Ten processes and 2.2 GB, and an API that runs code for whoever asks (facts: CVE-2026-0545).
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        # With the default, a minute, what happens in the first minute after registering goes nowhere.
        "MLFLOW_WEBHOOK_CACHE_TTL": "2",
        # Without one it is made at random in each process, and a restarted server cannot read its own webhooks.
        KEY_VARIABLE: os.environ.get(KEY_VARIABLE) or keys["encryption_key"],
    }


def keys_of(project: Project) -> dict[str, str]:
    """encryption_key (of the server's webhooks) and webhook_secret; made at the first time, for their owner only."""
    path = project.home / "mlflow_keys.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(found[name]) for name in ("encryption_key", "webhook_secret")}
    except (OSError, ValueError, KeyError, TypeError):
        return _make_keys(path)


def _make_keys(path: Path) -> dict[str, str]:
    keys = {name: base64.urlsafe_b64encode(os.urandom(32)).decode() for name in ("encryption_key", "webhook_secret")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(keys, out)
    partial.replace(path)
    return keys
