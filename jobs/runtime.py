"""The durable engine: DBOS on SQLite or Postgres, the rules that make it safe, and its agreement with the run rows.

Run rows are the truth of what people want (`registry/runs.py`). `agree` makes DBOS do it: it starts what was
submitted, cancels and resumes what was wished. Each is idempotent, so a worker killed in the middle loses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer
from dbos._utils import INTERNAL_QUEUE_NAME

from registry import runs
from registry.cards import Card
from registry.errors import FtError, Trouble
from registry.hosts import host_id, looked_after_by, served_cards
from registry.project import Project
from registry.store import Store

APP, VERSION, CONTROL = "ft-engine", "1", "control"
# DBOS asks its queues again and again. Ten times a second took 9 % of a core, so they are asked so often only while
# runs are on. New runs do not wait for it: they are started without a queue.
BUSY_SECONDS, IDLE_SECONDS = 0.1, 1.0
LetGo = Callable[[str, Container[str]], bool]
TERMINAL = {"SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"}


def card_queue(card_name: str, host: str = "") -> str:
    """One queue per card of a host (default: this one): a worker cannot listen to only some partitions of a queue."""
    return f"card.{host or host_id()}.{card_name}"


def launch(project: Project, paused: Container[str] = (), *, lends: bool = False) -> None:
    """Start DBOS in this process. The caller holds the worker's lock: two processes must not share an executor id.

    On `paused` cards (HOST/CARD) nothing begins. A host that only `lends` its cards takes nothing but their jobs.
    """
    project.home.mkdir(parents=True, exist_ok=True)
    # A parent that waits for its turn holds no card, so "control" has no limit; what rents has budgets, and no queue.
    queues: dict[str, int | None] = {} if lends else {CONTROL: None}
    queues |= {card_queue(card.name): int(f"{host_id()}/{card.name}" not in paused) for card in served_cards()}
    engine = DBOS(config=_config(project))
    if lends:
        # Workflows that are recovered go to DBOS's own queue, from which every process takes, whatever it listens to.
        # The run of a desk that was killed went on in the attic, which has neither its data nor its base model.
        engine._registry._register_internal_queue(INTERNAL_QUEUE_NAME, worker_concurrency=0)
    DBOS.listen_queues(list(queues))
    DBOS.launch()
    for name, limit in queues.items():
        DBOS.register_queue(
            name, worker_concurrency=limit, polling_interval_sec=IDLE_SECONDS, on_conflict="always_update"
        )
    logging.getLogger("dbos").setLevel(logging.WARNING)
    logging.getLogger("dbos").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """How a run failed is in its row, in words; DBOS adds a traceback of a hundred lines."""
    return not (record.exc_info and isinstance(record.exc_info[1], FtError))


def forget(project: Project, run_ids: list[str]) -> None:
    """Delete what DBOS has of these runs and their children; from any process, because nothing is launched."""
    url = project.database_url or f"sqlite:///{project.runs_database}"
    if not project.database_url and not project.runs_database.exists():  # a client would make an empty file
        return
    engine = None if project.database_url else _engine(url)
    try:
        client = DBOSClient(system_database_url=url, system_database_engine=engine, application_name=APP,
                            serializer=DBOSPortableJSONSerializer())  # fmt: skip
        try:
            client.delete_workflows(run_ids, delete_children=True)
        finally:
            client.destroy()
    except sqlalchemy.exc.SQLAlchemyError as error:
        fix = "`ft prune` again: they are known, and go with the next"
        raise Trouble(f"the engine's rows of pruned runs could not be deleted: {error}", fix=fix) from error
    finally:
        if engine:
            engine.dispose()


def mind_card(card: Card, *, busy: bool, is_open: bool) -> None:
    """Whether jobs may begin on a card of this host, and how often its queue is asked; what is at work goes on."""
    queue = DBOS.retrieve_queue(card_queue(card.name))
    if queue:
        queue.set_worker_concurrency(int(is_open))
        queue.set_polling_interval_sec(BUSY_SECONDS if busy else IDLE_SECONDS)


def agree(store: Store, start: Callable[[str], None], let_go: LetGo, others: Container[str]) -> None:
    """Make DBOS agree with the run rows: start, cancel, resume, plan again, and end what DBOS gave up.

    `start(run_id)` begins the workflow, once; `let_go(run_id, others)` stops what is still at work for a
    cancelled or paused run, unless one of `others`, the other hosts that live, has it; True when nothing is.
    """
    for run in _wishes(store, "replan"):
        _plan_again(store, run)
    for run in runs.listed(store, active=True, limit=1000):
        status = _status(run.id)
        stop = run.wish in runs.STOPS
        if status is None and stop:
            runs.stopped(store, run)
        elif status is None:
            start(run.id)
            runs.clear_wish(store, run.id, "resume")
        elif stop and status not in TERMINAL:
            DBOS.cancel_workflow(run.id, cancel_children=True)
        elif status in TERMINAL and status != "SUCCESS" and stop:
            # It may have failed by itself. Over only when the card is really free, not when DBOS says so.
            if let_go(run.id, others):
                runs.stopped(store, run)
        elif status in TERMINAL and status != "SUCCESS" and run.wish is None:
            runs.finish(store, run.id, "failed", Trouble(f"the run's workflow ended as {status}", place=run.id))
    for run in _wishes(store, "resume"):
        _resume(store, run, others)


def let_go_here(store: Store, let_go: LetGo) -> None:
    """What a host does that does not lead: free its own cards from runs that were cancelled or paused."""
    for run in [each for wish in runs.STOPS for each in _wishes(store, wish)]:
        if (
            run.active
            and looked_after_by(run.result) == host_id()
            and _status(run.id) in TERMINAL
            and let_go(run.id, ())
        ):
            runs.stopped(store, run)


def _wishes(store: Store, wish: str) -> list[runs.Run]:
    rows = store.read("SELECT id FROM runs WHERE wish = ?", (wish,))
    return [runs.get(store, row["id"]) for row in rows]


def _plan_again(store: Store, run: runs.Run) -> None:
    """The card that the run was planned for is gone with its host: it goes on from its plan, on another."""
    if run.active and _status(run.id) not in TERMINAL:
        DBOS.cancel_workflow(run.id, cancel_children=True)
        return  # until it has stopped
    if run.active:
        start = _planning(run.id)
        DBOS.rewind_workflow(run.id, start_step=start, application_version=VERSION, queue_name=CONTROL)
    runs.clear_wish(store, run.id, "replan")


def _planning(run_id: str) -> int:
    """Number of the run's step "plan" (or of the first unfinished one); its children are forgotten, and start anew."""
    steps = DBOS.list_workflow_steps(run_id)
    for child in [step["child_workflow_id"] for step in steps if step["child_workflow_id"]]:
        if _status(child) is not None:
            DBOS.delete_workflow(child, delete_children=True)
    planned = [step["function_id"] for step in steps if step["function_name"] == "plan"]
    return min(planned, default=_first_unfinished(run_id))


