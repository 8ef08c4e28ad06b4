"""`make sweep-money`: hundreds of jobs through the stand-in of RunPod, with faults and kill -9; then we read the books.

Real: ledger, renting, target, bucket (weed mini), the pods' start command with its watchdog, the reaper.
Prints the figures as JSON; exit code 1 if money leaked, and the folder stays where it is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.fetch_base import fetch_base
from jobs.pod_reaper import Reaper
from registry import runs
from registry.base_models import BaseModel
from registry.budgets import paid_seconds, stop_allowance
from registry.dataset_versions import materialise, pin
from registry.job_folder import JobFolder
from registry.manifest import manifest_digest, write_manifest
from registry.project import Project, cache_folder
from registry.recipe import Base, Finetune
from registry.rentals import any_open, rentals, rented_pods
from registry.runpod_api import open_runpod
from registry.settings import Settings
from registry.store import Store
from tests.conftest import ROOT, SMOL, TinyBase
from tests.fakes.adapter_folder import lora_arrays, make_adapter
from tests.fakes.runpod.started import Standin, standin
from tests.flows.tiny_project import SHORT, Tiny, make_tiny
from tests.tiny_base import save_tiny_base
from tests.weed_server import WeedServer, weed_server

GPUS = {"NVIDIA GeForce RTX 3070": 0.13, "NVIDIA GeForce RTX 4070 Ti": 0.19, "NVIDIA A40": 0.35}
# So dear that a second of a pod is a quarter of a cent, and cents are worth comparing.
PRICE_FACTOR, POD_SECONDS, ATTEMPTS = 100.0, 120.0, 6
LIST_LAG, SETTLE, BILLING_LAG, GRACE = 2.0, 4.0, 3.0, 60.0
DRIVERS, REAPER, FINAL = 2, "reaper", BILLING_LAG + 4
FAULTS: list[dict[str, Any]] = [
    {"fault": "random", "probability": 0.04, "seconds": 3},
    {"fault": "timeout_after", "match": "POST /v2/pods", "probability": 0.05, "seconds": 5},
    {"fault": "error_after", "match": "POST /v2/pods", "probability": 0.05},
    {"fault": "duplicate", "match": "POST /v2/pods", "probability": 0.04},
    {"fault": "price", "match": "POST /v2/pods", "probability": 0.04, "factor": 3},
    {"fault": "dies", "match": "POST /v2/pods", "probability": 0.06, "seconds": 4},
    {"fault": "hangs", "match": "POST /v2/pods", "probability": 0.03, "seconds": 4},
    {"fault": "restarts", "match": "POST /v2/pods", "probability": 0.05},
    {"fault": "stuck", "match": "POST /v2/pods", "probability": 0.02, "seconds": 5},
    {"fault": "idle", "match": "POST /v2/pods", "probability": 0.02},
    {"fault": "ignore", "match": "DELETE /v2/pods/*", "probability": 0.05},
    {"fault": "list_lag", "seconds": LIST_LAG},
    {"fault": "clock_skew", "seconds": 37},
]


@dataclass
class Part:
    """A process of ours that is killed and started again."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    kills: int = 0
    down_since: float | None = None


