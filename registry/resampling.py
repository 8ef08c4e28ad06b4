"""The paired bootstrap: how sure is the difference between two subjects that answered the same rows?

Rows are drawn with replacement, the same draw for both subjects, and the metric is computed anew on each.
A draw is a vector of how often each row was drawn, so that a thousand of them are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.scores import Scored

RESAMPLES = 2000
CHUNK = 250
POWER = 0.8
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """candidate - reference: measured, its interval, and the least true loss that would be seen as one."""

    measured: float
    low: float
    high: float
    detectable: float


def paired_difference(
    metric: str,
    candidate: Scored,
    reference: Scored,
    *,
    confidence: float,
    seed: int,
    resamples: int = RESAMPLES,
) -> Difference:
    """The interval holds the middle `confidence` of the resampled differences (percentile bootstrap).

    `detectable` is the true difference that would lie outside of the interval with 80% probability (normal
    approximation). Both subjects must have answered the same rows.
    """
    tail = (1 - confidence) / 2
    drawn = _drawn_differences(metric, candidate, reference, seed, resamples)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    wide = NormalDist().inv_cdf(1 - tail) + NormalDist().inv_cdf(POWER)
    measured = score(metric, candidate) - score(metric, reference)
    return Difference(measured, float(low), float(high), float(wide * np.std(drawn)))


def score(metric: str, scored: Scored) -> float:
    """The metric on the rows as they are."""
    return float(_measure(metric, scored)(np.ones((1, scored.count)))[0])


@dataclass(frozen=True)
class LabelTable:
    """Rows x labels matrices of 0 and 1: which label was expected, and which was said."""

    labels: list[str]
    expected: Array
    said: Array

    def macro_f1(self, weights: Array) -> Array:
        """Mean F1 over the labels that are expected at least once; one value per row of `weights`."""
        there = weights @ self.expected > 0
        return np.asarray((self.f1(weights) * there).sum(axis=1) / there.sum(axis=1))

    def f1(self, weights: Array) -> Array:
        """Draws x labels; 0 where a label was neither expected nor said."""
        hit = weights @ (self.expected * self.said)
        either = weights @ self.expected + weights @ self.said
        return np.asarray(2 * hit / np.maximum(either, 1.0))


def label_table(pairs: list[list[str]]) -> LabelTable:
    """Of (expected, said) pairs. What is said but never expected has no column: it is just not right."""
    labels = sorted({expected for expected, _ in pairs})
    column = {label: at for at, label in enumerate(labels)}
    expected, said = np.zeros((len(pairs), len(labels))), np.zeros((len(pairs), len(labels)))
    for row, (right, answer) in enumerate(pairs):
        expected[row, column[right]] = 1.0
        if answer in column:
            said[row, column[answer]] = 1.0
    return LabelTable(labels, expected, said)


def _drawn_differences(metric: str, candidate: Scored, reference: Scored, seed: int, resamples: int) -> Array:
    ours, theirs, rows = _measure(metric, candidate), _measure(metric, reference), candidate.count
    random, chances = np.random.default_rng(seed), np.full(rows, 1 / rows)
    found = []
    for begin in range(0, resamples, CHUNK):  # in pieces: all draws of 100,000 rows at once are 1.6 GB
        draws = random.multinomial(rows, chances, size=min(CHUNK, resamples - begin)).astype(np.float64)
        found.append(ours(draws) - theirs(draws))
    return np.concatenate(found)


def _measure(metric: str, scored: Scored) -> Any:
    """weights (draws x rows) -> the metric of each draw."""
    if metric == "macro_f1":
        return label_table(scored.pairs).macro_f1
    values = np.array(scored.values[metric])
    return lambda weights: weights @ values / weights.sum(axis=1)
