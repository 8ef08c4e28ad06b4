"""Hosts: machines whose workers share one database, their cards, and which of the cards are paused.

A worker raises its `beat` every few seconds. Whether it lives is judged by whoever watches, on the watcher's own
monotonic clock (`Pulse`): clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from registry.cards import Card, as_set, list_cards, pick_card
from registry.errors import WrongInput
from registry.events import append_within, new_event
from registry.folders import is_away
from registry.host_name import host_name
from registry.store import Store, dump

if TYPE_CHECKING:
    from registry.cloud_terms import CardSetting

# Of `ft.yaml`, where it says nothing.
AS_THEY_ARE: Mapping[str, CardSetting] = MappingProxyType({})


@dataclass(frozen=True)
class HostCard:
    """A card and where it is; `name` is what a recipe may say: HOST/CARD. `folder`: its host's, '' for this one."""

    host: str
    card: Card
    folder: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return f"{self.host}/{self.card.name}"


@dataclass(frozen=True)
class Host:
    """A machine with a worker. `seen` is when its worker last wrote (Unix time, by that machine's clock).

    `folder` names the project's folder that it works in (`registry/folders.py`), `bucket` is its setting.
    """

    id: str
    started: float
    beat: int
    seen: float
    cards: tuple[Card, ...]
    pid: int
    folder: str = ""
    bucket: str = ""


@dataclass(frozen=True)
class Pause:
    """Nobody begins on the card; what is at work on it goes on."""

    by_whom: str
    since: float


class Pulse:
    """Which hosts live, as far as this process has seen them beat. At first all that are known do."""

    def __init__(self, lost_seconds: float) -> None:
        self._lost_seconds = lost_seconds
        self._seen: dict[str, tuple[int, float]] = {}

    def living(self, known: Iterable[Host]) -> list[Host]:
        now, living = time.monotonic(), []
        for host in known:
            beat, since = self._seen.get(host.id, (None, now))
            if beat != host.beat:
                since = now
            self._seen[host.id] = (host.beat, since)
            if now - since < self._lost_seconds:
                living.append(host)
        return living


def host_id() -> str:
    """This machine's name in queues and rows: `FT_HOST`, or its hostname."""
    return host_name()


def served_cards(settings: Mapping[str, CardSetting] = AS_THEY_ARE) -> list[Card]:
    """The cards of this machine that its worker serves, as ft.yaml's `cards` sets them; the CPU always is one."""
    found = {card.name: card for card in [*list_cards(), pick_card("cpu")]}
    return as_set([*found.values()], settings)


def beat(store: Store, host: str, started: float, cards: Iterable[Card], folder: str = "", bucket: str = "") -> None:
    """Say that the host's worker lives, and what it has."""
    has = {"cards": [asdict(card) for card in cards], "pid": os.getpid(), "folder": folder, "bucket": bucket}
    body = dump(has)
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO hosts (id, started, beat, seen, body) VALUES (?,?,1,?,?) ON CONFLICT (id) DO UPDATE "
            "SET started = excluded.started, beat = hosts.beat + 1, seen = excluded.seen, body = excluded.body",
            (host, started, time.time(), body),
        )


def leave(store: Store, host: str) -> None:
    """The host's worker ends in order: nobody need wait for its heartbeat."""
    with store.writing() as connection:
        connection.execute("DELETE FROM hosts WHERE id = ?", (host,))


def hosts(store: Store) -> list[Host]:
    """All that have beaten and not left, by name."""
    found = []
    for row in store.read("SELECT * FROM hosts ORDER BY id"):
        body = json.loads(row.pop("body"))
        cards = tuple(Card(**each) for each in body.pop("cards"))
        found.append(Host(**row, **body, cards=cards))
    return found


def looked_after_by(result: Mapping[str, Any]) -> str | None:
    """The host that looks after what is at work for a run, by the run's `result`: the card's, or the one that rents."""
    rents = result.get("rent") or "rented_by" in result
    found = result.get("rented_by" if rents else "host")
    return str(found) if found else None


def pauses(store: Store) -> dict[str, Pause]:
    """The paused cards, by HOST/CARD."""
    rows = store.read("SELECT * FROM paused_cards ORDER BY host, card")
    return {f"{row['host']}/{row['card']}": Pause(row["by_whom"], row["since"]) for row in rows}


def pause_card(store: Store, place: HostCard, by_whom: str) -> bool:
    """False if it was paused already."""
    with store.writing() as connection:
        done = connection.execute(
            "INSERT INTO paused_cards VALUES (?,?,?,?) ON CONFLICT DO NOTHING",
            (place.host, place.card.name, by_whom, time.time()),
        )
        if done.rowcount:
            append_within(connection, new_event("ft/hosts", "card.paused", place.name, {"by": by_whom}))
        return bool(done.rowcount)


def resume_card(store: Store, place: HostCard, by_whom: str) -> bool:
    """False if it was not paused."""
    with store.writing() as connection:
        done = connection.execute("DELETE FROM paused_cards WHERE host = ? AND card = ?", (place.host, place.card.name))
        if done.rowcount:
            append_within(connection, new_event("ft/hosts", "card.resumed", place.name, {"by": by_whom}))
        return bool(done.rowcount)


def all_cards(known: Iterable[Host], settings: Mapping[str, CardSetting] = AS_THEY_ARE) -> list[HostCard]:
    """This host's cards first, as ft.yaml's `cards` sets them, then those of the others as they set theirs."""
    here = [HostCard(host_id(), card) for card in served_cards(settings)]
    others = [each for each in known if each.id != host_id()]
    return here + [HostCard(each.id, card, each.folder) for each in others for card in each.cards]


def cut_off(known: Iterable[Host], here: str, bucket: str) -> dict[str, str]:
    """Why the cards of some hosts cannot be had from the folder `here`, whose setting is `bucket`. Pure."""
    found = {}
    for host in (each for each in known if is_away(each.folder, here)):
        if not bucket:
            found[host.id] = "shares no folder with this host, and no `bucket:` is set"
        elif host.bucket != bucket:
            its = f"its `bucket:` is {host.bucket}, here it is {bucket}" if host.bucket else "it has no `bucket:`"
            found[host.id] = f"shares no folder with this host, and {its}"
    return found


def choose_card(
    wanted: str,
    there: list[HostCard],
    paused: Iterable[str],
    busy: dict[str, int],
    cut: Mapping[str, str] = MappingProxyType({}),
) -> HostCard:
    """The card for a recipe's `card:`; `there` has this host's cards first, `busy` says how many runs want each.

    'auto' takes an accelerator before a CPU, one that is not paused, the least wanted, and one of this host before
    others. Those of hosts that are `cut` off are none. Raises WrongInput where there is no such card. Pure.
    """
    paused = set(paused)
    named = [each for each in there if is_named(each, wanted)]
    fitting = [each for each in named if each.host not in cut]
    if named and not fitting:
        raise WrongInput(f"{named[0].host} {cut[named[0].host]}", place=f"card {named[0].name}",
                         fix="name one bucket on both hosts, or share the folder (docs/hosts.md)")  # fmt: skip
    if not fitting:
        raise WrongInput(f"no card '{wanted}'", place="card",
                         fix=f"there is: {', '.join(each.name for each in there)}; `ft cards` shows them")  # fmt: skip
    return min(fitting, key=lambda each: (each.name in paused, each.card.is_cpu, busy.get(each.name, 0)))


def is_named(place: HostCard, wanted: str) -> bool:
    """Does a recipe's `card:` mean this one? 'auto' means all."""
    return wanted == "auto" or wanted.replace(":", "-") in (place.card.name, place.name.replace(":", "-"))
