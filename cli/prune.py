"""`ft prune`: delete what has had its time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jobs.prune import Counts
    from registry.retention import Keep

WORDS = {
    "runs": "runs, with all that is left of them", "jobs": "job folders", "checkpoints": "checkpoints of ended runs",
    "adapters": "adapters that the gate failed", "scores": "kept scores", "events": "data of events",
    "logs": "logs, emptied", "leftovers": "folders left by an earlier prune",
}  # fmt: skip


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Write the database anew too; nobody can write then")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Delete runs, job folders, checkpoints, adapters and events that have had their time (`keep:` in ft.yaml).

    What adapters in use were made of is kept, and so is what an event was and what followed from it.

    Example: ft prune --dry-run
    """
    import time

    from cli.console import print_json, say
    from jobs.prune import plan_of, preview, shown
    from jobs.prune import prune as do_it
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store, keep = open_store(project), load_settings(project).keep
    plan = plan_of(project, store, keep, time.time())
    counts = preview(project, store, plan)
    if not as_json:
        _print(counts, keep)
    if not dry_run and (vacuum or counts.total.number) and _is_wanted(yes, as_json):
        counts = do_it(project, store, plan)
        if vacuum:
            store.database.give_back(whole=True)
        if not as_json:
            say(f"{counts.total.bytes / 1e6:.1f} MB are free")
    if as_json:
        print_json({"done": not dry_run, "bytes": counts.total.bytes, **shown(counts)})


def _is_wanted(yes: bool, as_json: bool) -> bool:
    from registry.errors import WrongInput

    if yes:
        return True
    if as_json or not sys.stdin.isatty():
        raise WrongInput("nobody is here to be asked", place="ft prune", fix="add --yes to do it, --dry-run to look")
    return typer.confirm("Delete it?")


def _print(counts: Counts, keep: Keep) -> None:
    from cli.console import say, table
    from jobs.prune import shown

    found = shown(counts)
    if not found:
        say("nothing has had its time")
        return
    rows = [[WORDS[name], str(each["number"]), f"{each['bytes'] / 1e6:.1f} MB", getattr(keep, name, "")]
            for name, each in found.items()]  # fmt: skip
    table(["what would go", "how many", "bytes", "kept for"], rows)
