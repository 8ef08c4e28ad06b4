"""What endpoints have cost, as RunPod bills it, and whether the budgets leave anything for them."""

from __future__ import annotations

import time

from registry import budgets, endpoints
from registry.errors import BudgetError
from registry.runpod_api import RunPod
from registry.settings import Settings
from registry.spending import book
from registry.store import Store


def note_bills(store: Store, runpod: RunPod) -> dict[str, float]:
    """US dollars billed since each endpoint was made, those that have ended too; written down. By endpoint id."""
    rows = endpoints.deployed(store, ended=True)
    if not rows:
        return {}
    bills = runpod.endpoint_billing(since=min(each.created for each in rows))
    ours = {each.id: bills[each.id] for each in rows if each.id in bills}
    endpoints.note_billed(store, ours)
    return ours


def refuse_spent(store: Store, runpod: RunPod, settings: Settings) -> None:
    """Raises BudgetError when the day's or the month's budget is used up, by pods and endpoints together."""
    now = time.time()
    for cap in budgets.period_caps(settings.budgets, *book(store.read, now, endpoints=False), now):
        used = cap.used_usd + _billed_since(store, runpod, budgets.start_of(cap.scope, now))
        if used >= cap.cap_usd:
            raise BudgetError(
                f"the {cap.scope}'s budget of ${cap.cap_usd:.2f} is used up (${used:.2f})", place=cap.period,
                fix=f"raise `budgets.{cap.scope}_usd` in ft.yaml, or `ft endpoints scale ID 0` what is on",
            )  # fmt: skip


def _billed_since(store: Store, runpod: RunPod, since: float) -> float:
    ours = {each.id for each in endpoints.deployed(store, ended=True)}
    if not ours:
        return 0.0
    return sum(usd for id, usd in runpod.endpoint_billing(since=since).items() if id in ours)
