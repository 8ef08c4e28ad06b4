"""`ft show`: one run in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.approvals import Approval

MOST_RETRIES = 20


def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show one run: steps, scores, verdict, answers, where time went.

    Example: ft show tickets-1a2b
    """
    from cli.console import print_json, say, table
    from cli.watch import describe, outcome, print_outcome
    from registry import approvals, runs
    from registry.errors import from_dict
    from registry.events import newest
    from registry.project import find_project
    from registry.store import open_store

    store = open_store(find_project())
    run = runs.get(store, run_id)
    steps = runs.steps(store, run.id)
    asked, tried = approvals.of_run(store, run.id), newest(store, MOST_RETRIES, type_="job.retried", subject=run.id)
    if as_json:
        more = {"retries": [each.data for each in tried], "approvals": [vars(each) for each in asked]}
        print_json({**outcome(store, run), "steps": [vars(step) for step in steps], **more})
        return
    say(f"{run.id}  {describe(run, None)}  recipe {run.recipe_path}")
    rows = []
    for step in steps:
        took = f"{step.finished - step.started:.1f} s" if step.finished else "on, or cut off"
        again = f" (attempt {step.attempt})" if step.attempt > 1 else ""
        rows.append([step.name + again, took, str(step.note.get("error", ""))[:80]])
    table(["step", "took", ""], rows)
    for each in tried:
        say(f"tried again after {_how(each.data)}")
    for one in asked:
        say(_answered(one, run.ended))
    if dataset := run.result.get("dataset"):
        say(f"dataset {dataset['path']} at {dataset['hash']}, rows: {dataset['rows']}")
    if base := run.result.get("base"):
        say(f"base {base['source']} at {base['revision'][:12]}, licence {base['licence']}")
    if rented := run.result.get("rent_to_evaluate"):
        say(f"no own card can serve the base: evaluated in a pod, {rented['expected']['name']} or another")
    if run.ended:
        print_outcome(store, run)
    if run.error:
        say(str(from_dict(run.error)))


def _how(retry: dict[str, Any]) -> str:
    what = "the trainer was lost" if retry["class"] == "lost" else str(retry["class"])
    changes = ", ".join(f"train.{name} {value:g}" for name, value in retry["train"].items())
    start = "from the beginning" if retry["anew"] else "from the last checkpoint"
    return f"{what}, {start}{', with ' if changes else ''}{changes}"


def _answered(asked: Approval, ended: bool) -> str:
    if asked.answer is None:
        state = "was not answered" if ended else f"waits for `ft approve` until {_when(asked.deadline)}"
        return f"approval of {asked.what} {state}"
    if asked.answer == "timed_out":
        return f"approval of {asked.what} timed out at {_when(asked.deadline)}"
    reason = f": {asked.reason}" if asked.reason else ""
    return f"{asked.what} was {asked.answer} by {asked.by_whom} at {_when(asked.answered or 0)}{reason}"


def _when(moment: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(moment).isoformat(sep=" ", timespec="seconds")
