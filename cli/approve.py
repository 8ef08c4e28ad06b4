"""`ft approve`: a person says yes or no to a version that passed its gate, or to a recipe that is to do better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.approvals import Approval
    from registry.store import Store


def approve(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, or the beginning of one")] = "",
    no: Annotated[bool, typer.Option("--no", help="It is not to be promoted, or not started")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the answer")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Answer a run whose recipe says `promote: approve`, or `approve: true` in `escalate`.

    Without RUN: list what waits for an answer.

    The first answer counts. Who gave it, when and why is kept.

    Example: ft approve tickets-1a2b --reason "read twenty answers"
    """
    from cli.console import print_json, say
    from jobs.worker_process import ensure_worker, submitting
    from registry import approvals, runs
    from registry.errors import WrongInput
    from registry.project import find_project, user_name
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    if not run_id:
        if no or reason:
            raise WrongInput("an answer needs the run that it is for", fix="`ft approve` lists what waits")
        _list(store, as_json)
        return
    run = runs.get(store, run_id)
    with submitting(project):
        said = approvals.answer(store, run.id, yes=not no, by_whom=user_name(), reason=reason)
        if run.active:
            ensure_worker(project)
    if as_json:
        print_json(vars(said))
        return
    say(f"{said.what} {said.answer} by {said.by_whom}")
    if run.state == "paused":
        say(f"the run is paused; `ft resume {run.id}` lets it go on")


def _list(store: Store, as_json: bool) -> None:
    from datetime import datetime

    from cli.console import ago, print_json, say, table
    from registry import approvals, runs

    waiting = approvals.waiting(store)
    if as_json:
        print_json([vars(each) for each in waiting])
        return
    if not waiting:
        say("nothing waits for approval")
        return
    rows = []
    for each in waiting:
        paused = runs.get(store, each.run_id).state == "paused"
        until = datetime.fromtimestamp(each.deadline).isoformat(sep=" ", timespec="minutes")
        rows.append([each.run_id, each.name, _yes(store, each), ago(each.asked), "paused" if paused else until])
    table(["run", "version", "yes", "asked", "until"], rows)
    say("`ft show RUN` has scores and answers; `ft approve RUN` says yes, with --no no")


def _yes(store: Store, asked: Approval) -> str:
    """What a yes does."""
    from registry import runs

    if not asked.starts:
        return "promotes it"
    most = runs.get(store, asked.run_id).result["escalated"]["max_usd"]
    return f"starts {asked.starts}, ${most:g} at most"
