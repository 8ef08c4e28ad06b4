"""Packs are counted as best fit decreasing makes them, whichever rows there are, and a plan rests on them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.calibration import of_result
from registry.card_profiles import GIB, profile_of
from registry.geometry import KNOWN
from registry.packing import packs, padding
from registry.plan import Place, Wish, plan_training
from registry.recipe import Train
from registry.train_memory import Training, train_memory
from registry.train_time import operations

SHORT = ((40, 300), (80, 200), (160, 60), (700, 4))


def on(name: str) -> Place:
    profile = profile_of(name)
    assert profile
    return Place(name, profile)


def wish(lengths: tuple[tuple[int, int], ...] = SHORT, model: str = "qwen2.5-3b", **train: Any) -> Wish:
    return Wish(KNOWN[model], Train.model_validate(train), lengths, model)


def row_by_row(lengths: tuple[tuple[int, int], ...], most: int) -> Counter[int]:
    """Best fit decreasing, one row after the other: how full each pack is."""
    room: list[int] = []
    for length in sorted((length for length, count in lengths for _ in range(count)), reverse=True):
        fitting = [space for space in room if space >= length]
        if fitting:
            room.remove(min(fitting))
        room.append((min(fitting) if fitting else most) - length)
    return Counter(most - space for space in room)


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ((), 100, ()),
        (((100, 3),), 100, ((100, 3),)),
        (((30, 7),), 100, ((30, 1), (90, 2))),
        (((40, 2), (60, 2)), 100, ((100, 2),)),
        (((20, 1), (50, 1), (80, 1)), 100, ((50, 1), (100, 1))),
        (((50, 1), (101, 5)), 100, ((50, 1),)),
        (((10, 25),), 100, ((50, 1), (100, 2))),
    ],
)
def test_packs_of_some_lengths(
    lengths: tuple[tuple[int, int], ...], most: int, expected: tuple[tuple[int, int], ...]
) -> None:
    assert packs(lengths, most) == expected


@given(most=st.integers(16, 300), lengths=st.dictionaries(st.integers(1, 300), st.integers(1, 40), max_size=9))
def test_packs_are_those_of_going_row_by_row(most: int, lengths: dict[int, int]) -> None:
    within = tuple(sorted((length, count) for length, count in lengths.items() if length <= most))
    found = packs(within, most)
    assert dict(found) == row_by_row(within, most)
    assert sum(length * count for length, count in found) == sum(length * count for length, count in within)


def test_a_million_rows_are_counted_at_once() -> None:
    found = packs(tuple((length, 1000) for length in range(24, 1024)), 1024)
    assert sum(length * count for length, count in found) == sum(range(24, 1024)) * 1000
    assert 511_000 < sum(count for _, count in found) < 530_000


@pytest.mark.parametrize(
    ("lengths", "batch", "expected"), [(((50, 9),), 8, 0.0), (((10, 1), (90, 1)), 1, 0.0), ((), 4, 0.0)]
)
def test_rows_of_one_length_or_alone_are_not_padded(
    lengths: tuple[tuple[int, int], ...], batch: int, expected: float
) -> None:
    assert padding(lengths, batch) == pytest.approx(expected)


def test_with_packs_steps_are_counted_in_packs_and_no_token_is_lost() -> None:
    plain, packed = (
        plan_training(wish(batch=2, accumulate=2, epochs=3, packing=packing), on("H100")) for packing in (False, True)
    )
    number = sum(count for _, count in packs(SHORT, 1024))
    assert packed.steps == 3 * math.ceil(math.ceil(number / 2) / 2)
    assert plain.steps == 3 * 141
    assert packed.tokens == plain.tokens == 3 * sum(length * count for length, count in SHORT)
    assert packed.seconds.mid < plain.seconds.mid


def test_memory_is_of_full_packs_with_their_mask() -> None:
    given = wish(batch=4, packing=True)
    verdict = plan_training(given, on("H100"))
    assert given.longest == 1024 > given.longest_row == 700
    assert verdict.memory.parts["mask"] == (4 * 1024) ** 2
    assert wish(lengths=((40, 3),), packing=True).longest == 120
    rows = plan_training(wish(batch=4), on("H100"))
    assert verdict.memory.total > rows.memory.total
    assert "mask" not in rows.memory.parts


def test_attention_goes_over_the_whole_batch_and_not_over_half_of_a_row() -> None:
    plain, packed = Training(4, 512), Training(4, 512, packed=True)
    geometry = KNOWN["qwen2.5-3b"]
    others = operations(geometry, plain, 0)
    assert (operations(geometry, packed, 512) - others) / (operations(geometry, plain, 512) - others) == pytest.approx(
        8
    )


def test_what_is_mostly_padding_is_told_what_packing_saves() -> None:
    given = wish(batch=8)
    now = plan_training(given, on("RTX 4090"))
    assert now.fits
    (knob,) = now.knobs
    assert knob.change["packing"] is True
    assert knob.text.endswith(f"{padding(SHORT, 8):.0%} of the tokens are padding now")
    train = Train.model_validate({**given.train.model_dump(), **knob.change})
    then = plan_training(replace(given, train=train), on("RTX 4090"))
    assert then.fits
    assert then.knobs == []
    assert f"saves about {1 - then.seconds.mid / now.seconds.mid:.0%} of the time" in knob.text
    assert now.memory.total - then.memory.total == knob.saves_bytes


@pytest.mark.parametrize("lengths", [((1024, 500),), ((500, 90), (510, 90))])
def test_rows_that_are_alike_are_not_worth_packing(lengths: tuple[tuple[int, int], ...]) -> None:
    assert plan_training(wish(lengths=lengths, batch=2), on("H100")).knobs == []


def test_where_packs_are_too_large_doing_without_is_a_knob() -> None:
    given = wish(lengths=((40, 3000), (80, 200)), batch=8, max_length=2048, packing=True)
    place = on("RTX 3070")
    verdict = plan_training(given, place)
    assert not verdict.fits
    knob = next(each for each in verdict.knobs if each.change == {"packing": False})
    assert knob.then_fits
    off = plan_training(replace(given, train=given.train.model_copy(update={"packing": False})), place)
    assert off.fits
    assert knob.saves_bytes == verdict.memory.total - off.memory.total > GIB
    assert f"packing false: padding instead, and more steps (saves {knob.saves_bytes / GIB:.1f} GiB" in knob.text
    assert any(each.text.startswith("max_length ") and "no row is longer" in each.text for each in verdict.knobs)


def test_a_finished_run_with_packs_is_measured_in_packs() -> None:
    given = wish(batch=2, packing=True)
    profile = profile_of("RTX 4090")
    assert profile
    tokens = given.tokens
    row = of_result(given, "RTX 4090", profile.usable, {"batch": 2, "tokens": tokens, "train_seconds": 60.0,
                                                        "peak_memory": 5 * GIB})  # fmt: skip
    assert row is not None
    assert row.step_seconds == pytest.approx(60.0 / (given.count / 2))
    assert row.usual_length == pytest.approx(tokens / given.count)
    assert row.training == Training(2, 1024, packed=True)
    assert row.training.packed
    assert train_memory(given.geometry, row.training, profile).total > 0
