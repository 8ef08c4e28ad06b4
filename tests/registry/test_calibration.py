"""Measurements of finished runs: noted once each, found by what they were made on, and used by the next plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.calibration import measured, note_measured, of_result
from registry.card_profiles import GIB, PROFILES
from registry.geometry import known_geometry
from registry.plan import Measured, Place, Wish, plan_training
from registry.recipe import Train
from registry.store import Store

MODEL, CARD = "Qwen/Qwen2.5-7B-Instruct", "NVIDIA GeForce RTX 4070 SUPER"
SHAPE = known_geometry(MODEL)
assert SHAPE is not None
WISH = Wish(SHAPE, Train(batch=2, max_length=512), lengths=((100, 600), (200, 300), (400, 100)), model=MODEL)
RESULT = {
    "status": "ok",
    "batch": 2,
    "tokens": 160_000,
    "train_seconds": 300.0,
    "seconds": 420.0,
    "peak_memory": 8 * GIB,
}
FOUND = of_result(WISH, CARD, 12 * GIB, RESULT)
assert FOUND is not None
DESK: Measured = FOUND


def test_a_result_says_how_long_a_batch_took_and_what_memory_was_reserved() -> None:
    assert (DESK.card, DESK.model, DESK.stack, DESK.peak, DESK.memory) == (CARD, MODEL, "trl", 8 * GIB, 12 * GIB)
    assert (DESK.training.batch, DESK.training.longest) == (2, 400)
    assert DESK.step_seconds == pytest.approx(300 / 500)  # a thousand rows of 160 tokens, two by two
    assert 160 < DESK.usual_length < 400


def test_of_a_run_that_was_resumed_only_the_last_part_is_counted() -> None:
    half = of_result(WISH, CARD, 12 * GIB, {**RESULT, "tokens": 80_000, "train_seconds": 150.0})
    assert half is not None
    assert half.step_seconds == pytest.approx(DESK.step_seconds)


@pytest.mark.parametrize("result", [{}, {"batch": 2}, {"tokens": 1, "train_seconds": 2.0}])
def test_a_result_without_numbers_is_no_measurement(result: dict[str, float]) -> None:
    assert of_result(WISH, CARD, 12 * GIB, result) is None


def test_a_result_without_time_still_tells_of_memory() -> None:
    found = of_result(WISH, CARD, 12 * GIB, {"batch": 2, "peak_memory": 5, "tokens": 0, "train_seconds": 0.0})
    assert found is not None
    assert (found.peak, found.step_seconds) == (5, None)


def test_a_run_that_is_noted_twice_counts_once(either_store: Store) -> None:
    note_measured(either_store, "tickets-1", replace(DESK, peak=1))
    note_measured(either_store, "tickets-1", DESK)
    assert measured(either_store) == [DESK]


def test_measurements_are_found_by_card_model_and_stack_the_newest_first(either_store: Store) -> None:
    targets = replace(DESK.training, targets=("q_proj", "v_proj"))
    later, other = replace(DESK, training=targets), replace(DESK, card="cpu", model="tiny", stack="unsloth")
    for number, each in enumerate((DESK, later, other)):
        note_measured(either_store, f"run-{number}", each)
    assert measured(either_store) == [other, later, DESK]
    assert measured(either_store, card=CARD) == [later, DESK]
    assert measured(either_store, card=CARD, model=MODEL, stack="trl") == [later, DESK]
    assert measured(either_store, stack="unsloth") == [other]
    assert measured(either_store, card=CARD, stack="unsloth") == []


def test_rows_that_another_ft_wrote_do_not_stop_a_plan(store: Store) -> None:
    note_measured(store, "tickets-1", DESK)
    with store.writing() as connection:
        connection.execute("UPDATE measured SET body = replace(body, 'step_seconds', 'seconds_per_step')")
    assert measured(store) == []


def test_the_next_plan_goes_by_what_was_measured(store: Store) -> None:
    place = Place("desk/cuda-0", next(each for each in PROFILES if each.name == "RTX 4070 SUPER"))
    before = plan_training(WISH, place)
    slow = replace(DESK, step_seconds=DESK.step_seconds and DESK.step_seconds * 1.5)
    note_measured(store, "tickets-1", slow)
    after = plan_training(WISH, place, measured(store))
    assert after.seconds != before.seconds
    assert after.seconds.high - after.seconds.low < before.seconds.high - before.seconds.low
