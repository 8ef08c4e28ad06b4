"""Triggers: `on:` in a recipe, and the decision whether an event starts a run of it. Pure: nothing is read or written.

`decide` gets what is known of the recipe's past in `Past`, so that every rule can be tested as a table.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from croniter import CroniterBadCronError, CroniterBadDateError, croniter
from pydantic import AfterValidator, Field, model_validator

from registry.durations import UNITS, Duration, seconds
from registry.event_types import EXTERNAL, TYPES
from registry.events import Event
from registry.recipe_part import Part, Text

# croniter knows R and H for times at random, which would come due anew at each look.
DAYS_AND_MONTHS = {
    *("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
    *("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
}


def _cron(line: str) -> str:
    """A cron line of five fields that fires at least once."""
    if len(line.split()) != 5:
        raise ValueError(f"a cron line has five fields (minute hour day month weekday): {line!r}")
    try:
        croniter(line, datetime(2026, 1, 1)).get_next()
        if unknown := [word for word in re.findall("[a-z]+", line.lower()) if word not in DAYS_AND_MONTHS]:
            raise ValueError(f"no cron line: {' '.join(unknown)} is neither a day nor a month")
    except CroniterBadCronError as error:
        raise ValueError(f"no cron line: {error}") from error
    except CroniterBadDateError as error:
        raise ValueError(f"never fires: {line!r}") from error
    return line


def _zone(name: str) -> str:
    if name not in available_timezones():
        raise ValueError(f"no such time zone: {name!r}; one is Asia/Seoul")
    return name


def _type(pattern: str) -> str:
    """A type, or a pattern, that at least one event can have."""
    if pattern.startswith("external.") or any(fnmatch(name, pattern) for name in TYPES):
        return pattern
    near = difflib.get_close_matches(pattern, TYPES, n=1)
    hint = f"did you mean {near[0]}?" if near else "`ft events types` lists them"
    raise ValueError(f"no such type of event: {pattern!r}; {hint}")


Cron = Annotated[Text, AfterValidator(_cron)]
Zone = Annotated[Text, AfterValidator(_zone)]


class Feedback(Part):
    """So much feedback on the model's answers starts a run."""

    count: int = Field(ge=1, description="At least so many")
    since_last_run: bool = Field(
        True, description="Count from the recipe's last run on; false: a run for each `count` of all"
    )
    min_rating: float | None = Field(None, description="Count only ratings of at least this")


class Match(Part):
    """An event of this type, with these values in it."""

    type: Annotated[Text, AfterValidator(_type)] = Field(
        description="The event's type; `*` stands for anything", examples=["adapter.rolled_back"]
    )
    where: dict[Text, str | int | float | bool] = Field(
        {}, description="subject, source or keys of the data (a.b for one in another), each with the value it must have"
    )


class Triggers(Part):
    """Events that start a run, in the manner of GitHub Actions; any of them does."""

    dataset: Literal[True] | list[Text] | None = Field(
        None, description="A new version of the recipe's dataset (true), or of these (paths, `*` allowed)"
    )
    recipe: Literal["changed"] | None = Field(None, description="The recipe's meaning has changed")
    feedback: Feedback | None = None
    schedule: list[Cron] = Field([], description="Cron lines, at most one run for each time that was missed")
    timezone: Zone = Field("UTC", description="Of the cron lines", examples=["Asia/Seoul"])
    event: list[Match] = Field([], description="Anything in the event log, also what was posted from outside")
    branches: list[Text] = Field(
        [], description="Of datasets, recipes and external events only those of these git branches (`*` allowed)"
    )
    cooldown: Duration | None = Field(
        None, description="Events so long after the last run was submitted start nothing: 30m, 12h"
    )
    max_runs_per_day: int | None = Field(None, ge=1, description="Events beyond so many runs in 24 hours start nothing")
    if_running: Literal["queue", "replace", "skip"] = Field(
        "queue",
        description="While a run of the recipe is on: wait behind it (one at most), cancel it, or start nothing",
    )
    dry_run: bool = Field(False, description="Only write down what would have been started")

    @model_validator(mode="after")
    def _something_starts_it(self) -> Triggers:
        if not (self.dataset or self.recipe or self.feedback or self.schedule or self.event):
            raise ValueError("nothing starts a run: give dataset, recipe, feedback, schedule or event")
        return self


@dataclass(frozen=True)
class Subscriber:
    """A recipe with triggers: its name, its model, the path of its dataset."""

    name: str
    model: str
    dataset: str
    on: Triggers


