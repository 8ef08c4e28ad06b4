"""What a run reserves to train and to evaluate, of one budget."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.place import RESERVED, rented
from registry.candidates import choose, judge, wish_of
from registry.cloud_terms import Budgets
from registry.errors import BudgetError
from registry.hosts import HostCard
from registry.plan_evaluation import plan_evaluation
from registry.settings import Settings
from tests.registry.test_candidates import MIDDLE, OLD, ROWS, SMALL, SUPER, around, recipe

Rented = tuple[dict[str, Any] | None, dict[str, Any] | None]
CLOUD = {"max_usd_per_hour": 1.0}


def planned(base: str, own: HostCard, max_usd: float | None = None, **more: Any) -> Rented:
    wanted = recipe(base, cloud=CLOUD, **more)
    wanted = wanted.model_copy(update={"budget": wanted.budget.model_copy(update={"max_usd": max_usd})})
    wish = wish_of(wanted, ROWS, None)
    judged = judge(wanted, wish, around(own))
    chosen = choose(wanted, judged)
    evaluation = plan_evaluation(wanted, wish, ROWS, judged, chosen)
    return rented(wanted, Settings(budgets=Budgets()), judged, chosen, evaluation)


def least(base: str, own: HostCard, **more: Any) -> tuple[float, float]:
    """The least that training and evaluation are expected to cost."""
    wanted = recipe(base, cloud=CLOUD, **more)
    wish = wish_of(wanted, ROWS, None)
    judged = judge(wanted, wish, around(own))
    chosen = choose(wanted, judged)
    usd, found = chosen.verdict.usd, plan_evaluation(wanted, wish, ROWS, judged, chosen).rented[0].usd
    assert usd is not None
    assert found is not None
    return usd.low, found.low


def test_with_enough_money_the_evaluation_gets_all_that_it_may_need_and_training_what_is_left() -> None:
    rent, to_evaluate = planned(MIDDLE, OLD, 100.0, card="runpod")
    assert rent is not None
    assert to_evaluate is not None
    assert to_evaluate["reserve_usd"] >= to_evaluate["expected"]["usd"]["high"] * RESERVED - 1e-4
    assert rent["max_usd"] == pytest.approx(100.0 - to_evaluate["reserve_usd"])


def test_with_little_money_each_gets_at_least_what_it_needs_at_best() -> None:
    trains, evaluates = least(MIDDLE, OLD, card="runpod")
    for max_usd in (trains + evaluates + 0.001, 2 * (trains + evaluates)):
        rent, to_evaluate = planned(MIDDLE, OLD, max_usd, card="runpod")
        assert rent is not None
        assert to_evaluate is not None
        assert rent["max_usd"] >= trains - 1e-6
        assert max_usd - rent["max_usd"] >= evaluates - 1e-6


def test_what_does_not_pay_for_both_is_refused_and_so_is_no_budget_at_all() -> None:
    trains, evaluates = least(MIDDLE, OLD, card="runpod")
    with pytest.raises(BudgetError, match="for the evaluation"):
        planned(MIDDLE, OLD, trains + evaluates - 0.001, card="runpod")
    with pytest.raises(BudgetError, match="nothing says what this run may cost"):
        planned(MIDDLE, SUPER)


def test_what_is_trained_here_rents_for_the_evaluation_alone() -> None:
    rent, to_evaluate = planned(MIDDLE, SUPER, 5.0)
    assert rent is None
    assert to_evaluate is not None
    assert planned(SMALL, SUPER) == (None, None)
