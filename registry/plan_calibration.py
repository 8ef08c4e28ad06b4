"""What finished runs measured corrects what the formulas say, and narrows it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.card_profiles import CardProfile, sized_profile
from registry.geometry import Geometry
from registry.train_memory import SPREAD_HIGH as MEMORY_HIGH
from registry.train_memory import SPREAD_LOW as MEMORY_LOW
from registry.train_memory import Memory, Training, train_memory
from registry.train_time import SPREAD_HIGH, SPREAD_LOW, Interval, step_time

# A single run of the same card, model and stack: its memory repeats within this, its rate within this.
SURE_MEMORY, SURE_TIME = 0.03, 0.08
# One run of another model, on the same card and stack, says less: so much remains of the formulas' own spread.
KINDRED = 0.6
# A measured peak that is further from the formula than this is of something else (another program on the card).
BELIEVED = (0.5, 2.0)


@dataclass(frozen=True)
class Measured:
    """A finished run. `card` as the driver or RunPod names it; `peak`: torch.cuda.max_memory_reserved, bytes;
    `step_seconds`: of one batch there and back, with rows padded to `usual_length` on average."""

    card: str
    model: str
    stack: str
    geometry: Geometry
    training: Training
    peak: int | None = None
    step_seconds: float | None = None
    usual_length: float = 0.0
    memory: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def profile(self) -> CardProfile | None:
        return sized_profile(self.card, self.memory or 0)


@dataclass(frozen=True)
class Corrected:
    """Factors on the formulas' memory and time, and what remains of their spread (1: all of it)."""

    memory_factor: float = 1.0
    memory_left: float = 1.0
    time_factor: float = 1.0
    time_left: float = 1.0

    def memory(self, formula: Memory) -> Memory:
        low = 1 - max(SURE_MEMORY, MEMORY_LOW * self.memory_left)
        return formula.scaled(self.memory_factor, low, 1 + max(SURE_MEMORY, MEMORY_HIGH * self.memory_left))

    def seconds(self, formula: float) -> Interval:
        mid = formula * self.time_factor
        low = 1 - max(SURE_TIME, (1 - SPREAD_LOW) * self.time_left)
        return Interval(mid * low, mid, mid * (1 + max(SURE_TIME, (SPREAD_HIGH - 1) * self.time_left)))


def correct(rows: Sequence[Measured], card: CardProfile, model: str, stack: str) -> Corrected:
    """From the rows of this model on this card and stack; where there are none, from other models on them."""
    here = [row for row in rows if row.stack == stack and row.profile == card]
    same = [row for row in here if row.model == model]
    peaks, peaks_left = _believed([_peak_ratio(row, card) for row in same], [_peak_ratio(row, card) for row in here])
    times, times_left = _believed([_time_ratio(row, card) for row in same], [_time_ratio(row, card) for row in here])
    return Corrected(peaks, peaks_left, times, times_left)


def _believed(same: list[float | None], kindred: list[float | None]) -> tuple[float, float]:
    """The factor, and how much of the spread remains: less with each further run."""
    for found, left in ((_plausible(same), 0.4), (_plausible(kindred), KINDRED)):
        if found:
            return statistics.median(found), left / len(found) ** 0.5
    return 1.0, 1.0


def _plausible(ratios: list[float | None]) -> list[float]:
    return [ratio for ratio in ratios if ratio is not None and BELIEVED[0] <= ratio <= BELIEVED[1]]


def _peak_ratio(row: Measured, card: CardProfile) -> float | None:
    return row.peak / train_memory(row.geometry, row.training, card).reserved if row.peak else None


def _time_ratio(row: Measured, card: CardProfile) -> float | None:
    if not row.step_seconds:
        return None
    length = row.usual_length or row.training.longest
    return row.step_seconds / step_time(row.geometry, row.training, card, length).total
