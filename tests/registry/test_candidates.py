"""Where a recipe could be trained, which place it gets, and what a person is told when it fits nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from registry.candidates import (
    Around,
    Judged,
    available,
    candidates,
    choose,
    judge,
    look_around,
    profile_for,
    rentable,
    wish_of,
)
from registry.card_profiles import GIB, usable_memory
from registry.cards import Card, as_set
from registry.cloud_terms import CardSetting
from registry.errors import BaseModelError, DoesNotFit, WrongInput
from registry.gpu_prices import GpuPrice, Prices, seed_prices
from registry.histogram import Histogram, lengths_of
from registry.hosts import HostCard, beat
from registry.plan import Place
from registry.recipe import Recipe
from registry.runs import note_result, submit
from registry.settings import Settings
from registry.store import Store

SMALL, MIDDLE = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
HUGE = "meta-llama/Llama-3.1-70B-Instruct"
CPU = HostCard("desk", Card("cpu", "CPU, 8 cores", 64 * GIB))
SUPER = HostCard("desk", Card("cuda-0", "NVIDIA GeForce RTX 4070 SUPER", 12 * GIB, 0, capability="8.9"))
OLD = HostCard("attic", Card("cuda-0", "NVIDIA GeForce RTX 3070", 8 * GIB, 0, capability="8.6"))
BIG = HostCard("tower", Card("cuda-0", "NVIDIA GeForce RTX 5090", 32 * GIB, 0, capability="12.0"))
ROWS = Histogram("0.dir", "", {"train": lengths_of([200] * 900 + [500] * 100), "eval": lengths_of([200] * 50),
                               "test": lengths_of([200])})  # fmt: skip
CHEAP = {"max_usd_per_hour": 1.0}


def recipe(base: str = MIDDLE, card: str = "auto", cloud: Mapping[str, Any] | None = None, **train: Any) -> Recipe:
    return Recipe(
        kind="finetune", name="plans", model="plans", base={"model": base}, data={"path": "datasets/plans"},
        train={"batch": 1, **train}, evaluate={"task": "label"}, card=card, cloud=cloud,
    )  # fmt: skip


def around(*cards: HostCard, paused: tuple[str, ...] = (), busy: dict[str, int] | None = None,
           prices: Prices | None = None) -> Around:  # fmt: skip
    return Around(cards, frozenset(paused), busy or {}, prices or seed_prices())


def judged(wanted: Recipe, there: Around) -> list[Judged]:
    return judge(wanted, wish_of(wanted, ROWS, None), there)


def chosen(wanted: Recipe, there: Around) -> str:
    return choose(wanted, judged(wanted, there)).candidate.name


@pytest.mark.parametrize(
    ("wanted", "there", "name"),
    [
        (recipe(), around(CPU, SUPER), "desk/cuda-0"),
        (recipe(), around(CPU, OLD, SUPER), "desk/cuda-0"),  # 8 GB are not enough
        (recipe(SMALL), around(CPU, SUPER, OLD, busy={"desk/cuda-0": 1}), "attic/cuda-0"),
        (recipe(SMALL), around(CPU, SUPER, OLD, paused=("desk/cuda-0",)), "attic/cuda-0"),
        (recipe(SMALL), around(CPU, SUPER, paused=("desk/cuda-0", "desk/cpu")), "desk/cuda-0"),
        (recipe(SMALL, card="cpu"), around(CPU, SUPER), "desk/cpu"),
        (recipe(SMALL, card="attic/cuda:0"), around(CPU, SUPER, OLD, busy={"attic/cuda-0": 9}), "attic/cuda-0"),
        (recipe(cloud=CHEAP), around(CPU, SUPER), "desk/cuda-0"),
        (recipe(cloud=CHEAP), around(CPU, SUPER, paused=("desk/cuda-0",)), "desk/cuda-0"),
        (recipe(cloud=CHEAP, card="runpod"), around(CPU, SUPER), "runpod/RTX 4090 secure"),
        (recipe(cloud=CHEAP), around(CPU, OLD), "runpod/RTX 4090 secure"),
        (recipe(cloud={**CHEAP, "cloud": "community"}), around(CPU, OLD), "runpod/RTX 4090 community"),
        (recipe(cloud={**CHEAP, "gpus": ["NVIDIA L40"]}), around(CPU, OLD), "runpod/L40 secure"),
    ],
)
def test_which_place_a_recipe_gets(wanted: Recipe, there: Around, name: str) -> None:
    assert chosen(wanted, there) == name


def test_the_cheapest_is_the_one_whose_run_costs_least_and_not_whose_hour_does() -> None:
    prices = Prices((
        GpuPrice("NVIDIA L4", "L4", 24, "secure", 0.40), GpuPrice("NVIDIA GeForce RTX 4090", "", 24, "secure", 0.44)
    ), 1.0)  # fmt: skip
    assert chosen(recipe(cloud=CHEAP), around(OLD, prices=prices)) == "runpod/RTX 4090 secure"


def test_what_runpod_has_none_of_is_taken_last() -> None:
    prices = Prices((
        GpuPrice("NVIDIA L4", "L4", 24, "secure", 0.40, "LOW", ("EU-RO-1",)),
        GpuPrice("NVIDIA GeForce RTX 4090", "", 24, "secure", 0.44, "NONE"),
    ), 1.0)  # fmt: skip
    wanted = recipe(cloud=CHEAP)
    names = [each.candidate.name for each in rentable(judged(wanted, around(OLD, prices=prices)))]
    assert names == ["runpod/L4 secure", "runpod/RTX 4090 secure"]


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        (None, "the recipe has no `cloud`, so nothing is rented"),
        ({"gpus": ["NVIDIA L4"]}, "not in cloud.gpus"),
        ({"cloud": "community"}, "cloud.cloud is community"),
        ({"cloud": "any"}, ""),
        ({"data_centers": ["US-KS-2"]}, "none in US-KS-2"),
        ({"max_usd_per_hour": 0.3}, "$0.44 an hour is more than cloud.max_usd_per_hour 0.3"),
        ({"max_usd_per_hour": 0.44, "data_centers": ["EU-RO-1"]}, ""),
    ],
)
def test_a_rented_card_is_within_the_recipes_terms(terms: Mapping[str, Any] | None, why: str) -> None:
    price = GpuPrice("NVIDIA GeForce RTX 4090", "RTX 4090", 24, "secure", 0.44, "LOW", ("EU-RO-1",))
    there = around(prices=Prices((price,), 1.0))
    assert next(each.why_not for each in candidates(recipe(cloud=terms), there) if each.memory == 24 * GIB) == why


def test_a_card_without_a_price_is_shown_and_never_rented() -> None:
    wanted = recipe(cloud={"gpus": ["NVIDIA A40"]}, card="runpod")
    [found] = [each for each in judged(wanted, around()) if each.candidate.gpu == "NVIDIA A40"]
    assert (found.verdict.fits, found.verdict.usd, found.candidate.why_not) == (True, None, "its price is not known")
    with pytest.raises(DoesNotFit, match="runpod/A40 secure: its price is not known"):
        chosen(wanted, around())


def test_a_training_that_fits_nowhere_says_what_each_card_lacks_what_helps_and_what_would_do() -> None:
    wanted = recipe(batch=2)
    with pytest.raises(DoesNotFit) as caught:
        chosen(wanted, around(CPU, OLD))
    what, fix = caught.value.what, caught.value.fix
    assert "attic/cuda-0: needs " in what
    assert "GiB too much" in what
    assert "desk/cpu: about " in what
    assert "`card: cpu` takes it all the same" in what
    assert "would do, for about $" in fix
    assert "the recipe has no `cloud`" in fix
    assert caught.value.exit_code == 2


def test_the_knob_that_makes_it_fit_is_named() -> None:
    with pytest.raises(DoesNotFit) as caught:
        chosen(recipe(batch=16, max_length=512), around(CPU, SUPER))
    assert "on desk/cuda-0: batch " in caught.value.fix


def test_where_nothing_is_large_enough_no_way_out_is_made_up() -> None:
    with pytest.raises(DoesNotFit) as caught:
        chosen(recipe(HUGE, cloud={"max_usd_per_hour": 1.0, "gpus": ["NVIDIA L4"]}), around(CPU, OLD))
    assert "runpod/L4 secure: needs" in caught.value.what
    assert "would do" in caught.value.fix  # one with 80 GB, which the recipe does not allow


def test_another_own_card_that_would_do_is_named_before_a_rented_one() -> None:
    with pytest.raises(DoesNotFit) as caught:
        chosen(recipe(card="attic/cuda-0"), around(CPU, OLD, BIG))
    assert "tower/cuda-0 would do (the recipe names another (`card: attic/cuda-0`))" in caught.value.fix


def test_a_card_that_is_nowhere_is_named_with_those_that_are() -> None:
    with pytest.raises(WrongInput, match="no card 'cuda:7'") as caught:
        chosen(recipe(card="cuda:7"), around(CPU, SUPER))
    assert "desk/cpu, desk/cuda-0" in caught.value.fix


def test_a_tight_own_card_is_taken_where_nothing_fits_and_nothing_may_be_rented() -> None:
    wanted = recipe()
    found = judged(wanted, around(SUPER))
    [own] = [each for each in found if each.candidate.kind == "card"]
    there = (own.verdict.memory.total + own.verdict.memory.high) // 2
    place = replace(SUPER, card=replace(SUPER.card, limit=there))
    assert chosen(wanted, around(CPU, place)) == "desk/cuda-0"
    assert chosen(recipe(cloud=CHEAP), around(CPU, place)) == "runpod/RTX 4090 secure"


def test_what_others_hold_and_what_ft_yaml_says_leaves_less() -> None:
    card = SUPER.card
    profile = profile_for(card)
    alone = available(card, profile)
    assert alone == usable_memory(card.memory, card.title)
    assert available(replace(card, used=200 << 20), profile) == alone  # a desktop, for which room is kept anyway
    assert available(replace(card, used=3 * GIB), profile) == int(card.memory * 0.98) - 3 * GIB
    for setting, there in ((CardSetting(keep_free_gb=2), alone - 2 * GIB), (CardSetting(memory_gb=5), 5 * GIB)):
        [told] = as_set([card], {"cuda-0": setting})
        assert available(told, profile) == there
    [smaller] = as_set([BIG.card], {"cuda-0": CardSetting(profile="RTX 3070")})
    assert available(smaller, profile_for(smaller)) == profile_for(OLD.card).usable
    assert available(replace(card, used=13 * GIB), profile) == 0


def test_a_vision_model_beside_it_decides_whether_an_llm_fits_on_8_gb() -> None:
    wanted = recipe("Qwen/Qwen2.5-1.5B-Instruct", max_length=512)
    assert chosen(wanted, around(OLD)) == "attic/cuda-0"
    with pytest.raises(DoesNotFit):
        chosen(wanted, around(replace(OLD, card=replace(OLD.card, used=6 * GIB))))


def test_a_card_in_no_list_is_planned_for_with_what_it_says_of_itself() -> None:
    unknown = Card("cuda-0", "NVIDIA Something 9999", 24 * GIB, 0, capability="13.0")
    profile = profile_for(unknown)
    assert (profile.memory_gib, profile.compute) == (24, "13.0")
    [told] = as_set([unknown], {"cuda-0": CardSetting(profile="RTX 4O70")})
    with pytest.raises(WrongInput, match="no card is known as 'RTX 4O70'"):
        profile_for(told)


def test_a_wish_has_only_so_many_rows_as_the_recipe_wants() -> None:
    wanted = recipe()
    fewer = wanted.model_copy(update={"data": wanted.data.model_copy(update={"max_train": 100})})
    wish = wish_of(fewer, ROWS, None)
    assert (wish.rows, wish.longest, wish.eval_rows, wish.model, wish.stack) == (100, 500, 48, MIDDLE, "trl")


def test_a_base_of_unknown_shape_is_refused_until_its_config_is_here() -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 2048,
              "intermediate_size": 128}  # fmt: skip
    with pytest.raises(BaseModelError, match="the shape of nobody/knows is not known here"):
        wish_of(recipe("nobody/knows"), ROWS, None)
    assert wish_of(recipe("nobody/knows"), ROWS, config).geometry.hidden == 64


def test_what_is_around_is_read_from_the_store(store: Store) -> None:
    beat(store, "attic", 1.0, [OLD.card])
    for number in range(2):
        run = submit(store, {"name": f"r{number}", "model": "m"}, "r.yaml", "d")
        note_result(store, run.id, host="attic", card="cuda-0")
    found = look_around(store, Settings(), prices=False, besides=run.id)
    assert "attic/cuda-0" in {each.name for each in found.cards}
    assert (found.busy["attic/cuda-0"], found.prices.asked) == (1, None)


def test_a_judged_candidate_is_plain_json() -> None:
    body = judged(recipe(), around(SUPER))[0].as_dict()
    assert (body["name"], body["host"], body["card"], body["title"]) == (
        "desk/cuda-0", "desk", "cuda-0", "RTX 4070 SUPER",
    )  # fmt: skip
    assert body["seconds"]["low"] < body["seconds"]["high"]
    assert isinstance(Place("x", profile_for(SUPER.card)).start.low, int | float)


def test_on_a_host_without_a_gpu_the_cpu_is_taken_however_long_it_takes() -> None:
    assert chosen(recipe(epochs=100), around(CPU)) == "desk/cpu"
    assert chosen(recipe(SMALL, epochs=0.1), around(CPU, OLD, paused=("attic/cuda-0",))) == "desk/cpu"
