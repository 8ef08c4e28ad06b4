"""A run whose recipe has `rollout:`: it begins the canary, waits for its end, and says how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.roll_out import behind_others, goes_by_steps, roll_out
from jobs.steps import BENCH, Bench, State
from registry import adapters, rollouts, runs
from registry.errors import Conflict
from registry.recipe import Finetune
from registry.rollout_terms import parse_canary
from registry.settings import Settings
from tests.fakes.reconciled import Site, make_site

RECIPE = {
    "kind": "finetune", "name": "a", "model": "a", "base": {"model": "org/base"}, "data": {"path": "datasets/a"},
    "evaluate": {"task": "label"}, "rollout": {"steps": [{"percent": 5, "for": "1s"}, {"percent": 50, "for": "1s"}]},
}  # fmt: skip


def ready(root: Path, **changed: Any) -> tuple[Site, Bench, str]:
    """a@1 is champion, a@2 has passed; and a run of the recipe, which is on."""
    site = make_site(root)
    for number in (1, 2):
        site.add("a", number)
    site.promote("a", 1)
    site.judge("a", 2)
    bench = Bench(site.project, site.store, Settings())
    BENCH.set(bench)
    body = Finetune.model_validate({**RECIPE, **changed}).model_dump(mode="json")
    run = runs.submit(site.store, body, "recipes/a.yaml", "digest").id
    runs.begin_step(site.store, run, "take turn", "step")
    return site, bench, run


async def step(run: str) -> State:
    return await roll_out(run, {"model": "a", "version": 2})


def rolled_out(site: Site, run: str, meanwhile: Callable[[rollouts.Rollout], object]) -> State:
    """What the step says, while something is done to its rollout."""

    async def both() -> State:
        waiting = asyncio.create_task(step(run))
        while not (found := rollouts.running(site.store, "a")):
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await asyncio.sleep(0.1)
        assert runs.get(site.store, run).stage == f"canary {found[0].percent:g}%"
        meanwhile(found[0])
        return await asyncio.wait_for(waiting, 10)

    return asyncio.run(both())


def test_a_version_that_held_is_promoted_by_its_run(tmp_path: Path) -> None:
    site, _, run = ready(tmp_path)
    moved = rolled_out(site, run, lambda on: rollouts.advance(site.store, rollouts.advance(site.store, on)))
    assert moved == {"model": "a", "version": 2, "from": 1}
    assert adapters.promotions(site.store, "a")[-1].run_id == run
    assert runs.get(site.store, run).result["promoted"] == {"from": 1, "to": 2}
    assert asyncio.run(step(run)) == moved, "the step is repeated after a kill"
    assert len(rollouts.rollouts(site.store)) == 1


@pytest.mark.parametrize("how", ["rolled_back", "cancelled"])
def test_one_that_did_not_is_not(tmp_path: Path, how: str) -> None:
    site, _, run = ready(tmp_path)

    def end(on: rollouts.Rollout) -> None:
        if how == "cancelled":
            rollouts.cancel(site.store, on, by_whom="ann", reason="enough")
        else:
            rollouts.roll_back(site.store, on, "enough")

    assert rolled_out(site, run, end) == {"ended": how, "reason": "enough"}
    assert adapters.aliases(site.store, "a")["champion"] == 1
    assert runs.get(site.store, run).result["rollout"]["state"] == how


def test_a_cancelled_run_takes_its_rollout_with_it_and_a_worker_that_ends_does_not(tmp_path: Path) -> None:
    site, _, run = ready(tmp_path)

    async def stopped() -> None:
        waiting = asyncio.create_task(step(run))
        while not rollouts.running(site.store, "a"):
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(stopped())
    assert rollouts.get(site.store, 1).state == "running", "the servers go on with it"
    runs.set_wish(site.store, run, "cancel")
    asyncio.run(stopped())
    assert rollouts.get(site.store, 1).state == "cancelled"


def test_only_one_is_on_its_way_at_a_time(tmp_path: Path) -> None:
    site, bench, run = ready(tmp_path)
    site.add("a", 3)
    other = rollouts.start(site.store, site.judge("a", 3), parse_canary("5%:1h"), by_whom="ann")

    async def waits() -> None:
        waiting = asyncio.create_task(behind_others(bench, run, "a"))
        await asyncio.sleep(0.2)
        assert runs.get(site.store, run).stage == "waiting behind the rollout of a@3"
        rollouts.cancel(site.store, other, by_whom="ann")
        await asyncio.wait_for(waiting, 5)

    asyncio.run(waits())


def test_a_champion_that_moved_meanwhile_is_judged_against_again(tmp_path: Path) -> None:
    site, _, run = ready(tmp_path)
    site.add("a", 3)
    site.promote("a", 3)
    found = asyncio.run(step(run))
    assert "was judged against version 1" in found["judge_again"]


def test_the_first_version_has_nothing_to_answer_beside(tmp_path: Path) -> None:
    site, bench, run = ready(tmp_path)
    verdict = adapters.last_verdict(site.store, "a", 2)
    assert verdict is not None
    assert goes_by_steps(bench, run, verdict)
    site.add("b", 1)
    assert not goes_by_steps(bench, run, site.judge("b", 1))
    with pytest.raises(Conflict, match="no champion"):
        rollouts.start(site.store, site.judge("b", 1), parse_canary("5%:1m"), by_whom="ann")


def test_without_that_section_it_is_all_at_once(tmp_path: Path) -> None:
    site, bench, run = ready(tmp_path, rollout=None)
    verdict = adapters.last_verdict(site.store, "a", 2)
    assert verdict is not None
    assert not goes_by_steps(bench, run, verdict)
