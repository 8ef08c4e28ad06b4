"""Brings here what trainers on lent cards write, as it comes, so that `ft logs`, the bar and MLflow show them."""

from __future__ import annotations

import sys
import time

from jobs.steps import BENCH, Bench
from jobs.through_bucket import is_lent, pull_here
from registry.errors import FtError, NotFound
from registry.file_locks import try_exclusive
from registry.runs import listed

FOLLOW_SECONDS = 2.0


def keep_followed() -> None:
    """For a worker's thread. Of the hosts that share a folder one does it."""
    bench = BENCH.get()
    if not bench.settings.bucket:
        return
    while try_exclusive(bench.project.home / "follow.lock") is None:
        time.sleep(FOLLOW_SECONDS)
    before: set[str] = set()
    while True:
        before = _look(bench, before)
        time.sleep(FOLLOW_SECONDS)


def _look(bench: Bench, before: set[str]) -> set[str]:
    """Runs that are on, and once more those that were: the last lines say how they ended."""
    try:
        now = {run.id for run in listed(bench.store, active=True, limit=1000) if is_lent(bench, run.result)}
    except FtError as error:
        print(error, file=sys.stderr, flush=True)
        return before
    for run_id in sorted(now | before):
        try:
            pull_here(bench, run_id)
        except NotFound:  # pruned
            continue
        except (FtError, OSError) as error:
            print(f"{run_id}: {error}", file=sys.stderr, flush=True)
    return now
