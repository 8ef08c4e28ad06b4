"""Which rows of a split are used when a recipe wants fewer than there are."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

from registry.chat_data import Row


def pick_rows(rows: Sequence[Row], most: int | None, seed: int) -> list[Row]:
    """At most `most` rows, spread evenly over the answers (the labels), in the order in which they came.

    Deterministic: a row's place in the draw is a hash of the seed and the row itself, so that neither
    the order of the file nor rows that are added to it change much of what was picked before.
    """
    if most is None or most >= len(rows):
        return list(rows)
    lots = [_lot(row, seed) for row in rows]
    picked = sorted(range(len(rows)), key=_turns(rows, lots).__getitem__)[:most]
    return [rows[at] for at in sorted(picked)]


def _turns(rows: Sequence[Row], lots: list[str]) -> list[tuple[int, str, int]]:
    """For each row, its turn: the first of every answer come before the second of any."""
    by_answer: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        by_answer[row.answer].append(at)
    turns: dict[int, tuple[int, str, int]] = {}
    for members in by_answer.values():
        drawn = sorted(members, key=lambda at: (lots[at], at))
        turns |= {at: (turn, lots[at], at) for turn, at in enumerate(drawn)}
    return [turns[at] for at in range(len(rows))]


def _lot(row: Row, seed: int) -> str:
    text = json.dumps([seed, row.messages], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
