"""`python -m jobs.worker` (and `ft worker`): does the runs of this project, and ends when there is nothing to do."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jobs import runtime
from jobs.deliver import Deliverer
from jobs.dispatch import Dispatcher, has_news
from jobs.finetune import begin, bind
from jobs.follow_jobs import keep_followed
from jobs.hosts import Post
from jobs.mlflow_aliases import AliasWatch
from jobs.pod_reaper import keep_reaped
from jobs.prune import prune_daily
from jobs.tell_mlflow import tell_the_rest
from jobs.train_job import let_go
from jobs.worker_process import close_gate, take_worker_lock
from registry import runs
from registry.errors import FtError, StoreError
from registry.folders import leads
from registry.hosts import pauses
from registry.project import Project, find_project
from registry.rentals import any_open
from registry.settings import Settings, load_settings
from registry.store import Store, open_store

LOOK_SECONDS = 0.02
# Between two changes of the run rows: what DBOS itself has ended is noticed this late at most.
QUIET_SECONDS = 0.5
TELL_SECONDS, AWAY_SECONDS = 2.0, 30.0
PRUNE_LOOK_SECONDS = 600.0


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
    lends = not leads(project, store)
    if lends:
        print("another folder leads this project: this host lends its cards", flush=True)
    runtime.launch(project, pauses(store), lends=lends)
    _start_beside(project, store, settings, lends=lends)
    changes, busy_at, messages = store.database.changes(), time.monotonic(), Deliverer(project, store)
    post, dispatcher = Post(project, store, settings), Dispatcher(project, store)
    if not lends:
        messages.start()
    while True:
        if _look(store, post, dispatcher, messages):
            busy_at = time.monotonic()
        if ready is not None:
            ready.write_text(str(os.getpid()), encoding="utf-8")
            ready = None
        idle = time.monotonic() - busy_at
        if not forever and idle > settings.worker_idle_seconds and _may_end(project, store, messages):
            post.leave()
            return
        changes.wait(QUIET_SECONDS, LOOK_SECONDS)


def _start_beside(project: Project, store: Store, settings: Settings, *, lends: bool) -> None:
    """What goes on beside the runs. Where cards are lent, MLflow and what is kept are those of another folder."""
    beside: dict[str, Callable[[], None]] = {
        "prune": partial(_keep_pruned, project, store, settings, lends),
        "pods": partial(keep_reaped, store, settings),
    }
    if not lends:
        beside["mlflow"] = partial(_keep_mlflow_told, project, store)
        beside["aliases"] = AliasWatch(project, store).run
        beside["lent cards"] = keep_followed
    for name, work in beside.items():
        threading.Thread(target=work, name=name, daemon=True).start()


def _look(store: Store, post: Post, dispatcher: Dispatcher, messages: Deliverer) -> bool:
    """One look at the run rows and the events; True while there is work. An error here must not end the worker."""
    try:
        post.keep()
        news = 0
        if post.leads:
            news = dispatcher.work()
            runtime.agree(store, begin, let_go, post.others())
        else:
            runtime.let_go_here(store, let_go)
        busy = bool(news) or _has_work(store, messages)
        post.mind_cards(busy)
        return busy
    except StoreError as error:  # locked, full, or restarting; the next look may find it well
        print(error, file=sys.stderr, flush=True)
        time.sleep(1)
        return True
    except Exception:
        traceback.print_exc()
        time.sleep(1)
        return True


def _may_end(project: Project, store: Store, messages: Deliverer) -> bool:
    """With the gate closed nobody can submit; if there is still nothing to do, this process may end."""
    gate = close_gate(project)
    if gate is None:
        return False
    busy = True
    try:
        busy = _has_work(store, messages) or has_news(store)
    finally:
        if busy:
            os.close(gate)
    return not busy  # the gate stays closed until this process is gone, and the worker's lock with it


def _has_work(store: Store, messages: Deliverer) -> bool:
    """A pod that may still cost needs a reaper, and so a worker, also when its run is over."""
    return bool(runs.listed(store, active=True, limit=1)) or _has_wishes(store) or messages.busy() or any_open(store)


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


def _keep_pruned(project: Project, store: Store, settings: Settings, lends: bool) -> None:
    """Killed with the worker in the middle, the next prune goes on."""
    while settings.keep.auto:
        try:
            prune_daily(project, store, settings.keep, lends=lends)
        except Exception as error:  # a full disk, a locked database: no reason for the worker to end
            print(error, file=sys.stderr, flush=True)
        time.sleep(PRUNE_LOOK_SECONDS)


if __name__ == "__main__":
    main()
