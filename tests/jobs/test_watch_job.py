"""The watch over a job: what is tried again and how, what counts as lost, when its time is over, and what is told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from jobs.steps import Bench
from jobs.watch_job import JobWatch, TrainClock
from registry import runs
from registry.errors import JobError, TimedOut
from registry.event_types import TYPES
from registry.events import read
from registry.job_folder import JobFolder
from registry.project import Project
from registry.recipe import Finetune
from registry.settings import Settings
from registry.store import Store
from tests.fakes.scripted_target import Act, ScriptedTarget

OK = {"status": "ok", "steps": 6, "seconds": 1.5, "peak_memory": 9}
Make = Callable[..., tuple[JobWatch, ScriptedTarget]]


def failed(kind: str) -> dict[str, Any]:
    return {"status": "failed", "class": kind, "message": f"it was {kind}", "seconds": 0.1}


@pytest.fixture
def make(project: Project, store: Store) -> Make:
    """A watch of the job of run m-1, whose trainers do what `acts` say."""

    def made(*acts: Act, busy: int = 0, **sections: Any) -> tuple[JobWatch, ScriptedTarget]:
        recipe = Finetune.model_validate({
            "kind": "finetune", "name": "m", "model": "m", "base": {"model": "org/base"},
            "train": {"batch": 8, "accumulate": 1}, "data": {"path": "datasets/m"}, "evaluate": {"task": "label"},
            **sections,
        })  # fmt: skip
        body = recipe.model_dump(mode="json")
        with store.writing() as connection:
            runs.submit_within(connection, "m-1", body, "recipes/m.yaml", "d")
        JobFolder(project.job_folder("m-1")).write_spec({"recipe": body})
        target = ScriptedTarget(list(acts), busy)
        # A moment earlier: a file system's clock is a little behind.
        bench = Bench(project, store, Settings(), started=time.time() - 1)
        return JobWatch(bench, "m-1", recipe, target, "cpu"), target

    return made


def watched(watch: JobWatch) -> dict[str, Any]:
    return asyncio.run(asyncio.wait_for(watch.until_done(), 60))


def told(store: Store) -> list[str]:
    events = [event for event in read(store) if event.type.startswith("job.")]
    for event in events:
        Draft202012Validator(TYPES[event.type].schema()).validate(event.data)
        assert (event.subject, event.cause) == ("m-1", "ft/runs m-1")
    return [event.type.removeprefix("job.") for event in events]


def batches(target: ScriptedTarget) -> list[tuple[int, int]]:
    return [(each["batch"], each["accumulate"]) for each in target.used]


def test_a_job_that_goes_well_is_started_and_finished_once(make: Make, store: Store) -> None:
    watch, target = make(OK, busy=2)
    assert watched(watch) == OK
    assert told(store) == ["started", "finished"]
    assert runs.get(store, "m-1").stage == "train: starting"
    assert watched(make(OK)[0]) == OK  # a worker that was started again
    assert told(store) == ["started", "finished"]
    assert len(target.used) == 1


def test_out_of_memory_halves_the_batch_until_it_fits(make: Make, store: Store) -> None:
    watch, target = make(failed("out_of_memory"), failed("out_of_memory"), OK)
    assert watched(watch) == OK
    assert batches(target) == [(8, 1), (4, 2), (2, 4)]
    assert told(store) == ["started", "failed", "retried", "started", "failed", "retried", "started", "finished"]
    last = read(store, type_="job.retried")[-1].data
    assert last == {"after": 2, "class": "out_of_memory", "train": {"batch": 2, "accumulate": 4}, "anew": False}


def test_at_batch_one_it_fails_with_advice(make: Make) -> None:
    watch, target = make(failed("out_of_memory"), train={"batch": 1, "accumulate": 8})
    with pytest.raises(JobError, match="training failed \\(out_of_memory\\)") as caught:
        watched(watch)
    assert "train.batch is 1 already" in caught.value.fix
    assert len(target.used) == 1


def test_a_worker_killed_before_it_tried_again_does_so_when_it_is_back(make: Make, project: Project) -> None:
    job = JobFolder(project.job_folder("m-1"))
    watch, target = make(OK)
    job.accept(job.claim("the trainer before", None), failed("out_of_memory"))
    watch.bench.started = time.time() + 60  # the failure is older than the worker
    assert watched(watch) == OK
    assert batches(target) == [(4, 2)]


def test_a_worker_killed_after_it_had_decided_does_not_decide_again(make: Make, project: Project) -> None:
    job = JobFolder(project.job_folder("m-1"))
    watch, target = make(OK)
    job.accept(job.claim("the trainer before", None), failed("out_of_memory"))
    job.add_attempt({"after": 1, "class": "out_of_memory", "train": {"batch": 4, "accumulate": 2}, "anew": False})
    assert watched(watch) == OK
    assert batches(target) == [(4, 2)]


def test_a_resumed_job_goes_on_after_a_failure_that_is_not_tried_again(make: Make, project: Project) -> None:
    job = JobFolder(project.job_folder("m-1"))
    watch, target = make(OK)
    job.accept(job.claim("the trainer before", None), failed("disk_full"))
    watch.bench.started = time.time() + 60
    assert watched(watch) == OK
    assert batches(target) == [(8, 1)]


@pytest.mark.parametrize(("kind", "times"), [("bad_data", 1), ("disk_full", 1), ("diverged", 1), ("crash", 2)])
def test_what_does_not_help_is_tried_no_more(make: Make, store: Store, kind: str, times: int) -> None:
    watch, target = make(*[failed(kind)] * times)
    with pytest.raises(JobError, match=f"it was {kind}"):
        watched(watch)
    assert len(target.used) == times
    assert told(store).count("retried") == times - 1


def test_what_diverged_begins_anew(make: Make, project: Project) -> None:
    watch, target = make(failed("diverged"), OK, retries={"diverged": 1})
    job = JobFolder(project.job_folder("m-1"))
    target.on_launch = lambda job: (job.checkpoints / f"0001-{len(target.used)}").mkdir(parents=True)
    assert watched(watch) == OK
    assert [each["learning_rate"] for each in target.used] == [2e-4, 1e-4]
    assert [each.name for each in job.checkpoints.iterdir()] == ["0001-2"]


@pytest.mark.parametrize("death", ["die", "die early"])
def test_trainers_that_die_without_getting_further_are_counted(make: Make, store: Store, death: str) -> None:
    watch, target = make(*[death] * 9, retries={"lost": 2})
    with pytest.raises(JobError, match="the trainer died 3 times") as caught:
        watched(watch)
    assert "a smaller train.batch" in caught.value.fix
    assert len(target.used) == 3
    assert told(store).count("lost") == 3
    assert told(store).count("retried") == 2


def test_trainers_that_get_further_before_they_die_are_not(make: Make, store: Store) -> None:
    watch, _ = make(*["progress and die"] * 5, OK, retries={"lost": 1})
    assert watched(watch) == OK
    assert told(store).count("lost") == 5


def test_waiting_for_a_card_after_a_death_is_no_other_death(make: Make) -> None:
    watch, target = make("die", OK, retries={"lost": 1})

    def busy(job: JobFolder) -> None:
        target.busy = 6 if len(target.used) == 1 else 0

    target.on_launch = busy
    assert watched(watch) == OK


def test_at_the_end_of_its_time_the_trainer_stops_with_a_checkpoint(make: Make, store: Store, project: Project) -> None:
    watch, target = make("go on", OK, timeouts={"train": "1s"})
    with pytest.raises(TimedOut, match=r"after step 3: it took longer than timeouts.train \(1s\)") as caught:
        watched(watch)
    assert "`ft resume m-1` goes on from the checkpoint" in caught.value.fix
    assert target.working is None
    assert told(store) == ["started", "stopped"]
    again, target = make(OK, timeouts={"train": "1s"})
    again.bench.started = time.time() + 60
    assert watched(again) == OK
    assert len(target.used) == 1


def test_time_goes_on_while_no_worker_looks(project: Project) -> None:
    path = project.root / "clock.json"
    first = TrainClock(path)
    first.tick()
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "used": 10.0, "at": written["at"] - 100}))
    second = TrainClock(path)
    second.tick()
    assert 109 < second.used < 115
    second.halt()
    third = TrainClock(path)  # nobody was at work meanwhile
    third.tick()
    assert 109 < third.used < 115
    path.write_text(json.dumps({"used": 10.0, "at": time.time() + 1000}))  # the clock was put back
    fourth = TrainClock(path)
    fourth.tick()
    assert fourth.used == 10.0
    path.write_text("{broken")
    assert TrainClock(path).used == 0


def test_who_stops_it_says_so(make: Make, store: Store) -> None:
    watch, target = make("go on")

    async def stopped() -> None:
        watching = asyncio.create_task(watch.until_done())
        while target.working is None or "started" not in told(store):
            await asyncio.sleep(0.05)
        watching.cancel()
        await watch.stop("the run was paused")

    asyncio.run(asyncio.wait_for(stopped(), 30))
    assert read(store, type_="job.stopped")[0].data == {"epoch": 1, "reason": "the run was paused", "steps": 3}
