"""`python -m tests.flows.kills FOLDER [KILLS] [SEED]`: kill -9 worker or trainer of one run at random moments.

The run is resumed with `ft resume` each time. In the end there must be one model version, one move of champion, and
no step repeated whose completion was recorded. Prints one JSON line; exit code 1 if any of that does not hold.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.worker_process import worker_is_on, worker_pid
from registry import adapters, runs
from registry.job_folder import JobFolder
from registry.project import Project
from tests.flows.conftest import Person

# A trainer needs some 15 s to its first step, vLLM 40 s to its first answer: kills fall before, in and after these.
SPREAD_SECONDS = (1.0, 35.0)
LIMIT_SECONDS = 1800.0


@dataclass
class Sweep:
    kills: list[dict[str, Any]] = field(default_factory=list)
    resumes: int = 0


def sweep(person: Person, kills: int, seed: int) -> dict[str, Any]:
    """Submit a run, kill `kills` times, let it end; the figures."""
    dice, done, began = random.Random(seed), Sweep(), time.monotonic()
    run_id = person.ft("run", "recipes/tickets.yaml", "--detach").strip().splitlines()[-1]
    while runs.get(person.store, run_id).state != "succeeded" and time.monotonic() - began < LIMIT_SECONDS:
        if len(done.kills) < kills:
            _wait(person, run_id, dice.uniform(*SPREAD_SECONDS))
            _kill_one(person, run_id, dice, done)
        # A person does the same: a dead worker is started again, and a run that gave up on its trainer goes on.
        if not worker_is_on(person.project) or not runs.get(person.store, run_id).active:
            person.ft("resume", run_id, "--detach", exits=None)
            done.resumes += 1
        time.sleep(0.5)
    return {
        "run": run_id,
        "seed": seed,
        **_figures(person, run_id, done),
        "seconds": round(time.monotonic() - began, 1),
    }


def holds(figures: dict[str, Any]) -> bool:
    return (
        figures["state"] == "succeeded"
        and figures["versions"] == 1
        and figures["mlflow_versions"] == 1
        and figures["moves"] == 1
        and not figures["repeated"]
    )


def _wait(person: Person, run_id: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and runs.get(person.store, run_id).active:
        time.sleep(0.1)


def _kill_one(person: Person, run_id: str, dice: random.Random, done: Sweep) -> None:
    found = {"worker": _worker(person.project), "trainer": _trainer(person.project, run_id)}
    there = {name: pid for name, pid in found.items() if pid}
    if not there:
        return
    name = dice.choice(sorted(there))
    os.kill(there[name], signal.SIGKILL)
    done.kills.append({"killed": name, "stage": runs.get(person.store, run_id).stage})


def _worker(project: Project) -> int | None:
    return worker_pid(project)


def _trainer(project: Project, run_id: str) -> int | None:
    held = JobFolder(project.job_folder(run_id)).lease()
    if held is None:
        return None
    command = Path(f"/proc/{held.lease.pid}/cmdline")
    return held.lease.pid if command.exists() and b"jobs.trainer" in command.read_bytes() else None


def _figures(person: Person, run_id: str, done: Sweep) -> dict[str, Any]:
    from mlflow import MlflowClient

    store, run = person.store, runs.get(person.store, run_id)
    client = MlflowClient(f"sqlite:///{person.project.home}/mlflow.db")
    steps = runs.steps(store, run_id)
    # Completed: ended without an error. No attempt may come after that.
    completed: dict[str, int] = {}
    for step in steps:
        if step.finished and "error" not in step.note:
            completed.setdefault(step.name, step.attempt)
    repeated = [step.name for step in steps if step.attempt > completed.get(step.name, step.attempt)]
    return {
        "state": run.state,
        "kills": len(done.kills),
        "killed": done.kills,
        "resumes": done.resumes,
        "attempts": {step.name: step.attempt for step in steps},
        "versions": len(adapters.versions(store)),
        "mlflow_versions": len(client.search_model_versions("")),
        "moves": len(adapters.promotions(store)),
        "repeated": sorted(set(repeated)),
        "error": run.error,
    }


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    cache = Path(os.environ["FT_CACHE"]) if "FT_CACHE" in os.environ else Path.home() / ".cache" / "ft"
    person = Person(Project(root=root, home=root / ".ft", cache=cache))
    person.shorten()
    figures = sweep(person, int(sys.argv[2] if len(sys.argv) > 2 else 10), int(sys.argv[3] if len(sys.argv) > 3 else 1))
    print(json.dumps(figures))
    sys.exit(0 if holds(figures) else 1)


if __name__ == "__main__":
    main()
