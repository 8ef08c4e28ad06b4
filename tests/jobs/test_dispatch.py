"""From events to runs: each event once, all of a decision or nothing, and what nobody saw is found later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.dispatch import Dispatcher, has_news
from registry import adapters, runs
from registry.decisions import decision_for, decisions_on
from registry.events import Event, append, by_run, causes, cursor, find, new_event, read
from registry.project import Project
from registry.seen import git_branch
from registry.store import Store
from registry.triggers import run_id_of
from tests.conftest import run_bounded

ON = {"event": [{"type": "external.*"}]}


def write_recipe(project: Project, name: str, **on: Any) -> Path:
    path = project.root / "recipes" / f"{name}.yaml"
    body = {
        "kind": "finetune", "base": "org/base", "data": {"path": "datasets/tickets"},
        "evaluate": {"task": "label"}, **({"on": on} if on else {}),
    }  # fmt: skip
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return path


def write_dataset(project: Project, digit: str) -> None:
    text = yaml.safe_dump({"outs": [{"md5": digit * 32 + ".dir", "path": "tickets", "hash": "md5"}]})
    (project.root / "datasets" / "tickets.dvc").write_text(text, encoding="utf-8")


def post(store: Store, id_: str, type_: str = "external.go", **data: Any) -> Event:
    append(store, new_event("test", type_, "", data, key=id_))
    return next(each for each in find(store, id_) if each.source == "test")


def work(project: Project, store: Store) -> None:
    """A worker that was just started."""
    Dispatcher(project, store).work()


def end_runs(store: Store) -> None:
    for run in runs.listed(store, active=True):
        runs.finish(store, run.id, "succeeded")


def started(store: Store) -> list[str]:
    return [run.id for run in reversed(runs.listed(store))]


def test_an_event_starts_one_run_of_each_recipe_that_listens(project: Project, store: Store) -> None:
    for name in ("one", "two"):
        write_recipe(project, name, **ON)
    write_recipe(project, "deaf")
    event = post(store, "e1")
    assert has_news(store)
    for _ in range(3):
        post(store, "e1")
        work(project, store)
    assert not has_news(store)
    assert sorted(started(store)) == sorted([run_id_of("one", event), run_id_of("two", event)])
    run = runs.get(store, run_id_of("one", event))
    assert (run.recipe, run.model, run.recipe_path, run.state) == ("one", "one", "recipes/one.yaml", "submitted")
    found = decision_for(store, run.id)
    assert found is not None
    assert (found[0], found[1].reason) == (event.seq, "external.go of test")
    [submitted] = read(store, subject=run.id)
    assert [each.ref for each in causes(store, submitted)] == [event.ref]


def test_what_does_not_fire_is_written_down_with_the_reason(project: Project, store: Store) -> None:
    write_recipe(project, "once", **ON, cooldown="1h")
    first, second = post(store, "e1"), post(store, "e2")
    work(project, store)
    assert started(store) == [run_id_of("once", first)]
    [decision] = decisions_on(store, second)
    assert (decision.fired, "cooldown is 1h" in decision.reason) == (False, True)


def test_replace_cancels_what_is_on(project: Project, store: Store) -> None:
    write_recipe(project, "m", **ON, if_running="replace")
    old = post(store, "e1")
    work(project, store)
    new = post(store, "e2")
    work(project, store)
    assert [runs.get(store, run_id_of("m", each)).wish for each in (old, new)] == ["cancel", None]


def test_feedback_counts_from_the_last_run_on(project: Project, store: Store) -> None:
    write_recipe(project, "m", feedback={"count": 2, "min_rating": 4})
    append(store, new_event("test", "feedback.received", "m2@1", {"rating": 5}))
    for id_, rating in (("f1", 5), ("f2", 1), ("f3", 4), ("f4", 5)):
        append(store, new_event("test", "feedback.received", "m@1", {"rating": rating}, key=id_))
        work(project, store)
    [third] = find(store, "f3")
    assert started(store) == [run_id_of("m", third)]


def test_what_comes_to_a_branch_by_a_merge_is_news_and_a_checkout_is_none(project: Project, store: Store) -> None:
    (project.root / ".git").mkdir()

    def on(branch: str, digit: str) -> None:
        head = f"ref: refs/heads/{branch}\n" if branch else "0" * 40
        (project.root / ".git" / "HEAD").write_text(head)
        write_dataset(project, digit)
        work(project, store)

    write_recipe(project, "m", dataset=True, branches=["main"])
    on("main", "1")
    on("dev", "1")
    on("dev", "2")
    on("", "3")  # in the middle of a rebase
    on("main", "1")
    assert started(store) == []
    on("main", "2")
    [run] = started(store)
    dev, main = read(store, type_="dataset.versioned")
    assert [each.data["branch"] for each in (dev, main)] == ["dev", "main"]
    assert "branch dev is none of main" in decisions_on(store, dev)[0].reason
    assert run == run_id_of("m", main)


def test_a_worktree_knows_its_branch(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "HEAD").write_text("ref: refs/heads/topic/a\n")
    (tmp_path / "tree" / "shop").mkdir(parents=True)
    (tmp_path / "tree" / ".git").write_text("gitdir: ../real\n")
    assert git_branch(tmp_path / "tree" / "shop") == "topic/a"


def test_a_roll_back_by_a_run_starts_no_other_of_its_recipe(project: Project, store: Store) -> None:
    write_recipe(project, "m", event=[{"type": "adapter.rolled_back"}, {"type": "external.*"}])
    first = run_id_of("m", post(store, "e1"))
    work(project, store)
    for number in (1, 2):
        adapters.add_version(store, "m", number, first if number == 2 else "by hand", "adapters/m/1", {})
        champion = adapters.aliases(store, "m").get("champion")
        verdict = adapters.add_verdict(store, "m", number, "pass", {"champion": champion}, None)
        adapters.promote(store, verdict, by_whom="ann")
    end_runs(store)
    adapters.roll_back(store, "m", by_whom="ft", cause=by_run(first))
    work(project, store)
    assert started(store) == [first]
    adapters.roll_back(store, "m", by_whom="ann", to=2)
    work(project, store)
    assert len(started(store)) == 2, "what a person does begins a new chain"


def test_a_file_that_cannot_be_read_keeps_nobody_from_the_rest(
    project: Project, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(project, "m", **ON, schedule=["* * * * *"])
    (project.root / "dvc.lock").write_text("schema: '2.0'\n<<<<<<< HEAD\nstages:\n=======\n>>>>>>> b\n")
    (project.root / "recipes" / ".#m.yaml").symlink_to("nobody@nowhere")
    (project.root / "recipes" / "a.yaml").symlink_to("a.yaml")
    os.mkfifo(project.root / "recipes" / "fifo.yaml")
    event, dispatcher = post(store, "e1"), Dispatcher(project, store)
    for _ in range(3):
        dispatcher.watch()
        dispatcher.work()
    assert started(store) == [run_id_of("m", event)]
    assert capsys.readouterr().err.count("starts no runs until it is right") == 1


def test_a_name_that_two_recipes_had_is_free_again(project: Project, store: Store) -> None:
    first, dispatcher = write_recipe(project, "m", **ON), Dispatcher(project, store)
    dispatcher.work()
    copy = project.root / "recipes" / "copy.yaml"
    copy.write_text("name: m\n" + first.read_text())
    one = post(store, "e1")
    dispatcher.work()
    assert [each.recipe for each in decisions_on(store, one)] == ["m"]
    first.unlink()
    two = post(store, "e2")
    dispatcher.work()
    assert started(store) == [run_id_of("m", one), run_id_of("m", two)]


def test_a_recipe_is_not_started_by_what_its_own_run_led_to(project: Project, store: Store) -> None:
    write_recipe(project, "m", event=[{"type": "adapter.registered"}, {"type": "external.*"}])
    first = post(store, "e1")
    work(project, store)
    adapters.add_version(store, "m", 1, run_id_of("m", first), "adapters/m/1", {})
    work(project, store)
    assert started(store) == [run_id_of("m", first)]
    [registered] = read(store, type_="adapter.registered")
    assert registered.cause == by_run(run_id_of("m", first))
    assert "in a circle: m -> m" in decisions_on(store, registered)[0].reason


def test_two_recipes_cannot_start_each_other_for_ever(project: Project, store: Store) -> None:
    write_recipe(project, "a", event=[{"type": "run.submitted"}])
    write_recipe(project, "b", event=[{"type": "run.submitted"}])
    runs.submit(store, {"name": "a", "model": "a"}, "recipes/a.yaml", "d")
    for _ in range(5):
        work(project, store)
    assert [run.recipe for run in runs.listed(store)] == ["b", "a"]
    reasons = [each.reason for event in read(store, type_="run.submitted") for each in decisions_on(store, event)]
    assert any("in a circle: a -> b -> a" in each for each in reasons)


def test_changes_of_data_and_recipes_become_events_that_are_no_news_at_first(project: Project, store: Store) -> None:
    write_dataset(project, "1")
    write_recipe(project, "m", dataset=True, recipe="changed", if_running="queue")
    work(project, store)
    assert read(store) == []
    for digit in "212":
        write_dataset(project, digit)
        for _ in range(2):
            work(project, store)
        end_runs(store)
    changed = read(store, type_="dataset.versioned")
    assert [each.data["hash"][0] for each in changed] == ["2", "1", "2"]
    assert len(started(store)) == 3
    path = write_recipe(project, "m", dataset=True, recipe="changed", if_running="queue", max_runs_per_day=9)
    work(project, store)
    assert not read(store, type_="recipe.changed"), "when it runs is not what it means"
    path.write_text(path.read_text().replace("org/base", "org/other"))
    work(project, store)
    assert [each.subject for each in read(store, type_="recipe.changed")] == ["m"]


def test_a_cron_line_fires_once_for_each_time(project: Project, store: Store) -> None:
    write_recipe(project, "m", schedule=["* * * * *"])
    work(project, store)
    assert started(store) == []
    with store.writing() as connection:
        connection.execute("UPDATE seen SET value = ? WHERE kind = 'schedule'", (str(time.time() - 600),))
    work(project, store)
    work(project, store)
    assert len(started(store)) == 1
    [fired] = read(store, type_="schedule.fired")
    assert (fired.subject, fired.data["cron"]) == ("m", "* * * * *")


def test_a_broken_recipe_keeps_no_other_from_starting(
    project: Project, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(project, "good", **ON)
    (project.root / "recipes" / "bad.yaml").write_text("kind: finetune\nbse: x\n")
    same = write_recipe(project, "same", **ON)
    same.write_text("name: good\n" + same.read_text())
    event = post(store, "e1")
    dispatcher = Dispatcher(project, store)
    for _ in range(3):
        dispatcher.work()
    assert started(store) == [run_id_of("good", event)]
    assert capsys.readouterr().err.count("starts no runs until it is right") == 2


KILLED = """
import os, sys
from jobs import dispatch
from registry.project import find_project
from registry.store import open_store
project = find_project()
settle, calls = dispatch.settle, 0
def once(*arguments):
    global calls
    calls += 1
    if calls == int(sys.argv[1]) and sys.argv[2] == "before":
        os.kill(os.getpid(), 9)
    done = settle(*arguments)
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
    return done
