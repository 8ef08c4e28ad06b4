"""Triggers as a table: which event starts which run, and what speaks against it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from registry.events import Event
from registry.triggers import Past, Subscriber, Triggers, decide, due, listens, run_id_of

NOW = 1_800_000_000.0
HOUR = 3600.0


def event(type_: str, subject: str = "", id_: str = "e1", **data: Any) -> Event:
    return Event("test", id_, type_, subject, NOW, data)


def subscriber(**on: Any) -> Subscriber:
    return Subscriber("support", "tickets", "datasets/tickets", Triggers.model_validate(on))


ANY = {"event": [{"type": "external.*"}]}
GO = event("external.go")


@pytest.mark.parametrize(
    ("on", "what", "heard"),
    [
        ({"dataset": True}, event("dataset.versioned", "datasets/tickets"), True),
        ({"dataset": True}, event("dataset.versioned", "datasets/other"), False),
        ({"dataset": ["datasets/o*"]}, event("dataset.versioned", "datasets/other"), True),
        ({"recipe": "changed"}, event("recipe.changed", "support"), True),
        ({"recipe": "changed"}, event("recipe.changed", "other"), False),
        ({"recipe": "changed"}, event("dataset.versioned", "datasets/tickets"), False),
        ({"feedback": {"count": 1}}, event("feedback.received", "tickets@3"), True),
        ({"feedback": {"count": 1}}, event("feedback.received", "tickets-2@3"), False),
        ({"schedule": ["0 3 * * *"]}, event("schedule.fired", "support", cron="0 3 * * *"), True),
        ({"schedule": ["0 3 * * *"]}, event("schedule.fired", "support", cron="0 4 * * *"), False),
        ({"schedule": ["0 3 * * *"]}, event("schedule.fired", "other", cron="0 3 * * *"), False),
        ({"event": [{"type": "adapter.*"}]}, event("adapter.rolled_back", "tickets@2"), True),
        ({"event": [{"type": "adapter.*"}]}, event("run.failed", "support-1"), False),
        (
            {"event": [{"type": "external.ci", "where": {"a.b": 1, "source": "test"}}]},
            event("external.ci", a={"b": 1}),
            True,
        ),
        ({"event": [{"type": "external.ci", "where": {"a.b": 1}}]}, event("external.ci", a={"b": 2}), False),
        ({"event": [{"type": "external.ci", "where": {"a.b.c": 1}}]}, event("external.ci", a=3), False),
    ],
)
def test_what_a_recipe_listens_to(on: dict[str, Any], what: Event, heard: bool) -> None:
    assert bool(listens(subscriber(**on), what)) is heard
    assert decide(subscriber(**on), what, Past(feedback=9), NOW).fired is heard


@pytest.mark.parametrize(
    ("on", "past", "said"),
    [
        ({"cooldown": "1h"}, Past(begun=(NOW - 2 * HOUR,)), ""),
        ({"cooldown": "3h"}, Past(begun=(NOW - 9 * HOUR, NOW - 2 * HOUR)), "the last run was submitted 7200 s ago"),
        ({"cooldown": "1h", "max_runs_per_day": 1}, Past(begun=(NOW + 60,)), ""),  # the clock was set back
        ({"max_runs_per_day": 2}, Past(begun=(NOW - 25 * HOUR, NOW - HOUR)), ""),
        (
            {"max_runs_per_day": 2},
            Past(begun=(NOW - 2 * HOUR, NOW - HOUR)),
            "2 runs were submitted in",
        ),
        ({"if_running": "skip"}, Past(active=("support-1",)), "support-1 is on, and if_running is skip"),
        ({"if_running": "queue"}, Past(active=("support-1",)), ""),
        ({"if_running": "queue"}, Past(active=("support-1", "support-2")), "support-2 waits already"),
        ({"dry_run": True}, Past(), "dry_run is set"),
        ({}, Past(chain=("a", "support", "b")), "it would go round in a circle: support -> b -> support"),
        ({}, Past(chain=("a", "b")), ""),
        ({"branches": ["main", "release/*"]}, Past(), "branch unknown is none of main, release/*"),
    ],
)
def test_what_speaks_against_a_run(on: dict[str, Any], past: Past, said: str) -> None:
    decision = decide(subscriber(**ANY, **on), GO, past, NOW)
    assert decision.fired is (said == "")
    assert said in decision.reason
    assert decision.run_id == (run_id_of("support", GO) if decision.fired else None)


def test_a_branch_is_matched_as_a_pattern() -> None:
    on = subscriber(**ANY, branches=["release/*"])
    assert decide(on, event("external.go", branch="release/2"), Past(), NOW).fired
    assert not decide(on, event("external.go", branch="main"), Past(), NOW).fired


def test_branches_silence_nothing_that_has_none() -> None:
    on = subscriber(schedule=["0 3 * * *"], event=[{"type": "adapter.*"}], branches=["main"])
    assert decide(on, event("schedule.fired", "support", cron="0 3 * * *"), Past(), NOW).fired
    assert decide(on, event("adapter.rolled_back", "tickets@1"), Past(), NOW).fired


def test_each_trigger_stands_for_itself() -> None:
    on = subscriber(feedback={"count": 9}, event=[{"type": "feedback.received", "where": {"rating": 1}}])
    assert decide(on, event("feedback.received", "tickets@1", rating=1), Past(feedback=1), NOW).fired
    assert not decide(on, event("feedback.received", "tickets@1", rating=2), Past(feedback=2), NOW).fired


@pytest.mark.parametrize(("there", "fires"), [(0, False), (2, False), (3, True), (4, False), (6, True)])
def test_feedback_from_the_beginning_on_starts_a_run_for_each_count(there: int, fires: bool) -> None:
    on = subscriber(feedback={"count": 3, "since_last_run": False})
    assert decide(on, event("feedback.received", "tickets@1"), Past(feedback=there), NOW).fired is fires


def test_a_path_that_is_written_otherwise_is_the_same_dataset() -> None:
    on = Subscriber("support", "tickets", "./datasets/tickets/", Triggers(dataset=True))
    assert listens(on, event("dataset.versioned", "datasets/tickets"))


def test_enough_feedback_starts_a_run() -> None:
    on = subscriber(feedback={"count": 20})
    said = decide(on, event("feedback.received", "tickets@1"), Past(feedback=19), NOW)
    assert (said.fired, "19 of 20 are there" in said.reason) == (False, True)
    assert decide(on, event("feedback.received", "tickets@1"), Past(feedback=20), NOW).fired


def test_replace_names_the_run_that_it_replaces() -> None:
    decision = decide(subscriber(**ANY, if_running="replace"), GO, Past(active=("support-1",)), NOW)
    assert (decision.fired, decision.replaces) == (True, ("support-1",))


def test_an_event_has_one_run_id_for_each_recipe() -> None:
    assert run_id_of("a", GO) == run_id_of("a", event("external.other"))  # the id is of (source, id), nothing else
    assert len({run_id_of("a", GO), run_id_of("b", GO), run_id_of("a", event("external.go", id_="e2"))}) == 3


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ({}, "nothing starts a run"),
        ({"schedule": ["0 3 * *"]}, "five fields"),
        ({"schedule": ["61 3 * * *"]}, "no cron line"),
        ({"schedule": ["0 0 30 2 *"]}, "never fires"),
        ({"schedule": ["R R * * *"]}, "r r is neither a day nor a month"),
        ({"event": [{"type": "adapter.rolledback"}]}, "did you mean adapter.rolled_back"),
        ({"schedule": ["0 3 * * *"], "timezone": "Asia/Soul"}, "no such time zone"),
        ({**ANY, "cooldown": "soon"}, "a duration is"),
        ({**ANY, "if_running": "wait"}, "'queue', 'replace' or 'skip'"),
        ({"dataset": False}, "Input should be"),
        ({"feedback": {"count": 0}}, "greater than or equal to 1"),
        ({**ANY, "cooldwn": "1h"}, "Extra inputs"),
    ],
)
def test_triggers_that_cannot_be_meant_are_refused(on: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Triggers.model_validate(on)


def test_of_the_times_that_were_missed_the_last_is_made_up_for() -> None:
    def at(day: int, hour: int, minute: int = 0) -> float:
        return datetime(2026, 11, day, hour, minute, tzinfo=UTC).timestamp()

    assert due("0 3 * * *", "UTC", at(20, 3), at(21, 2)) is None
    assert due("0 3 * * *", "UTC", at(18, 3), at(21, 4)) == at(21, 3)
    assert due("0 3 * * *", "Asia/Seoul", at(20, 12), at(20, 19)) == at(20, 18)
    assert due("0 3 * * *", "UTC", at(21, 3), at(19, 4)) is None  # the clock was set back


def fired(line: str, zone: str, first: datetime, hours: int) -> list[str]:
    """The local times at which a worker that looks every minute finds the line due."""
    after = first.timestamp()
    found = []
    for minute in range(hours * 60 + 1):
        moment = due(line, zone, after, first.timestamp() + 60 * minute)
        if moment:
            found.append(datetime.fromtimestamp(moment, ZoneInfo(zone)).strftime("%H:%M %Z"))
            after = moment
    return found


AUTUMN, SPRING = datetime(2026, 11, 1, 4, 1, tzinfo=UTC), datetime(2026, 3, 8, 5, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("line", "first", "found"),
    [
        ("30 1 * * *", AUTUMN, ["01:30 EDT"]),
        ("0 1,2 * * *", AUTUMN, ["01:00 EDT", "02:00 EST"]),
        ("0 2 * * *", AUTUMN, ["02:00 EST"]),
        ("30 * * * *", AUTUMN, ["00:30 EDT", "01:30 EDT", "01:30 EST", "02:30 EST"]),
        ("30 2 * * *", SPRING, ["03:00 EDT"]),
        ("0 3 * * *", SPRING, ["03:00 EDT"]),
        ("30 1,3 * * *", SPRING, ["01:30 EST", "03:30 EDT"]),
        ("30 * * * *", SPRING, ["00:30 EST", "01:30 EST", "03:30 EDT", "04:30 EDT"]),
    ],
)
def test_a_clock_that_is_changed_makes_no_line_fire_twice(line: str, first: datetime, found: list[str]) -> None:
    assert fired(line, "America/New_York", first, 4) == found


def test_what_was_missed_in_the_repeated_hour_is_made_up_for_once() -> None:
    late = datetime(2026, 11, 1, 6, 45, tzinfo=UTC).timestamp()
    began = datetime(2026, 11, 1, 5, 30, tzinfo=UTC).timestamp()
    assert due("30 1 * * *", "America/New_York", AUTUMN.timestamp(), late) == began
    assert due("30 1 * * *", "America/New_York", began, late) is None
