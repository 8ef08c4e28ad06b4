"""`ft keys`: made, listed, rotated, revoked; the key itself is shown once."""

from __future__ import annotations

import json
import sys
from typing import Any

from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded


def ft(project: Project, *arguments: str) -> tuple[int, str, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", "keys", *arguments], timeout=60, cwd=project.root)
    return done.returncode, done.stdout, done.stderr


def listed(project: Project) -> Any:
    return json.loads(ft(project, "list", "--json")[1])


def test_a_key_from_its_making_to_its_end(project: Project, store: Store) -> None:
    assert "no keys" in ft(project, "list")[1]
    code, out, err = ft(project, "add", "shop", "--routes", "support, auto", "--rate", "60/m")
    key = out.splitlines()[0]
    assert (code, err, key[:3]) == (0, "", "ft-")
    assert "the first one" in out
    [found] = listed(project)
    assert (found["name"], found["routes"], found["rate"]) == ("shop", ["support", "auto"], "60 in 60 s")
    shown = ft(project, "list")[1]
    assert "support, auto" in shown
    assert key not in shown
    rotated = json.loads(ft(project, "rotate", "shop", "--json")[1])["key"]
    assert rotated.startswith("ft-")
    assert rotated != key
    assert ft(project, "revoke", "shop")[:2] == (0, "shop: revoked\n")
    assert listed(project)[0]["revoked"]
    assert ft(project, "add", "desk")[0] == 0
    assert "shop: forgotten; callers still need a key" in ft(project, "revoke", "shop", "--forget")[1]
    assert ft(project, "revoke", "desk", "--forget")[:2] == (0, "desk: forgotten\n")
    assert listed(project) == []


def test_what_is_asked_wrongly(project: Project, store: Store) -> None:
    assert ft(project, "add", "shop", "--rate", "often")[0] == 2
    assert listed(project) == []
    code, _, err = ft(project, "revoke", "nobody")
    assert (code, "ft keys list" in err) == (2, True)
