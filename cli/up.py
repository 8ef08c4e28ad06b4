"""`ft up`: MLflow, worker, receiver and, if asked for, serving: started together and kept on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli.parts import Part
    from cli.up_folder import UpFolder
    from registry.project import Project

    Tell = Callable[[str], None]

POLL_SECONDS = 0.2
# What failed so often is told of; its supervisor goes on trying.
TRIES = 3
# Beyond what the slowest part may take.
SLACK_SECONDS = 15.0


def up(
    serve: Annotated[
        str, typer.Option("--serve", metavar="MODEL|RECIPE", help="Serve it too; auto: the only one")
    ] = "",
    only: Annotated[list[str] | None, typer.Option("--only", metavar="PART", help="Only this part; repeatable")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, for a service manager")] = False,
    status: Annotated[bool, typer.Option("--status", help="Show the parts; exit code 1 if one is not on")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Start the platform on this machine: MLflow's server, worker, receiver, serving. `ft run` works without it too.

    Parts that end are started again; their logs are in .ft/logs. Where it is on already, nothing is done.

    Example: ft up --serve tickets
    """
    from cli.console import say
    from cli.up_folder import UpFolder
    from registry.project import find_project

    project = find_project()
    folder = UpFolder(project.home)
    if not status:
        tell: Tell = (lambda _: None) if as_json else say
        _start(project, folder, _wanted(project, serve, only, tell), foreground, tell)
        follow(folder, tell)
    _show(folder, as_json)
    if not folder.is_well():
        raise typer.Exit(1)


def _wanted(project: Project, serve: str, only: list[str] | None, tell: Tell) -> list[Part]:
    from cli.parts import parts_of

    parts, left_out = parts_of(project, serve, only, tell)
    for name, why in left_out.items():
        tell(f"{name}: not started: {why}")
    return parts


def _start(project: Project, folder: UpFolder, parts: list[Part], foreground: bool, tell: Tell) -> None:
    from cli.supervising import become_supervisor, start_supervisor
    from registry.errors import Conflict

    if foreground:
        become_supervisor(project, folder, parts)
    elif start_supervisor(project, folder, parts):
        return
    if foreground:
        raise Conflict(f"it is up already (pid {folder.supervisor()})", place=str(project.home),
                       fix="`ft up --status` shows it, `ft down` stops it")  # fmt: skip
    tell(f"it is up already (pid {folder.supervisor()})")
    if {each.name: each.stamp for each in folder.plan()} != {each.name: each.stamp for each in parts}:
        tell("it was started for other parts or with other settings; `ft down`, then `ft up` takes these")


def follow(folder: UpFolder, tell: Tell) -> None:
    """Tell of each change until every part is on or has failed a few times, for as long as the slowest may take."""
    plan = folder.plan()
    deadline = time.monotonic() + max((each.start_seconds for each in plan), default=0.0) + SLACK_SECONDS
    told: set[str] = set()
    while folder.is_up() and time.monotonic() < deadline:
        parts = folder.now()
        for part in parts:
            line = _line(part)
            if line not in told:  # one that fails again and again says it once
                tell(line)
                told.add(line)
        if len(parts) == len(plan) and all(_is_settled(part) for part in parts):
            return
        time.sleep(POLL_SECONDS)


def _is_settled(part: dict[str, Any]) -> bool:
    return part["state"] in ("up", "elsewhere") or (part["state"] == "down" and part["failures"] >= TRIES)


def _line(part: dict[str, Any]) -> str:
    why = part["error"] if part["state"] == "down" else part["note"] or part["address"]
    return f"{part['name']}: {part['state']}{': ' if why else ''}{why}"


def _show(folder: UpFolder, as_json: bool) -> None:
    from cli.console import print_json

    supervisor, parts = folder.supervisor(), folder.now()
    if as_json:
        print_json({"up": folder.is_up(), "well": folder.is_well(), "pid": supervisor, "parts": parts})
    else:
        _print(folder, supervisor, parts)


def _print(folder: UpFolder, supervisor: int | None, parts: list[dict[str, Any]]) -> None:
    from cli.console import ago, say, table

    if not folder.is_up():
        left = [part["name"] for part in parts if part["state"] == "left behind"]
        say(f"the supervisor is gone, but not {', '.join(left)}; `ft up` takes over, `ft down` stops them"
            if left else "not up; `ft up` starts it")  # fmt: skip
    if folder.is_up() or any(part["state"] == "left behind" for part in parts):
        rows = [
            [part["name"], part["state"], str(part["pid"] or "-"), ago(part["since"]), str(part["restarts"]),
             part["address"] or "-", part["log"]]
            for part in parts
        ]  # fmt: skip
        table(["part", "state", "pid", "since", "restarts", "address", "log"], rows)
    for part in parts:
        if trouble := part["note"] or (part["error"] if part["restarts"] or part["state"] == "down" else ""):
            say(f"{part['name']}: {'' if part['note'] else 'last error: '}{trouble}")
    if supervisor and folder.is_well():
        say(f"up (pid {supervisor}); `ft down` stops it")
