"""How answers are scored. Pure: expected texts and answers in, per-row values and metrics out.

The rules, the same for every subject and on both sides (expected and said):
- text is NFC, runs of white space are one space, none at the ends;
- a label is compared without case, surrounding quotes or backticks, a dash before it, and a full stop at its end;
- a JSON answer must be the whole answer (no code fence, no words around it), of plain JSON (no NaN);
- tokens of free text are what white space separates, without case; punctuation stays;
- an answer that is missing (None: the engine failed) is wrong.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from registry.errors import RecipeError
from registry.resampling import label_table

NO_ANSWER = "\0"  # equals no label: the texts of a dataset are stripped of nothing but cannot be just this
QUOTES = "\"'`“”‘’"


@dataclass(frozen=True)
class Marks:
    """Values by metric, one per row; `pairs` (expected, said) for labels; `detail` by label or by field."""

    values: dict[str, list[float]]
    metrics: dict[str, float]
    pairs: list[list[str]] = field(default_factory=list)
    detail: dict[str, float] = field(default_factory=dict)


def mark(task: str, schema: dict[str, Any] | None, expected: Sequence[str], said: Sequence[str | None]) -> Marks:
    """Score one subject's answers to a task ('label', 'json' with its `schema`, 'text')."""
    if task == "label":
        return mark_labels(expected, said)
    if task == "json":
        return mark_json(schema or {}, expected, said)
    return mark_texts(expected, said)


def mark_labels(expected: Sequence[str], said: Sequence[str | None]) -> Marks:
    """exact_match; macro_f1 over the labels that are expected (any other answer is just wrong)."""
    pairs = [
        [as_label(right), NO_ANSWER if answer is None else as_label(answer)]
        for right, answer in zip(expected, said, strict=True)
    ]
    values = [float(right == answer) for right, answer in pairs]
    table, ones = label_table(pairs), np.ones((1, len(pairs)))
    metrics = {"exact_match": _mean(values), "macro_f1": float(table.macro_f1(ones)[0])}
    detail = dict(zip(table.labels, map(float, table.f1(ones)[0]), strict=True))
    return Marks({"exact_match": values}, metrics, pairs, detail)


def mark_json(schema: dict[str, Any], expected: Sequence[str], said: Sequence[str | None]) -> Marks:
    """json_valid against the schema; field_accuracy: the share of equal fields, then the mean over rows.

    Fields are the schema's properties, or those that are expected where it names none. A field that is not
    expected must be absent.
    """
    validator = schema_validator(schema)
    valid = [float(_is_valid(validator, answer)) for answer in said]
    rows = [
        _equal_fields(schema, parse_json(right), parse_json(answer))
        for right, answer in zip(expected, said, strict=True)
    ]
    accuracy = [_mean(list(row.values())) for row in rows]
    names = sorted({name for row in rows for name in row})
    detail = {name: _mean([row[name] for row in rows if name in row]) for name in names}
    metrics = {"field_accuracy": _mean(accuracy), "json_valid": _mean(valid)}
    return Marks({"field_accuracy": accuracy, "json_valid": valid}, metrics, detail=detail)


def mark_texts(expected: Sequence[str], said: Sequence[str | None]) -> Marks:
    """token_f1: of the tokens that both have, counted as often as both have them."""
    values = [token_f1(right, answer) for right, answer in zip(expected, said, strict=True)]
    return Marks({"token_f1": values}, {"token_f1": _mean(values)})


def token_f1(expected: str, said: str | None) -> float:
    """F1 of two bags of white-space tokens; two empty texts are equal."""
    if said is None:
        return 0.0
    ours, theirs = Counter(as_text(said).casefold().split()), Counter(as_text(expected).casefold().split())
    if not ours or not theirs:
        return float(ours == theirs)
    both = (ours & theirs).total()
    return 2 * both / (ours.total() + theirs.total())


def as_text(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def as_label(text: str) -> str:
    plain = as_text(text)
    bare = plain.removeprefix("- ").removeprefix("* ").strip(QUOTES).removesuffix(".").strip(QUOTES).strip()
    return unicodedata.normalize("NFC", (bare or plain).casefold())


def parse_json(text: str | None) -> Any:
    """The value, or None for what is no JSON (`null` as a whole answer is none either)."""
    try:
        return None if text is None else json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def schema_validator(schema: dict[str, Any]) -> Any:
    """A validator that fetches nothing. Raises RecipeError for what is no JSON schema."""
    import referencing
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise RecipeError(f"not a JSON schema: {error.message}", place="evaluate.json_schema") from error
    # Without a registry of its own jsonschema would fetch a remote $ref over the network.
    return kind(schema, registry=referencing.Registry())


def _is_valid(validator: Any, answer: str | None) -> bool:
    import referencing.exceptions

    value = parse_json(answer)
    try:
        return value is not None and bool(validator.is_valid(value))
    except (referencing.exceptions.Unresolvable, RecursionError):
        return False


def _equal_fields(schema: dict[str, Any], expected: Any, said: Any) -> dict[str, float]:
    """Field name -> 1.0 where equal; the empty name for an expected answer that is no object."""
    if not isinstance(expected, dict):
        return {"": float(said is not None and _plain(expected) == _plain(said))}
    names = list(schema.get("properties") or expected)
    if not isinstance(said, dict):
        return dict.fromkeys(names, 0.0)
    missing = object()
    return {name: float(_plain(expected.get(name, missing)) == _plain(said.get(name, missing))) for name in names}


def _plain(value: Any) -> Any:
    """A form in which equal means equal: texts as `as_text`, 1 == 1.0, but True is not 1."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, bool):
        return ("bool", value)
    return as_text(value) if isinstance(value, str) else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
