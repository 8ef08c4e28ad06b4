"""Which versions an engine holds where there are more than it has room for. Pure.

The least recently used make room. What is pinned, and what answers a request at this moment, does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Use:
    """Of one engine: `used` is when a version last had a request or came up, `asked` since when somebody waits for a
    name (a model's or a version's); any one clock. `pinned` are models."""

    used: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, float] = field(default_factory=dict)
    pinned: Collection[str] = ()


@dataclass(frozen=True)
class Need:
    """What one model wants held: its champion first; `answering` is an older version that does until that has landed,
    `canary` the version beside it."""

    model: str
    champion: str
    answering: str = ""
    canary: str = ""
    previous: str = ""


@dataclass(frozen=True)
class Slots:
    """`keep` have a place; of them `load` are missing yet. `spare` may go to make room. The first comes first."""

    keep: frozenset[str]
    load: tuple[str, ...]
    spare: tuple[str, ...]


def by_need(needs: Sequence[Need], use: Use) -> list[str]:
    """The versions, the most needed first.

    Pinned champions, then what somebody waits for, canaries with their champions, champions by their last use, previous
    versions by theirs, and then what nobody has used yet.
    """
    ranked = [pair for each in needs for pair in _ranked(each, use)]
    return list(dict.fromkeys(name for _, name in sorted(ranked, key=lambda pair: pair[0])))


def share_out(order: Sequence[str], loaded: Collection[str], fixed: Collection[str], slots: int) -> Slots:
    """`fixed`: loaded versions that must not go now. Never more than `slots`, but for more than so many fixed ones."""
    keep = {name for name in loaded if name in fixed}
    for name in order:
        if len(keep) >= slots:
            break
        keep.add(name)
    places = {name: place for place, name in enumerate(order)}
    spare = sorted((name for name in loaded if name not in keep), key=lambda name: -places.get(name, len(order)))
    load = tuple(name for name in order if name in keep and name not in loaded)
    return Slots(frozenset(keep), load, tuple(spare))


def _ranked(need: Need, use: Use) -> list[tuple[tuple[float, ...], str]]:
    lead, canary = [name for name in (need.champion, need.answering) if name], need.canary
    names = [*lead, canary, need.previous]
    recency = -max((use.used[name] for name in names if name in use.used), default=0.0)
    never = float("inf")
    found: list[tuple[tuple[float, ...], str]] = []
    for place, name in enumerate(names):
        leads = place < len(lead)
        since = use.asked.get(name, use.asked.get(need.model, never) if leads else never)
        if leads and need.model in use.pinned:
            found.append(((0, place), name))
        elif since < never:
            found.append(((1, since, place), name))
        elif canary and name != need.previous:
            found.append(((2, recency, place), name))
        else:
            found.append((((3 if leads else 4) + (0 if recency else 2), recency, place), name))
    return [pair for pair in found if pair[1]]