@dataclass(frozen=True)
class Past:
    """What is known of a recipe when an event is looked at. Times are Unix seconds.

    `active` are its runs that are on, the oldest first; `begun` when each of its runs of the last day, and the last of
    all, was submitted; `feedback` counts what its trigger asks for; `chain` are the recipes whose runs led here.
    """

    active: tuple[str, ...] = ()
    begun: tuple[float, ...] = ()
    feedback: int = 0
    chain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What was decided for one recipe and one event; `run_id` is that of the run that was started, if one was."""

    recipe: str
    fired: bool
    reason: str
    run_id: str | None = None
    replaces: tuple[str, ...] = ()


def listens(subscriber: Subscriber, event: Event) -> str:
    """What the event is to the recipe, in words; '' if no trigger of it is for such an event."""
    on = subscriber.on
    if event.type == "dataset.versioned" and _is_its_dataset(subscriber, event.subject):
        return f"a new version of {event.subject}"
    if event.type == "recipe.changed" and on.recipe and event.subject == subscriber.name:
        return "the recipe has changed"
    if event.type == "feedback.received" and on.feedback and event.subject.partition("@")[0] == subscriber.model:
        return f"feedback on {event.subject}"
    if event.type == "schedule.fired" and event.subject == subscriber.name and event.data.get("cron") in on.schedule:
        return f"the clock: {event.data['cron']}"
    if _matches(on, event):
        return f"{event.type} of {event.subject or event.source}"
    return ""


def decide(subscriber: Subscriber, event: Event, past: Past, now: float) -> Decision:
    """Does the event start a run? Says why, or why not."""
    what = listens(subscriber, event)
    if not what:
        return Decision(subscriber.name, False, f"has no trigger for {event.type} of {event.subject or event.source}")
    against = _what_speaks_against(subscriber, event, past, now)
    if against:
        return Decision(subscriber.name, False, f"{what}, but {against}")
    replaces = past.active if subscriber.on.if_running == "replace" else ()
    waits = f"; waits behind {past.active[0]}" if past.active and not replaces else ""
    instead = f"; instead of {', '.join(replaces)}" if replaces else ""
    return Decision(subscriber.name, True, what + waits + instead, run_id_of(subscriber.name, event), replaces)


def run_id_of(recipe: str, event: Event) -> str:
    """The same for the same recipe and event, so that an event starts at most one run of a recipe."""
    text = json.dumps([recipe, event.source, event.id])
    return f"{recipe}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def fits(match: Match, event: Event) -> bool:
    """Is it an event of that type, with those values in it?"""
    return fnmatch(event.type, match.type) and all(
        _value(event, name) == wanted for name, wanted in match.where.items()
    )


def due(line: str, zone: str, after: float, now: float) -> float | None:
    """The last time up to `now` at which the cron line fires, if that is later than `after`; Unix seconds.

    Of the times that were missed only the last is made up for. In the hour that a clock repeats in autumn a line that
    names its hours fires once, and one with `*` for them goes on; what falls into the hour that is left out in spring
    fires at its end.
    """
    last = croniter(line, datetime.fromtimestamp(now, ZoneInfo(zone))).get_prev(float)
    if not line.split()[1].startswith("*"):
        last = datetime.fromtimestamp(last, ZoneInfo(zone)).replace(fold=0).timestamp()
    return float(last) if last > after else None


def _what_speaks_against(subscriber: Subscriber, event: Event, past: Past, now: float) -> str:
    # Runs of the future were submitted while the clock was wrong, and must not block the recipe until it gets there.
    on, begun = subscriber.on, [each for each in past.begun if each <= now]
    last = max(begun, default=None)
    if subscriber.name in past.chain:
        circle = " -> ".join([*past.chain[past.chain.index(subscriber.name):], subscriber.name])  # fmt: skip
        return f"it would go round in a circle: {circle}"
    branch = str(event.data.get("branch", ""))
    if on.branches and _has_branch(event) and not any(fnmatch(branch, each) for each in on.branches):
        return f"branch {branch or 'unknown'} is none of {', '.join(on.branches)}"
    if event.type == "feedback.received" and on.feedback and not _matches(on, event):
        missing = _missing_feedback(on.feedback, past.feedback)
        if missing:
            return f"{on.feedback.count - missing} of {on.feedback.count} are there"
    if on.cooldown and last is not None and now - last < seconds(on.cooldown):
        return f"the last run was submitted {now - last:.0f} s ago, and cooldown is {on.cooldown}"
    today = [each for each in begun if now - each < UNITS["d"]]
    if on.max_runs_per_day is not None and len(today) >= on.max_runs_per_day:
        return f"{len(today)} runs were submitted in the last 24 hours, and max_runs_per_day is {on.max_runs_per_day}"
    if past.active and on.if_running == "skip":
        return f"{past.active[0]} is on, and if_running is skip"
    if len(past.active) > 1 and on.if_running == "queue":
        return f"{past.active[1]} waits already, and will see what is there when it begins"
    return "dry_run is set" if on.dry_run else ""


def _missing_feedback(wanted: Feedback, there: int) -> int:
    """How many more are needed; where all are counted from the beginning, every `count`-th starts a run."""
    if wanted.since_last_run:
        return max(0, wanted.count - there)
    return -there % wanted.count if there else wanted.count


def _is_its_dataset(subscriber: Subscriber, path: str) -> bool:
    wanted = subscriber.on.dataset
    if wanted is True:
        return path == os.path.normpath(subscriber.dataset)
    return any(fnmatch(path, os.path.normpath(each)) for each in wanted or [])


def _has_branch(event: Event) -> bool:
    return event.type in ("dataset.versioned", "recipe.changed") or event.type.startswith(EXTERNAL)


def _matches(on: Triggers, event: Event) -> bool:
    return any(fits(match, event) for match in on.event)


def _value(event: Event, name: str) -> Any:
    if name in ("subject", "source"):
        return getattr(event, name)
    found: Any = event.data
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
