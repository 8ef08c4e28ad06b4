"""Packs: rows one behind another in a sequence of at most `max_length` tokens, so that next to nothing is padding.

Best fit decreasing, as the trainer does it (trl.pack_dataset, strategy bfd, over all rows at once): how many packs
there are follows from the lengths alone, so a plan knows them without the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from registry.train_time import padded_length

Lengths = tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def packs(lengths: Lengths, most: int) -> Lengths:
    """(tokens, packs) pairs, ascending, of (tokens, rows) pairs; rows longer than `most` are left out."""
    spaces: Counter[int] = Counter()
    for length, count in sorted(lengths, reverse=True):
        if 0 < length <= most:
            _place(spaces, length, count, most)
    return tuple(sorted((most - space, number) for space, number in spaces.items() if number))


def _place(spaces: Counter[int], length: int, count: int, most: int) -> None:
    """Rows of one length: into the packs with the least room that suffices, then into new ones. A pack that a row went
    into has the least room of all, so it takes the next row too, for as long as one fits."""
    for space in sorted(each for each, number in spaces.items() if number and each >= length):
        count -= _fill(spaces, space, min(spaces[space], -(-count // (space // length))), length, count)
        if not count:
            return
    fresh = -(-count // (most // length))
    spaces[most] += fresh
    _fill(spaces, most, fresh, length, count)


def _fill(spaces: Counter[int], space: int, number: int, length: int, count: int) -> int:
    """So many packs with this room take what they can of `count` rows; how many rows that were."""
    each = space // length
    taken = min(count, number * each)
    full, rest = divmod(taken, each)
    spaces[space] -= number
    spaces[space - each * length] += full
    if rest:
        spaces[space - rest * length] += 1
    return taken


def longest(lengths: Sequence[tuple[int, int]], most: int, *, packed: bool = False) -> int:
    """Tokens of the longest row within `most`, or of the fullest pack that there can be, whichever rows are picked."""
    if packed:
        return min(most, sum(length * count for length, count in lengths))
    return max((length for length, _ in lengths if length <= most), default=most)


def padding(lengths: Sequence[tuple[int, int]], batch: int) -> float:
    """Which part (0 to 1) of a batch's tokens is padding on average, where rows are not packed."""
    rows = sum(count for _, count in lengths)
    padded = padded_length(lengths, batch) * rows
    return 1 - sum(length * count for length, count in lengths) / padded if padded else 0.0
