"""A run that waits for a person: the version passed, and `promote: approve` asks before it answers anybody.

`until_answered` is for whatever else a person is asked.
"""

from __future__ import annotations

import asyncio
import time

from jobs.steps import Bench, State, step
from registry import adapters, approvals, runs
from registry.approvals import Approval
from registry.durations import seconds

LOOK_SECONDS = 0.5
# A clock that differs from what has really passed by more than this was set (or the machine slept).
JUMP_SECONDS = 60.0


@step("waiting for approval")
async def wait_for_approval(bench: Bench, run_id: str, verdict: State) -> State:
    """Until somebody answers or the time is over. Holds no card; the deadline is in the store."""
    subject, limit = (verdict["model"], verdict["version"]), bench.recipe(run_id).approval.timeout
    asking = approvals.ask(bench.store, run_id, verdict["id"], *subject, seconds=seconds(limit))
    asking = await until_answered(bench, asking, seconds(limit))
    said = {"answer": asking.answer, "by": asking.by_whom, "reason": asking.reason, "at": asking.answered}
    runs.note_result(bench.store, run_id, approval=said)
    return {**verdict, **said, "outcome": "pass" if asking.answer == "approved" else asking.answer}


async def until_answered(bench: Bench, asking: Approval, limit: float) -> Approval:
    """The same question with its answer; the time of waiting, of `limit` seconds at most, is counted apart."""
    clock, behind = WallClock(), time.time() - asking.asked
    if asking.answer is None and behind < -JUMP_SECONDS:  # the clock was put back while no worker looked
        asking = approvals.move_deadline(bench.store, asking, behind)
    while asking.answer is None:
        await asyncio.sleep(LOOK_SECONDS)
        asking = await asyncio.to_thread(_look, bench, asking, clock.jump())
    bench.note_outside("approval", _waited(asking, limit))
    return asking


class WallClock:
    """Notices when the clock on the wall was set: it then moves otherwise than the machine's own."""

    def __init__(self) -> None:
        self.wall, self.own = time.time(), time.monotonic()

    def jump(self) -> float:
        """Seconds by which it has jumped since the last look; 0 where it just went on."""
        wall, own = time.time(), time.monotonic()
        jumped = jump_between((self.wall, self.own), (wall, own))
        self.wall, self.own = wall, own
        return jumped


def jump_between(before: tuple[float, float], now: tuple[float, float]) -> float:
    """Of two readings (wall, monotonic)."""
    jumped = (now[0] - before[0]) - (now[1] - before[1])
    return jumped if abs(jumped) > JUMP_SECONDS else 0.0


def _look(bench: Bench, asking: Approval, jumped: float) -> Approval:
    if jumped:
        return approvals.move_deadline(bench.store, asking, jumped)
    if adapters.aliases(bench.store, asking.model).get("champion") == asking.version:
        by = adapters.promotions(bench.store, asking.model)[-1].by_whom
        return approvals.promoted_by_hand(bench.store, asking, by)
    if time.time() > asking.deadline:
        return approvals.expire(bench.store, asking)
    return approvals.get(bench.store, asking.run_id, asking.verdict, asking.starts)


def _waited(answered: Approval, limit: float) -> float:
    """Seconds from question to answer, whatever workers there were; what the run was paused moved the deadline."""
    paused = answered.deadline - answered.asked - limit
    return max(0.0, (answered.answered or answered.asked) - answered.asked - max(0.0, paused))
