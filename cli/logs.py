"""`ft logs`: what a run's trainer prints, and then who evaluates in a pod."""

from __future__ import annotations

from typing import Annotated

import typer


def logs(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress lines as JSON, one per line")] = False,
) -> None:
    """Show what a run's trainer says, and its progress.

    Example: ft logs -f tickets-1a2b
    """
    import json

    from cli.console import say
    from cli.watch import exit_as, watch
    from registry import runs
    from registry.errors import NotFound
    from registry.job_folder import JobFolder
    from registry.project import find_project
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    run = runs.get(store, run_id)
    job = JobFolder(project.job_folder(run.id))
    if run.pruned is not None:
        raise NotFound(f"the job folder of {run.id} was pruned, and its log with it", fix=f"`ft show {run.id}`")
    if as_json:
        for line in job.progress():
            say(json.dumps(line))
        return
    for each in (job, *job.evaluations()):
        if each.log.exists():
            say(each.log.read_text(encoding="utf-8", errors="replace").rstrip())
    if follow and run.active:
        exit_as(watch(project, store, run.id), as_json=False)
