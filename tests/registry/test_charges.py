"""What is paid by use: reserved against every budget, booked, and given back whatever happens. On both databases."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic import ValidationError

from registry import budgets as decide
from registry import ledger, runs
from registry.budgets import Cap, Refused
from registry.charges import Payer, reserved
from registry.cloud_terms import Budgets, ReferenceModel
from registry.errors import BudgetError
from registry.events import read
from registry.ledger import Intent
from registry.spending import book, charge_costs, reservations
from registry.store import Store

RECIPE = {"name": "support", "model": "support"}
ROOMY = Budgets(run_usd=10, day_usd=20, month_usd=30)


def payer(store: Store, run_id: str = "support-1", budgets: Budgets = ROOMY, max_usd: float | None = None) -> Payer:
    if store.first("SELECT 1 AS one FROM runs WHERE id = ?", (run_id,)) is None:
        with store.writing() as connection:
            runs.submit_within(connection, run_id, RECIPE, "recipes/support.yaml", "d")
    return Payer(store, run_id, "support", budgets, max_usd)


def used(store: Store, budgets: Budgets = ROOMY) -> dict[str, float]:
    now = time.time()
    return {cap.scope: round(cap.used_usd, 6) for cap in decide.period_caps(budgets, *book(store.read, now), now)}


@pytest.mark.parametrize(
    ("usd", "caps", "refused"),
    [
        (1.0, [Cap("run", "r", 2, 1)], None),
        (1.1, [Cap("run", "r", 2, 1)], "run"),
        (1.0, [Cap("run", "r", 2, 1), Cap("day", "d", 5, 4.5)], "day"),
        (0.5, [Cap("run", "r", 2, 1), Cap("day", "d", 5, 4.5), Cap("month", "m", 5, 4.6)], "month"),
        (0.0, [Cap("run", "r", 2, 2)], None),
    ],
)
def test_what_goes_beyond_a_budget(usd: float, caps: list[Cap], refused: str | None) -> None:
    found = decide.beyond(usd, caps)
    assert (found.cap.scope if isinstance(found, Refused) else None) == refused


def test_it_is_reserved_spent_and_given_back(either_store: Store) -> None:
    store = either_store
    with reserved(payer(store), "asking gpt", 4.0) as charge:
        assert used(store) == {"day": 4.0, "month": 4.0}
        charge.spend(1.0)
        assert used(store) == {"day": 4.0, "month": 4.0}, "what is spent is no more reserved"
        charge.spend(0.5)
    assert used(store) == {"day": 1.5, "month": 1.5}
    with pytest.raises(KeyboardInterrupt), reserved(payer(store), "asking gpt", 4.0):
        raise KeyboardInterrupt
    assert used(store) == {"day": 1.5, "month": 1.5}
    with reserved(payer(store), "asking gpt", 1.0) as charge:
        charge.spend(2.5)
    assert used(store) == {"day": 4.0, "month": 4.0}, "what was paid counts, also beyond what was reserved"
    assert [(each.job, each.recipe, each.usd(0)) for each in charge_costs(store.read)] == [
        ("support-1", "support", 1.5), ("support-1", "support", 0.0), ("support-1", "support", 2.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budgets", "max_usd", "scope"),
    [(ROOMY, 3.0, "run"), (Budgets(run_usd=3), None, "run"), (Budgets(run_usd=9, day_usd=3), None, "day"),
     (Budgets(run_usd=9, month_usd=3), 9.0, "month")],
)  # fmt: skip
def test_too_little_is_refused_with_the_budget_that_is_too_small(
    store: Store, budgets: Budgets, max_usd: float | None, scope: str
) -> None:
    here = payer(store, budgets=budgets, max_usd=max_usd)
    says = f"asking gpt may cost [$]3.5000, and of the {scope}'s budget"
    with pytest.raises(BudgetError, match=says) as caught, reserved(here, "asking gpt", 3.5):
        pass
    assert f"{scope}_usd" in str(caught.value.fix) or "budget.max_usd" in str(caught.value.fix)
    assert charge_costs(store.read) == []
    [event] = read(store, type_="budget.refused")
    assert (event.subject, event.data["scope"], event.data["wanted_usd"]) == ("support-1", scope, 3.5)
    with reserved(here, "asking gpt", 2.5):
        pass


def test_pods_and_charges_share_the_budgets(store: Store) -> None:
    intent = Intent("support-2", "support", "support", "NVIDIA A40", "secure", 0.5, reserved_usd=9.0)
    with reserved(payer(store), "asking gpt", 9.0) as charge:
        charge.spend(6.0)
        ledger.intend(store, intent, ROOMY)
        with (
            pytest.raises(BudgetError, match="of the day's budget"),
            reserved(payer(store, "support-3"), "asking", 3.0),
        ):
            pass
    with reserved(payer(store, "support-3"), "asking", 3.0):
        pass


def test_a_worker_that_was_killed_leaves_no_reservation_behind(store: Store) -> None:
    """Its run asks again and replaces it; a run that is over needs it no more."""
    lost = reserved(payer(store), "asking gpt", 4.0)
    lost.__enter__()
    assert [each.usd for each in reservations(store, time.time())] == [4.0]
    with reserved(payer(store), "asking gpt", 3.0):
        assert [each.usd for each in reservations(store, time.time())] == [3.0]
    again = reserved(payer(store), "asking gpt", 5.0)
    again.__enter__()
    store.note("UPDATE runs SET state = 'cancelled'")
    assert reservations(store, time.time()) == []


@pytest.mark.parametrize("given", [{"usd_per_million_input": 1}, {"usd_per_million_output": 1},
                                   {"usd_per_million_input": -1, "usd_per_million_output": 1}])  # fmt: skip
def test_prices_come_in_pairs(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ReferenceModel.model_validate({"model": "m", "url": "https://api.example.com/v1", **given})


def test_a_price_is_of_a_million_tokens() -> None:
    one = ReferenceModel(model="m", url="u", usd_per_million_input=1.25, usd_per_million_output=10)
    assert one.has_prices
    assert one.usd(2_000_000, 100_000) == pytest.approx(3.5)
    assert ReferenceModel(model="m", url="u").usd(10**9, 10**9) == 0
