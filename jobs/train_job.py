"""The training of one run, where its plan says: watched to its end, and let go of when a person stops the run."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from jobs.fetch_base import fetch_base
from jobs.steps import BENCH, Bench, State, at_work
from jobs.target_of import RUNPOD, evaluation_target, target_of
from jobs.targets.local_card import LocalCard
from jobs.targets.target import Target
from jobs.tell_mlflow import keep_telling, named_tracker
from jobs.through_bucket import lends
from jobs.token_histogram import look
from jobs.watch_job import JobWatch
from registry import runs
from registry.calibration import note_measured, of_result
from registry.candidates import wish_of
from registry.card_profiles import GIB, by_runpod_id
from registry.cards import marker, pick_card
from registry.errors import FtError, JobError
from registry.hosts import all_cards, choose_card, host_id, hosts, looked_after_by
from registry.job_folder import JobFolder
from registry.rentals import current, rentals
from registry.store import Store

# Of runs that were cancelled or paused while no step of theirs was at work here: who ends their pods.
_ending: dict[str, threading.Thread] = {}


async def train_job(bench: Bench, run_id: str, plan: State) -> State:
    """The accepted result; its adapter lies in the job's folder then."""
    recipe, rented = bench.recipe(run_id), bool(plan.get("rent"))
    if rented:
        runs.note_result(bench.store, run_id, rented_by=host_id())
    elif not plan.get("through"):
        _refuse_copied_folder(bench, run_id)
        await bench.outside("set-up", asyncio.to_thread(fetch_base, bench.project, recipe.base))
    target = target_of(bench.project, bench.store, bench.settings, recipe, plan)
    watch = JobWatch(bench, run_id, recipe, target, RUNPOD if rented else plan["card"])
    tracking = asyncio.create_task(keep_telling(bench, run_id, plan))
    if lends(bench) and not named_tracker(recipe):
        tracking.cancel()  # it would tell a file of this host, which nobody reads
    with nullcontext() if rented else _card_wanted(bench, plan):
        try:
            result = await watch.until_done()
        except asyncio.CancelledError:
            # The card is given back only when the trainer is really gone.
            await asyncio.shield(watch.stop(why_stopped(bench.store, run_id)))
            raise
        finally:
            tracking.cancel()
    if rented:
        await asyncio.to_thread(target.fetch, watch.folder, watch.job.adapter)
    if not plan.get("through"):
        await asyncio.to_thread(measure, bench, run_id, plan, result)
    return result


def let_go(run_id: str, others: Container[str] = ()) -> bool:
    """Stop what still works for a cancelled or paused run, without waiting; True when nothing does.

    `others` are the other hosts that live: what works there, they let go of.
    """
    bench = BENCH.get()
    planned = bench.run(run_id).result
    if looked_after_by(planned) in others:
        return False
    pod_gone = not _rents(planned) or _pod_is_gone(bench, run_id, planned)
    free = bool(planned.get("rent")) or _card_is_free(bench, run_id, planned)
    return pod_gone and free and run_id not in at_work()


def why_stopped(store: Store, run_id: str) -> str:
    return f"the run was {'paused' if runs.get(store, run_id).wish == 'pause' else 'cancelled'}"


def _card_is_free(bench: Bench, run_id: str, planned: dict[str, Any]) -> bool:
    folder = bench.project.job_folder(run_id)
    if not (folder / "spec.json").exists() or planned.get("host", host_id()) != host_id() or "card" not in planned:
        return True
    job = JobFolder(folder)
    if LocalCard(bench.project, pick_card(planned["card"])).poll(folder).state == "running":
        job.ask_to_stop(why_stopped(bench.store, run_id))
        return False
    job.withdraw_stop()
    return True


def _pod_is_gone(bench: Bench, run_id: str, planned: dict[str, Any]) -> bool:
    """The pod is stopped in a thread: that may take two minutes, and the worker has other runs to look after."""
    ending = _ending.get(run_id)
    if run_id in at_work() or (ending and ending.is_alive()):
        return False
    if current(bench.store, run_id) is None:
        _ending.pop(run_id, None)
        return True
    target, folder = _in_pod(bench, run_id, planned)
    arguments = (folder, why_stopped(bench.store, run_id))
    _ending[run_id] = threading.Thread(target=target.cancel, args=arguments, name=f"end {run_id}", daemon=True)
    _ending[run_id].start()
    return False


def _rents(planned: dict[str, Any]) -> bool:
    return bool(planned.get("rent") or planned.get("rent_to_evaluate"))


def _in_pod(bench: Bench, run_id: str, planned: dict[str, Any]) -> tuple[Target, Path]:
    """What the run's pod does, and the folder of that: the evaluation, once there is one."""
    project, recipe = bench.project, bench.recipe(run_id)
    if jobs := JobFolder(project.job_folder(run_id)).evaluations():
        return evaluation_target(project, bench.store, bench.settings, recipe, planned, run_id), jobs[-1].path
    return target_of(project, bench.store, bench.settings, recipe, planned), project.job_folder(run_id)


def measure(bench: Bench, run_id: str, plan: State, result: State) -> None:
    """Keep what it really took, for the next plans: where the data are. If it cannot be kept, the run goes on."""
    if not plan.get("planned"):
        return
    recipe = bench.recipe(run_id)
    try:
        card, memory = _trained_on(bench, run_id, plan, result)
        looked = look(bench.project, recipe, python=bench.settings.trainer_python)
        row = of_result(wish_of(recipe, looked.histogram, looked.config), card, memory, result)
    except FtError as error:
        print(f"{run_id}: not kept for the next plan: {error}", file=sys.stderr, flush=True)
    else:
        if row:
            note_measured(bench.store, run_id, row)


def _trained_on(bench: Bench, run_id: str, plan: State, result: State) -> tuple[str, int]:
    """The card's title and bytes; of a pod's, what the trainer found in it counts."""
    if not plan.get("rent"):
        card = choose_card(f"{plan['host']}/{plan['card']}", all_cards(hosts(bench.store)), (), {}).card
        return card.title if not card.is_cpu else "cpu", card.memory
    gpu = rentals(bench.store, job=run_id)[-1].gpu
    profile = by_runpod_id(gpu)
    return str(result.get("card") or gpu), int(profile.memory_gib * GIB) if profile else 0


def _refuse_copied_folder(bench: Bench, run_id: str) -> None:
    folder = bench.project.job_folder(run_id)
    if not (folder / "spec.json").exists():
        raise JobError(
            "the job's folder is not here, though this host and the one that planned it seem to share theirs",
            place=str(folder), fix=f"was .ft copied to {host_id()}? Delete {bench.project.home / 'folder.id'} there, "
            f"start its worker again, then `ft resume {run_id}`",
        )  # fmt: skip


def _card_wanted(bench: Bench, plan: State) -> AbstractContextManager[None]:
    return marker(bench.project, pick_card(plan["card"]), "train")
