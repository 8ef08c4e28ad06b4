"""`ft cost`: what rented pods, endpoints and references have cost, and what the month will."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from registry.budgets import RentedPod
    from registry.costs import Forecast, Line
    from registry.settings import Settings
    from registry.store import Store


def cost(
    by: Annotated[Literal["run", "recipe", "month"], typer.Option("--by", help="What to add up")] = "run",
    forecast: Annotated[bool, typer.Option("--forecast", help="What this month will have cost")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Show what pods, endpoints and asked references have cost: by RunPod's bill where it is final, else as measured or
    as it was billed last (marked with ~).

    Example: ft cost --by month
    """
    import time

    from registry.costs import lines
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store, settings = open_store(project), load_settings(project)
    costs = _costs(store, was_asked=_read_bill(store, settings))
    if forecast:
        _forecast(store, settings, costs, as_json)
        return
    found = lines(costs, by, time.time())
    if as_json:
        _print_json(found, by)
    else:
        _print(found, by, settings)


def _costs(store: Store, *, was_asked: bool) -> list[RentedPod]:
    """Pods, endpoints, references. Whether an endpoint's bill is final nobody knows where RunPod was not asked."""
    import time

    from jobs.pod_reaper import FINAL_SECONDS
    from registry.rentals import rented_pods
    from registry.spending import charge_costs, endpoint_costs

    complete = time.time() - FINAL_SECONDS if was_asked else 0.0
    return rented_pods(store) + endpoint_costs(store.read, complete=complete) + charge_costs(store.read)


def _read_bill(store: Store, settings: Settings) -> bool:
    """Bring the ledger up to the bill. Without a key, or with RunPod away, the ledger is shown as it is."""
    from jobs.pod_reaper import Reaper
    from registry.errors import CloudError, WrongKey
    from registry.runpod_api import open_runpod

    try:
        cloud = open_runpod(settings, patience_s=5.0)
    except WrongKey:  # there is none
        return False
    with cloud:
        try:
            Reaper(store, cloud, settings.budgets, settings.settle_seconds).bill(at_once=True)
        except CloudError as error:
            print(f"without RunPod's newest bill: {error}", file=sys.stderr)
            return False
    return True


def _forecast(store: Store, settings: Settings, costs: list[RentedPod], as_json: bool) -> None:
    import time
    from dataclasses import asdict

    from cli.console import print_json, say
    from registry.costs import forecast
    from registry.endpoints import deployed

    now = time.time()
    awake = [(each.id, each.awake_usd_per_hour) for each in deployed(store) if each.awake_usd_per_hour]
    found = forecast(costs, _still_to_come(store, now), now, awake)
    cap = settings.budgets.month_usd
    if as_json:
        print_json({**asdict(found), "usd": found.usd, "cap_usd": cap})
        return
    for text in _words(found, cap):
        say(text)


def _words(found: Forecast, cap: float | None) -> list[str]:
    trend = found.trend_usd_per_day * found.days_left
    said = [
        f"{found.month} will have cost about ${found.usd:.2f}" + (f" of ${cap:.2f}" if cap else ""),
        f"  ${found.spent_usd:.2f} up to now",
        f"  ${found.running_usd:.2f} for what is rented, until its permits end",
        *([f"  ${found.awake_usd:.2f} for endpoints' workers that never sleep"] if found.awake_usd else []),
        f"  ${trend:.2f} for {found.days_left:.1f} more days like the last 30 (${found.trend_usd_per_day:.2f} a day)",
    ]
    if cap and found.usd > cap:
        said.append("that is more than `budgets.month_usd` allows: runs will be refused before the month ends")
    return said


def _still_to_come(store: Store, now: float) -> float:
    """What open rentals will take: live ones until their permit ends, others all that they have reserved."""
    from registry.rentals import rentals
    from registry.spending import permit_until

    usd = 0.0
    for each in rentals(store, open_=True):
        if each.state == "live":
            usd += max(0.0, permit_until(store, each, now) - now) * each.usd_per_hour / 3600
        elif each.state == "intended":
            usd += each.reserved_usd
    return usd


def _print_json(found: list[Line], by: str) -> None:
    from dataclasses import asdict

    from cli.console import print_json

    rows = [{by: line.pop("name"), **line} for line in map(asdict, found)]
    print_json({"by": by, "usd": sum(each.usd for each in found),
                "measured_usd": sum(each.measured_usd for each in found), "lines": rows})  # fmt: skip


def _print(found: list[Line], by: str, settings: Settings) -> None:
    from cli.console import say, table

    if not found:
        say("nothing was rented yet; a recipe with `cloud:` and a budget may (docs/cloud.md)")
        return
    table([by, "pods", "hours", "US dollars"], [_row(each) for each in found])
    say(f"${sum(each.usd for each in found):.2f} in all")
    if any(each.measured_usd for each in found):
        say("~ in part measured, or as it was billed last: RunPod's bill is complete some hours after an end")
    budgets = settings.budgets
    caps = {"day": budgets.day_usd, "month": budgets.month_usd, "run": budgets.run_usd}
    if given := [f"${cap:g} a {scope}" for scope, cap in caps.items() if cap is not None]:
        say(f"budgets: {', '.join(given)}")


def _row(line: Line) -> list[str]:
    pods = [str(line.pods), f"{line.seconds / 3600:.2f}"] if line.pods else ["", ""]
    return [line.name, *pods, _usd(line)]


def _usd(line: Line) -> str:
    return f"{'~' if line.measured_usd else ''}{line.usd:.2f}"
