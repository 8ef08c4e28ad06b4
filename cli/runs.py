"""`ft runs`: list runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.runs import Run


def runs(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1_000_000, help="The newest so many")] = 20,
    active: Annotated[bool, typer.Option("--active", help="Only those that are on, or paused")] = False,
    recipe: Annotated[str, typer.Option("--recipe", help="Only of this recipe")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List runs, the newest first.

    Example: ft runs --active
    """
    from cli.console import ago, print_json, say, table
    from jobs.worker_process import worker_is_on
    from registry import runs as rows
    from registry.project import find_project
    from registry.store import open_store

    project = find_project()
    found = rows.listed(open_store(project), limit=limit, on=active, recipe=recipe)
    interrupted = any(run.active for run in found) and not worker_is_on(project)
    if as_json:
        fields = ("id", "recipe", "model", "state", "stage", "created", "finished", "error", "result")
        print_json([{name: getattr(run, name) for name in fields} for run in found])
        return
    if not found:
        say("no runs yet; start one with `ft run recipes/NAME.yaml`")
        return
    table(
        ["run", "state", "stage", "version", "score", "started"],
        [
            [run.id, run.state, "" if run.ended else run.stage, _version(run), _score(run), ago(run.created)]
            for run in found
        ],
    )
    if any(run.stage.startswith("waiting for approval") and not run.ended for run in found):
        say("`ft approve RUN` (or `ft approve RUN --no`) answers a run that waits for approval")
    if interrupted:
        say("no worker is on: `ft resume RUN` lets an interrupted run go on")


def _version(run: Run) -> str:
    number = run.result.get("version")
    return f"{run.model}@{number}" if number else "-"


def _score(run: Run) -> str:
    candidate = run.result.get("scores", {}).get("candidate", {})
    return f"{next(iter(candidate.values())):.3f}" if candidate else "-"
