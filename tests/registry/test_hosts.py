"""Hosts: who lives by whose clock, which card a run gets, and paused cards."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from registry.cards import Card
from registry.cloud_terms import CardSetting
from registry.errors import WrongInput
from registry.events import newest
from registry.hosts import (
    Host,
    HostCard,
    Pulse,
    all_cards,
    beat,
    choose_card,
    hosts,
    leave,
    pause_card,
    pauses,
    resume_card,
)
from registry.project import Project
from registry.store import Store

CPU, GPU = Card("cpu", "CPU", 8), Card("cuda-0", "RTX 4070 SUPER", 12, 0)
DESK = [HostCard("desk", GPU), HostCard("desk", CPU)]
ATTIC = [HostCard("attic", GPU), HostCard("attic", CPU)]
LAPTOP = [HostCard("laptop", CPU)]


def host(name: str, beat: int) -> Host:
    return Host(name, 0.0, beat, 0.0, (CPU,), 1)


def test_a_host_is_lost_when_its_beat_stays_the_same() -> None:
    pulse = Pulse(0.2)
    assert [each.id for each in pulse.living([host("a", 1), host("b", 1)])] == ["a", "b"]
    time.sleep(0.25)
    assert [each.id for each in pulse.living([host("a", 2), host("b", 1)])] == ["a"]
    assert [each.id for each in pulse.living([host("a", 3), host("b", 2)])] == ["a", "b"]


def test_a_clock_that_jumps_loses_nobody() -> None:
    pulse = Pulse(0.5)
    pulse.living([host("a", 1)])
    assert pulse.living([Host("a", 0.0, 1, time.time() - 1e6, (CPU,), 1)])


@pytest.mark.parametrize(
    ("wanted", "there", "paused", "busy", "chosen"),
    [
        ("auto", DESK, (), {}, "desk/cuda-0"),
        ("auto", LAPTOP + DESK, (), {}, "desk/cuda-0"),
        ("auto", DESK + ATTIC, (), {"desk/cuda-0": 1}, "attic/cuda-0"),
        ("auto", DESK + ATTIC, (), {"desk/cuda-0": 1, "attic/cuda-0": 1}, "desk/cuda-0"),
        ("auto", DESK + ATTIC, ("desk/cuda-0",), {}, "attic/cuda-0"),
        ("auto", LAPTOP, ("laptop/cpu",), {}, "laptop/cpu"),
        ("cuda:0", LAPTOP + ATTIC, (), {}, "attic/cuda-0"),
        ("cuda-0", DESK + ATTIC, (), {}, "desk/cuda-0"),
        ("cpu", LAPTOP + DESK, (), {}, "laptop/cpu"),
        ("attic/cuda:0", DESK + ATTIC, (), {"attic/cuda-0": 9}, "attic/cuda-0"),
        ("attic/cuda-0", DESK + ATTIC, ("attic/cuda-0",), {}, "attic/cuda-0"),
    ],
)
def test_which_card_a_run_gets(
    wanted: str, there: list[HostCard], paused: tuple[str, ...], busy: dict[str, int], chosen: str
) -> None:
    assert choose_card(wanted, there, paused, busy).name == chosen


def test_a_card_that_is_nowhere() -> None:
    with pytest.raises(WrongInput, match="no card 'cuda:1'") as caught:
        choose_card("cuda:1", LAPTOP + DESK, (), {})
    assert "laptop/cpu, desk/cuda-0, desk/cpu" in caught.value.fix


def test_hosts_come_beat_and_leave(store: Store) -> None:
    beat(store, "desk", 5.0, [GPU, CPU])
    beat(store, "desk", 5.0, [GPU, CPU])
    beat(store, "attic", 6.0, [CPU])
    assert [(each.id, each.beat, each.cards) for each in hosts(store)] == [
        ("attic", 1, (CPU,)),
        ("desk", 2, (GPU, CPU)),
    ]
    leave(store, "desk")
    assert [each.id for each in hosts(store)] == ["attic"]


def test_a_card_that_was_beaten_before_cards_knew_what_is_taken_can_still_be_read(store: Store) -> None:
    beat(store, "desk", 5.0, [GPU])
    old = {"cards": [{"name": "cuda-0", "title": "RTX 4070 SUPER", "memory": 12, "index": 0}], "pid": 1}
    with store.writing() as connection:
        connection.execute("UPDATE hosts SET body = ?", (json.dumps(old),))
    [desk] = hosts(store)
    assert desk.cards == (GPU,)
    assert desk.cards[0].used == 0


def test_a_host_tells_the_others_what_is_taken_and_what_its_ft_yaml_says(store: Store) -> None:
    told = replace(GPU, used=3, keep_free=1, serve="share", profile="RTX 4080", limit=9, capability="8.9")
    beat(store, "desk", 5.0, [told])
    [card] = next(each.cards for each in hosts(store))
    assert (card, card.used, card.free) == (told, 3, 8)


def test_settings_are_for_this_hosts_cards_only(project: Project, store: Store) -> None:
    beat(store, "desk", 5.0, [CPU])
    here, there = all_cards(hosts(store), {"cpu": CardSetting(keep_free_gb=1)})
    assert (here.card.keep_free, there.card.keep_free) == (1 << 30, 0)


def test_a_card_is_paused_once_and_it_is_written_down(store: Store) -> None:
    assert pause_card(store, DESK[0], "kim")
    assert not pause_card(store, DESK[0], "lee")
    assert pauses(store)["desk/cuda-0"].by_whom == "kim"
    assert resume_card(store, DESK[0], "lee")
    assert not resume_card(store, DESK[0], "lee")
    assert [(each.type, each.subject, each.data) for each in newest(store, 5)] == [
        ("card.paused", "desk/cuda-0", {"by": "kim"}), ("card.resumed", "desk/cuda-0", {"by": "lee"})
    ]  # fmt: skip