dispatch.settle = once
dispatch.Dispatcher(project, open_store(project)).work()
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_dispatcher_killed_around_its_write_loses_and_doubles_nothing(
    project: Project, store: Store, at: int, when: str
) -> None:
    write_recipe(project, "m", **ON)
    wanted = [run_id_of("m", post(store, f"e{n}")) for n in range(4)][:2]  # one is on, one waits: enough
    killed = run_bounded([sys.executable, "-c", KILLED, str(at), when], 60, cwd=project.root)
    assert killed.returncode == -9
    work(project, store)
    assert started(store) == wanted
    assert cursor(store, "triggers") >= max(each.seq for each in read(store, type_="external.go"))


TOGETHER = """
from jobs.dispatch import Dispatcher, has_news
from registry.project import find_project
from registry.store import open_store
project = find_project()
store = open_store(project)
dispatcher = Dispatcher(project, store)
while has_news(store):
    dispatcher.work()
"""


def test_several_dispatchers_at_once_start_each_run_once(project: Project, store: Store) -> None:
    write_recipe(project, "m", **ON)
    events = [post(store, f"e{n}") for n in range(30)]
    several = [subprocess.Popen([sys.executable, "-c", TOGETHER], cwd=project.root) for _ in range(3)]
    assert [each.wait(120) for each in several] == [0, 0, 0]
    assert {run.id for run in runs.listed(store, limit=99)} == {run_id_of("m", each) for each in events[:2]}
    assert [len(decisions_on(store, each)) for each in events] == [1] * 30


