"""Serverless endpoints on RunPod: a model's champion on somebody else's cards, paid by the second while it works.

`deploy` makes or updates what a plan (serving/endpoint_plan.py) says, as often as it is called. An update replaces
workers one by one: new ones load the new version and the one that answers, so the gateway goes on asking for the old
one, which all of them know, until none of the old workers is left (`settle`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from registry import endpoints
from registry.endpoints import Deployed
from registry.errors import AnswerLost, BudgetError
from registry.rentals import installation
from registry.runpod_api import Endpoint, EndpointOrder, RunPod
from registry.store import Store
from serving.endpoint_bills import note_bills
from serving.endpoint_plan import Plan, Terms, kept_terms, of_name

POLL_SECONDS = 2.0


def deploy(store: Store, runpod: RunPod, plan: Plan, *, settle_seconds: float = 60.0) -> Deployed:
    """Create, adopt or update; the row as it is then. `settle` makes the new version answer."""
    endpoint = plan.found or _create(runpod, plan.order, settle_seconds)
    if plan.found and plan.changes:
        order = plan.order
        endpoint = runpod.update_endpoint(
            endpoint.id, image=order.image, env=order.env, workers_min=order.workers_min,
            workers_max=order.workers_max, idle_seconds=order.idle_seconds,
        )  # fmt: skip
    return _note(store, plan, _only(runpod, endpoint, plan.order.name))


def settle(
    store: Store, runpod: RunPod, row: Deployed, seconds: float, tell: Callable[[int], None] = lambda stale: None
) -> Deployed:
    """Ask for the wanted version as soon as no worker is left that does not know it. After `seconds` without that, the
    row is as it was: calling again goes on."""
    deadline = time.monotonic() + seconds
    wanted = int(row.body["wanted"])
    while wanted != row.version:
        stale = runpod.stale_workers(row.id)
        if not stale:
            row = replace(row, version=wanted)
            endpoints.note_deployed(store, row)
        elif time.monotonic() + POLL_SECONDS > deadline:
            return row
        else:
            tell(stale)
            time.sleep(POLL_SECONDS)
    return row


def scale(store: Store, runpod: RunPod, row: Deployed, workers_max: int, workers_min: int = 0) -> Deployed:
    """At most so many workers; 0 ends all of them, and the gateway asks it no more. Raises BudgetError, CloudError."""
    terms = kept_terms(row)
    dear = float(row.body["usd_per_worker"]) * workers_max
    if dear > terms.max_usd_per_hour:
        raise BudgetError(
            f"{workers_max} workers cost up to ${dear:.2f} an hour, more than the allowed "
            f"${terms.max_usd_per_hour:.2f}", place=row.name,
            fix=f"`ft endpoints deploy {row.model} --max-workers {workers_max} --max-usd-per-hour {dear:.2f}`",
        )  # fmt: skip
    workers_min = min(workers_min, workers_max)
    # Zero is written down first: nobody shall be sent to an endpoint whose workers have just been ended.
    changed = replace(row, body={**row.body, **_with_workers(terms, workers_min, workers_max)})
    if workers_max == 0:
        endpoints.note_deployed(store, changed)
    runpod.update_endpoint(row.id, workers_min=workers_min, workers_max=workers_max)
    endpoints.note_deployed(store, changed)
    return changed


def delete(store: Store, runpod: RunPod, row: Deployed) -> None:
    """Its workers end, jobs that wait are lost. Fine when it is gone already."""
    note_bills(store, runpod)
    off = replace(row, body={**row.body, "workers_max": 0})
    endpoints.note_deployed(store, off)
    runpod.delete_endpoint(row.id)
    endpoints.note_ended(store, row.id)


def look(store: Store, runpod: RunPod) -> tuple[list[Deployed], list[Endpoint]]:
    """Our endpoints as RunPod has them now, and those that bear our name but are in no row (a create whose answer was
    lost; the next deploy of the model adopts it). What RunPod no longer has is noted as ended."""
    there = {each.id: each for each in runpod.endpoints()}
    for row in endpoints.deployed(store):
        if row.id not in there:
            endpoints.note_ended(store, row.id)
    rows = endpoints.deployed(store)
    prefix = endpoints.endpoint_name(installation(store), "")
    known = {each.id for each in rows}
    return rows, [each for each in there.values() if each.name.startswith(prefix) and each.id not in known]


def _create(runpod: RunPod, order: EndpointOrder, settle_seconds: float) -> Endpoint:
    """A create whose answer was lost may have been done: look for its name before anybody tries again."""
    try:
        return runpod.create_endpoint(order)
    except AnswerLost:
        deadline = time.monotonic() + settle_seconds
        while True:
            if found := of_name(runpod.endpoints(), order.name):
                return found
            if time.monotonic() > deadline:
                raise
            time.sleep(min(POLL_SECONDS, settle_seconds))


def _only(runpod: RunPod, endpoint: Endpoint, name: str) -> Endpoint:
    """Two deploys at the same time may both have created one: the older one stays, and is what both go on with."""
    there = [each for each in runpod.endpoints() if endpoints.is_named(each.name, name)]
    kept = of_name([endpoint, *there], name) or endpoint
    for each in there:
        if each.id != kept.id:
            runpod.delete_endpoint(each.id)
    return kept


def _note(store: Store, plan: Plan, endpoint: Endpoint) -> Deployed:
    version = plan.version
    body = {
        "wanted": version.version, "paths": plan.paths, "terms": asdict(plan.terms),
        "workers_min": plan.terms.workers_min, "workers_max": plan.terms.workers_max,
        "usd_per_worker": plan.usd_per_hour / plan.terms.workers_max,
    }  # fmt: skip
    asked = plan.before.version if plan.before else version.version
    row = Deployed(endpoint.id, plan.order.name, version.model, asked, endpoint.created or time.time(), None, 0.0, body)
    endpoints.note_deployed(store, row)
    return row


def _with_workers(terms: Terms, workers_min: int, workers_max: int) -> dict[str, Any]:
    """0 is a pause, no term: the next deploy brings the workers back."""
    if workers_max:
        terms = replace(terms, workers_min=workers_min, workers_max=workers_max)
    return {"workers_min": workers_min, "workers_max": workers_max, "terms": asdict(terms)}
