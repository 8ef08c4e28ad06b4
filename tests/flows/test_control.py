"""Control of real runs: approved by a person across a killed worker, paused, out of time, out of memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from registry import adapters, approvals, runs
from registry.cards import holder, pick_card
from registry.event_types import TYPES
from registry.events import read
from tests.conftest import TinyBase
from tests.flows.conftest import _end_what_runs
from tests.flows.tiny_project import Tiny, make_tiny, stand_in

# torch, MLflow and their friends warn of their own deprecations.
pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("default"), pytest.mark.timeout(1500)]


@pytest.fixture
def tiny(tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    for name, value in (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "PASSIVE")):
        monkeypatch.setenv(name, value)
    made = make_tiny(tmp_path / "project", tiny_base)
    yield made
    _end_what_runs(made.person.project.cache)


def check_events(tiny: Tiny) -> None:
    for event in read(tiny.store):
        Draft202012Validator(TYPES[event.type].schema()).validate(event.data)
        by_a_person = event.type == "adapter.promoted" and event.data["run"] is None
        assert event.cause or by_a_person or event.type in ("run.submitted", "adapter.served"), event


def test_a_run_waits_for_a_person_across_a_killed_worker(tiny: Tiny) -> None:
    tiny.write_recipe(promote="approve", approval={"timeout": "1h"})
    with stand_in(tiny):
        run_id = tiny.submit()
        tiny.until_stage(run_id, "waiting for approval")
        assert holder(tiny.person.project, pick_card("cpu")) == ""
        [waiting] = tiny.person.json("approve")
        assert (waiting["run_id"], waiting["model"], waiting["version"], waiting["answer"]) == (run_id, "m", 1, None)
        assert 3590 < waiting["deadline"] - time.time() < 3600
        tiny.kill_worker()
        assert "waits for `ft approve` until" in tiny.person.ft("show", run_id)
        said = tiny.person.json("approve", run_id[:-2], "--reason", "read it")
        assert (said["answer"], said["reason"], bool(said["by_whom"])) == ("approved", "read it", True)
        assert "was approved already" in tiny.person.ft("approve", run_id, "--no", exits=2)
        ended = tiny.end(run_id)
    assert ended.state == "succeeded", tiny.told(run_id)
    [move] = adapters.promotions(tiny.store, "m")
    assert (move.run_id, move.by_whom, move.reason) == (run_id, said["by_whom"], "read it")
    assert ended.result["approval"]["by"] == said["by_whom"]
    attempts = {step.name: step.attempt for step in runs.steps(tiny.store, run_id)}
    assert attempts["waiting for approval"] == 2
    assert {name for name, attempt in attempts.items() if attempt > 1} == {"waiting for approval"}
    types = tiny.types(run_id)
    assert types[:2] == ["run.submitted", "run.started"]
    for type_ in ("run.approval_wanted", "run.approved", "job.started", "job.finished", "run.finished"):
        assert types.count(type_) == 1, type_
    steps = [data["step"] for data in tiny.data(run_id, "run.step")]
    assert steps == ["take turn", "pin", "plan", "train", "register", "evaluate", "judge", "waiting for approval",
                     "promote", "wait until served", "conclude"]  # fmt: skip
    time_ = tiny.person.json("show", run_id)["time"]
    assert time_["approval"] > 0
    check_events(tiny)


def test_no_and_nobody_leave_the_champion_and_a_new_champion_is_asked_for_again(tiny: Tiny) -> None:
    tiny.write_recipe(promote="approve", approval={"timeout": "1h"})
    with stand_in(tiny):
        first = tiny.submit()
        tiny.until_stage(first, "waiting for approval")
        second = tiny.submit("--queue")
        tiny.person.ft("approve", first, "--no", "--reason", "too terse")
        assert tiny.end(first).state == "refused"
        assert "m@1 was rejected by " in tiny.person.ft("show", first)
        assert adapters.aliases(tiny.store, "m") == {"candidate": 1}
        tiny.until_stage(second, "waiting for approval")
        # While it waits, somebody makes another version the champion: what was approved was judged against none.
        adapters.promote(tiny.store, adapters.last_verdict(tiny.store, "m", 1), by_whom="ann", person=True)  # type: ignore[arg-type]
        tiny.person.ft("approve", second)
        tiny.until(lambda: len(approvals.of_run(tiny.store, second)) == 2, second)
        old, new = approvals.of_run(tiny.store, second)
        assert (old.answer, new.answer) == ("approved", None)
        with tiny.store.writing() as connection:  # an hour later, and nobody has answered
            connection.execute("UPDATE approvals SET deadline = ? WHERE verdict = ?", (time.time() - 1, new.verdict))
        ended = tiny.end(second)
    assert (ended.state, ended.result["approval"]["answer"]) == ("refused", "timed_out")
    assert adapters.aliases(tiny.store, "m")["champion"] == 1
    assert tiny.types(second).count("run.approval_timed_out") == 1
    late = tiny.person.ft("approve", second, exits=2)
    assert "the time to approve m@2 was over" in late
    assert "`ft promote m@2`" in late
    check_events(tiny)


def test_a_paused_run_keeps_its_place_and_goes_on_from_its_checkpoint(tiny: Tiny) -> None:
    project = tiny.person.project
    # Some 40 steps a second on a quick machine: 120 were nearly over before the pause came.
    tiny.write_recipe({"max_steps": 600, "checkpoint_steps": 600})
    with stand_in(tiny):
        run_id = tiny.submit()
        tiny.until(lambda: tiny.step(run_id) >= 3, run_id)
        tiny.person.ft("pause", run_id)
        paused = tiny.run(run_id)
        assert (paused.state, paused.stage, paused.ended) == ("paused", "train", False)
        assert holder(project, pick_card("cpu")) == ""
        stopped = tiny.step(run_id)
        assert len(tiny.job(run_id).complete_checkpoints()) == 1
        assert "paused already" in tiny.person.ft("pause", run_id, exits=2)
        assert "is paused" in tiny.person.ft("run", "recipes/m.yaml", exits=2)
        assert f"{run_id}" in tiny.person.ft("runs", "--active")
        later = tiny.submit("--queue")
        tiny.until_stage(later, f"waiting behind {run_id}")
        tiny.kill_worker()
        tiny.person.ft("resume")  # what was interrupted goes on, what was paused does not
        time.sleep(3)
        assert tiny.run(run_id).state == "paused"
        tiny.person.ft("cancel", later)
        assert tiny.run(later).state == "cancelled"
        tiny.person.ft("resume", run_id, "--detach")
        ended = tiny.end(run_id)
        assert ended.state == "succeeded", tiny.told(run_id)
    begins = [line["step"] for line in tiny.job(run_id).progress() if set(line) == {"time", "epoch", "step", "steps"}]
    assert begins[0] == 0
    assert begins[1] >= stopped > 0
    types = tiny.types(run_id)
    for type_ in ("run.started", "run.paused", "run.resumed", "job.stopped", "job.finished"):
        assert types.count(type_) == 1, (type_, types)
    assert types.count("job.started") == 2
    assert tiny.person.json("show", run_id)["time"]["stopped"] >= 3
    again = tiny.submit()
    tiny.until(lambda: tiny.step(again) >= 5, again)
    tiny.person.ft("pause", again)
    tiny.person.ft("cancel", again)
    assert tiny.run(again).state == "cancelled"
    check_events(tiny)


def test_training_that_takes_too_long_keeps_its_checkpoint(tiny: Tiny) -> None:
    # On a busy machine 15 s may be over while the smoke runs, and then there is no checkpoint yet.
    tiny.write_recipe({"max_steps": 100_000, "checkpoint_steps": 50_000, "smoke": False}, timeouts={"train": "15s"})
    run_id = tiny.submit()
    ended = tiny.end(run_id)
    assert ended.error is not None
    assert (ended.state, ended.error["error"]) == ("failed", "TimedOut"), tiny.told(run_id)
    assert "it took longer than timeouts.train (15s)" in ended.error["what"]
    assert f"`ft resume {run_id}` goes on from the checkpoint" in ended.error["fix"]
    [checkpoint] = tiny.job(run_id).complete_checkpoints()
    assert holder(tiny.person.project, pick_card("cpu")) == ""
    assert tiny.data(run_id, "job.stopped")[0]["reason"] == "timeouts.train is 15s"
    tiny.person.ft("resume", run_id, "--detach")
    reached = int(checkpoint.name.split("-")[1])
    tiny.until(lambda: tiny.step(run_id) > reached, run_id)
    tiny.person.ft("cancel", run_id)
