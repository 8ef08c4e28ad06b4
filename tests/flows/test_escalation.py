"""A small model that is not good enough starts the large one: real worker, trainer and stores; the engine is a fake."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from jobs.worker_process import worker_is_on
from registry import adapters, approvals, runs
from registry.event_types import TYPES
from registry.events import by_run, causes, read
from registry.recipe import digest, load_recipe
from tests.conftest import run_bounded
from tests.fakes.provider import KEY, Provider
from tests.flows.shared_parts import canned_parts
from tests.flows.swept_project import MODEL, Parts, Swept, swept_project

# MLflow uses what SQLAlchemy calls deprecated.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(900)]

SECONDS = 240.0


def write_recipe(swept: Swept, name: str, **keys: Any) -> Path:
    body = yaml.safe_load((swept.project.root / "recipes" / f"{MODEL}.yaml").read_text(encoding="utf-8"))
    body.pop("on", None)
    path = swept.project.root / "recipes" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**body, **keys}), encoding="utf-8")
    return path


def escalating(swept: Swept, provider: Provider, key: str, **more: Any) -> Path:
    reference = {"model": "gpt-canned", "url": provider.url, "key": key}
    terms = {"to": "recipes/large.yaml", "max_usd": 50, "reference": reference, **more}
    return write_recipe(swept, "small", gate={"min": 0.9}, escalate=terms)


def submit(swept: Swept, path: Path) -> str:
    recipe = load_recipe(path)
    return runs.submit(swept.store, recipe.model_dump(mode="json"), f"recipes/{path.name}", digest(recipe)).id


def until(swept: Swept, run_id: str, condition: Callable[[runs.Run], object]) -> runs.Run:
    end = time.monotonic() + SECONDS
    while not condition(run := runs.get(swept.store, run_id)):
        swept.keep_up()
        assert time.monotonic() < end, f"{run}\n{swept.log_tail('worker', 40)}"
        time.sleep(0.05)
    return run


def ft(swept: Swept, *arguments: str) -> str:
    env, root = {"FT_CACHE": str(swept.project.cache)}, swept.project.root
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], 120, env=env, cwd=root)
    return done.stdout + done.stderr


def label_of(body: dict[str, Any], _: int) -> str:
    time.sleep(0.2)  # long enough to be killed in
    return str(body["messages"][-1]["content"].splitlines()[0].rpartition(" ")[2])


def test_a_small_model_that_is_not_good_enough_starts_the_large_one_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    with (
        canned_parts(tmp_path) as shared,
        swept_project(tmp_path, Parts(shared.base, shared.adapter, shared.engine)) as swept,
        Provider(label_of) as provider,
    ):
        write_recipe(swept, "large", budget={"max_usd": 8})
        _a_missing_key_leaves_it_undecided(swept, provider)
        run_id = submit(swept, escalating(swept, provider, "${PROVIDER_KEY}", approve=True))
        until(swept, run_id, lambda run: provider.asked)
        assert swept.kill("worker", run_id)
        until(swept, run_id, lambda run: approvals.waiting(swept.store))
        assert len(provider.asked) <= 8, "four rows, and those that were under way when the worker was killed"
        assert swept.kill("worker", run_id)
        swept.running["worker"].wait(30)
        # Else `ft approve` would start a worker of its own, which nobody here ends.
        until(swept, run_id, lambda run: worker_is_on(swept.project))
        assert "starts recipes/large.yaml, $8 at most" in ft(swept, "approve")
        assert "recipes/large.yaml, after m@2 approved by" in ft(swept, "approve", run_id)
        small = until(swept, run_id, lambda run: run.ended)
        [event] = read(swept.store, type_="run.escalated")
        large = until(swept, event.data["run"], lambda run: run.ended)
        _check(swept, small, large)
        assert f"escalated to recipes/large.yaml for at most $8: {large.id}" in ft(swept, "show", small.id)
        assert f"because of run.submitted  {small.id}" in ft(swept, "events", "why", large.id)


def _a_missing_key_leaves_it_undecided(swept: Swept, provider: Provider) -> None:
    run_id = submit(swept, escalating(swept, provider, "${NO_SUCH_KEY}"))
    ended = until(swept, run_id, lambda run: run.ended)
    assert (ended.state, ended.error) == ("refused", None), swept.log_tail("worker", 40)
    assert ended.result["escalated"]["outcome"] == "undecided"
    assert "not set: NO_SUCH_KEY" in ended.result["escalated"]["why"]
    assert provider.asked == []
    assert read(swept.store, type_="run.escalated") == []


def _check(swept: Swept, small: runs.Run, large: runs.Run) -> None:
    assert (small.state, large.state) == ("refused", "succeeded"), (large.error, swept.log_tail("worker", 40))
    found = small.result["escalated"]
    assert (found["outcome"], found["run"], found["reference"], found["limit"]) == ("started", large.id, 1.0, 0.7)
    assert found["score"] < 0.7
    assert (large.model, large.recipe, large.body["budget"]) == (MODEL, "large", {"max_usd": 8.0})
    assert adapters.aliases(swept.store, MODEL)["champion"] == large.result["version"]
    [submitted] = read(swept.store, type_="run.submitted", subject=large.id)
    assert [each.type for each in causes(swept.store, submitted)] == ["run.escalated", "run.submitted"]
    assert causes(swept.store, submitted)[0].cause == by_run(small.id)
    assert [run.id for run in runs.listed(swept.store, recipe="large")] == [large.id]
    done = [each.data["step"] for each in read(swept.store, type_="run.step", subject=small.id)]
    assert done[-5:] == ["judge", "escalate", "waiting for approval to escalate", "start escalation", "conclude"]
    for event in read(swept.store):
        Draft202012Validator(TYPES[event.type].schema()).validate(event.data)
