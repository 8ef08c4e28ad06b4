"""What is wanted, and what is decided about it, without an engine."""

from __future__ import annotations

from typing import Any

import pytest

from registry import adapters
from registry.adapters import Version
from registry.base_models import BaseModel
from registry.store import Store
from serving.parity import Parity
from serving.reconciler import Wanted, decide, nothing_answers, rank_needed, to_bring_up, wanted_models
from serving.routes import Away
from serving.swap import Landed

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
    found = [each.name for each in to_bring_up(models, names(), {})]
    assert found == ["tickets@2", "letters@5", "tickets@1"]
    assert [each.name for each in to_bring_up(models, names(1), {"tickets@2": "why"})] == ["letters@5"]


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
