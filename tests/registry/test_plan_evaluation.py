"""Where a version is evaluated: own cards first, a pod where none can serve the base, and what that costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.candidates import choose, judge, wish_of
from registry.card_profiles import GIB
from registry.cards import Card
from registry.errors import DoesNotFit
from registry.gpu_prices import GpuPrice, seed_prices
from registry.hosts import HostCard
from registry.plan_evaluation import EvaluationPlan, plan_evaluation
from registry.recipe import Recipe
from tests.registry.test_candidates import BIG, CPU, HUGE, MIDDLE, OLD, ROWS, SMALL, SUPER, around, recipe

GPUS = ["NVIDIA A100 80GB PCIe", "NVIDIA H200", "NVIDIA B200"]
CLOUD = {"max_usd_per_hour": 2.0}
TINY_CPU = HostCard("desk", Card("cpu", "CPU, 2 cores", 4 * GIB))
SECOND = HostCard("desk", Card("cuda-1", "NVIDIA GeForce RTX 5090", 32 * GIB, 1, capability="12.0"))


def planned(wanted: Recipe, *cards: HostCard) -> EvaluationPlan:
    there = around(*cards)
    wish = wish_of(wanted, ROWS, None)
    judged = judge(wanted, wish, there)
    return plan_evaluation(wanted, wish, ROWS, judged, choose(wanted, judged))


def test_where_an_own_card_can_serve_the_base_nothing_is_rented() -> None:
    assert planned(recipe(SMALL, cloud=CLOUD), SUPER) == EvaluationPlan(cards=("desk/cuda-0",))
    assert planned(recipe(SMALL, card="runpod", cloud=CLOUD), CPU).cards == ("desk/cpu",)


def test_a_base_that_is_trained_here_in_4_bits_and_served_in_16_nowhere_here_is_evaluated_in_a_pod() -> None:
    found = planned(recipe(MIDDLE, cloud=CLOUD), SUPER)
    assert found.cards == ()
    assert all(each.fits for each in found.rented)
    assert found.as_dict()["on"] == "runpod"
    prices = [each.usd.mid for each in found.rented if each.usd]
    assert prices == sorted(prices)


def test_without_cloud_or_with_a_card_named_it_is_tried_on_that_card() -> None:
    assert planned(recipe(MIDDLE), SUPER) == EvaluationPlan()
    assert planned(recipe(MIDDLE, card="cuda-0", cloud=CLOUD), SUPER) == EvaluationPlan()


def test_another_card_of_the_same_host_evaluates_and_one_of_another_host_does_not() -> None:
    assert planned(recipe(MIDDLE, card="desk/cuda-0"), SUPER, SECOND).cards == ("desk/cuda-1",)
    assert planned(recipe(MIDDLE, card="desk/cuda-0"), SUPER, BIG).cards == ()


def test_of_what_is_trained_in_a_pod_any_own_card_may_evaluate() -> None:
    assert planned(recipe(MIDDLE, card="runpod", cloud=CLOUD), OLD, BIG).cards == ("tower/cuda-0",)
    assert planned(recipe(MIDDLE, card="runpod", cloud=CLOUD), OLD, TINY_CPU).rented


def test_a_cpu_that_could_serve_it_in_hours_is_not_taken() -> None:
    wanted = recipe(MIDDLE, card="runpod", cloud=CLOUD)
    many = replace(ROWS, splits={**ROWS.splits, "test": ROWS.splits["train"]})
    wish = wish_of(wanted, many, None)
    judged = judge(wanted, wish, around(CPU))
    assert plan_evaluation(wanted, wish, many, judged, choose(wanted, judged)).rented
    assert planned(wanted, CPU).cards == ("desk/cpu",)  # one row takes minutes


def test_what_could_be_trained_and_served_nowhere_is_refused_before_money_is_spent() -> None:
    with pytest.raises(DoesNotFit, match="no card that the recipe allows can serve it") as refused:
        planned(recipe(HUGE, card="runpod", cloud={"gpus": ["NVIDIA A100 80GB PCIe"], **CLOUD}), OLD)
    assert "cloud.gpus" in refused.value.fix
    assert "GiB needed" in refused.value.what


def test_a_card_must_hold_all_that_vllm_is_started_with() -> None:
    """An H200 has room for the weights of a 70B, but not within the part that vLLM takes."""
    wanted = recipe(HUGE, card="runpod", cloud={"max_usd_per_hour": 9.0, "gpus": GPUS, "disk_gb": 200})
    dear = GpuPrice("NVIDIA B200", "B200", 180, "secure", 6.0)
    there = around(OLD, prices=replace(seed_prices(), of=(*seed_prices().of, dear)))
    wish = wish_of(wanted, ROWS, None)
    judged = judge(wanted, wish, there)
    found = plan_evaluation(wanted, wish, ROWS, judged, choose(wanted, judged))
    assert [each.candidate.gpu for each in found.rented] == ["NVIDIA B200"]


def test_a_context_that_the_model_has_not_is_not_asked_of_a_card() -> None:
    wanted = recipe(MIDDLE, cloud=CLOUD)
    longer = wanted.model_copy(update={"serve": wanted.serve.model_copy(update={"max_context": 1 << 20})})
    assert max(each.context for each in planned(longer, SUPER).rented) <= 1 << 17


def test_a_disk_that_does_not_hold_base_and_vllm_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="need 30 GB of disk") as refused:
        planned(recipe(MIDDLE, cloud={**CLOUD, "disk_gb": 20}), SUPER)
    assert "write 40 there" in refused.value.fix


def test_longer_answers_and_more_rows_take_longer() -> None:
    short = planned(recipe(MIDDLE, cloud=CLOUD), SUPER).rented[0]
    wanted = recipe(MIDDLE, cloud=CLOUD)
    wanted = wanted.model_copy(update={"evaluate": wanted.evaluate.model_copy(update={"max_new_tokens": 2048})})
    longer = planned(wanted, SUPER).rented[0]
    assert short.usd is not None
    assert longer.usd is not None
    assert longer.seconds.mid > short.seconds.mid
    assert longer.usd.high > short.usd.high
