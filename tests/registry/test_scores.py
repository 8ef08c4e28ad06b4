"""Kept scores, and the rows that are picked."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from registry.chat_data import Row
from registry.sampling import pick_rows
from registry.scores import Scored, answers_of, find_score, keep_score, score_key
from registry.store import Store

SCORED = Scored(
    "m@1", 1, "rows", {"exact_match": 0.5}, {"exact_match": [1.0, 0.0]}, [["가", "가"], ["나", "\0"]], [1],
    {"가": 1.0}, {"누구?": "나는 모델"},
)  # fmt: skip


def row(question: str, answer: str) -> Row:
    return Row([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def test_a_score_comes_back_as_it_was(store: Store) -> None:
    key = score_key({"subject": "x", "rows": "y"})
    assert find_score(store, key) is None
    answers: list[dict[str, Any]] = [{"text": "가", "error": "", "attempts": 1}]
    answers.append({"text": None, "error": "500", "attempts": 3})
    keep_score(store, key, SCORED, answers)
    assert find_score(store, key) == SCORED
    assert answers_of(store, key) == answers
    keep_score(store, key, replace(SCORED, version=2), [])
    assert find_score(store, key) == replace(SCORED, version=2)


def test_a_key_is_of_the_facts_not_of_their_order() -> None:
    assert score_key({"a": 1, "b": 2}) == score_key({"b": 2, "a": 1}) != score_key({"a": 1, "b": 3})


ROWS = st.lists(st.tuples(st.text("xyz", max_size=3), st.sampled_from("abcd")), max_size=40).map(
    lambda found: [row(f"{at} {question}", answer) for at, (question, answer) in enumerate(found)]
)


@given(ROWS, st.integers(1, 50), st.integers(0, 3))
def test_picked_rows_are_some_of_the_rows_spread_over_the_answers(rows: list[Row], most: int, seed: int) -> None:
    picked = pick_rows(rows, most, seed)
    assert len(picked) == min(most, len(rows))
    places = [rows.index(each) for each in picked]
    assert places == sorted(places)
    there, chosen = Counter(each.answer for each in rows), Counter(each.answer for each in picked)
    for answer in there:
        fewest = min(chosen[other] for other in there if chosen[other] < there[other]) if len(picked) < len(rows) else 0
        assert chosen[answer] <= fewest + 1 or len(picked) == len(rows)


@given(ROWS, st.integers(1, 50), st.integers(0, 3))
def test_the_draw_does_not_hang_on_the_order_of_the_file(rows: list[Row], most: int, seed: int) -> None:
    mixed = random.Random(seed).sample(rows, len(rows))
    first, second = pick_rows(rows, most, seed), pick_rows(mixed, most, seed)
    assert sorted(each.as_json() for each in first) == sorted(each.as_json() for each in second)


def test_without_a_bound_all_rows_come_and_the_seed_matters_with_one() -> None:
    rows = [row(str(at), "abcdefgh"[at % 8]) for at in range(400)]
    assert pick_rows(rows, None, 1) == rows
    assert pick_rows(rows, 400, 1) == rows
    assert Counter(each.answer for each in pick_rows(rows, 80, 1)) == Counter(dict.fromkeys("abcdefgh", 10))
    assert pick_rows(rows, 80, 1) == pick_rows(rows, 80, 1) != pick_rows(rows, 80, 2)


def test_rows_that_are_added_change_little_of_what_was_picked() -> None:
    rows = [row(str(at), "ab"[at % 2]) for at in range(200)]
    more = [*rows, *(row(f"new {at}", "ab"[at % 2]) for at in range(20))]
    before, after = pick_rows(rows, 60, 5), pick_rows(more, 60, 5)
    assert len([each for each in before if each in after]) >= 45
