"""`ft show`: one run in full."""

from __future__ import annotations

from typing import Annotated

import typer


def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show one run: steps, scores, verdict, answers, where time went.

    Example: ft show tickets-1a2b
    """
    from cli.console import print_json, say, table
    from cli.watch import describe, outcome, print_outcome
    from registry import runs
    from registry.errors import from_dict
    from registry.project import find_project
    from registry.store import open_store

    store = open_store(find_project())
    run = runs.get(store, run_id)
    steps = runs.steps(store, run.id)
    if as_json:
        print_json({**outcome(store, run), "steps": [vars(step) for step in steps]})
        return
    say(f"{run.id}  {describe(run, None)}  recipe {run.recipe_path}")
    rows = []
    for step in steps:
        took = f"{step.finished - step.started:.1f} s" if step.finished else "on, or cut off"
        again = f" (attempt {step.attempt})" if step.attempt > 1 else ""
        rows.append([step.name + again, took, str(step.note.get("error", ""))[:80]])
    table(["step", "took", ""], rows)
    if dataset := run.result.get("dataset"):
        say(f"dataset {dataset['path']} at {dataset['hash']}, rows: {dataset['rows']}")
    if base := run.result.get("base"):
        say(f"base {base['source']} at {base['revision'][:12]}, licence {base['licence']}")
    if not run.active:
        print_outcome(store, run)
    if run.error:
        say(str(from_dict(run.error)))
