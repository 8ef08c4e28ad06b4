"""Measurements of finished runs: noted once each, and found by what they were made on."""

from __future__ import annotations

from dataclasses import replace

from registry.calibration import Measured, measured, note_measured
from registry.store import Store

DESK = Measured(
    run_id="tickets-1", card="NVIDIA GeForce RTX 4070 SUPER", model="Qwen/Qwen2.5-7B-Instruct", stack="trl",
    peak_memory=9 << 30, tokens=600_000, seconds=300.0, batch=2, longest=900, max_length=1024, rank=16, quantize="nf4",
    created=100.0,
)  # fmt: skip


def test_a_run_that_is_noted_twice_counts_once(either_store: Store) -> None:
    note_measured(either_store, replace(DESK, seconds=1.0))
    note_measured(either_store, DESK)
    assert measured(either_store) == [DESK]
    assert DESK.tokens_per_second == 2000
    assert replace(DESK, seconds=0).tokens_per_second == 0


def test_measurements_are_found_by_card_model_and_stack_the_newest_first(either_store: Store) -> None:
    later = replace(DESK, run_id="tickets-2", created=200.0)
    other = replace(DESK, run_id="letters-1", card="CPU, 2 cores", model="tiny", stack="unsloth", created=300.0)
    for each in (later, DESK, other):
        note_measured(either_store, each)
    assert measured(either_store) == [other, later, DESK]
    assert measured(either_store, card=DESK.card) == [later, DESK]
    assert measured(either_store, card=DESK.card, model=DESK.model, stack="trl") == [later, DESK]
    assert measured(either_store, stack="unsloth") == [other]
    assert measured(either_store, card=DESK.card, stack="unsloth") == []


def test_when_it_was_measured_is_noted_where_nobody_says(store: Store) -> None:
    note_measured(store, replace(DESK, created=0.0))
    assert measured(store)[0].created > 1_700_000_000


def test_rows_of_another_ft_are_read_as_far_as_they_go(store: Store) -> None:
    note_measured(store, DESK)
    with store.writing() as connection:
        connection.execute('UPDATE measured SET body = replace(body, \'"batch"\', \'"new": 1, "batch"\')')
    assert measured(store) == [DESK]
    with store.writing() as connection:
        connection.execute("UPDATE measured SET body = replace(body, 'peak_memory', 'memory')")
    assert measured(store) == []
