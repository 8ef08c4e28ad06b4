"""`python -m tests.flows.money_driver FIRST STEP AT_ONCE`: a share of the sweep's jobs, watched by the product's own.

Stands for a worker: killed at any moment and started again, it goes on with the jobs that are not over.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from jobs.rent import Offer
from jobs.steps import Bench
from jobs.targets.runpod_pod import Rent, RunPodPod
from jobs.watch_job import JobWatch
from registry import runs
from registry.bucket import open_bucket
from registry.errors import FtError
from registry.project import find_project
from registry.recipe import Finetune
from registry.runpod_api import open_runpod
from registry.settings import load_settings
from registry.store import open_store


async def main(first: int, step: int, at_once: int) -> None:
    project = find_project()
    store, settings = open_store(project), load_settings(project)
    bench = Bench(project, store, settings)
    cloud, bucket = open_runpod(settings), open_bucket(settings)
    terms = json.loads((project.root / "sweep.json").read_text(encoding="utf-8"))
    ids = sorted(each.id for each in runs.listed(store, active=True, limit=10_000))
    free = asyncio.Semaphore(at_once)

    async def one(run_id: str) -> None:
        async with free:
            target = RunPodPod(store, settings, cloud, bucket, _rent(bench, run_id, terms), terms["commands"][run_id])
            await _to_its_end(bench, run_id, target)

    mine = [each for each in ids if int(each.rpartition("-")[2], 16) % step == first]
    await asyncio.gather(*(one(each) for each in mine))


async def _to_its_end(bench: Bench, run_id: str, target: RunPodPod) -> None:
    watch = JobWatch(bench, run_id, bench.recipe(run_id), target, "runpod")
    try:
        result = await watch.until_done()
    except FtError as error:
        await watch.stop(error.what)
        runs.finish(bench.store, run_id, "failed", error)
    except Exception:
        traceback.print_exc()
        raise
    else:
        await asyncio.to_thread(target.fetch, watch.folder, watch.job.adapter)
        runs.note_result(bench.store, run_id, training=result)
        runs.finish(bench.store, run_id, "succeeded")


def _rent(bench: Bench, run_id: str, terms: dict[str, Any]) -> Rent:
    recipe: Finetune = bench.recipe(run_id)
    assert recipe.cloud is not None
    offers = tuple(Offer(**each) for each in terms["offers"])
    return Rent(
        recipe=recipe.name, model=recipe.model, terms=recipe.cloud, offers=offers,
        reserve_usd=terms["reserve_usd"], max_usd=recipe.budget.max_usd, base=Path(terms["base"]),
    )  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:4])))
