"""`ft cancel`: stop a run."""

from __future__ import annotations

from typing import Annotated

import typer


def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when the card is free")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Stop a run. Its trainer saves a checkpoint first, so `ft resume` can let it go on.

    Later runs of its recipe no longer wait for it; `ft pause` keeps its place.

    Example: ft cancel tickets-1a2b
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
    if run.ended:
        raise Conflict(f"{run.id} has ended already ({run.state})", fix=f"`ft show {run.id}`")
    with submitting(project):
        runs.set_wish(store, run.id, "cancel")
        if run.active:
            ensure_worker(project)
    state = watch(project, store, run.id, quiet=True).state if wait else "stopping"
    print_json({"run": run.id, "state": state}) if as_json else say(f"{run.id}: {state}")
