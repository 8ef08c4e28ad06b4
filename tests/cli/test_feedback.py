"""`ft feedback`: added up by version, and written to a file."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.events import Event, append, new_event
from registry.feedback_log import add_up, feedback_on
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded

DAY = 86400.0


def ft(project: Project, *arguments: str) -> tuple[int, str, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", "feedback", *arguments], timeout=60, cwd=project.root)
    return done.returncode, done.stdout, done.stderr


def said(store: Store, adapter: str, days_ago: float = 0.0, **data: Any) -> Event:
    event = new_event("ft/feedback", "feedback.received", adapter, data)
    found = replace(event, time=time.time() - days_ago * DAY)
    append(store, found)
    return found


@pytest.fixture
def some(store: Store) -> Store:
    said(store, "tickets@10", rating=1)
    said(store, "tickets@9", rating=-1, tags=["rude", "wrong"], request="r-1")
    said(store, "tickets@9", rating=0, tags=["wrong"], days_ago=20)
    said(store, "tickets@9", correction="환불은 7일 안에", request="r-2")
    said(store, "ticket@1", rating=5)
    said(store, "tickets-2@1", rating=5)
    append(store, new_event("ft/x", "adapter.served", "tickets@9", {}))
    return store


def test_feedback_is_added_up_by_version(some: Store) -> None:
    nine, ten = add_up(feedback_on(some, "tickets"))
    assert (nine.adapter, nine.count, nine.rated, nine.mean, nine.corrections) == ("tickets@9", 3, 2, -0.5, 1)
    assert nine.tags == {"wrong": 2, "rude": 1}
    assert (ten.adapter, ten.mean) == ("tickets@10", 1.0)
    assert [each.count for each in add_up(feedback_on(some, "tickets", time.time() - 7 * DAY))] == [2, 1]
    assert {each.adapter for each in add_up(feedback_on(some, ""))} == {
        "tickets@9", "tickets@10", "ticket@1", "tickets-2@1"
    }  # fmt: skip


def test_more_than_one_page(store: Store) -> None:
    from registry.events import append_all

    append_all(store, [new_event("f", "feedback.received", "m@1", {"rating": n % 2}) for n in range(2500)])
    [found] = add_up(feedback_on(store, "m"))
    assert (found.count, found.mean) == (2500, 0.5)


def test_the_commands(project: Project, some: Store) -> None:
    code, out, _ = ft(project, "tickets", "--since", "7d", "--json")
    assert code == 0
    assert [(each["adapter"], each["count"]) for each in json.loads(out)] == [("tickets@9", 2), ("tickets@10", 1)]
    assert "wrong 2" in ft(project, "tickets")[1]
    assert "no feedback on nothing" in ft(project, "nothing")[1]
    assert ft(project, "tickets", "--since", "soon")[0] == 2


def test_the_file(project: Project, some: Store, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert ft(project, "export", "tickets", str(file))[:2] == (0, f"4 rows in {file}\n")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows[3] | {"id": "", "time": ""} == {
        "id": "", "time": "", "adapter": "tickets@9", "correction": "환불은 7일 안에", "request": "r-2"
    }  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.part")] == []
    code, _, err = ft(project, "export", "tickets", str(file))
    assert (code, "already" in err) == (2, True)
    assert ft(project, "export", "tickets", str(tmp_path / "no" / "such" / "folder"))[0] == 1