def test_what_passes_a_broken_recipe_is_written_down(project: Project, store: Store) -> None:
    path = write_recipe(project, "m", **ON)
    dispatcher = Dispatcher(project, store)
    post(store, "e0")
    dispatcher.work()
    right = path.read_text()
    for number, text in enumerate((right.replace("kind:", "knid:"), right + "\n: [", "on: {event: 3}\n"), start=1):
        path.write_text(text)
        heard, other = post(store, f"e{number}"), post(store, f"o{number}", "run.other")
        dispatcher.work()
        [said] = decisions_on(store, heard)
        assert (said.recipe, said.fired, "was broken when the event passed" in said.reason) == ("m", False, True)
        assert decisions_on(store, other) == [], "it had no trigger for that"
    path.write_text(right.replace("'on'", "off"))
    Dispatcher(project, store).work()
    silent = post(store, "e9")
    Dispatcher(project, store).work()
    assert decisions_on(store, silent) == [], "nothing says that it has triggers"


def test_of_a_recipe_that_was_never_right_any_event_may_be_one(project: Project, store: Store) -> None:
    write_recipe(project, "good", **ON)
    (project.root / "recipes" / "bad.yaml").write_text("on:\n  event: [\n")
    (project.root / "recipes" / "good2.yaml").write_text(
        "name: good\nkind: nothing\non: {event: [{type: external.*}]}\n"
    )
    event = post(store, "e1")
    work(project, store)
    assert [(each.recipe, each.fired) for each in decisions_on(store, event)] == [("bad", False), ("good", True)]


