"""What is wanted, and what is decided about it, without an engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import adapters, events
from registry.adapters import Version
from registry.alias_requests import untold_refusals
from registry.base_models import BaseModel
from registry.store import Store
from serving.moves import watching_moves
from serving.parity import Parity
from serving.reconciler import decide, need_of, nothing_answers, rank_needed, wanted_models
from serving.routes import Away, Route
from serving.slots import Need, Slots, Use, by_need, share_out
from serving.swap import Landed
from serving.wanted import Wanted
from tests.fakes.answering_engine import AnsweringEngine
from tests.fakes.reconciled import make_site

BASE = BaseModel("small", "1", "MIT", "digest-of-small", "small@1")
OTHER = BaseModel("large", "1", "MIT", "digest-of-large", "large@1")
LANDED = Landed(Parity("pass", "", {}))


def version(number: int) -> Version:
    return Version("tickets", number, f"run-{number}", "", {}, 0.0, False)


def wanted(*numbers: int) -> list[Wanted]:
    return [Wanted("tickets", tuple(version(number) for number in numbers))]


def names(*numbers: int) -> dict[str, Any]:
    return {f"tickets@{number}": LANDED for number in numbers}


@pytest.mark.parametrize(
    ("case", "champion_previous", "landed", "refused", "live", "leads_to"),
    [
        ("the first champion", (1,), [1], [], None, 1),
        ("nothing has landed yet", (1,), [], [], None, None),
        ("the new champion is coming up", (2, 1), [1], [], 1, 1),
        ("it has landed", (2, 1), [1, 2], [], 1, 2),
        ("it was refused", (2, 1), [1], [2], 1, 1),
        ("it was refused, and this is a new engine", (2, 1), [1], [2], None, 1),
        ("a new engine does not lead to previous while the champion comes up", (2, 1), [1], [], None, None),
        ("two promotions in a row: the oldest answers on", (3, 2), [1], [], 1, 1),
        ("rolled back", (1, 2), [1, 2], [], 2, 1),
    ],
)
def test_routes(
    case: str,
    champion_previous: tuple[int, ...],
    landed: list[int],
    refused: list[int],
    live: int | None,
    leads_to: int | None,
) -> None:
    decision = decide(
        wanted(*champion_previous),
        names(*landed),
        {f"tickets@{number}": "why" for number in refused},
        {"tickets": f"tickets@{live}"} if live else {},
        dict.fromkeys(names(*landed), ""),
    )
    assert decision.live == ({"tickets": f"tickets@{leads_to}"} if leads_to else {}), case
    assert ("tickets" in decision.away) == (leads_to is None)
    assert f"tickets@{leads_to}" not in decision.unload


def test_what_nobody_needs_is_unloaded_and_no_longer_named() -> None:
    decision = decide(wanted(3, 2), names(1, 2, 3), {}, {"tickets": "tickets@3"}, dict.fromkeys(names(1, 2, 3), ""))
    assert decision.unload == ("tickets@1",)
    assert decision.named == {"tickets@2", "tickets@3"}


def test_champions_come_before_previous_versions_and_refused_ones_not_at_all() -> None:
    models = [*wanted(2, 1), Wanted("letters", (Version("letters", 5, "run", "", {}, 0.0, False),))]

    def order(refused: set[str]) -> list[str]:
        return by_need([need_of(each, refused, "") for each in models], Use())

    assert order(set()) == ["tickets@2", "letters@5", "tickets@1"]
    assert order({"tickets@2"}) == ["tickets@1", "letters@5"], "behind a refused champion its previous answers"


def test_without_an_engine_every_name_is_away() -> None:
    routes = nothing_answers([*wanted(2, 1), Wanted("letters", (), closed="no champion")], Away("restarting"))
    assert set(routes.away) == {"tickets", "tickets@2", "tickets@1"}
    assert routes.closed == {"letters": "no champion"}


def test_only_models_of_this_base_are_wanted(store: Store) -> None:
    for model, number, base, rank in (("a", 1, BASE, 8), ("a", 2, BASE, 32), ("b", 1, OTHER, 64), ("c", 1, BASE, 16)):
        adapters.add_version(store, model, number, f"{model}{number}", "", {"base": base.as_dict(), "rank": rank})
    for model, number in (("a", 1), ("a", 2), ("b", 1)):
        champion = adapters.aliases(store, model).get("champion")
        verdict = adapters.add_verdict(store, model, number, "pass", {"champion": champion}, None)
        adapters.promote(store, verdict, by_whom="test")
    found = {each.model: each for each in wanted_models(store, BASE)}
    assert [each.name for each in found["a"].versions] == ["a@2", "a@1"]
    assert "another base model (large)" in found["b"].closed
    assert found["c"].closed == "it has no champion yet"
    assert rank_needed(store, BASE) == 32


# What an engine holds of more than it has room for.

MODELS = [f"m{number}" for number in range(8)]
NEEDS = [Need(each, f"{each}@2", previous=f"{each}@1", canary=f"{each}@3" if each == "m7" else "") for each in MODELS]
names_of_all = st.sampled_from([f"{each}@{number}" for each in MODELS for number in (1, 2)])
uses = st.builds(
    Use,
    used=st.dictionaries(names_of_all, st.floats(1, 1000)),
    asked=st.dictionaries(st.sampled_from(MODELS), st.floats(1, 1000)),
    pinned=st.frozensets(st.sampled_from(MODELS), max_size=3),
)


def pinned_in(use: Use) -> set[str]:
    return {f"{each}@2" for each in use.pinned}


@given(uses, st.sets(names_of_all, max_size=8), st.sets(names_of_all, max_size=3), st.integers(3, 8))
def test_never_more_than_there_is_room_for_and_nothing_pinned_or_busy_goes(
    use: Use, loaded: set[str], busy: set[str], room: int
) -> None:
    loaded = set(sorted(loaded)[:room])
    fixed = (busy | pinned_in(use)) & loaded
    found = share_out(by_need(NEEDS, use), loaded, fixed, room)
    assert len(found.keep) <= room
    assert not fixed & set(found.spare)
    assert not set(found.spare) & found.keep
    assert set(found.load) == found.keep - loaded
    assert loaded - found.keep == set(found.spare)
    after = (loaded - set(found.spare)) | set(found.load)
    again = share_out(by_need(NEEDS, use), after, fixed, room)
    assert (again.load, again.spare) == ((), ()), "and then there is peace"


@given(uses, st.sets(names_of_all, max_size=8), st.integers(4, 8))
def test_what_somebody_waits_for_comes_up(use: Use, loaded: set[str], room: int) -> None:
    """Where what is pinned leaves room, the first who asked is served at once, and so are all, one after another."""
    loaded, asked = set(sorted(loaded)[:room]), dict(use.asked)
    while asked:
        now = Use(use.used, asked, use.pinned)
        found = share_out(by_need(NEEDS, now), loaded, pinned_in(use) & loaded, room)
        loaded = (loaded - set(found.spare)) | set(found.load)
        first = min(asked, key=lambda name: (asked[name], MODELS.index(name)))
        assert f"{first}@2" in loaded
        del asked[first]


def test_the_order_of_need() -> None:
    use = Use(used={"m1@2": 5.0, "m2@2": 9.0}, asked={"m3": 4.0, "m4": 3.0}, pinned=["m0"])
    order = by_need(NEEDS, use)
    assert order[:5] == ["m0@2", "m4@2", "m3@2", "m7@2", "m7@3"], "pinned, waited for, the canary and its champion"
    assert order[5:9] == ["m2@2", "m1@2", "m2@1", "m1@1"], "by last use, then their previous versions"


def test_the_least_recently_used_makes_room() -> None:
    order = ["a@1", "b@1", "c@1"]
    assert share_out(order, {"b@1", "c@1"}, (), 2) == Slots(frozenset({"a@1", "b@1"}), ("a@1",), ("c@1",))
    assert share_out(order, {"b@1", "c@1"}, {"c@1"}, 2).spare == ("b@1",), "c is answering"
    assert share_out(order, {"b@1", "c@1"}, {"b@1", "c@1"}, 2).load == (), "a waits until one has answered"


# The real reconciler on a loopback engine.


def test_more_models_than_room_each_comes_up_when_it_is_asked_for(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    models = [f"m{number:02d}" for number in range(12)]
    for model in models:
        site.add(model, 1)
        site.promote(model, 1)

    async def all_of_them() -> None:
        most = 0
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned, slots=3, pinned=["m11"]) as here:
                board = here.board
                await here.step()
                assert sorted(canned.loaded) == ["m00@1", "m01@1", "m11@1"]
                for model in [*models, "m03", "m00"]:
                    found = board.routes.find(model, internal=False)
                    if isinstance(found, Away):
                        assert found.hold
                        assert found.want is not None
                        found.want()
                        await here.step()
                        found = board.routes.find(model, internal=False)
                    assert isinstance(found, Route)
                    assert found.adapter == f"{model}@1"
                    assert found.adapter in canned.loaded
                    with board.counted(found):
                        await here.step()
                    most = max(most, len(canned.loaded))
                    assert "m11@1" in canned.loaded, "pinned"
                assert not board.asked
                assert set(board.routes.public) == {
                    name for each in canned.loaded for name in (each, each.partition("@")[0])
                }
        assert most == 3

    asyncio.run(all_of_them())


def test_what_answers_a_request_is_not_unloaded_for_another(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    for model in ("a", "b"):
        site.add(model, 1)
        site.promote(model, 1)

    async def busy() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned, slots=1) as here:
                await here.step()
                found = here.board.routes.public["a"]
                with here.board.counted(found):
                    here.board.want("b")
                    await here.step()
                    assert list(canned.loaded) == ["a@1"]
                    assert here.board.routes.public["a"] == found, "and it still leads somewhere"
                await here.step()
                assert list(canned.loaded) == ["b@1"]
                assert "a" in here.board.routes.away

    asyncio.run(busy())


def test_with_room_for_one_alone_a_promotion_still_lands(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    for number in (1, 2):
        site.add("a", number)
    site.promote("a", 1)

    async def swap() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned, slots=1) as here:
                await here.step()
                site.promote("a", 2)
                await here.step()
                assert list(canned.loaded) == ["a@2"]
                assert here.board.routes.public["a"].adapter == "a@2"

    asyncio.run(swap())


def test_another_gateway_has_to_let_go_first(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    for model in ("a", "b"):
        site.add(model, 1)
        site.promote(model, 1)
    let_go: set[str] = set()

    async def may_unload(name: str) -> bool:
        return name in let_go

    async def two() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned, slots=1, may_unload=may_unload) as here:
                await here.step()
                here.board.want("b")
                await here.step()
                assert list(canned.loaded) == ["a@1"]
                assert "a" not in here.board.routes.public, "no new request goes there"
                assert "a@1" not in here.board.routes.internal
                let_go.add("a@1")
                await here.step()
                await here.step()
                assert list(canned.loaded) == ["b@1"]

    asyncio.run(two())


def test_a_failed_probe_is_told_to_mlflow_too(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.add("a", 1)
    site.add("a", 2, wrong=True)
    site.promote("a", 1)

    async def refuse() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                await here.step()
                site.promote("a", 2)
                for _ in range(3):
                    await here.step()
                assert here.board.routes.public["a"].adapter == "a@1"
                assert "a@2" not in canned.loaded

    asyncio.run(refuse())
    (event,) = events.read(site.store, type_="adapter.refused")
    (told,) = untold_refusals(site.store)
    assert (told.model, told.version, told.reason) == ("a", 2, event.data["reason"])
    assert "prompt tokens" in told.reason


def test_without_a_verdict_only_what_the_serve_recipe_allows_gets_a_public_route(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    for model in ("allowed", "other"):
        site.add(model, 1)

    async def routes() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned, unjudged=["allowed"]) as here:
                await here.step()
                assert list(canned.loaded) == ["allowed@1"]
                assert set(here.board.routes.public) == {"allowed", "allowed@1"}
                assert here.board.routes.closed == {"other": "it has no champion yet"}
                site.add("allowed", 2)
                await here.step()
                assert here.board.routes.public["allowed"].adapter == "allowed@2"

    asyncio.run(routes())


def test_an_alias_that_moves_is_noticed_at_once(tmp_path: Path) -> None:
    site = make_site(tmp_path)
    for number in (1, 2):
        site.add("a", number)
    site.promote("a", 1)
    site.promote("a", 2)

    async def moves() -> float:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                board = here.board
                await here.step()
                with watching_moves(site.store, board):
                    await asyncio.sleep(0.1)
                    seen, began = board.pokes, time.monotonic()
                    await asyncio.to_thread(adapters.roll_back, site.store, "a", by_whom="test")
                    await board.poked(seen, 5.0)
                    await here.step()
                    assert board.routes.public["a"].adapter == "a@1"
                    return time.monotonic() - began

    assert asyncio.run(moves()) < 0.5
