"""A training's time: published rates, and which card, stack and batch is faster."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.card_profiles import PROFILES, CardProfile, profile_of
from registry.geometry import KNOWN
from registry.train_memory import Training
from registry.train_time import SPREAD_HIGH, SPREAD_LOW, operations, padded_length, step_time, tokens_per_second
from tests.bench.bench_planner import load_points

LLAMA, USUAL = KNOWN["llama-3.1-8b"], Training(batch=4, longest=1024)


def card(name: str) -> CardProfile:
    found = profile_of(name)
    assert found
    return found


def test_published_rates_are_met_within_the_interval() -> None:
    ratios = [
        tokens_per_second(point.geometry, point.training, point.profile, point.training.longest) / point.rate
        for point in load_points()
        if point.rate and point.profile
    ]
    assert len(ratios) >= 30
    assert sum(abs(ratio - 1) for ratio in ratios) / len(ratios) < 0.2
    within = [ratio for ratio in ratios if SPREAD_LOW <= 1 / ratio <= SPREAD_HIGH]
    assert len(within) >= 0.9 * len(ratios)


def test_a_token_costs_six_operations_for_each_parameter_and_four_without_recomputation() -> None:
    short = 1.0  # so that attention costs nothing
    assert operations(LLAMA, USUAL, short) == pytest.approx(6 * LLAMA.active, rel=0.04)
    assert operations(LLAMA, replace(USUAL, checkpointing=False), short) == pytest.approx(4 * LLAMA.active, rel=0.05)


def test_cards_come_in_the_order_that_people_know() -> None:
    order = ["T4", "RTX 3070", "RTX 4070 SUPER", "RTX 4090", "A100 SXM 80GB", "H100 SXM 80GB"]
    rates = [tokens_per_second(LLAMA, USUAL, card(name), 1024) for name in order]
    assert rates == sorted(rates)
    assert 8 < rates[-1] / rates[2] < 20


def test_small_batches_of_4_bit_weights_are_held_up_by_unpacking_or_by_starting_kernels() -> None:
    tiny = replace(USUAL, batch=1, longest=32)
    assert step_time(LLAMA, tiny, card("H100 SXM 80GB"), 32).limit == "starting kernels (the batch is small)"
    assert step_time(LLAMA, tiny, card("RTX 3060"), 32).limit == "unpacking 4-bit weights"
    assert step_time(LLAMA, USUAL, card("RTX 3060"), 1024).limit == "arithmetic"


def test_a_card_without_bf16_is_slow_out_of_proportion() -> None:
    assert tokens_per_second(LLAMA, USUAL, card("T4"), 1024) < 0.2 * tokens_per_second(LLAMA, USUAL, card("L4"), 1024)


def test_every_card_has_a_rate() -> None:
    for profile in PROFILES:
        assert tokens_per_second(LLAMA, USUAL, profile, 1024) > 0


def test_one_row_is_padded_to_itself_and_many_to_the_longest() -> None:
    lengths = [(100, 90), (1000, 10)]
    assert padded_length(lengths, 1) == pytest.approx(190)
    assert padded_length(lengths, 200) == pytest.approx(1000)
    assert padded_length([], 4) == 0


@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 50)), min_size=1, max_size=8, unique_by=lambda x: x[0]),
       st.integers(1, 16))  # fmt: skip
def test_padding_is_what_drawing_batches_shows(lengths: list[tuple[int, int]], batch: int) -> None:
    lengths = sorted(lengths)
    rows, seeded = [length for length, count in lengths for _ in range(count)], random.Random(3)
    drawn = [max(seeded.choices(rows, k=batch)) for _ in range(600)]
    expected = padded_length(lengths, batch)
    assert expected == pytest.approx(sum(drawn) / len(drawn), rel=0.25, abs=lengths[-1][0] * 0.12)
    assert lengths[0][0] <= expected <= lengths[-1][0]
