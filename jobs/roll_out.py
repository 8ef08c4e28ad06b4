"""The promotion of a run whose recipe has `rollout:`: begun, and waited for as long as its steps take.

The servers decide (serving/rollout_keeper.py); the run only looks at the row, so it survives its worker.
"""

from __future__ import annotations

import asyncio

from jobs.steps import Bench, State, step
from registry import adapters, rollouts, runs
from registry.adapters import Promotion, Verdict
from registry.errors import Conflict
from registry.rollouts import Rollout

LOOK_SECONDS = 0.5


def goes_by_steps(bench: Bench, run_id: str, judged: Verdict) -> bool:
    """Beside the champion, if there is one: the first version of a model has nothing to be compared with."""
    champion = adapters.aliases(bench.store, judged.model).get("champion")
    return bench.recipe(run_id).rollout is not None and champion not in (None, judged.version)


@step("roll out")
async def roll_out(bench: Bench, run_id: str, verdict: State) -> State:
    """The move of `champion` as `promote` gives it; `judge_again` if the champion is another by now; `ended` if the
    version was rolled back, or somebody cancelled it."""
    await behind_others(bench, run_id, verdict["model"])
    judged = adapters.last_verdict(bench.store, verdict["model"], verdict["version"])
    terms = bench.recipe(run_id).rollout
    assert judged is not None
    assert terms is not None
    by, reason = verdict.get("by") or "ft", verdict.get("reason") or "the gate passed it"
    try:
        found = rollouts.start(bench.store, judged, terms, by_whom=by, run_id=run_id, reason=reason)
    except Conflict as error:
        champion = adapters.aliases(bench.store, judged.model).get("champion")
        if champion == judged.version:  # a person was faster
            return _moved(bench, run_id, adapters.promotions(bench.store, judged.model)[-1])
        if champion != judged.body.get("champion"):
            return {"judge_again": error.what}
        raise
    return await _until_ended(bench, run_id, found)


async def behind_others(bench: Bench, run_id: str, model: str) -> None:
    """Wait while another version of the model is on its way: only one is at a time."""
    while others := [each for each in rollouts.running(bench.store, model) if each.run_id != run_id]:
        runs.set_stage(bench.store, run_id, f"waiting behind the rollout of {others[0].name}")
        await bench.outside("waiting", asyncio.sleep(LOOK_SECONDS))


async def _until_ended(bench: Bench, run_id: str, found: Rollout) -> State:
    try:
        while found.state == "running":
            runs.set_stage(bench.store, run_id, f"canary {found.percent:g}%")
            await bench.outside("canary", asyncio.sleep(LOOK_SECONDS))
            found = rollouts.get(bench.store, found.id)
    except asyncio.CancelledError:
        if bench.run(run_id).wish == "cancel":
            rollouts.cancel(bench.store, found, by_whom="ft", reason="its run was cancelled")
        raise
    said = {"state": found.state, "percent": found.percent, "reason": found.reason, "from": found.from_version}
    runs.note_result(bench.store, run_id, rollout=said)
    if found.state != "done":
        return {"ended": found.state, "reason": found.reason}
    move = next(each for each in adapters.promotions(bench.store, found.model) if each.run_id == run_id)
    return _moved(bench, run_id, move)


def _moved(bench: Bench, run_id: str, move: Promotion) -> State:
    runs.note_result(bench.store, run_id, promoted={"from": move.from_version, "to": move.version})
    return {"model": move.model, "version": move.version, "from": move.from_version}
