"""`ft promote --canary`, `ft rollout` and `ft serve plan`, as a person types them."""

from __future__ import annotations

import fcntl
import json
import sys
from typing import Any

import pytest

from registry import adapters
from registry.api_keys import add_key, revoke_key
from registry.base_models import BaseModel
from registry.project import Project
from registry.store import Store
from serving.server_record import ServerStatus, write_status
from tests.conftest import run_bounded
from tests.fakes.reconciled import Site


@pytest.fixture
def site(project: Project, store: Store) -> Site:
    base = BaseModel("org/base", "1", "Apache-2.0", "b" * 64, "org-base@1")
    here = Site(project, store, base)
    for number in (1, 2):
        here.add("a", number)
        here.judge("a", number)
    here.promote("a", 1)
    here.judge("a", 2)
    return here


def ft(project: Project, *arguments: str) -> tuple[int, str, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=project.root)
    return done.returncode, done.stdout, done.stderr


def as_json(out: str) -> Any:
    return json.loads(out)


def test_a_canary_from_its_beginning_to_its_end(site: Site) -> None:
    code, out, _ = ft(site.project, "rollout")
    assert (code, out) == (0, "no rollout; `ft promote MODEL@N --canary 5%:10m,50%:30m` begins one\n")
    code, out, _ = ft(site.project, "promote", "a@2", "--canary", "5%:10m,50%:30m")
    assert code == 0
    assert "rollout of a@2 beside version 1: 5% for 10m, then 50% for 30m" in out
    assert "no server is up" in out
    code, _, err = ft(site.project, "promote", "a@2", "--force")
    assert code == 2
    assert "a rollout of a@2 is under way" in err
    assert "ft rollout cancel a" in err
    code, out, _ = ft(site.project, "rollout", "a")
    assert "a@2: 0 of 600 s at 5%" in out
    code, out, _ = ft(site.project, "rollout", "advance", "a", "--json")
    assert (as_json(out)[0]["step"], as_json(out)[0]["state"]) == (1, "running")
    code, out, _ = ft(site.project, "serve", "plan", "a", "--json")
    plan = as_json(out)
    assert (code, plan["server"], plan["engines"]["engine"]["lines"][0]["notes"]) == (
        0,
        "not running",
        ["canary a@2 at 50%"],
    )
    assert plan["engines"]["engine"]["lines"][0]["todo"] == [
        "load and probe a@1",
        "load and probe a@2",
        "lead a to a@1",
    ]
    code, out, _ = ft(site.project, "rollout", "cancel", "a", "--json")
    assert as_json(out)[0]["state"] == "cancelled"
    assert adapters.aliases(site.store, "a")["champion"] == 1
    code, _, err = ft(site.project, "rollout", "cancel", "a")
    assert (code, "no rollout of a is under way" in err) == (2, True)


def test_status_tells_of_a_canary(site: Site) -> None:
    status = ServerStatus(1, "serving", "", {}, {}, "", 0, "http://127.0.0.1:1")
    ft(site.project, "promote", "a@2", "--canary", "5%:10m,50%:30m")
    write_status(site.store, status)
    with (site.store.home / "server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, _ = ft(site.project, "serve", "status")
    assert code == 0
    assert "canary: a@2 answers 5% beside a@1; `ft rollout a` has more" in out


def test_the_plan_names_what_leads_nowhere(site: Site) -> None:
    """A slip in a rule would otherwise show itself as a 404 to some callers."""
    file = site.project.root / "recipes" / "desk.yaml"
    file.write_text(
        "kind: serve\nengines: {far: {url: 'http://127.0.0.1:1'}}\nroutes: {support: {model: letters}}\n"
        "rules: [{when: {keywords: refund}, route: suport}, {when: {model: [easy]}, route: a}]\n"
    )
    add_key(site.store, "shop", routes=("support", "a", "auto", "easy", "aa"), rate=None, by_whom="test")
    add_key(site.store, "old", routes=("gone",), rate=None, by_whom="test")
    revoke_key(site.store, "old")
    wanted = [
        "route support: no version of a model 'letters' is registered",
        "rule 1: no route or registered model 'suport'",
        "key shop: no route or registered model 'aa'",
    ]
    code, out, _ = ft(site.project, "serve", "plan", str(file), "--json")
    assert (code, as_json(out)["nowhere"]) == (0, wanted)
    code, out, _ = ft(site.project, "serve", "plan", str(file))
    assert out.splitlines()[-3:] == wanted


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["promote", "a@2", "--canary", "half"], "no steps of a canary: 'half'"),
        (["rollout", "advance"], "not understood: advance"),
        (["rollout", "restart", "a"], "not understood: restart a"),
    ],
)
def test_what_makes_no_sense(site: Site, arguments: list[str], why: str) -> None:
    code, _, err = ft(site.project, *arguments)
    assert code == 2
    assert why in err
