"""What MLflow's aliases are, read as cheaply as it goes: again and again, in a worker that has nothing else to do.

MLflow's own client with its SQL store takes 80 MB and seconds of import, and plain HTTP or SQLite will mostly do.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from registry.errors import TrackerError
from registry.mlflow_store import Tracker

SECONDS = 5.0
MOST_BYTES = 10_000_000
# What only MLflow's own client knows how to do.
SPECIAL = (
    "MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_AUTH", "MLFLOW_WORKSPACE",
)  # fmt: skip


def aliases_at(tracker: Tracker, model: str) -> dict[str, int] | None:
    """MLflow's aliases of the model, None if it does not know it. Raises TrackerError if it is away."""
    parts = urlsplit(tracker.uri)
    if any(os.environ.get(name) for name in SPECIAL):
        return tracker.aliases(model)
    try:
        if parts.scheme in ("http", "https"):
            return _by_http(tracker, model)
        if tracker.uri.startswith("sqlite:///") and "?" not in tracker.uri:
            return _by_sqlite(Path(tracker.uri.removeprefix("sqlite:///")), model)
    except (OSError, ValueError, sqlite3.Error) as error:
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise TrackerError(f"MLflow: cannot read aliases: {error}", place=place, fix="start it again") from error
    return tracker.aliases(model)


def _by_http(tracker: Tracker, model: str) -> dict[str, int] | None:
    parts = urlsplit(tracker.uri)
    path = f"{parts.path.rstrip('/')}/api/2.0/mlflow/registered-models/get"
    url = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, f"name={quote(model, safe='')}", ""))
    request = urllib.request.Request(url, headers=_who(parts.username, parts.password))
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            found = json.loads(reply.read(MOST_BYTES))["registered_model"].get("aliases", [])
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):  # a password of ~/.mlflow, or a plugin's
                return tracker.aliases(model)
            if error.code == 404 and b"RESOURCE_DOES_NOT_EXIST" in error.read(10_000):
                return None
            raise
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError("what answers is no MLflow") from error
    return {each["alias"]: int(each["version"]) for each in found}


def _by_sqlite(path: Path, model: str) -> dict[str, int] | None:
    if not path.is_file():
        return None
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=SECONDS)) as connection:
        # Nobody has been there yet: MLflow makes its tables at the first call.
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'registered_models'").fetchone():
            return None
        if not connection.execute("SELECT 1 FROM registered_models WHERE name = ?", (model,)).fetchone():
            return None
        rows = connection.execute("SELECT alias, version FROM registered_model_aliases WHERE name = ?", (model,))
        return {str(alias): int(version) for alias, version in rows}


def _who(user: str | None, password: str | None) -> dict[str, str]:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(user or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(password or "")
    if user:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}
