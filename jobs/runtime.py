"""The durable engine: DBOS on SQLite, with the rules that make it safe here, and its agreement with the run rows.

Run rows are the truth of what people want (`registry/runs.py`). `agree` makes DBOS do it: it enqueues what was
submitted, cancels and resumes what was wished. Each is idempotent, so a worker killed in the middle loses nothing.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer

from registry import runs
from registry.cards import Card, list_cards, pick_card
from registry.errors import Trouble
from registry.project import Project
from registry.store import Store

APP, VERSION, CONTROL = "ft-engine", "1", "control"
# A parent that waits for its turn holds no card, so "control" has no limit.
POLL_SECONDS = 0.1
TERMINAL = {"SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"}


def card_queue(card_name: str) -> str:
    """One queue per card: a worker cannot listen to only some partitions of a queue."""
    return f"card.{host_id()}.{card_name}"


def host_id() -> str:
    return "".join(each if each.isalnum() else "-" for each in socket.gethostname().lower())


def launch(project: Project) -> None:
    """Start DBOS in this process. The caller holds the worker's lock: two processes must not share an executor id."""
    project.home.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{project.runs_database}"
    DBOS.migrate(url)
    queues = [CONTROL, *(card_queue(card.name) for card in _served_cards())]
    DBOS(config=_config(url))
    DBOS.listen_queues(queues)
    DBOS.launch()
    for name in queues:
        limit = None if name == CONTROL else 1
        DBOS.register_queue(
            name, worker_concurrency=limit, polling_interval_sec=POLL_SECONDS, on_conflict="always_update"
        )
    logging.getLogger("dbos").setLevel(logging.WARNING)


def agree(store: Store, let_go: Callable[[str], bool]) -> None:
    """Make DBOS agree with the run rows: enqueue, cancel, resume, and end what DBOS gave up.

    `let_go(run_id)` stops what is still at work for a cancelled or paused run; True when nothing is.
    """
    for run in runs.listed(store, active=True, limit=1000):
        status = _status(run.id)
        stop = run.wish in runs.STOPS
        if status is None and stop:
            runs.stopped(store, run)
        elif status is None:
            _enqueue(run.id)
        elif stop and status not in TERMINAL:
            DBOS.cancel_workflow(run.id, cancel_children=True)
        elif status in TERMINAL and status != "SUCCESS" and stop:
            # It may have failed by itself. Over only when the card is really free, not when DBOS says so.
            if let_go(run.id):
                runs.stopped(store, run)
        elif status in TERMINAL and status != "SUCCESS" and run.wish is None:
            runs.finish(store, run.id, "failed", Trouble(f"the run's workflow ended as {status}", place=run.id))
    for run in _wishes(store, "resume"):
        _resume(store, run)


def _wishes(store: Store, wish: str) -> list[runs.Run]:
    rows = store.read("SELECT id FROM runs WHERE wish = ?", (wish,))
    return [runs.get(store, row["id"]) for row in rows]


def _enqueue(run_id: str) -> None:
    DBOS.enqueue_workflow_with_options(
        {"workflow_name": "finetune", "queue_name": CONTROL, "workflow_id": run_id, "app_version": VERSION},
        run_id,
    )


def _resume(store: Store, run: runs.Run) -> None:
    """Let a failed or cancelled run go on at the step that did not succeed; finished steps keep their results."""
    if run.active and _status(run.id) not in TERMINAL:
        runs.clear_wish(store, run.id, "resume")
        return
    if run.state in ("succeeded", "refused"):
        runs.clear_wish(store, run.id, "resume")
        return
    start = _first_unfinished(run.id)
    runs.reopen(store, run.id)
    DBOS.rewind_workflow(run.id, start_step=start, application_version=VERSION, queue_name=CONTROL)
    runs.clear_wish(store, run.id, "resume")


def _first_unfinished(run_id: str) -> int:
    """Number of the step to go on at; children that did not succeed are forgotten, and so start anew."""
    steps = DBOS.list_workflow_steps(run_id)
    start = max((step["function_id"] for step in steps), default=0) + 1
    for step in steps:
        child = step["child_workflow_id"]
        if child and _status(child) not in (None, "SUCCESS"):
            DBOS.delete_workflow(child, delete_children=True)
            start = min(start, step["function_id"])
        elif (child and _status(child) is None) or step["error"] is not None:
            start = min(start, step["function_id"])
    return max(start, 1)


def _status(workflow_id: str) -> str | None:
    found = DBOS.get_workflow_status(workflow_id)
    return str(found.status) if found else None


def _served_cards() -> list[Card]:
    found = {card.name: card for card in [*list_cards(), pick_card("cpu")]}
    return list(found.values())


def _config(url: str) -> DBOSConfig:
    return {
        "name": APP,
        "system_database_url": url,
        "system_database_engine": _engine(url),
        "run_migrations": False,
        "executor_id": host_id(),
        "application_version": VERSION,
        "serializer": DBOSPortableJSONSerializer(),
        "log_level": "WARNING",
        "notification_listener_polling_interval_sec": POLL_SECONDS,
        "scheduler_polling_interval_sec": 5,
    }


def _engine(url: str) -> sqlalchemy.Engine:
    """WAL, and transactions that lock when they begin: a queue's count and claim must be one (engine facts, trap 1)."""
    engine = sqlalchemy.create_engine(url, pool_size=20, max_overflow=0, pool_timeout=30)

    @sqlalchemy.event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("busy_timeout=30000", "foreign_keys=ON", "journal_mode=WAL", "synchronous=NORMAL"):
            connection.execute("PRAGMA " + pragma)

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
