"""Scores of single answers, by the rules that metrics.py states."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.evaluation.metrics import as_label, mark, mark_json, mark_labels, mark_texts, schema_validator, token_f1
from registry.errors import RecipeError

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "seats": {"type": "integer"}, "vip": {"type": "boolean"}},
    "required": ["city", "seats"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("card_arrival", 1),
        ("  Card_Arrival\n", 1),
        ('"card_arrival"', 1),
        ("`card_arrival`.", 1),
        ("card_arrival.", 1),
        ("- card_arrival", 1),
        ("-card_arrival", 0),
        ("- card_arrival\n- other", 0),
        ("card arrival", 0),
        ("The label is card_arrival", 0),
        ("card_arrival card_arrival", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_labels(said: str | None, right: float) -> None:
    assert mark_labels(["card_arrival"], [said]).values["exact_match"] == [right]


def test_korean_labels_composed_or_not() -> None:
    label = "카드 도착"
    marks = mark_labels([label, label], [unicodedata.normalize("NFD", label), "카드  도착."])
    assert marks.metrics == {"exact_match": 1.0, "macro_f1": 1.0}


def test_macro_f1_counts_each_label_alike_and_invented_labels_as_wrong() -> None:
    marks = mark_labels(["a", "a", "a", "b"], ["a", "a", "invented", None])
    assert marks.metrics["exact_match"] == 0.5
    assert marks.metrics["macro_f1"] == pytest.approx((0.8 + 0.0) / 2)
    assert marks.detail == {"a": pytest.approx(0.8), "b": 0.0}
    assert all(isinstance(value, float) for value in marks.detail.values())


@pytest.mark.parametrize("label", [".", '"', "''", "a.", "…"])
def test_a_label_of_punctuation_is_still_one(label: str) -> None:
    assert mark_labels([label, "other"], [label, label]).values["exact_match"] == [1.0, 0.0]


JSON_CASES = [
    ('{"city": "Seoul", "seats": 2}', 1.0, 1.0),
    ('\n {"seats": 2.0, "city": " Seoul "}', 1.0, 1.0),
    ('{"city": "Seoul", "seats": 3}', 2 / 3, 1.0),
    ('{"city": "Seoul", "seats": 2, "vip": false}', 2 / 3, 1.0),
    ('{"city": "Seoul", "seats": true}', 2 / 3, 0.0),
    ('{"city": "Seoul"}', 2 / 3, 0.0),
    ('{"city": "Seoul", "seats": 2, "more": 1}', 1.0, 0.0),
    ('```json\n{"city": "Seoul", "seats": 2}\n```', 0.0, 0.0),
    ('{"city": "Seoul", "seats": NaN}', 0.0, 0.0),
    ('{"city": "Seoul", "seats": 2', 0.0, 0.0),
    ("[1]", 0.0, 0.0),
    ("null", 0.0, 0.0),
    ("[" * 100_000, 0.0, 0.0),
    ("9" * 5000, 0.0, 0.0),
    ("", 0.0, 0.0),
    (None, 0.0, 0.0),
]


@pytest.mark.parametrize(("said", "accuracy", "valid"), JSON_CASES)
def test_json_answers(said: str | None, accuracy: float, valid: float) -> None:
    marks = mark_json(SCHEMA, ['{"city": "Seoul", "seats": 2}'], [said])
    assert marks.values == {"field_accuracy": [pytest.approx(accuracy)], "json_valid": [valid]}


def test_accuracy_of_each_field_and_their_mean() -> None:
    right = '{"city": "서울", "seats": 2, "vip": true}'
    marks = mark_json(
        SCHEMA, [right] * 2, ['{"city": "서울", "seats": 1, "vip": true}', '{"city": "부산", "seats": 2}']
    )
    assert marks.detail == {"city": 0.5, "seats": 0.5, "vip": 0.5}
    assert marks.metrics == {"field_accuracy": pytest.approx(0.5), "json_valid": 1.0}


def test_nested_values_and_true_is_not_one() -> None:
    schema = {"type": "object"}
    right = '{"a": {"b": [1, "x  y"]}, "c": 1}'
    said = ['{"c": 1.0, "a": {"b": [1.0, "x y"]}}', '{"c": true, "a": {"b": ["x y", 1]}}']
    assert mark_json(schema, [right] * 2, said).values["field_accuracy"] == [1.0, 0.0]


def test_a_schema_that_is_none_is_refused_and_none_is_fetched() -> None:
    with pytest.raises(RecipeError, match="not a JSON schema"):
        schema_validator({"type": "strnig"})
    away = {"$ref": "http://127.0.0.1:9/schema.json"}
    assert mark_json(away, ["{}"], ["{}"]).values["json_valid"] == [0.0]


@pytest.mark.parametrize(
    ("expected", "said", "f1"),
    [
        ("the cat sat", "The  cat\nsat", 1.0),
        ("the cat sat", "the dog sat", 2 / 3),
        ("the cat", "the the the cat", 2 * 2 / 6),
        ("오늘 날씨가 좋다", unicodedata.normalize("NFD", "오늘 날씨가 나쁘다"), 2 / 3),
        ("", "", 1.0),
        ("a", "", 0.0),
        ("", "a", 0.0),
        ("a", None, 0.0),
        ("", None, 0.0),
    ],
)
def test_token_f1(expected: str, said: str | None, f1: float) -> None:
    assert token_f1(expected, said) == pytest.approx(f1)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8))
def test_the_expected_answer_itself_is_always_right(texts: list[str]) -> None:
    assert mark_labels(texts, texts).metrics["exact_match"] == 1.0
    assert mark_texts(texts, texts).metrics["token_f1"] == 1.0
    assert all(as_label(as_label(text)) == as_label(as_label(as_label(text))) for text in texts)


@given(st.text(max_size=30), st.text(max_size=30))
def test_token_f1_is_symmetric_and_between_0_and_1(one: str, other: str) -> None:
    assert 0 <= token_f1(one, other) == token_f1(other, one) <= 1


@given(st.sampled_from(["label", "json", "text"]), st.text(max_size=40))
def test_no_answer_breaks_a_metric(task: str, said: str) -> None:
    marks = mark(task, SCHEMA if task == "json" else None, ['{"city": "a", "seats": 1}', "b"], [said, None])
    assert all(0 <= value <= 1 for values in marks.values.values() for value in values)
    assert all(values[1] == 0 for values in marks.values.values())
