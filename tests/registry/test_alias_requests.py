"""A champion moved in MLflow: what is granted, what is refused, and that ft's own writes are never taken for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from registry import adapters, rollouts
from registry.alias_requests import (
    Standing,
    decide_request,
    mark_refusal_told,
    standing,
    untold_refusals,
)
from registry.alias_telling import LEASE_SECONDS, Telling, abandon_telling, begin_telling, end_telling
from registry.events import causes, read
from registry.leases import is_gone, new_lease
from registry.project import Project
from registry.rollout_terms import parse_canary
from registry.store import Store
from tests.conftest import run_bounded

CLAIM = """
from registry.alias_telling import begin_telling
from registry.project import find_project
from registry.store import open_store
print(begin_telling(open_store(find_project()), "m", "champion") is not None)
"""


def add(store: Store, number: int) -> None:
    adapters.add_version(store, "m", number, f"run-{number}", f"adapters/m/{number}", {})


def judge(store: Store, number: int, outcome: str = "pass", against: int | None = None) -> adapters.Verdict:
    return adapters.add_verdict(store, "m", number, outcome, {"champion": against, "checks": []}, None)


def tell(store: Store) -> None:
    """MLflow takes everything that it does not know yet."""
    for model, alias, _ in adapters.unprojected_aliases(store):
        telling = begin_telling(store, model, alias)
        assert telling is not None
        end_telling(store, telling)
    for refusal in untold_refusals(store):
        mark_refusal_told(store, refusal)


def champions(store: Store, *numbers: int) -> None:
    """Each of them was promoted after the one before it, and MLflow knows."""
    before = None
    for number in numbers:
        add(store, number)
        adapters.promote(store, judge(store, number, against=before), by_whom="ann")
        before = number
    tell(store)


def standing_now(store: Store) -> Standing:
    found = standing(store, "m")
    assert found is not None
    return found


def moved(store: Store, wanted: int | None) -> str | None:
    return decide_request(store, standing_now(store), wanted)


def aliases(store: Store) -> dict[str, int]:
    return adapters.aliases(store, "m")


def said(store: Store) -> list[tuple[str, str, dict[str, Any]]]:
    return [(each.type, each.subject, each.data) for each in read(store) if each.type.startswith("alias.")]


def test_a_version_with_a_passing_verdict_against_the_champion_is_promoted(store: Store) -> None:
    champions(store, 1)
    add(store, 2)
    judge(store, 2, against=1)
    tell(store)
    assert moved(store, 2) == ""
    assert (aliases(store)["champion"], aliases(store)["previous"]) == (2, 1)
    assert said(store) == [("alias.requested", "m@2", {"alias": "champion", "from": 1, "to": 2})]
    [promoted] = read(store, type_="adapter.promoted", subject="m@2")
    assert [each.type for each in causes(store, promoted)] == ["alias.requested"]
    assert promoted.data["by"] == "mlflow"
    assert standing(store, "m") is None, "MLflow has still to be told of `previous`"


def test_the_first_champion_may_be_made_in_mlflow(store: Store) -> None:
    add(store, 1)
    judge(store, 1)
    tell(store)
    assert moved(store, 1) == ""
    assert aliases(store)["champion"] == 1


def test_to_the_previous_version_is_a_rollback(store: Store) -> None:
    champions(store, 1, 2)
    assert moved(store, 1) == ""
    assert aliases(store)["champion"] == 1
    assert adapters.get_version(store, "m", 2).rolled_back
    tell(store)
    # Back and forth: the version that was rolled back is `previous` now.
    reason = moved(store, 2)
    assert reason is not None
    assert "m@2 was rolled back; a person may: `ft promote m@2`" in reason


@pytest.mark.parametrize(
    ("outcome", "against", "wanted", "said_"),
    [
        ("fail", 2, 3, "no passing verdict (fail)"),
        ("undecided", 2, 3, "no passing verdict (undecided)"),
        ("pass", 1, 3, "was judged against version 1, and the champion is version 2 now"),
        (None, None, 3, "m@3 was never judged; judge it with `ft gate m@3`"),
        (None, None, 9, "ft has no version m@9"),
        (None, None, None, "was deleted in MLflow"),
    ],
)
def test_what_is_refused_is_put_back_with_the_reason(
    outcome: str | None, against: int | None, wanted: int | None, said_: str, store: Store
) -> None:
    champions(store, 1, 2)
    add(store, 3)
    if outcome:
        judge(store, 3, outcome, against)
    tell(store)
    before = aliases(store)
    reason = moved(store, wanted)
    assert reason is not None
    assert said_ in reason
    assert aliases(store) == before
    subject = "m" if wanted is None else f"m@{wanted}"
    assert said(store) == [
        ("alias.requested", subject, {"alias": "champion", "from": 2, "to": wanted}),
        ("alias.refused", subject, {"alias": "champion", "reason": reason, "champion": 2}),
    ]
    assert [(each.model, each.version, each.reason) for each in untold_refusals(store)] == [("m", wanted, reason)]
    assert adapters.unprojected_aliases(store) == [("m", "champion", 2)]
    assert standing(store, "m") is None, "until it is put back, what MLflow has is no news"
    tell(store)
    assert moved(store, wanted) == reason, "somebody who does it again is answered again"


def test_what_changed_between_looking_here_and_looking_there_is_no_request(store: Store) -> None:
    champions(store, 1)
    before = standing_now(store)
    adapters.promote(store, _passed(store, 2, 1), by_whom="ann")  # and MLflow had not been told when it was read
    tell(store)
    assert decide_request(store, before, 1) is None
    now = standing_now(store)
    telling = begin_telling(store, "m", "champion")  # the same again, while MLflow was read
    assert telling is not None
    end_telling(store, telling)
    assert decide_request(store, now, 1) is None
    assert said(store) == []
    assert decide_request(store, standing_now(store), 2) is None  # it is where it should be


def test_of_two_workers_that_see_it_one_decides(store: Store) -> None:
    champions(store, 1)
    before = standing_now(store)
    assert decide_request(store, before, 9)
    assert decide_request(store, before, 9) is None
    tell(store)
    assert decide_request(store, before, 9) is None
    assert len(said(store)) == 2


def test_while_ft_tells_an_alias_nobody_else_does(store: Store) -> None:
    champions(store, 1)
    mine = begin_telling(store, "m", "champion")
    assert mine is not None
    assert (mine.version, begin_telling(store, "m", "champion"), standing(store, "m")) == (1, None, None)
    other = begin_telling(store, "m", "previous")
    assert other is not None
    assert other.version is None
    with store.writing() as connection:  # it takes too long
        connection.execute("UPDATE projections SET since = since - ?", (LEASE_SECONDS,))
    theirs = begin_telling(store, "m", "champion")
    assert theirs is not None
    end_telling(store, mine)
    assert standing(store, "m") is None, "who comes too late ends nothing"
    end_telling(store, theirs)
    assert standing(store, "m") is not None


def test_told_too_late_or_in_vain_it_is_told_again(store: Store) -> None:
    add(store, 1)
    assert adapters.unprojected_aliases(store) == [("m", "candidate", 1)]
    tell(store)
    assert adapters.unprojected_aliases(store) == []
    late = begin_telling(store, "m", "candidate")
    assert late is not None
    add(store, 2)
    end_telling(store, late)
    assert adapters.unprojected_aliases(store) == [("m", "candidate", 2)]
    failed = begin_telling(store, "m", "candidate")
    assert isinstance(failed, Telling)
    abandon_telling(store, failed)
    assert adapters.unprojected_aliases(store) == [("m", "candidate", 2)]
    tell(store)
    assert adapters.unprojected_aliases(store) == []


def test_who_was_killed_while_telling_keeps_nobody(project: Project, store: Store) -> None:
    champions(store, 1)
    assert run_bounded([sys.executable, "-c", CLAIM], 60, cwd=project.root).stdout == "True\n"
    assert standing(store, "m") is None
    assert adapters.unprojected_aliases(store) == [("m", "champion", 1)]
    tell(store)
    assert standing(store, "m") is not None


def test_a_lease_is_gone_with_its_process(project: Project) -> None:
    assert not is_gone(new_lease())
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    host, _, rest = new_lease().partition(" ")
    assert is_gone(f"{host} {gone.pid} {rest}")
    assert not is_gone(f"elsewhere {gone.pid} x")
    assert not is_gone("nonsense")


def _passed(store: Store, number: int, against: int) -> adapters.Verdict:
    add(store, number)
    return judge(store, number, against=against)


def test_a_version_that_no_gate_passed_needs_the_serve_recipes_leave(store: Store) -> None:
    champions(store, 1)
    add(store, 2)
    tell(store)
    said_no = decide_request(store, standing_now(store), 2)
    assert said_no is not None
    assert "never judged" in said_no
    tell(store)
    assert decide_request(store, standing_now(store), 2, unjudged=True) == ""
    assert aliases(store)["champion"] == 2
    verdict = adapters.last_verdict(store, "m", 2)
    assert verdict is not None
    assert (verdict.outcome, verdict.body["checks"][0]["name"]) == ("undecided", "unjudged")


def test_beside_a_rollout_a_move_in_mlflow_is_refused_also_back_to_previous(store: Store) -> None:
    champions(store, 1, 2)
    add(store, 3)
    begun = rollouts.start(store, judge(store, 3, against=2), parse_canary("5%:1m"), by_whom="ann")
    tell(store)
    for wanted in (3, 1):
        reason = moved(store, wanted)
        assert reason is not None
        assert "a rollout of m@3 is under way" in reason
        tell(store)
    assert aliases(store)["champion"] == 2
    rollouts.cancel(store, begun, by_whom="ann")
    assert moved(store, 1) == ""
