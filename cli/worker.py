"""`ft worker`: the worker in the foreground."""

from __future__ import annotations

from typing import Annotated

import typer


def worker(
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when there is nothing to do")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON whether one is on already")] = False,
) -> None:
    """Run the worker in the foreground. `ft run` starts one by itself; this is for a service manager.

    Example: ft worker
    """
    from cli.console import print_json, say
    from jobs.worker_process import worker_is_on
    from registry.project import find_project

    project = find_project()
    if as_json:
        print_json({"worker": worker_is_on(project)})
        return
    if worker_is_on(project):
        say("a worker is on already")
        return
    from jobs.worker import work

    say(f"working for {project.root}")
    work(project, forever=not until_idle)
