"""What is kept, and for how long: `keep:` in ft.yaml, and the decision what has had its time. Pure: nothing is deleted.

What an adapter in use was made of is kept: the run, its job folder, its steps and events. In use is a version that an
alias names, that a live server has loaded, or that was champion at any time within `runs`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}
FOR_EVER = "off"


def _period(value: Any) -> str:
    text = FOR_EVER if value is False else str(value)  # `off` is false in YAML 1.1
    if text != FOR_EVER and not re.fullmatch(r"\d{1,5}[hdw]", text):
        raise ValueError("a number and h, d or w (like 30d), or off for ever")
    return text


Period = Annotated[str, BeforeValidator(_period)]


class Keep(BaseModel):
    """How long what is kept: a number and h, d or w; `off`: for ever. `keep: off` is that for all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _all_for_ever(cls, given: Any) -> Any:
        periods = [name for name in cls.model_fields if name != "auto"]
        return dict.fromkeys(periods, FOR_EVER) if given in (False, FOR_EVER) else given

    auto: bool = Field(False, description="A worker prunes once a day; otherwise only `ft prune` does")
    runs: Period = Field("90d", description="Rows and steps of runs that have ended, with all that is left of them")
    jobs: Period = Field("30d", description="Job folders of runs that succeeded or were refused")
    failed_jobs: Period = Field("14d", description="Job folders of failed and cancelled runs; then no `ft resume`")
    checkpoints: Period = Field("7d", description="Checkpoints of runs that succeeded or were refused")
    adapters: Period = Field("180d", description="Adapters that the gate failed and that were never promoted")
    scores: Period = Field("180d", description="Kept answers and scores; what is gone is asked again")
    events: Period = Field("180d", description="Data of events; what, when, of whom and why is kept for ever")
    logs: Period = Field("90d", description="Logs in .ft/logs in which nothing was written for so long")

    def before(self, what: str, now: float) -> float:
        """What is older than this Unix time has had its time; -1: nothing has."""
        period = str(getattr(self, what))
        return -1.0 if period == FOR_EVER else now - int(period[:-1]) * UNITS[period[-1]]


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended and of which nothing is wanted. `told`: MLflow knows of its end."""

    id: str
    state: str
    ended: float
    told: bool = True
    has_folder: bool = True
    has_checkpoints: bool = True


@dataclass(frozen=True)
class KnownVersion:
    """A version; `champion_until` is when it last was champion (Unix time), None if it never was."""

    name: str
    run_id: str
    created: float
    outcome: str = ""
    aliased: bool = False
    loaded: bool = False
    champion_until: float | None = None
    pruned: bool = False


@dataclass(frozen=True)
class Known:
    """What is there. `busy` are runs that have not ended, `passed` is the last event that all readers passed."""

    runs: tuple[EndedRun, ...] = ()
    versions: tuple[KnownVersion, ...] = ()
    busy: frozenset[str] = frozenset()
    passed: int = 0


@dataclass(frozen=True)
class Plan:
    """What has had its time: run ids, version names; events, scores and logs by the time before which they go.

    `kept` are the subjects (runs and versions) whose events stay whole.
    """

    runs: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    events_before: float = -1.0
    events_up_to: int = 0
    scores_before: float = -1.0
    logs_before: float = -1.0
    kept: frozenset[str] = field(default_factory=frozenset)


def decide(keep: Keep, known: Known, now: float) -> Plan:
    """What goes. A run that goes takes its job folder with it, a job folder its checkpoints."""
    used = [each for each in known.versions if _in_use(each, keep.before("runs", now))]
    makers = {each.run_id for each in used}
    free = [run for run in known.runs if run.id not in makers]
    runs = [run.id for run in free if run.told and run.ended < keep.before("runs", now)]
    jobs = [run.id for run in free if run.has_folder and run.id not in runs and run.ended < _job_limit(keep, run, now)]
    gone = {*runs, *jobs}
    return Plan(
        runs=tuple(runs),
        jobs=tuple(jobs),
        checkpoints=tuple(run.id for run in free if run.id not in gone and _is_spent(keep, run, now)),
        adapters=tuple(each.name for each in known.versions if _may_go(keep, each, now) and each not in used),
        events_before=keep.before("events", now),
        events_up_to=known.passed,
        scores_before=keep.before("scores", now),
        logs_before=keep.before("logs", now),
        kept=frozenset({*makers, *known.busy, *(each.name for each in used)}),
    )


def _in_use(version: KnownVersion, since: float) -> bool:
    was_champion = version.champion_until is not None and version.champion_until >= since
    return version.aliased or version.loaded or was_champion


def _job_limit(keep: Keep, run: EndedRun, now: float) -> float:
    return keep.before("failed_jobs" if _may_be_resumed(run) else "jobs", now)


def _is_spent(keep: Keep, run: EndedRun, now: float) -> bool:
    """The adapter was copied out of the folder, so nobody goes on from a checkpoint."""
    return run.has_checkpoints and not _may_be_resumed(run) and run.ended < keep.before("checkpoints", now)


def _may_be_resumed(run: EndedRun) -> bool:
    return run.state not in ("succeeded", "refused")


def _may_go(keep: Keep, version: KnownVersion, now: float) -> bool:
    unwanted = version.outcome == "fail" and version.champion_until is None and not version.pruned
    return unwanted and version.created < keep.before("adapters", now)
