"""What has had its time, as a table; and what an adapter in use was made of, which never has."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from registry.retention import EndedRun, Keep, Known, KnownVersion, Plan, decide

NOW = 1_800_000_000.0
DAY = 86400.0


def run(days: float, state: str = "succeeded", **facts: Any) -> EndedRun:
    return EndedRun("r", state, NOW - days * DAY, **facts)


def version(**facts: Any) -> KnownVersion:
    return KnownVersion(**{"name": "m@1", "run_id": "r", "created": NOW - 200 * DAY, "outcome": "pass", **facts})


def decided(*runs: EndedRun, versions: tuple[KnownVersion, ...] = (), keep: Keep | None = None) -> Plan:
    return decide(keep or Keep(), Known(runs, versions, frozenset({"busy"}), passed=7), NOW)


@pytest.mark.parametrize(
    ("ended", "goes"),
    [
        (run(6), ""),
        (run(8), "checkpoints"),
        (run(8, "refused"), "checkpoints"),
        (run(8, has_checkpoints=False), ""),
        (run(8, "failed"), ""),  # `ft resume` goes on from them
        (run(13, "cancelled"), ""),
        (run(15, "cancelled"), "jobs"),
        (run(15, "failed", told=False), "jobs"),
        (run(15, "failed", has_folder=False), ""),
        (run(31), "jobs"),
        (run(89, has_folder=False, has_checkpoints=False), ""),
        (run(91), "runs"),
        (run(91, "failed"), "runs"),
        (run(91, "failed", told=False, has_folder=False), ""),  # MLflow does not know of its end
        (run(-1), ""),  # the clock was wrong when it ended
    ],
)
def test_what_goes_when(ended: EndedRun, goes: str) -> None:
    plan = decided(ended)
    assert {"runs": plan.runs, "jobs": plan.jobs, "checkpoints": plan.checkpoints} == {
        name: ("r",) if name == goes else () for name in ("runs", "jobs", "checkpoints")
    }


@pytest.mark.parametrize(
    ("facts", "used"),
    [
        ({"aliased": True}, True),
        ({"loaded": True}, True),
        ({"champion_until": NOW - 10 * DAY}, True),
        ({"champion_until": NOW - 100 * DAY}, False),
        ({}, False),
    ],
)
def test_what_an_adapter_in_use_was_made_of_is_kept(facts: dict[str, Any], used: bool) -> None:
    plan = decided(run(999), versions=(version(**facts),))
    assert plan.runs == (() if used else ("r",))
    assert plan.jobs == plan.checkpoints == ()
    assert plan.kept == ({"busy", "r", "m@1"} if used else {"busy"})


def test_whoever_was_champion_once_keeps_its_run_where_runs_are_kept_for_ever() -> None:
    keep = Keep(runs="off", jobs="1d", checkpoints="1d")
    assert decided(run(999), versions=(version(champion_until=1.0),), keep=keep).jobs == ()
    assert decided(run(999), versions=(version(),), keep=keep).jobs == ("r",)


@pytest.mark.parametrize(
    ("facts", "goes"),
    [
        ({"outcome": "fail"}, True),
        ({"outcome": "fail", "created": NOW - 179 * DAY}, False),
        ({"outcome": "fail", "aliased": True}, False),
        ({"outcome": "fail", "loaded": True}, False),
        ({"outcome": "fail", "pruned": True}, False),
        ({"outcome": "fail", "champion_until": NOW - 900 * DAY}, False),
        ({"outcome": "pass"}, False),
        ({"outcome": "undecided"}, False),
        ({"outcome": ""}, False),
    ],
)
def test_only_adapters_that_failed_and_nobody_uses_go(facts: dict[str, Any], goes: bool) -> None:
    assert decided(versions=(version(**facts),)).adapters == (("m@1",) if goes else ())


def test_events_scores_and_logs_go_by_their_age() -> None:
    plan = decided(keep=Keep(events="2d", scores="off", logs="3w"))
    assert (plan.events_before, plan.events_up_to) == (NOW - 2 * DAY, 7)
    assert (plan.scores_before, plan.logs_before) == (-1.0, NOW - 21 * DAY)


def test_off_is_for_ever() -> None:
    keep = Keep.model_validate(yaml.safe_load("{runs: off, jobs: off, failed_jobs: off, checkpoints: off}"))
    plan = decided(run(9999), run(9999, "failed"), keep=keep)
    assert plan.runs == plan.jobs == plan.checkpoints == ()


@pytest.mark.parametrize("wrong", [{"runs": "30"}, {"runs": "1 month"}, {"runs": True}, {"run": "3d"}, {"runs": "-3d"}])
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Keep.model_validate(wrong)
