"""Keeps the canaries of one engine going: what was seen is written down every few seconds, judged, and acted upon.

A server that ends in the middle loses what it saw in those few seconds, and no more: step, time and counts are rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from registry import rollouts
from registry.errors import StoreError
from registry.rollouts import Rollout
from registry.store import Store
from serving.rollout_watch import ArmCounts, Ratings, Seen, judge
from serving.routes import Board

EVERY_SECONDS = 2.0


class RolloutKeeper:
    """`look` is called in every round. `decides`: a gateway beside the one whose reconciler does only counts."""

    def __init__(self, store: Store, board: Board, every: float = EVERY_SECONDS, *, decides: bool = True) -> None:
        self.store, self.board, self.every, self.decides = store, board, every, decides
        # Of each rollout: its step, and until when (time.monotonic) it has been written down.
        self._written: dict[int, tuple[int, float]] = {}

    async def look(self, in_force: Mapping[str, Rollout], refused: Mapping[str, Rollout]) -> None:
        """`in_force`: rollouts of which both versions answer here now. `refused`: those whose version cannot."""
        for reason, rollout in refused.items():
            await asyncio.to_thread(rollouts.roll_back, self.store, rollout, reason)
            self.board.poke()
        here = {each.id for each in in_force.values()}
        self._written = {id_: each for id_, each in self._written.items() if id_ in here}
        for rollout in in_force.values():
            await self._look(rollout)

    async def _look(self, rollout: Rollout) -> None:
        now = time.monotonic()
        step, since = self._written.get(rollout.id, (-1, now))
        if step != rollout.step:  # what was seen before belongs to another step
            self.board.arms |= {rollout.name: ArmCounts(), rollout.stable: ArmCounts()}
            self._written[rollout.id] = rollout.step, now
        elif now - since >= self.every:
            self._written[rollout.id] = step, now
            await self._write(rollout, now - since if self.decides else 0.0)
            if self.decides:
                await asyncio.to_thread(self._decide, rollout)

    async def _write(self, rollout: Rollout, seconds: float) -> None:
        arms = {"new": rollout.name, "stable": rollout.stable}
        taken = {arm: self.board.arms.get(name, ArmCounts()) for arm, name in arms.items()}
        self.board.arms |= {name: ArmCounts() for name in arms.values()}
        counts = {arm: each.as_dict() for arm, each in taken.items()}
        try:
            await asyncio.to_thread(rollouts.add_seen, self.store, rollout, seconds, counts)
        except StoreError:  # a database that is away for a moment takes it later
            for arm, name in arms.items():
                self.board.arms[name].take(taken[arm])
            raise

    def _decide(self, rollout: Rollout) -> None:
        rollout = rollouts.get(self.store, rollout.id)
        judged = judge(rollout.terms, rollout.step, rollout.held, seen_of(self.store, rollout))
        if judged.outcome == "roll back":
            rollouts.roll_back(self.store, rollout, judged.reason, judged.numbers)
        elif judged.outcome in ("advance", "finish"):
            rollouts.advance(self.store, rollout, reason=judged.reason)
        elif rollout.held >= rollout.terms.seconds_of(rollout.step):
            rollouts.note_held(self.store, rollout, judged.reason)


def split_here(store: Store, board: Board) -> dict[str, Rollout]:
    """The rollouts of which this board's callers get a part, whoever put it up."""
    return {each.model: each for each in rollouts.running(store) if each.model in board.routes.splits}


def seen_of(store: Store, rollout: Rollout) -> Seen:
    """What was seen in the step, as it is written down, and the ratings since the rollout began."""
    new, stable = (ArmCounts.of(rollout.counts.get(arm, {})) for arm in ("new", "stable"))
    rated = [Ratings(**rollouts.rated(store, name, rollout.created)) for name in (rollout.name, rollout.stable)]
    return Seen(new, stable, *rated)
