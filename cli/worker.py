"""`ft worker`: the worker in the foreground."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.project import Project


def worker(
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when there is nothing to do")] = False,
    lead: Annotated[bool, typer.Option("--lead", help="From now on this folder leads, of several")] = False,
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
    if lead:
        _take_lead(project)
    if worker_is_on(project):
        say("a worker is on already")
        return
    from jobs.worker import work

    say(f"working for {project.root}")
    work(project, forever=not until_idle)


def _take_lead(project: Project) -> None:
    """Where the folder that led is gone. While a host of it lives, there would be two who lead."""
    import time

    from jobs.worker_process import worker_is_on
    from registry.errors import Conflict
    from registry.folders import leading, leads, take_lead
    from registry.hosts import hosts
    from registry.settings import load_settings
    from registry.store import open_store

    store, seconds = open_store(project), load_settings(project).lost_seconds
    if leads(project, store):
        return
    if worker_is_on(project):
        raise Conflict("a worker of this host is on, and lends its cards", fix="stop it, then `ft worker --lead`")
    led_by = leading(store)
    before = {each.id: each.beat for each in hosts(store)}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, seconds / 4))
        living = [each.id for each in hosts(store) if each.folder == led_by and each.beat != before.get(each.id)]
        if living:
            raise Conflict(f"{', '.join(living)} is on, in the folder that leads", fix="stop its worker first")
    take_lead(project, store)
