"""`ft resume`: let a run go on."""

from __future__ import annotations

from typing import Annotated

import typer


def resume(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Do not watch")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON")] = False,
) -> None:
    """Let a paused, interrupted, failed or cancelled run go on. Finished steps are not repeated.

    Without RUN: all that were interrupted (their worker died); a paused run stands still until it is named.

    Example: ft resume tickets-1a2b
    """
    from cli.console import print_json, say
    from cli.watch import exit_as, watch
    from jobs.worker_process import ensure_worker, submitting
    from registry import runs
    from registry.errors import Conflict
    from registry.project import find_project
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    chosen = [runs.get(store, run_id)] if run_id else runs.listed(store, active=True, limit=1000)
    if run_id and chosen[0].state in ("succeeded", "refused"):
        raise Conflict(
            f"{chosen[0].id} has ended ({chosen[0].state})",
            fix=f"`ft run {chosen[0].recipe_path}` starts anew",
        )
    if run_id and chosen[0].pruned is not None:
        raise Conflict(
            f"the job folder of {chosen[0].id} was pruned, so it cannot go on",
            fix=f"`ft run {chosen[0].recipe_path}` starts anew",
        )
    if run_id and chosen[0].active and chosen[0].wish in runs.STOPS:
        doing = {"pause": "paused", "cancel": "cancelled"}[str(chosen[0].wish)]
        raise Conflict(f"{chosen[0].id} is just being {doing}", fix="try again when `ft runs` shows it so")
    with submitting(project):
        for run in chosen:
            if not run.active:
                runs.set_wish(store, run.id, "resume")
                runs.reopen(store, run.id)
        ensure_worker(project)
    if detach or not run_id:
        ids = [run.id for run in chosen]
        print_json({"runs": ids}) if as_json else say(f"going on: {', '.join(ids) or 'no run was interrupted'}")
        return
    exit_as(watch(project, store, chosen[0].id, quiet=as_json), as_json)