@dataclass
class Sweep:
    tiny: Tiny
    cloud: Standin
    environment: dict[str, str]
    dice: random.Random
    parts: list[Part] = field(default_factory=list)
    longest_gap: float = 0.0
    fired: dict[str, int] = field(default_factory=dict)

    @property
    def store(self) -> Store:
        return self.tiny.store

    def keep_up(self) -> None:
        """Whoever is down is started again; a driver that has done its share stays down."""
        for part in self.parts:
            if part.process and part.process.poll() is None:
                continue
            if part.process and part.process.returncode == 0 and part.name != REAPER and not self.left():
                continue
            if part.down_since is not None:
                self.longest_gap = max(self.longest_gap, time.monotonic() - part.down_since)
            log = (self.tiny.person.project.root / f"{part.name}.log").open("ab")
            with log:
                part.process = subprocess.Popen(
                    part.command, cwd=self.tiny.person.project.root, env=self.environment, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            part.down_since = None

    def kill_one(self) -> None:
        part = self.dice.choice(self.parts)
        if part.process and part.process.poll() is None:
            os.killpg(part.process.pid, signal.SIGKILL)
            part.process.wait()
            part.kills, part.down_since = part.kills + 1, time.monotonic()

    def left(self) -> list[runs.Run]:
        return runs.listed(self.store, active=True, limit=10_000)

    def end(self) -> None:
        for part in self.parts:
            if part.process:
                with suppress(ProcessLookupError):
                    os.killpg(part.process.pid, signal.SIGKILL)
                part.process.wait()


def main() -> None:
    asked = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="ft-sweep-money-"))
    began = time.monotonic()
    with _swept(folder, asked) as sweep:
        _through(sweep, asked)
        found = {**_counts(sweep), "minutes": round((time.monotonic() - began) / 60, 1), "seed": asked.seed}
        wrong = violations(sweep)
    print(json.dumps({**found, "wrong": wrong}, indent=1))
    if wrong:
        print(f"what is left lies in {folder}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(folder, ignore_errors=True)


def _through(sweep: Sweep, asked: argparse.Namespace) -> None:
    """Until every job is over and everything rented is ended and billed."""
    due, said = time.monotonic() + 10, time.monotonic()
    end = time.monotonic() + asked.minutes * 60
    while sweep.left():
        assert time.monotonic() < end, f"{len(sweep.left())} jobs are not over"
        if time.monotonic() > due:
            sweep.kill_one()
            due = time.monotonic() + sweep.dice.uniform(4, 20)
        sweep.keep_up()
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{len(sweep.left())} jobs left, {len(sweep.cloud.alive())} pods alive", file=sys.stderr, flush=True)
        time.sleep(0.5)
    end = time.monotonic() + POD_SECONDS + GRACE + 120
    while sweep.cloud.alive() or any_open(sweep.store):
        if time.monotonic() > end:
            return
        sweep.keep_up()
        time.sleep(0.5)
    time.sleep(FINAL)
    sweep.fired = {each["fault"]: each["fired"] for each in sweep.cloud.truth()["faults"] if each["fired"]}
    sweep.cloud.faults()
    settings = Settings(runpod_url=sweep.cloud.url, runpod_api_key=sweep.cloud.key)
    with open_runpod(settings) as client:
        Reaper(sweep.store, client, settings.budgets, SETTLE, FINAL).bill(at_once=True)


def violations(sweep: Sweep) -> list[str]:
    """What must never be, read off the stand-in's own books and our ledger."""
    truth = sweep.cloud.truth()
    pods = [each for each in truth["pods"] if each["name"].startswith("ft-")]
    wrong = [f"{each['id']} is alive" for each in pods if each["alive"]]
    ledger = {each.pod: each.usd(time.time()) for each in rented_pods(sweep.store)}
    bill, booked = sum(each["usd"] for each in pods), sum(ledger.values())
    wrong += [f"{each.pod} is not billed to its end" for each in rented_pods(sweep.store) if not each.final]
    if round(bill, 2) != round(booked, 2):
        missing = [each["id"] for each in pods if abs(each["usd"] - ledger.get(each["id"], 0.0)) > 0.005]
        wrong.append(f"the bill is ${bill:.4f} and the ledger says ${booked:.4f}; different: {missing[:10]}")
    for rental in rentals(sweep.store):
        of_name = [each for each in pods if each["name"] == rental.name]
        usd, price = sum(each["usd"] for each in of_name), max([each["usd_per_hour"] for each in of_name], default=0.0)
        if usd > rental.reserved_usd + GRACE * price / 3600 + 1e-6:
            wrong.append(f"{rental.name} cost ${usd:.4f} of ${rental.reserved_usd:.4f}")
        for each in of_name:
            paid = paid_seconds(rental.reserved_usd, each["usd_per_hour"])
            if each["seconds"] > paid - stop_allowance(paid) + LIST_LAG + GRACE:
                wrong.append(f"{each['id']} of {rental.name} lived {each['seconds']:.0f} s of {paid:.0f} s")
    for run in runs.listed(sweep.store, limit=10_000):
        job = JobFolder(sweep.tiny.person.project.job_folder(run.id))
        if run.state == "succeeded" and (job.result() or {}).get("status") != "ok":
            wrong.append(f"{run.id} succeeded without a result")
    return wrong


def _counts(sweep: Sweep) -> dict[str, Any]:
    truth = sweep.cloud.truth()
    pods = [each for each in truth["pods"] if each["name"].startswith("ft-")]
    states = Counter(each.state for each in runs.listed(sweep.store, limit=10_000))
    errors = Counter(
        str((each.error or {}).get("what"))[:50] for each in runs.listed(sweep.store, limit=10_000) if each.error
    )
    lives = sorted(each["seconds"] for each in pods)
    return {
        "jobs": sum(states.values()), "states": dict(states), "errors": dict(errors.most_common(8)), "pods": len(pods),
        "faults": sweep.fired,
        "attempts": dict(Counter(each.state for each in rentals(sweep.store))),
        "kills": {each.name: each.kills for each in sweep.parts},
        "longest_gap_s": round(sweep.longest_gap, 1), "bill_usd": round(sum(each["usd"] for each in pods), 2),
        "ledger_usd": round(sum(each.usd(time.time()) for each in rented_pods(sweep.store)), 2),
        "pod_seconds": {"median": round(lives[len(lives) // 2], 1), "longest": round(lives[-1], 1)} if lives else {},
        "alive": len(sweep.cloud.alive()),
    }  # fmt: skip


@contextmanager
def _swept(folder: Path, asked: argparse.Namespace) -> Iterator[Sweep]:
    with ExitStack() as stack:
        s3 = stack.enter_context(weed_server())
        cloud = stack.enter_context(standin(
            folder / "cloud", rules=FAULTS, seed=asked.seed, price_factor=PRICE_FACTOR, billing_lag=BILLING_LAG,
            balance=1e6, provision=0.2, start=0.2, grace=5,
        ))  # fmt: skip
        tiny = make_tiny(folder / "project", tiny_base_in(folder / "cache-of-tiny"))
        sweep = Sweep(tiny, cloud, _environment(tiny.person.project, s3, cloud), random.Random(asked.seed))
        _submit(sweep, asked, folder)
        share = max(1, asked.at_once // DRIVERS)
        driver = [sys.executable, "-m", "tests.flows.money_driver"]
        sweep.parts = [Part(f"driver-{n}", [*driver, str(n), str(DRIVERS), str(share)]) for n in range(DRIVERS)]
        sweep.parts.append(Part(REAPER, [sys.executable, "-m", "jobs.pod_reaper", "--final-seconds", str(FINAL)]))
        stack.callback(sweep.end)
        sweep.keep_up()
        yield sweep


def _environment(project: Project, s3: WeedServer, cloud: Standin) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("FT_", "AWS_", "RUNPOD_"))},
        **s3.environment("sweep"), **cloud.environment, "PYTHONPATH": str(ROOT), "FT_CACHE": str(project.cache),
        "FT_SETTLE_SECONDS": str(SETTLE), "FT_POD_START_SECONDS": "60", "FT_RUNPOD_IMAGE": "ft",
    }  # fmt: skip


def _submit(sweep: Sweep, asked: argparse.Namespace, folder: Path) -> None:
    """Run rows and whole job folders, as the steps before the training leave them."""
    project, base = sweep.tiny.person.project, sweep.tiny.base
    reserve = POD_SECONDS / 3600 * max(GPUS.values()) * PRICE_FACTOR
    recipe = _recipe(reserve * ATTEMPTS)
    pinned = pin(project, "datasets/tickets")
    made = folder / "adapter"
    make_adapter(made, lora_arrays(size=16), base=base.digest)
    (made / "fingerprint.json").write_text("{}", encoding="utf-8")
    light = f"{shlex.quote(sys.executable)} -m tests.flows.torch_free_trainer {shlex.quote(str(made))}"
    commands: dict[str, str] = {}
    for number in range(asked.jobs):
        run_id = f"m-{number:010x}"
        real = number % max(1, asked.jobs // max(1, asked.real)) == 0 and asked.real > 0
        commands[run_id] = "python -m jobs.pod" if real else f"env FT_TRAINER={shlex.quote(light)} python -m jobs.pod"
        _make_job(project, run_id, recipe, base, pinned)
        with sweep.store.writing() as connection:
            runs.submit_within(connection, run_id, recipe.model_dump(mode="json"), "recipes/m.yaml", "d")
    offers = [{"gpu": name, "cloud": "community", "usd_per_hour": usd * PRICE_FACTOR} for name, usd in GPUS.items()]
    terms = {"offers": offers, "reserve_usd": reserve, "commands": commands, "base": str(project.models / base.folder)}
    (project.root / "sweep.json").write_text(json.dumps(terms), encoding="utf-8")


def _make_job(project: Project, run_id: str, recipe: Finetune, base: BaseModel, pinned: Any) -> None:
    job = JobFolder(project.job_folder(run_id))
    job.write_spec(
        {"job": run_id, "recipe": recipe.model_dump(mode="json"), "base": base.as_dict(), "dataset": pinned.hash}
    )
    materialise(project, pinned, job.data)


def _recipe(max_usd: float) -> Finetune:
    return Finetune.model_validate({
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "./tiny"},
        "data": {"path": "datasets/tickets"}, "evaluate": {"task": "label"},
        "train": {**SHORT, "max_steps": 1, "checkpoint_steps": 1, "smoke": False},
        "card": "runpod", "budget": {"max_usd": max_usd}, "retries": {"lost": 20, "crash": 5},
        "cloud": {"cloud": "community", "max_usd_per_hour": max(GPUS.values()) * PRICE_FACTOR * 1.5},
    })  # fmt: skip


def tiny_base_in(cache: Path) -> TinyBase:
    """As the fixture of that name."""
    source = fetch_base(Project(root=cache, home=cache, cache=cache_folder()), Base(model=SMOL))
    target = cache / "models" / "local-tiny@1"
    save_tiny_base(cache_folder() / "models" / source.folder, target)
    facts = {"source": "tiny", "revision": "1", "licence": "Apache-2.0"}
    write_manifest(target, **facts)
    return TinyBase(cache, BaseModel(**facts, digest=manifest_digest(target), folder=target.name))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.flows.money_sweep", description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--real", type=int, default=50, help="of these, with the real trainer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60)
    return parser.parse_args()


if __name__ == "__main__":
    main()
