"""The running server's keys and addresses: `.ft/server.json`, which only its owner can read, never the database.

Standard library only, because `ft ask` needs nothing else of serving.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from registry.project import Project


def write_keys(project: Project, keys: dict[str, str]) -> None:
    partial = keys_path(project).with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(keys, out)
    partial.replace(keys_path(project))


def read_keys(project: Project) -> dict[str, str]:
    """internal_key, gateway_url, engine_url and engine_key of the running server; {} without one."""
    try:
        return {str(name): str(value) for name, value in json.loads(keys_path(project).read_bytes()).items()}
    except (OSError, ValueError):
        return {}


def forget_keys(project: Project) -> None:
    keys_path(project).unlink(missing_ok=True)


def keys_path(project: Project) -> Path:
    return project.home / "server.json"