def _resume(store: Store, run: runs.Run, others: Container[str]) -> None:
    """Let a failed or cancelled run go on at the step that did not succeed; finished steps keep their results.

    One that was planned for a card of a host that is lost by now is planned again.
    """
    status = _status(run.id)
    if run.state in ("succeeded", "refused"):
        runs.clear_wish(store, run.id, "resume")
        return
    if status is not None and status not in TERMINAL:
        # A child wrote the failure down, and its parent is about to end. The wish stays until then: cleared here,
        # as it once was, the parent failed the run that was just reopened, and it stood still.
        return
    host = run.result.get("host", host_id())
    start = _first_unfinished(run.id) if host == host_id() or host in others else _planning(run.id)
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


def _config(project: Project) -> DBOSConfig:
    config: DBOSConfig = {
        "name": APP,
        "executor_id": host_id(),
        "application_version": VERSION,
        "serializer": DBOSPortableJSONSerializer(),
        "log_level": "WARNING",
        "notification_listener_polling_interval_sec": IDLE_SECONDS,
        "scheduler_polling_interval_sec": 60,
    }
    if project.database_url:
        return {**config, "system_database_url": project.database_url}
    url = f"sqlite:///{project.runs_database}"
    DBOS.migrate(url)
    return {**config, "system_database_url": url, "system_database_engine": _engine(url), "run_migrations": False}


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
