"""The running server's keys and addresses: `.ft/server.json`, which only its owner can read, never the database.

Standard library only, because `ft ask` needs nothing else of serving.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.project import Project


def write_keys(project: Project, keys: Mapping[str, Any]) -> None:
    partial = keys_path(project).with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(keys, out)
    partial.replace(keys_path(project))


def read_keys(project: Project) -> dict[str, str]:
    """internal_key and gateway_url of the running server, engine_url and engine_key of its first engine; {} without."""
    return {name: value for name, value in _read(project).items() if isinstance(value, str)}


def engine_keys(project: Project, engine: str) -> tuple[str, str] | None:
    """Address and key of an engine of the running server; None while it is not up."""
    kept = _read(project)
    found = kept.get("engines", {}).get(engine) if "engines" in kept else kept
    return (str(found["engine_url"]), str(found["engine_key"])) if found and "engine_url" in found else None


def _read(project: Project) -> dict[str, Any]:
    try:
        return dict(json.loads(keys_path(project).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def read_engine_keys(project: Project) -> dict[str, str]:
    """The keys of all engines of the running server that are up, by their addresses."""
    engines = _read(project).get("engines", {})
    return {str(each["engine_url"]): str(each["engine_key"]) for each in engines.values() if "engine_url" in each}


def forget_keys(project: Project) -> None:
    keys_path(project).unlink(missing_ok=True)


def keys_path(project: Project) -> Path:
    return project.home / "server.json"
