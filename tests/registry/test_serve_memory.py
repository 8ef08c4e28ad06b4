"""Serving's memory and its plan: what fits on which card, in which precision, beside what."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.card_profiles import GIB, PROFILES, profile_of
from registry.geometry import KNOWN
from registry.plan import Place, Served, ServeWish, plan_serving, plan_servings
from registry.serve_memory import Serving, context_bytes, kv_bytes, serve_memory, weight_bytes

LLAMA, SMALL = KNOWN["llama-3.1-8b"], KNOWN["qwen2.5-3b"]
VISION = replace(KNOWN["qwen2.5-1.5b"], vision=675_000_000)


def on(name: str, available: int | None = None) -> Place:
    profile = profile_of(name)
    assert profile
    return Place(name, profile, available)


def held(served: Served, place: Place) -> float:
    return served.utilization * place.whole


def test_weights_are_of_the_size_that_vllm_logs() -> None:
    assert weight_bytes(LLAMA, "bf16") / GIB == pytest.approx(14.96, abs=0.05)
    assert weight_bytes(LLAMA, "bitsandbytes") / GIB == pytest.approx(5.6, abs=0.15)


def test_the_kv_cache_of_a_request_is_its_tokens_in_whole_blocks() -> None:
    assert kv_bytes(LLAMA) == 131_072
    assert context_bytes(LLAMA, 2048) == 2048 * 131_072
    assert context_bytes(LLAMA, 2049) == 2064 * 131_072
    assert context_bytes(replace(LLAMA, window=512), 4096) == 512 * 131_072


def test_each_adapter_has_a_slot_of_the_largest_rank() -> None:
    parts = serve_memory(LLAMA, Serving("bf16", 2048, 8, max_loras=3, rank=64)).parts
    assert parts["adapters"] == 3 * 2 * LLAMA.adapter(64)
    assert serve_memory(LLAMA, Serving("bf16", 2048, 8)).parts["adapters"] == 0


def test_an_8b_fits_on_12_gb_only_in_4_bits() -> None:
    place = on("RTX 4070 SUPER")
    served = plan_serving(ServeWish(LLAMA), place)
    assert served.fits
    assert served.serving.precision == "bitsandbytes"
    assert "4 bits" in served.given_up[0]
    only_16 = plan_serving(ServeWish(LLAMA, precisions=("bf16",)), place)
    assert not only_16.fits
    assert only_16.limit.startswith("memory: 1")


def test_an_8b_is_served_whole_in_16_bits_on_32_gb_and_nothing_is_given_up() -> None:
    served = plan_serving(ServeWish(LLAMA, max_context=4096), on("RTX 5090"))
    assert (served.serving.precision, served.serving.concurrency, served.given_up) == ("bf16", 16, [])
    assert served.kv_tokens >= 16 * 4096


def test_a_vision_model_fits_beside_an_llm_on_8_gb() -> None:
    place = on("RTX 3070")
    both = [ServeWish(SMALL, concurrency=8, name="llm"), ServeWish(VISION, concurrency=2, max_loras=0, name="vision")]
    served = plan_servings(both, place)
    assert [each.fits for each in served] == [True, True]
    assert sum(held(each, place) for each in served) <= place.bytes
    assert served[1].serving.max_loras == 0


def test_what_does_not_fit_beside_the_other_is_said_and_the_first_keeps_its_place() -> None:
    first, second = plan_servings([ServeWish(SMALL), ServeWish(LLAMA)], on("RTX 3070"))
    assert (first.fits, second.fits) == (True, False)
    assert second.limit.startswith("memory")


def test_what_others_hold_is_not_given_away() -> None:
    free = on("RTX 4070 SUPER")
    beside = on("RTX 4070 SUPER", free.bytes - 5 * GIB)
    served = plan_serving(ServeWish(SMALL), beside)
    assert served.fits
    assert held(served, beside) <= beside.bytes
    assert served.serving.precision == "bitsandbytes"
    assert plan_serving(ServeWish(SMALL), free).serving.precision == "bf16"


def test_vllm_is_told_the_part_of_the_card_by_the_drivers_total() -> None:
    place = replace(on("RTX 4070 SUPER"), total=12_282 * 1024**2)
    options = plan_serving(ServeWish(LLAMA), place).vllm_options()
    assert options["quantization"] == "bitsandbytes"
    assert 0 < options["gpu-memory-utilization"] * 12_282 * 1024**2 <= place.bytes
    assert "quantization" not in plan_serving(ServeWish(SMALL), on("RTX 5090")).vllm_options()


@given(
    card=st.sampled_from([each.name for each in PROFILES if not each.is_cpu]), model=st.sampled_from(sorted(KNOWN)),
    context=st.integers(64, 32768), concurrency=st.integers(1, 128), loras=st.integers(0, 8),
    part=st.floats(0.05, 1.0),
)  # fmt: skip
def test_no_plan_takes_more_than_is_free_and_every_plan_says_what_is_missing(
    card: str, model: str, context: int, concurrency: int, loras: int, part: float
) -> None:
    place = on(card)
    place = replace(place, available=int(place.bytes * part))
    wish = ServeWish(KNOWN[model], context, concurrency, loras)
    served = plan_serving(wish, place)
    assert held(served, place) <= place.bytes
    assert served.as_dict()["utilization"] == served.utilization
    if served.fits:
        assert served.memory.high <= place.bytes
        assert served.kv_tokens >= served.serving.max_context
        whole = served.serving == Serving("bf16", min(context, wish.geometry.max_positions), concurrency, loras)
        assert bool(served.given_up) != whole or context > wish.geometry.max_positions
    else:
        assert served.limit.startswith("memory")
