"""`make bench-scale`: a store with 10,000 runs and 1,000,000 events, on SQLite and on Postgres; what it still takes.

Rows have the shape that the real code writes, and are inserted in bulk. Commands are timed as whole processes,
with the start of Python, in turn; appends into the full store and into an empty one, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.dispatch import Dispatcher
from jobs.prune import plan_of, preview
from registry.decisions import CURSOR, past_of
from registry.events import Event, advance, append, find, new_event, newest, values_of
from registry.project import Project, find_project
from registry.retention import Keep
from registry.runs import listed, untold
from registry.store import Store, dump, open_store
from registry.triggers import Subscriber, Triggers
from tests.postgres_server import postgres_server

TIMES, APPENDS, ROUNDS, BATCH = 9, 300, 15, 20_000
STEPS = ("take turn", "pin", "plan", "train", "register", "evaluate", "judge", "promote")
START = time.time() - 200 * 86400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--databases", nargs="*", default=["sqlite", "postgres"])
    given = parser.parse_args()
    found = {name: _on(name, given.runs, given.events) for name in given.databases}
    print(json.dumps(found, indent=1))


def _on(name: str, runs: int, events: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ft-bench-") as folder:
        os.environ.pop("FT_DATABASE_URL", None)
        project, other = _project(Path(folder) / "full"), _project(Path(folder) / "empty")
        if name == "sqlite":
            return measure(project, other, open_store(other), runs, events)
        with postgres_server() as server:
            os.environ["FT_EMPTY_URL"] = os.environ["FT_DATABASE_URL"] = server.new_database("empty")
            empty = open_store(other)
            os.environ["FT_DATABASE_URL"] = server.new_database("bench")
            return measure(project, other, empty, runs, events)


def measure(project: Project, other: Project, empty: Store, runs: int, events: int) -> dict[str, Any]:
    """All figures of one database: seconds, unless the name says otherwise."""
    store, seeded = open_store(project), random.Random(7)
    began = time.perf_counter()
    fill_runs(store, runs, seeded)
    fill_events(store, runs, events, seeded)
    settle(store)
    found: dict[str, Any] = {"filling": round(time.perf_counter() - began, 1)}
    return found | appends(store, empty) | times_of_commands(project, other, runs) | times_within(project, store)


def appends(full: Store, empty: Store) -> dict[str, Any]:
    """One event in one transaction each, into both stores in turn, so that what else the machine does hits both."""
    rates: dict[str, list[float]] = {"empty": [], "full": []}
    # As a worker does: with no connection open SQLite copies its log into the file after each append.
    watching = [store.database.changes() for store in (full, empty)]
    for changes in watching:
        changes.wait(0, 0)
    for _ in range(ROUNDS):
        for name, store in (("empty", empty), ("full", full)):
            began = time.perf_counter()
            for number in range(APPENDS):
                append(store, new_event("bench", "external.bench", f"s{number}", {"number": number, "text": "x" * 60}))
            rates[name].append(APPENDS / (time.perf_counter() - began))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    each_round = statistics.median(full / empty for full, empty in zip(rates["full"], rates["empty"], strict=True))
    return {"appends/s": {name: round(each) for name, each in medians.items()}, "full to empty": round(each_round, 2)}


def fill_runs(store: Store, count: int, seeded: random.Random) -> None:
    columns = "id, recipe, model, digest, recipe_path, body, state, stage, created, started, finished, result, told"
    with store.writing() as connection:
        connection.executemany(
            f"INSERT INTO runs ({columns}) VALUES ({', '.join('?' * 13)})",
            (_run(number, seeded) for number in range(count)),
        )
        connection.executemany(
            "INSERT INTO steps (run_id, name, attempt, started, finished, kind, note) VALUES (?,?,1,?,?,'step',?)",
            (
                (run_id(number), name, _when(number) + at, _when(number) + at + 0.5, dump({"spent": {"training": 0.4}}))
                for number in range(count) for at, name in enumerate(STEPS)
            ),
        )  # fmt: skip


def fill_events(store: Store, runs: int, count: int, seeded: random.Random) -> None:
    """A tenth is feedback on one model; of each run some twenty; the rest comes from outside."""
    made, batch = _events(runs, count, seeded), []
    for event in made:
        batch.append(values_of(event))
        if len(batch) == BATCH:
            _insert(store, batch)
            batch = []
    _insert(store, batch)
    advance(store, CURSOR, newest(store, 1)[0].seq)


def settle(store: Store) -> None:
    """What a night does: the write-ahead log is in the file, Postgres has its statistics."""
    if os.environ.get("FT_DATABASE_URL"):
        store.read("SELECT 1 AS one")
        with store.database.connected() as connection:
            for table in ("events", "runs", "steps"):
                connection.execute(f"VACUUM ANALYZE {table}")
    else:
        store.read("PRAGMA wal_checkpoint(TRUNCATE)")


def times_of_commands(project: Project, other: Project, runs: int) -> dict[str, Any]:
    """Of whole processes, one of each in turn: median time, and median CPU time, which other programs change less."""
    middle = run_id(runs // 2)
    commands = {
        "ft runs": ["runs"], "ft runs --active": ["runs", "--active"], "ft runs --recipe": ["runs", "--recipe", "r3"],
        "ft show RUN": ["show", middle], "ft show BEGINNING": ["show", middle[:-1]],
        "ft events tail -n 20": ["events", "tail", "-n", "20"],
        "ft events tail --type": ["events", "tail", "--type", "run.finished"],
        "ft events tail --subject": ["events", "tail", "--subject", middle],
        "ft events why RUN": ["events", "why", middle], "ft models": ["models"],
    }  # fmt: skip
    empty = {f"{name}, empty store": commands[name] for name in ("ft runs", "ft events tail -n 20", "ft models")}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in [*empty, *commands]}
    for _ in range(TIMES):
        for name, arguments in commands.items():
            spent[name].append(_process(project, arguments, os.environ.get("FT_DATABASE_URL", "")))
        for name, arguments in empty.items():
            spent[name].append(_process(other, arguments, os.environ.get("FT_EMPTY_URL", "")))
    return {
        name: {"time": round(statistics.median(all_ for all_, _ in each), 3),
               "cpu": round(statistics.median(cpu for _, cpu in each), 3)}
        for name, each in spent.items()
    }  # fmt: skip


def _process(project: Project, arguments: list[str], url: str) -> tuple[float, float]:
    env = {name: value for name, value in os.environ.items() if name not in ("FT_DATABASE_URL", "FT_EMPTY_URL")}
    env |= {"PYTHONPATH": os.getcwd()} | ({"FT_DATABASE_URL": url} if url else {})
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments], cwd=project.root, check=True, capture_output=True, timeout=120,
        env=env,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - began, cpu


def times_within(project: Project, store: Store) -> dict[str, Any]:
    """Inside the worker: one new event through the dispatcher, one count of 100,000 feedback events, its looks."""
    dispatcher = Dispatcher(project, store)
    dispatcher.work()

    def feedback(rating: int) -> Event:
        append(store, new_event("bench", "feedback.received", "fed@3", {"rating": rating}))
        return newest(store, 1)[0]

    def dispatched(type_: str, subject: str, data: dict[str, Any]) -> Callable[[], object]:
        def once() -> object:
            append(store, new_event("bench", type_, subject, data))
            return dispatcher.work()

        return once

    def past(**wanted: Any) -> Callable[[], object]:
        on = Subscriber("fed", "fed", "datasets/x", Triggers.model_validate({"feedback": wanted}))
        event = feedback(1)
        return lambda: past_of(store, on, event, time.time())

    return {
        "dispatcher, one event of no recipe": _time(dispatched("external.nobody", "", {})),
        "dispatcher, one event that is decided": _time(dispatched("external.go", "", {})),
        "dispatcher, one feedback": _time(dispatched("feedback.received", "fed@3", {"rating": 1})),
        "past, feedback since the last run": _time(past(count=50, min_rating=4)),
        "past, all 100,000 and more feedback": _time(past(count=50, min_rating=4, since_last_run=False)),
        "events of an id, of whatever source": _time(lambda: find(store, run_id(77))),
        "runs that are on": _time(lambda: listed(store, active=True, limit=1000)),
        "runs MLflow was not told of": _time(lambda: untold(store)),
        "ft prune --dry-run, plan and preview": _time(lambda: _look(project, store), 1),
    }


def run_id(number: int) -> str:
    return f"r{number % 20}-{number:010x}"


def _look(project: Project, store: Store) -> object:
    return preview(project, store, plan_of(project, store, Keep(), time.time()))


def _time(act: Callable[[], object], times: int = 21) -> float:
    spent = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        spent.append(time.perf_counter() - began)
    return round(statistics.median(spent), 5)


def _project(root: Path) -> Project:
    (root / "recipes").mkdir(parents=True)
    (root / "datasets").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    recipe = {
        "kind": "finetune", "base": "org/base", "data": {"path": "datasets/x"}, "evaluate": {"task": "label"},
        "on": {"feedback": {"count": 1_000_000, "min_rating": 4}, "dry_run": True, "event": [{"type": "external.go"}]},
    }  # fmt: skip
    (root / "recipes" / "fed.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return find_project(root)


def _when(number: int) -> float:
    return START + number * 1500.0


def _run(number: int, seeded: random.Random) -> tuple[Any, ...]:
    at, recipe = _when(number), f"r{number % 20}"
    state = seeded.choices(["succeeded", "refused", "failed", "cancelled"], [70, 15, 10, 5])[0]
    body = {"kind": "finetune", "name": recipe, "model": recipe, "base": {"model": "org/base"}, "text": "x" * 900}
    scores = {each: {"accuracy": seeded.random(), "f1": seeded.random()} for each in ("candidate", "base")}
    check = {"name": "min", "outcome": "pass", "text": "x" * 200}
    result = {"version": number // 20 + 1, "scores": scores, "checks": [check] * 3,
              "probes": {"candidate": {"question": "y" * 400}, "base": {"question": "n"}}}  # fmt: skip
    return (run_id(number), recipe, recipe, "d" * 64, f"recipes/{recipe}.yaml", dump(body), state, "conclude", at,
            at + 1, at + 1000, dump(result), state)  # fmt: skip


def _events(runs: int, count: int, seeded: random.Random) -> Iterator[Event]:
    made = 0
    for number in range(runs):
        for event in _events_of(number):
            made += 1
            yield event
    for _ in range(count // 10):
        data = {"rating": seeded.randint(1, 5), "request": uuid.uuid4().hex}
        yield Event("app", uuid.uuid4().hex, "feedback.received", f"fed@{seeded.randint(1, 5)}", START, data)
    for number in range(made + count // 10, count):
        data = {"number": number, "branch": "main", "text": "x" * seeded.randint(20, 300)}
        yield Event("github", uuid.uuid4().hex, f"external.kind{number % 50}", f"s{number % 1000}",
                    START + number * 15.0, data)  # fmt: skip


def _events_of(number: int) -> Iterator[Event]:
    id_, at = run_id(number), _when(number)
    yield Event("ft/runs", id_, "run.submitted", id_, at, {"recipe": f"r{number % 20}"})
    cause = f"ft/runs {id_}"
    for attempt in range(2):
        for each, step in enumerate(STEPS):
            data = {"step": step, "attempt": attempt, "seconds": 0.5}
            yield Event("ft/runs", f"{id_}/{step}/{attempt}", "run.step", id_, at + each, data, cause)
    yield Event("ft/adapters", id_, "adapter.registered", f"r{number % 20}@{number // 20 + 1}", at, {"run": id_}, cause)
    yield Event("ft/runs", uuid.uuid4().hex, "run.finished", id_, at + 1000, {"state": "succeeded"}, cause)


def _insert(store: Store, batch: list[tuple[Any, ...]]) -> None:
    with store.writing() as connection:
        connection.executemany(
            "INSERT INTO events (source, id, type, subject, time, data, cause, rating) VALUES (?,?,?,?,?,?,?,?)", batch
        )


if __name__ == "__main__":
    main()
