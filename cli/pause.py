"""`ft pause`: let a run stand still."""

from __future__ import annotations

from typing import Annotated

import typer


def pause(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when the card is free")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Let a run stand still: its trainer saves a checkpoint and stops, and its card is free.

    Finished steps are kept, and `ft resume` goes on. Later runs of its recipe wait behind it.

    Example: ft pause tickets-1a2b
    """
    from cli.console import print_json, say
    from cli.watch import watch
    from jobs.worker_process import ensure_worker, submitting
    from registry import runs
    from registry.errors import Conflict
    from registry.project import find_project
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    run = runs.get(store, run_id)
    if not run.active:
        is_so = "is paused already" if run.state == "paused" else f"has ended already ({run.state})"
        raise Conflict(f"{run.id} {is_so}", fix=f"`ft show {run.id}`")
    if run.wish == "cancel":
        raise Conflict(f"{run.id} is just being cancelled", fix=f"`ft resume {run.id}` lets it go on afterwards")
    with submitting(project):
        runs.set_wish(store, run.id, "pause")
        ensure_worker(project)
    state = watch(project, store, run.id, quiet=True).state if wait else "pausing"
    print_json({"run": run.id, "state": state}) if as_json else say(f"{run.id}: {state}")
