"""How long the rows of a dataset version are in tokens, for one tokenizer and chat template.

Counted once (`jobs/token_histogram.py`) and kept as JSON in the cache, so that a plan needs neither the data nor
transformers. Everything here is arithmetic.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lengths:
    """One split: (tokens, so many rows of that length), the shortest first."""

    counts: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.counts)

    @property
    def tokens(self) -> int:
        return sum(length * rows for length, rows in self.counts)

    @property
    def longest(self) -> int:
        return self.counts[-1][0] if self.counts else 0

    @property
    def mean(self) -> float:
        return self.tokens / self.rows if self.rows else 0.0

    def quantile(self, part: float) -> int:
        """The least length that at least so much of the rows (0 to 1) are within; 0 without rows."""
        need, within = part * self.rows, 0
        for length, rows in self.counts:
            within += rows
            if within >= need:
                return length
        return self.longest

    def over(self, limit: int) -> int:
        """Rows that are longer."""
        return sum(rows for length, rows in self.counts if length > limit)

    def thinned(self, most: int | None) -> Lengths:
        """Of only so many rows, alike. The longest stays: nobody knows here whether it will be among them."""
        if most is None or most >= self.rows:
            return self
        part, seen, kept, found = most / self.rows, 0, 0, []
        for length, rows in reversed(self.counts):
            seen += rows
            now = min(most, math.ceil(seen * part - 1e-9)) - kept
            kept += now
            found += [(length, now)] if now else []
        return Lengths(tuple(reversed(found)))

    def padded(self, batch: int) -> float:
        """Expected tokens of a row in a batch of rows drawn at random, each padded to the longest of its batch."""
        expected, below = 0.0, 0
        for length, rows in self.counts:
            share, before = (below + rows) / self.rows, below / self.rows
            expected += length * (share**batch - before**batch)
            below += rows
        return expected


@dataclass(frozen=True)
class Histogram:
    """Lengths by split. `dataset` is DVC's hash, `tokenizer` the digest of its files (and the chat template's).

    `estimated`: from the rows' bytes, because the tokenizer is not to be had; such a one is not kept.
    """

    dataset: str
    tokenizer: str
    splits: dict[str, Lengths]
    estimated: bool = False

    def as_dict(self) -> dict[str, Any]:
        splits = {name: each.counts for name, each in self.splits.items()}
        return {"dataset": self.dataset, "tokenizer": self.tokenizer, "splits": splits, "estimated": self.estimated}


def lengths_of(tokens: Iterable[int]) -> Lengths:
    """The counts of rows that are so long."""
    counts: dict[int, int] = {}
    for length in tokens:
        counts[length] = counts.get(length, 0) + 1
    return Lengths(tuple(sorted(counts.items())))


def histogram_of(content: dict[str, Any]) -> Histogram:
    """What `as_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
    splits = {
        name: Lengths(tuple((int(length), int(rows)) for length, rows in counts))
        for name, counts in content["splits"].items()
    }
    return Histogram(str(content["dataset"]), str(content["tokenizer"]), splits, bool(content["estimated"]))


def histogram_path(cache: Path, dataset: str, tokenizer: str) -> Path:
    return cache / "histograms" / f"{dataset}-{tokenizer[:16]}.json"


def load_histogram(cache: Path, dataset: str, tokenizer: str) -> Histogram | None:
    """The one that is kept; None if it was not counted yet, or its file is damaged."""
    try:
        text = histogram_path(cache, dataset, tokenizer).read_text(encoding="utf-8")
        found = histogram_of(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if (found.dataset, found.tokenizer) == (dataset, tokenizer) else None


def save_histogram(cache: Path, histogram: Histogram) -> None:
    """Whole or not at all. A cache that cannot be written costs the next plan some seconds, nothing more."""
    path = histogram_path(cache, histogram.dataset, histogram.tokenizer)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(histogram.as_dict()), encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
