"""`ft pods`: what is rented, at RunPod and in the ledger, and ending what nobody wants."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.rentals import Rental
    from registry.runpod_shapes import Pod
    from registry.settings import Settings
    from registry.store import Store

app = typer.Typer(add_completion=False, invoke_without_command=True, rich_markup_mode=None)
JSON = typer.Option("--json", help="Print as JSON")
COLUMNS = ["pod", "run", "card", "$/hour", "RunPod says", "the ledger says", "age", "cost", "permit ends"]


@app.callback()
def pods(
    context: typer.Context,
    all_: Annotated[bool, typer.Option("--all", help="The account's other pods too, which ft never touches")] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show rented pods. Without a key for RunPod: what the ledger knows.

    Example: ft pods
    """
    if context.invoked_subcommand:
        return
    from cli.console import print_json, say, table
    from registry.project import find_project
    from registry.rentals import is_ours
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    listed = _listed(load_settings(project))
    ours = is_ours(store)
    found = _lines(store, None if listed is None else [each for each in listed if ours(each.name)])
    foreign = [each for each in listed or [] if not ours(each.name)]
    if as_json:
        others = [{"pod": each.id, "name": each.name, "state": each.status} for each in foreign] if all_ else []
        print_json({"pods": found, "asked_runpod": listed is not None, "foreign": len(foreign), "others": others})
        return
    table(COLUMNS, [_cells(each) for each in found]) if found else say("nothing is rented")
    for each in found:
        if each["failures"]:
            say(f"{each['name']}: RunPod did not end it, {each['failures']} times: {each['error']}")
    if foreign and all_:
        table(["not ours", "card", "RunPod says"], [[each.name, each.gpu, each.status.lower()] for each in foreign])
    elif foreign:
        say(f"{len(foreign)} more in the account that ft did not make; `ft pods --all` lists them")


@app.command()
def reap(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done")] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """End now what nobody wants; every worker does the same all the time. Only pods of this project are touched.

    Example: ft pods reap --dry-run
    """
    from dataclasses import asdict

    from cli.console import print_json, say
    from jobs.pod_reaper import Reaper
    from registry.project import find_project
    from registry.runpod_api import open_runpod
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store, settings = open_store(project), load_settings(project)
    with open_runpod(settings) as cloud:
        reaper = Reaper(store, cloud, settings.budgets, settings.settle_seconds)
        acts = reaper.look(dry_run=dry_run)
    if as_json:
        print_json({"done": not dry_run, "acts": [asdict(each) for each in acts]})
        return
    for each in acts:
        would = "would be " if dry_run else ""
        say(f"{each.name}{f' ({each.pod})' if each.pod else ''}: {would}{DONE[each.kind]}{_because(each.reason)}")
    if not acts:
        say("all that is rented is wanted")


@app.command()
def extend(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run whose pod is rented now")],
    max_usd: Annotated[float, typer.Option("--max-usd", min=0.01, help="What the run may cost from now on, in all")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Let a run that is on cost more: its permit grows within half a minute. Budgets of day and month still hold.

    Example: ft pods extend support-1a2b --max-usd 8
    """
    from cli.console import print_json, say
    from registry import runs
    from registry.errors import NotFound
    from registry.ledger import reserve_more
    from registry.project import find_project
    from registry.rentals import current
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store = open_store(project)
    run = runs.get(store, run_id)
    rental = current(store, run.id)
    if rental is None:
        raise NotFound(f"{run.id} has no pod", fix="`ft pods` lists what is rented")
    more = reserve_more(store, rental.name, load_settings(project).budgets, max_usd)
    found = {"run": run.id, "name": more.name, "reserved_usd": more.reserved_usd, "max_usd": max_usd}
    print_json(found) if as_json else say(f"{run.id}: ${more.reserved_usd:.2f} are reserved for its pod now")


DONE = {
    "adopt": "taken for its run", "want_ended": "ended", "end": "ended", "reap": "ended", "ask": "looked for",
    "void": "struck out", "close": "closed in the ledger",
}  # fmt: skip


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _listed(settings: Settings) -> list[Pod] | None:
    """All pods of the account; None without a key, or where RunPod does not answer, which is said."""
    from registry.errors import CloudError
    from registry.runpod_api import open_runpod

    try:
        with open_runpod(settings, patience_s=5.0) as cloud:
            return cloud.pods()
    except CloudError as error:
        print(f"what RunPod has is not known: {error}", file=sys.stderr)
        return None


def _lines(store: Store, listed: list[Pod] | None) -> list[dict[str, Any]]:
    """Open rentals, and pods of ours that no open rental has."""
    from registry.rentals import rentals

    open_ = rentals(store, open_=True)
    found = [_of_rental(store, each, listed) for each in open_]
    known = {(each.name, each.pod) for each in open_}
    strays = [each for each in listed or [] if (each.name, each.id) not in known and each.status != "TERMINATED"]
    return found + [_of_stray(store, each) for each in strays if (each.name, None) not in known]


def _of_rental(store: Store, rental: Rental, listed: list[Pod] | None) -> dict[str, Any]:
    import time

    from registry.rentals import rented_pods
    from registry.spending import permit_until

    now = time.time()
    pod = next((each for each in listed or [] if rental.pod in (each.id, None) and each.name == rental.name), None)
    says = pod.status.lower() if pod else "?" if listed is None else "not there"
    return {
        "name": rental.name, "pod": rental.pod, "run": rental.job, "gpu": rental.gpu,
        "usd_per_hour": round(rental.usd_per_hour, 4), "runpod": says, "ledger": rental.state, "reason": rental.reason,
        "since": rental.created or rental.intended, "reserved_usd": round(rental.reserved_usd, 4),
        "usd": round(sum(each.usd(now) for each in rented_pods(store, name=rental.name)), 4),
        "permit_until": permit_until(store, rental, now) if rental.state == "live" else None,
        "failures": rental.body.get("failures", 0), "error": rental.body.get("error", ""),
    }  # fmt: skip


def _of_stray(store: Store, pod: Pod) -> dict[str, Any]:
    """It will be ended by the next look of a reaper."""
    import time

    from registry.rentals import rented_pods

    usd = sum(each.usd(time.time()) for each in rented_pods(store, name=pod.name) if each.pod == pod.id)
    return {
        "name": pod.name, "pod": pod.id, "run": "", "gpu": pod.gpu, "usd_per_hour": pod.usd_per_hour,
        "runpod": pod.status.lower(), "ledger": "not wanted", "reason": "", "since": pod.created, "reserved_usd": 0.0,
        "usd": round(usd, 4), "permit_until": None, "failures": 0, "error": "",
    }  # fmt: skip


def _cells(line: dict[str, Any]) -> list[str]:
    from cli.console import ago

    ledger = f"{line['ledger']} ({line['reason']})" if line["reason"] else line["ledger"]
    return [
        line["name"], line["run"], line["gpu"], f"{line['usd_per_hour']:.2f}", line["runpod"], ledger,
        ago(line["since"]), f"${line['usd']:.2f} of ${line['reserved_usd']:.2f}", _ahead(line["permit_until"]),
    ]  # fmt: skip


def _ahead(moment: float | None) -> str:
    import time

    if moment is None:
        return "-"
    minutes = (moment - time.time()) / 60
    if minutes < 0:
        return "is over"
    return f"in {minutes / 60:.1f} h" if minutes > 90 else f"in {minutes:.0f} min"
