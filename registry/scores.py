"""Scores: what one subject (a version, or the bare base) got on one set of rows, and the cache of them.

A score is keyed by everything that it rests on, so a repeat after a crash asks nothing again, and the base
model is asked once for each dataset and task, not once for each run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from registry.errors import RecipeError
from registry.recipe import METRICS
from registry.store import Store, dump


@dataclass(frozen=True)
class Scored:
    """What one subject got. Lists have one entry per row, in the rows' order.

    `subject` is `model@N` or 'base', `version` its number (None for the base); `rows` is a digest of the
    rows; `values` has 0 to 1 per row by metric, `pairs` (expected, said) for labels; `failed` are the places
    of rows without an answer, which count as wrong; `detail` is a metric by label or field; `probes` question
    -> answer. `missing` says why there is no score at all (the version stands on another base).
    """

    subject: str
    version: int | None
    rows: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    pairs: list[list[str]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    detail: dict[str, float] = field(default_factory=dict)
    probes: dict[str, str] = field(default_factory=dict)
    missing: str = ""

    @property
    def count(self) -> int:
        """How many rows were asked."""
        return max((len(each) for each in self.values.values()), default=0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Scored:
        return cls(**stored)

    def with_failures_forgiven(self) -> Scored:
        """The same, with the rows that got no answer counted as right.

        An engine's trouble with the model that a candidate is compared with must not help the candidate.
        """
        values = {name: _with_ones(each, self.failed) for name, each in self.values.items()}
        pairs = [[pair[0], pair[0]] if at in self.failed else pair for at, pair in enumerate(self.pairs)]
        return replace(self, values=values, pairs=pairs)


def metric_for(task: str, wanted: str | None) -> str:
    """The metric that a gate looks at. Raises RecipeError for one that the task does not have."""
    there = METRICS[task]
    if wanted is not None and wanted not in there:
        raise RecipeError(
            f"metric {wanted} does not belong to task {task}",
            place="gate.metric",
            fix=f"there is: {', '.join(there)}",
        )
    return wanted or there[0]


def score_key(facts: Mapping[str, Any]) -> str:
    """sha256 (hex) of all that a score rests on (plain JSON)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def find_score(store: Store, key: str) -> Scored | None:
    row = store.first("SELECT body FROM scores WHERE key = ?", (key,))
    return Scored.from_dict(json.loads(row["body"])["scored"]) if row else None


def keep_score(store: Store, key: str, scored: Scored, answers: list[dict[str, Any]]) -> None:
    """Keep a score and the answers (text, error, seconds per row) that it was made from."""
    body = dump({"scored": scored.as_dict(), "answers": answers})
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO scores (key, body, created) VALUES (?,?,?) "
            "ON CONFLICT (key) DO UPDATE SET body = excluded.body, created = excluded.created",
            (key, body, time.time()),
        )


def answers_of(store: Store, key: str) -> list[dict[str, Any]]:
    """The answers behind a kept score, in the rows' order; empty if it is not kept."""
    row = store.first("SELECT body FROM scores WHERE key = ?", (key,))
    return list(json.loads(row["body"])["answers"]) if row else []


def _with_ones(values: list[float], places: list[int]) -> list[float]:
    forgiven = set(places)
    return [1.0 if at in forgiven else value for at, value in enumerate(values)]
