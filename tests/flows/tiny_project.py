"""A project whose runs take seconds: a random two-layer base, a canned engine, and a stand-in for the server.

Everything else is real: the ft commands, the worker, DBOS, git, DVC, MLflow and the trainer.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from jobs.fetch_base import fetch_base
from jobs.worker_process import worker_is_on, worker_pid
from registry import adapters, runs
from registry.base_models import BaseModel
from registry.dataset_versions import store_version
from registry.events import append, new_event, read
from registry.job_folder import JobFolder
from registry.recipe import Base, Serve
from registry.store import Store
from serving.server_keys import write_keys
from serving.server_record import ServerStatus, only_server, write_status
from tests.conftest import TinyBase
from tests.dvc_projects import make_project
from tests.fakes.answering_engine import KEY, AnsweringEngine
from tests.flows.conftest import Person
from tests.judged_project import _write as write_tickets
from tests.judged_project import question_of

SHORT = {"quantize": "none", "batch": 2, "max_steps": 4, "checkpoint_steps": 2, "max_length": 128, "lora": {"rank": 8}}


@dataclass(frozen=True)
class Tiny:
    """A person in such a project, with recipe `m`."""

    person: Person
    base: BaseModel

    @property
    def store(self) -> Store:
        return self.person.store

    def write_recipe(self, train: dict[str, Any] | None = None, **keys: Any) -> None:
        body = {
            "kind": "finetune", "base": {"model": "./tiny", "licence": "Apache-2.0"}, "card": "cpu",
            "data": {"path": "datasets/tickets"}, "train": {**SHORT, **(train or {})},
            "evaluate": {"task": "label", "concurrency": 4}, "gate": {"may_lose": 1.0}, **keys,
        }  # fmt: skip
        text = yaml.safe_dump(body, sort_keys=False)
        (self.person.project.root / "recipes" / "m.yaml").write_text(text, encoding="utf-8")

    def submit(self, *more: str) -> str:
        return self.person.ft("run", "recipes/m.yaml", "--detach", *more).strip().splitlines()[-1]

    def run(self, run_id: str) -> runs.Run:
        return runs.get(self.store, run_id)

    def job(self, run_id: str) -> JobFolder:
        return JobFolder(self.person.project.job_folder(run_id))

    def step(self, run_id: str) -> int:
        """The last step of training that was reported."""
        return max((line.get("step", 0) for line in self.job(run_id).progress()), default=0)

    def until(self, condition: Callable[[], object], run_id: str, seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.told(run_id)
            time.sleep(0.05)

    def until_stage(self, run_id: str, stage: str) -> None:
        self.until(lambda: self.run(run_id).stage == stage or self.run(run_id).ended, run_id)
        assert self.run(run_id).stage == stage, self.told(run_id)

    def end(self, run_id: str) -> runs.Run:
        self.until(lambda: self.run(run_id).ended, run_id)
        return self.run(run_id)

    def told(self, run_id: str) -> str:
        log = self.person.project.logs / "worker.log"
        return f"{self.run(run_id)}\n{log.read_text() if log.exists() else ''}"

    def kill_worker(self) -> None:
        pid = worker_pid(self.person.project)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 30
        while worker_is_on(self.person.project):
            assert time.monotonic() < end
            time.sleep(0.05)

    def types(self, run_id: str) -> list[str]:
        return [event.type for event in read(self.store, subject=run_id)]

    def data(self, run_id: str, type_: str) -> list[dict[str, Any]]:
        return [event.data for event in read(self.store, subject=run_id, type_=type_)]


def make_tiny(root: Path, tiny_base: TinyBase) -> Tiny:
    project = replace(make_project(root), cache=root.parent / "cache")
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    store_version(project, "tickets", write_tickets, replace=False)
    shutil.copytree(tiny_base.folder, root / "tiny")
    (root / "tiny" / "MANIFEST.json").unlink()
    project.models.mkdir(parents=True)
    base = fetch_base(project, Base(model="./tiny", licence="Apache-2.0"))
    return Tiny(Person(project), base)


@contextmanager
def stand_in(tiny: Tiny) -> Iterator[AnsweringEngine]:
    """This project's server as runs see it: its engine answers rightly, and each champion is served at once."""
    store, project, over = tiny.store, tiny.person.project, threading.Event()

    def serve(url: str) -> None:
        served, written = 0, 0.0
        while not over.is_set():
            if time.monotonic() - written > 5:
                written = time.monotonic()
                write_status(store, ServerStatus(
                    pid=1, state="serving", reason="", base=tiny.base.as_dict(), serve=Serve().model_dump(),
                    card="cpu", max_rank=512, gateway_url="http://127.0.0.1:1", engine_url=url,
                ))  # fmt: skip
            champion = adapters.aliases(store, "m").get("champion", 0)
            if champion != served:
                append(store, new_event("test", "adapter.served", f"m@{champion}", {"at": time.time()}))
                served = champion
            over.wait(0.1)

    def answer(model: str, messages: list[dict[str, str]], attempt: int) -> str:
        return question_of(messages)[1]

    with AnsweringEngine(answer) as engine, only_server(project, store):
        write_keys(project, {"engine_url": engine.url, "engine_key": KEY})
        thread = threading.Thread(target=serve, args=[engine.url])
        thread.start()
        try:
            yield engine
        finally:
            over.set()
            thread.join(30)
