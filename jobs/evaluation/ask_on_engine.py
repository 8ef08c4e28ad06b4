"""An evaluation inside a run: on the engine that will serve, with the next engine where one dies under it."""

from __future__ import annotations

import time
from contextlib import suppress

from jobs.evaluation.evaluate import EvalRequest, evaluate
from jobs.steps import Bench
from registry import runs
from registry.base_models import BaseModel
from registry.cards import Card
from registry.errors import EngineError, StoreError
from registry.scores import Scored
from serving.control import engine_for

ENGINE_DEATHS = 3


async def ask_on_engine(
    bench: Bench, run_id: str, request: EvalRequest, card: Card, base: BaseModel
) -> dict[str, Scored]:
    """Start the engine (or wait for the server's), ask, and count the engine's time apart."""

    def progress(done: int, total: int) -> None:
        with suppress(StoreError):  # nothing that an engine should be started again for
            runs.set_stage(bench.store, run_id, f"evaluate {done}/{total}")

    for deaths in range(1, ENGINE_DEATHS + 1):
        runs.set_stage(bench.store, run_id, "starting the engine")
        entered, serve = time.monotonic(), bench.recipe(run_id).serve
        async with engine_for(bench.project, bench.store, bench.settings, base, serve, card) as engine:
            bench.note_outside("engine", time.monotonic() - entered)
            try:
                asking = evaluate(bench.project, bench.store, engine, request, progress)
                scored = await bench.outside("evaluation", asking)
                break
            except EngineError:  # of one that has died: another is started, and asked what was not scored yet
                if deaths == ENGINE_DEATHS or await engine.healthy():
                    raise
            finally:
                left = time.monotonic()
    bench.note_outside("engine", time.monotonic() - left)
    return scored
