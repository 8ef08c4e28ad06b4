"""`python -m jobs.worker` (and `ft worker`): does the runs of this project, and ends when there is nothing to do."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from jobs import runtime
from jobs.dispatch import Dispatcher, has_news
from jobs.finetune import bind, let_go
from jobs.tell_mlflow import tell_the_rest
from jobs.worker_process import close_gate, take_worker_lock
from registry import runs
from registry.errors import FtError
from registry.project import Project, find_project
from registry.settings import load_settings
from registry.store import Store, open_store

LOOK_SECONDS = 0.05
# Between two changes of the run rows: what DBOS itself has ended is noticed this late at most.
QUIET_SECONDS = 0.5
TELL_SECONDS, AWAY_SECONDS = 2.0, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.worker", description=__doc__)
    parser.add_argument("--forever", action="store_true", help="do not end when there is nothing to do")
    parser.add_argument("--ready", type=Path, help="a file to write this process's id into when it works")
    asked = parser.parse_args()
    try:
        work(find_project(), forever=asked.forever, ready=asked.ready)
    except FtError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    # DBOS's own shutdown takes a second on SQLite, and everything is already written.
    sys.stdout.flush()
    os._exit(0)


def work(project: Project, *, forever: bool = False, ready: Path | None = None) -> None:
    """Work until idle for `worker_idle_seconds` (`forever`: until killed). Returns at once if a worker is on."""
    lock = take_worker_lock(project)
    if lock is None:
        return
    store, settings = open_store(project), load_settings(project)
    bind(project, store, settings)
    runtime.launch(project)
    threading.Thread(target=_keep_mlflow_told, args=[project, store], name="mlflow", daemon=True).start()
    changes, busy_at, dispatcher = store.database.changes(), time.monotonic(), Dispatcher(project, store)
    while True:
        if _look(store, dispatcher):
            busy_at = time.monotonic()
        if ready is not None:
            ready.write_text(str(os.getpid()), encoding="utf-8")
            ready = None
        idle = time.monotonic() - busy_at
        if not forever and idle > settings.worker_idle_seconds and _may_end(project, store):
            return
        changes.wait(QUIET_SECONDS, LOOK_SECONDS)


def _look(store: Store, dispatcher: Dispatcher) -> bool:
    """One look at the run rows and the events; True while there is work. An error here must not end the worker."""
    try:
        runtime.agree(store, let_go)
        news = dispatcher.work()
        return bool(news) or bool(runs.listed(store, active=True, limit=1)) or _has_wishes(store)
    except Exception:
        traceback.print_exc()
        time.sleep(1)
        return True


def _may_end(project: Project, store: Store) -> bool:
    """With the gate closed nobody can submit; if there is still nothing to do, this process may end."""
    gate = close_gate(project)
    if gate is None:
        return False
    busy = True
    try:
        busy = bool(runs.listed(store, active=True, limit=1)) or _has_wishes(store) or has_news(store)
    finally:
        if busy:
            os.close(gate)
    return not busy  # the gate stays closed until this process is gone, and the worker's lock with it


def _has_wishes(store: Store) -> bool:
    return store.first("SELECT 1 AS one FROM runs WHERE wish IS NOT NULL") is not None


def _keep_mlflow_told(project: Project, store: Store) -> None:
    """Beside the runs, which tell what goes well themselves. Its import takes seconds, so it comes first."""
    import mlflow  # noqa: F401

    while True:
        try:
            tell_the_rest(project, store)
        except Exception as error:  # away, or misconfigured: no reason for the worker to end
            print(error, file=sys.stderr, flush=True)
            time.sleep(AWAY_SECONDS)
        time.sleep(TELL_SECONDS)


if __name__ == "__main__":
    main()
