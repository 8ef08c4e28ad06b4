"""`python -m tests.bench.bench_latency [COUNT] [sqlite|postgres]`: from an event to the first step of its run.

A worker is up. Each event is appended by this process, as the receiver does, once the run of the event before it has
ended (its recipe names a dataset that is not there, so it fails at its second step). The time is from the event's own
to the start of the run's first step, both by this machine's clock. Prints one JSON line, in milliseconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from registry import runs
from registry.events import append, new_event
from registry.project import Project, find_project
from registry.store import Store, open_store
from tests.postgres_server import postgres_server

RECIPE = """
kind: finetune
base: org/base
data: {path: datasets/none}
evaluate: {task: label}
on: {event: [{type: external.go}]}
"""
LIMIT_SECONDS = 60.0


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    database = sys.argv[2] if len(sys.argv) > 2 else "sqlite"
    with ExitStack() as stack:
        if database == "postgres":
            os.environ["FT_DATABASE_URL"] = stack.enter_context(postgres_server()).url
        project = _project(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        store = open_store(project)
        worker = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "worker"],
            cwd=project.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            taken = [_one(store, number) for number in range(-5, count)][5:]
        finally:
            worker.kill()
            worker.wait()
    print(json.dumps({"database": database, **_figures(taken)}))


def _project(root: Path) -> Project:
    for folder in ("recipes", "datasets"):
        (root / folder).mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    (root / "recipes" / "bench.yaml").write_text(RECIPE, encoding="utf-8")
    return find_project(root)


def _one(store: Store, number: int) -> float:
    """Seconds from the event to its run's first step."""
    event = new_event("bench", "external.go", "", {}, key=str(number))
    append(store, event)
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        found = runs.listed(store, limit=1)
        if found and found[0].created >= event.time and not found[0].active:
            return runs.steps(store, found[0].id)[0].started - event.time
        time.sleep(0.02)
    raise TimeoutError(f"event {number} started no run")


def _figures(taken: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(taken, n=100)
    return {"events": len(taken), "p50_ms": round(cuts[49] * 1000, 1), "p99_ms": round(cuts[98] * 1000, 1)}


if __name__ == "__main__":
    main()
