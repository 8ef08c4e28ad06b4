"""A made project in which whole paths are tried with the real commands, as a person would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.project import Project
from registry.store import Store, open_store
from tests.conftest import ROOT

LONG_SECONDS = 540


@dataclass(frozen=True)
class Person:
    """Somebody in a project, with a cache whose card locks are their own."""

    project: Project

    @property
    def store(self) -> Store:
        return open_store(self.project)

    def environment(self) -> dict[str, str]:
        ours = {"FT_CACHE": str(self.project.cache), "FT_GATEWAY_PORT": "0", "FT_WORKER_IDLE_SECONDS": "5"}
        return {**os.environ, **ours, "PYTHONPATH": str(ROOT)}

    def ft(self, *arguments: str, exits: int | None = 0, timeout: float = LONG_SECONDS) -> str:
        """Run `ft ...`; what it printed (both streams)."""
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments], cwd=self.project.root, env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert exits is None or done.returncode == exits, f"ft {' '.join(arguments)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def json(self, *arguments: str, exits: int | None = 0) -> Any:
        return json.loads(self.ft(*arguments, "--json", exits=exits))

    def shorten(self) -> None:
        """A few steps of training, a few questions, and a gate that lets everything through."""
        self.change_recipe(
            train={"max_steps": 4, "batch": 4, "checkpoint_steps": 1},
            data={"max_test": 16},
            gate={"min": 0.0, "beat_base_by": -1.0, "may_lose": 1.0},
        )

    def change_recipe(self, **sections: dict[str, Any]) -> Path:
        """Merge keys into sections of the project's recipe."""
        path = self.project.root / "recipes" / "tickets.yaml"
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, keys in sections.items():
            body[section] = {**body.get(section, {}), **keys}
        path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
        return path


@pytest.fixture
def person(tmp_path: Path, base_model: object, persons_cache: Path) -> Iterator[Person]:
    """In a project as `ft init` makes it; the recipe's training is cut to a few steps and its gate opened wide."""
    cache, root = tmp_path / "cache", tmp_path / "project"
    cache.mkdir()
    for shared in ("models", "envs"):
        (cache / shared).symlink_to(persons_cache / shared, target_is_directory=True)
    found = Person(Project(root=root, home=root / ".ft", cache=cache))
    subprocess.run(
        [sys.executable, "-m", "cli.main", "init", str(root)], env=found.environment(), cwd=tmp_path, check=True,
        timeout=120, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    found.shorten()
    yield found
    found.ft("serve", "down", exits=None)
    _end_what_runs(cache)


def _end_what_runs(cache: Path) -> None:
    """Workers and trainers outlive their command by design, so a test ends those that have its cache."""
    mark = f"FT_CACHE={cache}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0") and int(process.name) != os.getpid():
                os.kill(int(process.name), 9)
        except (OSError, ValueError):
            continue
