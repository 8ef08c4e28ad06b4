"""`python -m tests.bench.bench_steps [COUNT]`: what our layer costs on top of the durable engine, beside it in one run.

Enqueuing a run (row and event) against DBOS's own enqueue; a step of ours against a bare one; a whole workflow of ten
steps, from the enqueued run to the end of its last step, against a bare one. Prints one JSON line: medians in
milliseconds, ratios; and workflows per second where many are on at once. BENCH_DATABASE=postgres for Postgres.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from dbos import DBOS, SetWorkflowID

from jobs import runtime
from jobs.finetune import bind
from jobs.steps import State, step
from registry import runs
from registry.project import Project
from registry.settings import load_settings
from registry.store import Store, open_store
from tests.postgres_server import postgres_server

STEPS = 10
AT_ONCE, ROUNDS = 50, 5
# Who asks for the result each millisecond takes the interpreter from who is measured.
LOOK_SECONDS = 0.1
RECIPE = {"name": "bench", "model": "bench"}


@step("ours")
async def our_step(bench: Any, run_id: str) -> State:
    return {}


@DBOS.step(name="bare", preemptible=True)
async def bare_step(run_id: str) -> State:
    return {}


@DBOS.workflow(name="ours")
async def our_workflow(run_id: str) -> list[float]:
    began = time.perf_counter()
    for _ in range(STEPS):
        await our_step(run_id)
    return [began, time.perf_counter()]


@DBOS.workflow(name="bare")
async def bare_workflow(run_id: str) -> list[float]:
    began = time.perf_counter()
    for _ in range(STEPS):
        await bare_step(run_id)
    return [began, time.perf_counter()]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with ExitStack() as stack:
        if os.environ.get("BENCH_DATABASE") == "postgres":
            os.environ["FT_DATABASE_URL"] = stack.enter_context(postgres_server()).url
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        project = Project(root, root / ".ft", root / "cache")
        project.home.mkdir()
        store = open_store(project)
        bind(project, store, load_settings(project))
        runtime.launch(project)
        database = os.environ.get("BENCH_DATABASE", "sqlite")
        print(json.dumps({"database": database, **measure(store, count), **rates(store)}), flush=True)
        os._exit(0)


def measure(store: Store, count: int) -> dict[str, Any]:
    """One of ours, one bare, one of ours..., so that a noisy machine is noisy for both."""
    for number in range(5):
        _one(our_workflow, _submit(store, f"warm-{number}"))
        _one(bare_workflow, f"warm-bare-{number}")
    times: dict[str, list[float]] = {
        name: [] for name in ("enqueue", "enqueue_bare", "step", "step_bare", "all", "all_bare")
    }
    for number in range(count):
        for name, flow, submit in (("", our_workflow, True), ("_bare", bare_workflow, False)):
            began = time.perf_counter()
            run_id = _submit(store, f"{number}") if submit else f"bare-{number}"
            if submit:
                times["enqueue"].append(time.perf_counter() - began)
            handle = _start(flow, run_id)
            first, last = handle.get_result(polling_interval_sec=LOOK_SECONDS)
            times[f"step{name}"].append((last - first) / STEPS)
            times[f"all{name}"].append(last - began)
        began = time.perf_counter()
        _enqueue_bare(f"queued-{number}")
        times["enqueue_bare"].append(time.perf_counter() - began)
    medians = {f"{name}_ms": round(statistics.median(each) * 1000, 3) for name, each in times.items()}
    ratios = {
        f"{name}_ratio": round(medians[f"{name}_ms"] / medians[f"{name}_bare_ms"], 2)
        for name in ("enqueue", "step", "all")
    }
    return {**medians, **ratios, "count": count}


def rates(store: Store) -> dict[str, Any]:
    """Workflows per second, submitting included, with so many on at once; rounds in turn."""
    found: dict[str, list[float]] = {"rate": [], "rate_bare": []}
    for number in range(ROUNDS):
        ids = [f"r{number}-{each}" for each in range(AT_ONCE)]
        found["rate"].append(_rate(our_workflow, ids, partial(_submit, store)))
        found["rate_bare"].append(_rate(bare_workflow, ids, "bare-{}".format))
    medians = {name: round(statistics.median(each), 1) for name, each in found.items()}
    return {**medians, "rate_ratio": round(medians["rate_bare"] / medians["rate"], 2), "at_once": AT_ONCE}


def _rate(flow: Callable[..., Any], ids: list[str], submit: Callable[[str], str]) -> float:
    began = time.perf_counter()
    handles = [_start(flow, submit(each)) for each in ids]
    ends = [float(handle.get_result(polling_interval_sec=LOOK_SECONDS)[1]) for handle in handles]
    return len(ids) / (max(ends) - began)


def _submit(store: Store, name: str) -> str:
    with store.writing() as connection:
        runs.submit_within(connection, f"bench-{name}", RECIPE, "recipes/bench.yaml", "0")
    return f"bench-{name}"


def _enqueue_bare(name: str) -> None:
    """On a queue that nobody listens to."""
    DBOS.enqueue_workflow_with_options(
        {"workflow_name": "bare", "queue_name": "nobody", "workflow_id": name, "app_version": runtime.VERSION}, name
    )


def _start(flow: Callable[..., Any], run_id: str) -> Any:
    with SetWorkflowID(run_id):
        return DBOS.start_workflow(flow, run_id)


def _one(flow: Callable[..., Any], run_id: str) -> None:
    _start(flow, run_id).get_result(polling_interval_sec=LOOK_SECONDS)


if __name__ == "__main__":
    main()
