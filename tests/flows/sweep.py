"""`make sweep-kill`: kill -9 at every point of a run's way, then at random moments; count what came of it.

The pipeline as real processes: worker, trainer, server, targets and stores are the product's own. One project for all
trials; each is a new event, a new run, a new version. Prints a line for each trial and a JSON summary; exit code 1 if
anything did not hold, and the project stays where it is.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from registry import runs
from registry.errors import NotFound, StoreError
from registry.events import Event, append, new_event, read
from registry.triggers import run_id_of
from tests.flows.invariants import violations
from tests.flows.points import POINTS, Point
from tests.flows.restarts import Noise, Restarts
from tests.flows.shared_parts import Shared, canned_parts, real_parts
from tests.flows.swept_project import MODEL, Parts, Swept, swept_project
from tests.postgres_server import PostgresServer, postgres_server

Value = TypeVar("Value")
# Of a run, and of every death in it: a worker that starts anew has seconds of imports before it.
RUN_SECONDS, DEATH_SECONDS = 300.0, 60.0
# A person resumes a run that gave up (its trainer died four times, its engine in the evaluation).
RESUMES = 8
# A run takes some ten seconds.
SPREAD_SECONDS = (0.2, 6.0)
ENGINES = {"vllm": real_parts, "canned": canned_parts}
ROLES = ("worker", "worker", "trainer", "server", "engine")


@dataclass
class Trial:
    """One run and what was done to it."""

    name: str
    killed: list[str] = field(default_factory=list)
    resumes: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    event: Event | None = None

    @property
    def line(self) -> str:
        what = "; ".join(self.wrong) if self.wrong else "ok"
        again = f", resumed {self.resumes}" if self.resumes else ""
        return f"{self.name}: killed {', '.join(self.killed) or 'nothing'}{again}: {self.seconds:.1f} s: {what}"


def at_points(swept: Swept, points: list[Point], name: str = "") -> Trial:
    """One run that is killed at each of the points, in this order."""
    trial, began, waiting = Trial(name or points[0].name), time.monotonic(), list(points)
    swept.keep_up()
    swept.give_order(waiting[0])
    event, run_id = _news(swept, points[0].news)
    while not _is_over(swept, run_id, trial, began):
        if not swept.order.exists() and waiting:
            trial.killed.append(waiting.pop(0).killed)
            if waiting:
                swept.give_order(waiting[0])
        _keep_on(swept, run_id, trial)
    # The last points come after the run's own end.
    trial.wrong = violations(swept, event, run_id)
    trial.killed += [each.killed for each in waiting[:1] if not swept.order.exists()]
    trial.wrong += [f"never came to: {each.name}" for each in waiting if swept.order.exists()]
    swept.order.unlink(missing_ok=True)
    trial.seconds = time.monotonic() - began
    return trial


def at_random(
    swept: Swept, dice: random.Random, most: int, name: str, spread: tuple[float, float] = SPREAD_SECONDS
) -> Trial:
    """One run in which up to `most` processes are killed at random moments."""
    return _checked(swept, _run_through(swept, dice, most, name, spread))


def _run_through(
    swept: Swept, dice: random.Random, most: int, name: str, spread: tuple[float, float] = SPREAD_SECONDS
) -> Trial:
    trial, began = Trial(name), time.monotonic()
    swept.keep_up()
    trial.event, run_id = _news(swept, dice.choice(["event", "event", "dataset"]))
    due = time.monotonic() + dice.uniform(*spread)
    while not _is_over(swept, run_id, trial, began):
        if len(trial.killed) < most and time.monotonic() > due:
            role = dice.choice(ROLES)
            if swept.kill(role, run_id):
                trial.killed.append(f"{role} at {_stage(swept, run_id)}")
            due = time.monotonic() + dice.uniform(*spread)
        _keep_on(swept, run_id, trial)
    trial.seconds = time.monotonic() - began
    return trial


def _checked(swept: Swept, trial: Trial) -> Trial:
    assert trial.event is not None
    trial.wrong += violations(swept, trial.event, run_id_of(MODEL, trial.event))
    return trial


def _news(swept: Swept, kind: str) -> tuple[Event, str]:
    """Something happens; the event, once it is in the log, and the run that it must start."""
    known, deadline = {each.ref for each in _external(swept)}, time.monotonic() + RUN_SECONDS
    if kind == "event":
        event = new_event("tests/sweep", "external.go", "", {})
        _patiently(swept, lambda: append(swept.store, event))
    else:
        while not _is_watched(swept):  # what is there at a worker's first look is no news
            assert time.monotonic() < deadline, "nobody looked at the datasets"
            swept.keep_up()
            time.sleep(0.1)
        swept.change_data()
    while not (fresh := [each for each in _external(swept) if each.ref not in known]):
        assert time.monotonic() < deadline, "the changed dataset was not noticed"
        swept.keep_up()
        time.sleep(0.1)
    return fresh[0], run_id_of(MODEL, fresh[0])


def _is_watched(swept: Swept) -> bool:
    return bool(_patiently(swept, lambda: swept.store.first("SELECT 1 AS one FROM seen WHERE kind = 'dataset'")))


def _external(swept: Swept) -> list[Event]:
    """The events that start runs."""
    types = ("external.go", "dataset.versioned")
    return [event for each in types for event in _patiently(swept, partial(read, swept.store, type_=each))]


def _patiently(swept: Swept, ask: Callable[[], Value]) -> Value:
    """Ask the database, again while it is away for a moment."""
    deadline = time.monotonic() + RUN_SECONDS
    while True:
        try:
            return ask()
        except StoreError:
            if time.monotonic() > deadline:
                raise
        swept.keep_up()
        time.sleep(0.1)


def _is_over(swept: Swept, run_id: str, trial: Trial, began: float) -> bool:
    if time.monotonic() - began > RUN_SECONDS + DEATH_SECONDS * len(trial.killed):
        return True
    try:
        run = runs.get(swept.store, run_id)
    except (NotFound, StoreError):
        return False
    return not run.active and (run.state != "failed" or trial.resumes >= RESUMES)


def _keep_on(swept: Swept, run_id: str, trial: Trial) -> None:
    """What a person or `ft up` does: start the dead again, resume a run that has failed."""
    swept.keep_up()
    try:
        if runs.get(swept.store, run_id).state == "failed":
            trial.resumes += 1
            runs.set_wish(swept.store, run_id, "resume")
            runs.reopen(swept.store, run_id)
    except (NotFound, StoreError):  # no run yet, or the database is away for a moment
        pass
    time.sleep(0.1)


def _stage(swept: Swept, run_id: str) -> str:
    try:
        return runs.get(swept.store, run_id).stage or "submitted"
    except (NotFound, StoreError):
        return "event"


def sweep(swept: Swept, points: list[Point], kills: int, dice: random.Random) -> list[Trial]:
    """Once at each point, then at random until so many were killed. Prints each trial as it ends."""
    trials = [_told(at_random(swept, dice, 0, "without a kill"))]
    for number, point in enumerate(points, 1):
        trials.append(_told(at_points(swept, [point]), f"{number}/{len(points)} "))
    done = 0
    while done < kills:
        trials.append(
            _told(at_random(swept, dice, min(kills - done, dice.randint(1, 4)), "random"), f"{done}/{kills} ")
        )
        done += len(trials[-1].killed)
    return trials


def summary(trials: list[Trial], **facts: object) -> dict[str, Any]:
    killed = [each.partition(" at ")[0] for trial in trials for each in trial.killed]
    return {
        **facts,
        "runs": len(trials),
        "kills": len(killed),
        "killed": dict(Counter(killed)),
        "resumed": sum(trial.resumes for trial in trials),
        "seconds": round(sum(trial.seconds for trial in trials)),
        "violations": [{"trial": trial.name, "wrong": trial.wrong} for trial in trials if trial.wrong],
    }


def main() -> None:
    asked = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="ft-sweep-", dir=asked.folder))
    print(f"everything is made in {folder}", flush=True)
    found: dict[str, Any] = {"seed": asked.seed, "database": asked.database}
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server()) if asked.database == "postgres" else None
        shared = stack.enter_context(ENGINES[asked.engine](folder))
        plan = Plan(folder, shared, postgres, random.Random(asked.seed))
        if asked.points != "none" or asked.count:
            found["torch-free trainer"] = plan.torch_free(chosen(asked.points), asked.count)
        if asked.real:
            found["real trainer"] = plan.real(asked.real)
        if postgres and asked.restarts:
            found["Postgres restarted"] = plan.restarts(asked.restarts)
    print(json.dumps(found, indent=1))
    wrong = [each for part in found.values() if isinstance(part, dict) for each in part["violations"]]
    if not wrong:
        shutil.rmtree(folder)
    sys.exit(bool(wrong))


@dataclass
class Plan:
    """The parts of a sweep, each with a project of its own below `folder`."""

    folder: Path
    shared: Shared
    postgres: PostgresServer | None
    dice: random.Random

    def torch_free(self, points: list[Point], kills: int) -> dict[str, Any]:
        with self._project("torch-free", self.shared.adapter) as swept:
            return summary(sweep(swept, points, kills, self.dice), points=len(points))

    def real(self, runs_: int) -> dict[str, Any]:
        """Runs with the real trainer, each killed one to four times at random."""
        with self._project("real", None) as swept:
            spread, most = (0.5, 25.0), [self.dice.randint(1, 4) for _ in range(runs_)]
            return summary([
                _told(at_random(swept, self.dice, each, "real trainer", spread), f"{number}/{runs_} ")
                for number, each in enumerate(most, 1)
            ])  # fmt: skip

    def restarts(self, runs_: int) -> dict[str, Any]:
        """Runs while Postgres is restarted every 5 to 20 s and others append events; nobody is killed."""
        assert self.postgres is not None
        with self._project("restarts", self.shared.adapter) as swept:
            trials = [_told(at_random(swept, self.dice, 0, "before the restarts"))]
            with Restarts(self.postgres, self.dice) as restarts, Noise(swept) as noise:
                begun = [_run_through(swept, self.dice, 0, "Postgres restarts") for _ in range(runs_)]
            trials += [_told(_checked(swept, each)) for each in begun]
            lost = noise.lost()
            if lost:
                trials[0].wrong.append(f"events lost or doubled: {lost}")
            return summary(trials, restarts=restarts.done, events_beside=len(noise.sent), events_lost=len(lost))

    def _project(self, name: str, adapter: Path | None) -> AbstractContextManager[Swept]:
        (self.folder / name).mkdir()
        url = self.postgres.new_database(name) if self.postgres else ""
        return swept_project(self.folder / name, Parts(self.shared.base, adapter, self.shared.engine, url))


def chosen(names: str) -> list[Point]:
    """`all`, `none`, or those whose name contains the text."""
    return [each for each in POINTS if names in ("all", each.name) or (names != "none" and names in each.name)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make sweep-kill", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm", help="canned: neither vLLM nor torch")
    parser.add_argument("--points", default="all", help="all, none, or a part of their names")
    parser.add_argument("--count", type=int, default=200, help="kills at random, with the torch-free trainer")
    parser.add_argument("--real", type=int, default=20, help="runs with the real trainer")
    parser.add_argument("--restarts", type=int, default=10, help="runs while Postgres is restarted")
    parser.add_argument("--folder", default=None, help="where it is made; the system's temporary folder otherwise")
    return parser.parse_args()


def _told(trial: Trial, place: str = "") -> Trial:
    print(place + trial.line, flush=True)
    return trial


if __name__ == "__main__":
    main()