def test_a_record_is_read_again_when_it_has_changed(project: Project, store: Store) -> None:
    write_recipe(project, "m", dataset=True)
    record = project.root / "datasets" / "tickets.dvc"
    for digit in "1123":
        write_dataset(project, digit)
        long_ago = time.time() - 100
        os.utime(record, (long_ago, long_ago))  # the same time and size each time, as a fast disk may have it
        work(project, store)
    assert [each.data["hash"][0] for each in read(store, type_="dataset.versioned")] == ["2", "3"]


def test_a_clock_that_was_wrong_stops_no_trigger(project: Project, store: Store) -> None:
    write_recipe(project, "m", **ON, schedule=["* * * * *"], cooldown="1h", max_runs_per_day=1)
    future = time.time() + 400 * 86400
    first = post(store, "e1")
    work(project, store)
    end_runs(store)
    with store.writing() as connection:
        connection.execute("UPDATE runs SET created = ?", (future,))
        connection.execute("UPDATE seen SET value = ? WHERE kind = 'schedule'", (str(future),))
    second = post(store, "e2")
    work(project, store)
    assert started(store) == [run_id_of("m", second), run_id_of("m", first)]
    [row] = store.read("SELECT value FROM seen WHERE kind = 'schedule'")
    assert float(row["value"]) <= time.time()
