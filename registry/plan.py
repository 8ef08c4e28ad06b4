"""The plan of a training on one card: does it fit, what limits it, which knob helps, how long, what it costs.

Pure arithmetic: everything comes in as data (`Wish`, `Place`, `Measured`), and a `Verdict` comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from registry.card_profiles import GIB
from registry.geometry import Geometry
from registry.packing import longest, packs
from registry.plan_calibration import Corrected, Measured, correct
from registry.plan_knobs import Knob, find_knobs, packing_knob
from registry.plan_place import Place
from registry.plan_serving import Served, ServeWish, plan_serving, plan_servings
from registry.recipe import Train
from registry.train_memory import Memory, train_memory, training_of
from registry.train_time import Interval, padded_length, step_time

__all__ = ["Knob", "Measured", "Place", "ServeWish", "Served", "Verdict", "Wish", "plan_serving", "plan_servings",
           "plan_training"]  # fmt: skip

EFFECTIVE_BATCH = 16
# Bytes of the base's 16-bit weights that are loaded and quantized in a second: from a disk, and again from its cache.
LOADING, AGAIN = Interval(0.3e9, 0.8e9, 2.5e9), Interval(0.6e9, 1.5e9, 4e9)
IMPORTS = Interval(15, 30, 60)
# Beside its steps: the smoke's checkpoint, resume and evaluation; the fingerprint's answers, one token at a time.
SMOKE, FINGERPRINT = Interval(2, 6, 20), Interval(5, 10, 30)
SMOKE_STEPS = 6
CHECKPOINT_SECONDS = Interval(0.3, 1.0, 4.0)


@dataclass(frozen=True)
class Wish:
    """What is to be trained. `lengths`: (tokens, rows) pairs of the train split, ascending; `model` only for
    calibration; `evaluations`: how often the eval split is gone through (None: once an epoch)."""

    geometry: Geometry
    train: Train
    lengths: tuple[tuple[int, int], ...]
    model: str = ""
    stack: str = "trl"
    other_stacks: tuple[str, ...] = ()
    eval_rows: int = 48
    evaluations: int | None = None

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.lengths)

    @property
    def tokens(self) -> int:
        """Of one epoch, without padding."""
        return sum(length * count for length, count in self.lengths)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that the trainer would take."""
        return longest(self.lengths, self.train.max_length)

    @property
    def longest(self) -> int:
        """Tokens of what a batch is made of, at most."""
        return longest(self.lengths, self.train.max_length, packed=self.train.packing)

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """What a batch is made of, as `lengths`: rows, or packs of them."""
        return packs(self.lengths, self.train.max_length) if self.train.packing else self.lengths

    @property
    def count(self) -> int:
        """Rows, or packs of them."""
        return sum(number for _, number in self.sequences)


@dataclass(frozen=True)
class Verdict:
    """`fits`: the upper end of the memory's interval is there; `tight`: only the expected peak is.

    `usual_memory`: the peak of a batch of usual length (bytes); `memory` is of the longest rows that there are.
    `tokens` are those of the rows in all steps, without padding; `usd` is None where nothing is paid.
    """

    place: str
    fits: bool
    tight: bool
    memory: Memory
    available: int
    limit: str
    knobs: list[Knob]
    batch: int
    accumulate: int
    steps: int
    tokens: int
    seconds: Interval
    usd: Interval | None
    notes: list[str]
    usual_memory: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "place": self.place, "fits": self.fits, "tight": self.tight, "memory": self.memory.as_dict(),
            "available": self.available, "limit": self.limit, "knobs": [each.as_dict() for each in self.knobs],
            "batch": self.batch, "accumulate": self.accumulate, "steps": self.steps, "tokens": self.tokens,
            "seconds": self.seconds.as_dict(), "usd": self.usd.as_dict() if self.usd else None, "notes": self.notes,
            "usual_memory": self.usual_memory,
        }  # fmt: skip


def plan_training(wish: Wish, place: Place, calibrations: Sequence[Measured] = ()) -> Verdict:
    """The verdict on one place. With `batch: auto` it is of the fastest batch that fits, else of the smallest."""
    corrected = correct(calibrations, place.profile, wish.model, wish.stack)
    plans = [_planned(wish, place, corrected, batch, accumulate) for batch, accumulate in arrangements(wish.train)]
    fitting = [plan for plan in plans if plan.fits] or [plan for plan in plans if plan.tight]
    best = min(fitting, key=lambda plan: plan.seconds.mid) if fitting else plans[-1]
    find = _faster if best.fits else _knobs
    return replace(best, knobs=find(wish, place, corrected, best))


def arrangements(train: Train) -> list[tuple[int, int]]:
    """Batch and accumulate that make exactly the effective batch that was asked for, the largest batch first."""
    if train.batch != "auto":
        return [(train.batch, train.accumulate)]
    return divisions(train.effective_batch or EFFECTIVE_BATCH)


