"""What a canary's two versions are seen to do, and what follows from it: hold, go on, finish or go back.

`judge` is pure. Of small samples it is sure of nothing: it goes back only where a limit is broken at the lower end of
the confidence interval, and goes on only where the measured value itself is within all limits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.rollout_terms import Rollout

# Times are counted in steps of a tenth, from a millisecond.
SHORTEST, GROWTH = 0.001, 1.1
SLOW_SHARE = 0.05
# One-sided, 95 %.
SURE = 1.645

Outcome = Literal["hold", "advance", "finish", "roll back"]


@dataclass
class ArmCounts:
    """One version in one step of a rollout: answers, failed ones, and how long they took."""

    requests: int = 0
    errors: int = 0
    times: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float, failed: bool) -> None:
        """An answer; of a failed one the time says nothing."""
        self.requests += 1
        if failed:
            self.errors += 1
        else:
            self.times[_place(seconds)] += 1

    def take(self, other: ArmCounts) -> None:
        """Add what was counted elsewhere."""
        self.requests, self.errors = self.requests + other.requests, self.errors + other.errors
        self.times.update(other.times)

    def as_dict(self) -> dict[str, Any]:
        times = {str(place): count for place, count in sorted(self.times.items())}
        return {"requests": self.requests, "errors": self.errors, "times": times}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> ArmCounts:
        times = Counter({int(place): int(count) for place, count in stored.get("times", {}).items()})
        return cls(int(stored.get("requests", 0)), int(stored.get("errors", 0)), times)

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def p95(self) -> float | None:
        """Seconds within which 95 of 100 answers came; None without any."""
        left = math.ceil(0.95 * self.times.total())
        for place, count in sorted(self.times.items()):
            left -= count
            if left <= 0:
                return SHORTEST * GROWTH**place
        return None

    def slower_than(self, seconds: float) -> int:
        """How many took longer (beyond the tenth that is counted together)."""
        return sum(count for place, count in self.times.items() if place > _place(seconds))


@dataclass(frozen=True)
class Ratings:
    """What people said of one version since the rollout began."""

    count: int = 0
    mean: float = 0.0


@dataclass(frozen=True)
class Seen:
    """Of the new version and of the champion."""

    new: ArmCounts = field(default_factory=ArmCounts)
    stable: ArmCounts = field(default_factory=ArmCounts)
    new_ratings: Ratings = Ratings()
    stable_ratings: Ratings = Ratings()


@dataclass(frozen=True)
class Judged:
    outcome: Outcome
    reason: str
    numbers: dict[str, float | int | None]


def judge(terms: Rollout, step: int, held: float, seen: Seen) -> Judged:
    """Pure. `held`: seconds that the step has been in force."""
    numbers, limit, wanted = numbers_of(seen), terms.seconds_of(step), terms.min_requests
    if seen.new.requests >= wanted and (broken := _broken(terms, seen, sure=True)):
        return Judged("roll back", broken, numbers)
    if rated := _rated_worse(terms, seen):
        return Judged("roll back", rated, numbers)
    if held < limit:
        return Judged("hold", f"{held:.0f} of {limit} s", numbers)
    if seen.new.requests < wanted:
        return Judged("hold", f"{seen.new.requests} of {wanted} requests", numbers)
    if unsure := _broken(terms, seen, sure=False):
        return Judged("hold", f"{unsure}; too few requests to be sure of it", numbers)
    last = step + 1 == len(terms.steps)
    return Judged("finish" if last else "advance", f"held with {seen.new.requests} requests", numbers)


def numbers_of(seen: Seen) -> dict[str, float | int | None]:
    """What a person wants to see of it; seconds and parts of one."""
    found: dict[str, float | int | None] = {}
    for name, arm, ratings in (
        ("new", seen.new, seen.new_ratings),
        ("stable", seen.stable, seen.stable_ratings),
    ):
        found[f"{name}_requests"], found[f"{name}_errors"] = arm.requests, arm.errors
        found[f"{name}_p95"] = None if arm.p95 is None else round(arm.p95, 4)
        found[f"{name}_ratings"] = ratings.count
        found[f"{name}_rating"] = round(ratings.mean, 4) if ratings.count else None
    return found


def lowest(hits: int, total: int) -> float:
    """Lower end of Wilson's interval of a share."""
    if not total:
        return 0.0
    share, z2 = hits / total, SURE**2
    middle = share + z2 / (2 * total)
    spread = SURE * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, (middle - spread) / (1 + z2 / total))


def _broken(terms: Rollout, seen: Seen, *, sure: bool) -> str:
    """Which limit is; '' if none. `sure`: also at the lower end of what the sample allows."""
    return _fails_more(terms, seen, sure) or _slower(terms, seen, sure)


def _fails_more(terms: Rollout, seen: Seen, sure: bool) -> str:
    new, stable = seen.new, seen.stable
    rate = lowest(new.errors, new.requests) if sure else new.error_rate
    said = f"{new.errors} of {new.requests} requests failed"
    if stable.requests >= terms.min_requests:
        allowed = stable.error_rate + terms.max_error_rise
        if rate > allowed:
            return f"{said}; of the champion's {stable.errors} of {stable.requests}"
        # Where the champion fails as well, something else is broken: no reason to go back, and none to go on.
        return f"{said}, and the champion's do too" if not sure and rate > terms.max_error_rate else ""
    return said if rate > terms.max_error_rate else ""


def _slower(terms: Rollout, seen: Seen, sure: bool) -> str:
    usual, answered = seen.stable.p95, seen.new.times.total()
    if usual is None or seen.stable.times.total() < terms.min_requests or not answered:
        return ""
    slow = seen.new.slower_than(usual * terms.max_latency_ratio)
    share = lowest(slow, answered) if sure else slow / answered
    if share <= SLOW_SHARE:
        return ""
    return (f"{slow} of {answered} answers took more than {terms.max_latency_ratio:g} times the champion's "
            f"95th percentile of {usual:.2g} s")  # fmt: skip


def _rated_worse(terms: Rollout, seen: Seen) -> str:
    new, stable = seen.new_ratings, seen.stable_ratings
    if min(new.count, stable.count) < terms.min_ratings or stable.mean - new.mean <= terms.max_rating_drop:
        return ""
    return f"rated {new.mean:.2f} by {new.count}; the champion {stable.mean:.2f} by {stable.count}"


def _place(seconds: float) -> int:
    # Rounded first: the upper bound of a step, written as a float, belongs to that step.
    return max(0, math.ceil(round(math.log(max(seconds, SHORTEST) / SHORTEST, GROWTH), 6)))
