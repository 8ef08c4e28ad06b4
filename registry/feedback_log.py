"""What people said of answers: feedback in the log, read by model and added up by version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from registry.events import FEEDBACK, Event, read
from registry.store import Store

TOGETHER = 1000


@dataclass
class Said:
    """Of one version."""

    adapter: str
    count: int = 0
    rated: int = 0
    total: float = 0.0
    corrections: int = 0
    last: float = 0.0
    tags: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float | None:
        return self.total / self.rated if self.rated else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter, "count": self.count, "rated": self.rated, "mean_rating": self.mean,
            "corrections": self.corrections, "tags": dict(self.tags.most_common()), "last": self.last,
        }  # fmt: skip


def feedback_on(store: Store, model: str, since: float = 0.0) -> Iterator[Event]:
    """Feedback on the model's versions in the order in which it came; on all models for ''. `since` is a Unix time."""
    after = 0
    while found := read(store, after=after, type_=FEEDBACK, limit=TOGETHER):
        after = found[-1].seq
        yield from (each for each in found if each.time >= since and model in ("", each.subject.partition("@")[0]))


def add_up(feedback: Iterable[Event]) -> list[Said]:
    """By version, in the order of their names and numbers. Pure."""
    found: dict[str, Said] = {}
    for each in feedback:
        _add(found.setdefault(each.subject, Said(each.subject)), each)
    return sorted(found.values(), key=lambda said: _in_order(said.adapter))


def rows(feedback: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """For a file. The question and the answer are not here: the log never had them. Pure."""
    for each in feedback:
        if not each.pruned:
            yield {"id": each.id, "time": each.as_dict()["time"], "adapter": each.subject, **each.data}


def _add(said: Said, event: Event) -> None:
    rating = event.data.get("rating")
    said.count += 1
    said.last = max(said.last, event.time)
    if isinstance(rating, int | float) and not isinstance(rating, bool):
        said.rated += 1
        said.total += rating
    said.corrections += "correction" in event.data
    said.tags.update(event.data.get("tags") or [])


def _in_order(adapter: str) -> tuple[str, int]:
    model, _, number = adapter.partition("@")
    return model, int(number) if number.isdecimal() else 0