def divisions(effective: int) -> list[tuple[int, int]]:
    """Batch and accumulate whose product it is, the largest batch first."""
    return [(batch, effective // batch) for batch in range(effective, 0, -1) if effective % batch == 0]


def steps_of(train: Train, rows: int, batch: int, accumulate: int) -> int:
    """Updates of the adapter, as transformers counts them: the last, smaller ones of an epoch are steps too. `rows`
    are packs where rows are packed."""
    an_epoch = max(1, math.ceil(math.ceil(rows / batch) / accumulate))
    steps = math.ceil(train.epochs * an_epoch)
    return min(steps, train.max_steps) if train.max_steps else steps


def _planned(wish: Wish, place: Place, corrected: Corrected, batch: int, accumulate: int) -> Verdict:
    training = training_of(wish.train, batch=batch, longest=wish.longest, stack=wish.stack)
    memory = corrected.memory(train_memory(wish.geometry, training, place.profile))
    count = wish.count
    steps = steps_of(wish.train, count, batch, accumulate)
    time, limit = _seconds(wish, place, corrected, (batch, accumulate), steps)
    fits, tight = memory.high <= place.bytes, memory.total <= place.bytes < memory.high
    epochs = steps * batch * accumulate / count if count else 0.0
    usual = replace(training, longest=math.ceil(_usual_length(wish, batch)))
    return Verdict(
        place=place.name,
        fits=fits,
        tight=tight,
        memory=memory,
        available=place.bytes,
        limit=f"speed: {limit}" if fits else _shortage(memory, place.bytes),
        knobs=[],
        batch=batch,
        accumulate=accumulate,
        steps=steps,
        tokens=round(wish.tokens * min(epochs, wish.train.epochs)),
        seconds=time,
        usd=_usd(place, time),
        notes=_notes(wish, place),
        usual_memory=corrected.memory(train_memory(wish.geometry, usual, place.profile)).total,
    )


def _seconds(
    wish: Wish, place: Place, corrected: Corrected, arranged: tuple[int, int], steps: int
) -> tuple[Interval, str]:
    batch, accumulate = arranged
    training = training_of(wish.train, batch=batch, longest=wish.longest, stack=wish.stack)
    step = step_time(wish.geometry, training, place.profile, _usual_length(wish, batch))
    worst = step_time(wish.geometry, training, place.profile, wish.longest)
    evaluations = math.ceil(wish.train.epochs) if wish.evaluations is None else wish.evaluations
    # An evaluation is a forward pass: a third of a step with its recomputation.
    batches = steps * accumulate + evaluations * math.ceil(wish.eval_rows / batch) / 3
    busy = corrected.seconds(batches * step.total)
    checkpoints = CHECKPOINT_SECONDS.times(steps // wish.train.checkpoint_steps + 1)
    smoke = SMOKE + corrected.seconds(SMOKE_STEPS * worst.total) if wish.train.smoke else Interval(0, 0, 0)
    return place.start + _around(wish) + smoke + busy + checkpoints, step.limit


def _usual_length(wish: Wish, batch: int) -> float:
    """Tokens to which a batch is padded on average; packs are not padded."""
    within = [(length, count) for length, count in wish.sequences if length <= wish.longest]
    return padded_length(within, 1 if wish.train.packing else batch) or float(wish.longest)


def _around(wish: Wish) -> Interval:
    """Before and after the steps: imports, the base, and for the fingerprint the base again, in 4 and in 16 bits."""
    weights, times = 2 * wish.geometry.parameters, 2 if wish.train.quantize == "nf4" else 1
    return IMPORTS + _per(weights, LOADING) + _per(times * weights, AGAIN) + FINGERPRINT


def _per(amount: float, rate: Interval) -> Interval:
    return Interval(amount / rate.high, amount / rate.mid, amount / rate.low)


def _usd(place: Place, time: Interval) -> Interval | None:
    if place.usd_per_hour is None:
        return None
    return time.times((place.usd_per_hour + place.storage_usd_per_hour) / 3600)


def _shortage(memory: Memory, available: int) -> str:
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    needed = f"{memory.total / GIB:.1f} GiB (up to {memory.high / GIB:.1f})"
    return f"memory: {needed} needed, {available / GIB:.1f} there; {largest} is {memory.parts[largest] / GIB:.1f}"


def _knobs(wish: Wish, place: Place, corrected: Corrected, plan: Verdict) -> list[Knob]:
    def memory(train: Train, stack: str, batch: int, longest: int) -> Memory:
        training = training_of(train, batch=batch, longest=longest, stack=stack)
        return corrected.memory(train_memory(wish.geometry, training, place.profile))

    return find_knobs(wish.train, wish.lengths, (plan.batch, plan.accumulate), place.bytes, memory,
                      stack=wish.stack, others=wish.other_stacks)  # fmt: skip


def _faster(wish: Wish, place: Place, corrected: Corrected, plan: Verdict) -> list[Knob]:
    """Packing, where enough of the tokens are padding: with about as many rows in an update as now."""
    if wish.train.packing or wish.stack != "trl" or not wish.rows:
        return []
    within = tuple((length, count) for length, count in wish.lengths if length <= wish.train.max_length)
    packed = replace(wish, train=wish.train.model_copy(update={"packing": True}), lengths=within)
    rows_in_a_pack = packed.rows / packed.count if packed.count else 1.0
    updates = max(1, round(plan.batch * plan.accumulate / rows_in_a_pack))
    options = [_planned(packed, place, corrected, batch, each) for batch, each in divisions(updates)]
    fitting = [each for each in options if each.fits]
    if not fitting:
        return []
    best = min(fitting, key=lambda each: each.seconds.mid)
    found = packing_knob(within, plan.batch, (plan.seconds.mid, best.seconds.mid), (best.batch, best.accumulate),
                         plan.memory.total - best.memory.total)  # fmt: skip
    return [found] if found else []


def _notes(wish: Wish, place: Place) -> list[str]:
    notes = []
    longer = sum(count for length, count in wish.lengths if length > wish.train.max_length)
    if longer:
        notes.append(f"{longer} rows are longer than max_length {wish.train.max_length}: the trainer refuses them")
    if not place.profile.bf16:
        notes.append(f"{place.profile.name} has no bf16: it is emulated, and slow")
    if wish.longest_row > wish.geometry.max_positions:
        notes.append(f"rows of {wish.longest_row} tokens, and the model was made for {wish.geometry.max_positions}")
    return notes
