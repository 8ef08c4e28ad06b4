"""`ft events` as a person or a script meets it; a real worker decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from cli.waking import any_triggers
from registry import adapters
from registry.decisions import CURSOR
from registry.event_types import as_markdown
from registry.events import append, cursor, new_event, read
from registry.project import Project
from registry.store import Store
from tests.conftest import ROOT, run_bounded

FT = [sys.executable, "-m", "cli.main"]
RECIPE = """kind: finetune
base: org/base
data: {path: datasets/tickets}
evaluate: {task: label}
on:
  event: [{type: external.go, where: {branch: main}}]
  dry_run: true
"""


def ft(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_bounded([*FT, *arguments], 60, cwd=project.root, env={"FT_WORKER_IDLE_SECONDS": "1"})


def story(project: Project, what: str) -> dict[str, Any]:
    done = ft(project, "events", "why", what, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)[0])


def test_an_event_is_posted_once_decided_by_a_worker_and_explained(project: Project, store: Store) -> None:
    (project.root / "recipes" / "m.yaml").write_text(RECIPE)
    post = ["events", "emit", "external.go", "--data", '{"branch": "main"}', "--id", "e1"]
    assert ft(project, *post).stdout == "e1\n"
    assert "the log has it already" in ft(project, *post).stdout
    ft(project, "events", "emit", "external.go", "--data", '{"branch": "dev"}', "--id", "e2")
    end = time.monotonic() + 60
    while cursor(store, CURSOR) < 2:
        assert time.monotonic() < end, "a worker was started and looks at the events"
        time.sleep(0.1)
    assert [each["reason"] for each in story(project, "e1")["decisions"]] == [
        "external.go of ft/cli, but dry_run is set"
    ]
    assert "has no trigger for external.go" in story(project, "e2")["decisions"][0]["reason"]
    told = ft(project, "events", "why", "e1").stdout
    assert "m: did not start: external.go of ft/cli, but dry_run is set" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run.finished"], "only ft itself appends events of this type"),
        (["dataset.versionned"], "did you mean dataset.versioned?"),
        (["external."], "no such type of event"),
        (["feedback.received", "--data", '{"rating": "good"}'], "data.rating: 'good' is not of type 'number'"),
        (["dataset.versioned"], "'hash' is a required property"),
        (["external.go", "--data", "{"], "not valid JSON"),
        (["external.go", "--data", "[1]"], "data is a JSON object"),
        (["external.go", "--data", '{"a": NaN}'], "NaN is no number in JSON"),
        (["external.go", "--data", '{"a": 1e999}'], "not valid JSON"),
        (["external.go", "--data", '{"a": "\\ud800"}'], "not valid JSON"),
        (["external.go", "--subject", "two\nlines"], "printable characters on one line"),
        (["external.go", "--source", "ft/runs"], "no source"),
        (["external.go", "--source", "two words"], "no source"),
    ],
)
def test_what_cannot_be_posted_is_said_and_nothing_appended(
    arguments: list[str], said: str, project: Project, store: Store
) -> None:
    done = ft(project, "events", "emit", *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert said in done.stderr
    assert read(store) == []


def test_the_newest_are_shown_in_order_and_what_comes_is_followed(project: Project, store: Store) -> None:
    for n in range(30):
        append(store, new_event("test", "external.go", f"s{n}", {"n": n}, key=str(n)))
    lines = ft(project, "events", "tail", "-n", "3", "--json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["data"]["n"] for each in found] == [27, 28, 29]
    assert {"specversion", "id", "source", "type", "time", "ftseq"} <= found[0].keys()
    assert ft(project, "events", "tail", "--subject", "s7").stdout.split()[-1] == "n=7"
    with subprocess.Popen([*FT, "events", "tail", "-f", "-n", "1"], cwd=project.root, stdout=subprocess.PIPE,
                          text=True) as following:  # fmt: skip
        assert following.stdout is not None
        try:
            assert "s29" in following.stdout.readline()
            append(store, new_event("test", "external.go", "late", {}))
            assert "late" in following.stdout.readline()
        finally:
            following.kill()


def test_a_run_that_a_person_started_says_so(project: Project, store: Store) -> None:
    from registry import runs

    run = runs.submit(store, {"name": "m", "model": "m"}, "recipes/m.yaml", "d")
    assert "a person started it" in ft(project, "events", "why", run.id).stdout
    done = ft(project, "events", "why", "nothing")
    assert (done.returncode, "no run and no event 'nothing'" in done.stderr) == (2, True)
    assert ft(project, "events", "why", "9" * 30).returncode == 2
    adapters.add_version(store, "m", 1, run.id, "adapters/m/1", {})  # its event has the run's id as well
    assert "a person started it" in ft(project, "events", "why", run.id).stdout


def test_the_published_list_is_the_one_in_the_code() -> None:
    assert (ROOT / "docs" / "events.md").read_text(encoding="utf-8") == as_markdown(), "`make docs` makes it anew"


def test_recipes_with_triggers_are_known_at_a_glance(project: Project) -> None:
    assert not any_triggers(project)
    (project.root / "recipes" / "m.yaml").write_text(RECIPE.partition("on:")[0])
    assert not any_triggers(project)
    for key in ("on:", '"on":', "on :"):
        (project.root / "recipes" / "m.yaml").write_text(RECIPE.replace("on:", key))
        assert any_triggers(project)
    (project.root / "recipes" / ".#m.yaml").symlink_to("nobody@nowhere")
    (project.root / "recipes" / "a.yaml").symlink_to("a.yaml")
    (project.root / "recipes" / "folder.yaml").mkdir()
    (project.root / "recipes" / "latin.yaml").write_bytes(b"\xff\xfe")
    os.mkfifo(project.root / "recipes" / "fifo.yaml")
    assert any_triggers(project)
