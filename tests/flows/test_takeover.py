"""Two real trainers and one job in a real S3, one of them frozen past its lease and woken: one result is accepted.

`python -m tests.flows.test_takeover COUNT SEED` repeats it and prints the counts as one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.pod_env import IN_BUCKET, pod_env
from registry.job_bucket import LeaseWatch
from registry.job_folder import JobFolder
from registry.settings import Settings
from tests.conftest import ROOT
from tests.fakes.bucket_job import BucketJob, bucket_job
from tests.weed_server import WeedServer, weed_server

TERM = 1.0
OK, TAKEN = 0, 4
STEPS = 12
LIMIT_SECONDS = 90.0


@dataclass(frozen=True)
class Outcome:
    """Exit codes of the first and the second trainer, the results that the lease ever named, and what counts."""

    codes: tuple[int, int]
    accepted: tuple[tuple[int, str], ...]
    whole: bool
    woken: str


@dataclass(frozen=True)
class Trainer:
    process: subprocess.Popen[bytes]
    log: Path

    @contextmanager
    def ended(self) -> Iterator[None]:
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)

    def code(self) -> int:
        return self.process.wait(LIMIT_SECONDS)


def takeover(settings: Settings, folder: Path, dice: random.Random) -> Outcome:
    """One race. The first is frozen somewhere from its claim to its end, and woken before, in or after the second's."""
    made = bucket_job(folder, settings, f"m-{dice.randrange(1 << 40):010x}", max_steps=STEPS)
    woken = dice.choice(["at the claim", "while the other trains", "when the other is done"])
    first = _start(made, settings, folder / "first")
    with _leases(made) as seen, first.ended():
        _until(made.remote.lease, first)
        time.sleep(dice.uniform(0.0, 1.5 * STEPS * 0.05))
        os.killpg(first.process.pid, signal.SIGSTOP)
        _until_expired(made)
        second = _start(made, settings, folder / "second")
        with second.ended():
            _wait_to_wake(woken, made, second, dice)
            os.killpg(first.process.pid, signal.SIGCONT)
            codes = first.code(), second.code()
    return Outcome(codes, tuple(sorted(seen)), _is_whole(made, folder / "fetched"), woken)


def holds(outcome: Outcome) -> bool:
    return len(outcome.accepted) == 1 and sorted(outcome.codes) == [OK, TAKEN] and outcome.whole


def _start(made: BucketJob, settings: Settings, folder: Path) -> Trainer:
    job = JobFolder(folder)
    made.remote.fetch_job(job)
    cache = folder / "cache"
    made.remote.fetch_model(cache / "models" / "local-none@1")
    env = {**os.environ, **pod_env(settings, made.job.name, 1), **IN_BUCKET, "FT_LEASE_SECONDS": str(TERM),
           "FT_CACHE": str(cache), "PYTHONPATH": str(ROOT)}  # fmt: skip
    with job.log.open("ab") as log:
        process = subprocess.Popen([*shlex.split(made.trainer), str(folder)], stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=log, env=env, start_new_session=True)  # fmt: skip
    return Trainer(process, job.log)


def _until_expired(made: BucketJob) -> None:
    watch = LeaseWatch(TERM)
    while not watch.is_expired(held := made.remote.lease()):
        if held and held.lease.result:  # it was frozen after its acceptance
            return
        time.sleep(0.1)


def _wait_to_wake(woken: str, made: BucketJob, second: Trainer, dice: random.Random) -> None:
    if woken == "when the other is done":
        second.code()
        return
    _until(lambda: (held := made.remote.lease()) and (held.lease.epoch == 2 or held.lease.result), second)
    if woken == "while the other trains":
        time.sleep(dice.uniform(0.0, STEPS * 0.05))


def _until(met: Callable[[], object], trainer: Trainer) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not met() and trainer.process.poll() is None:
        assert time.monotonic() < end, trainer.log.read_text()
        time.sleep(0.05)


@contextmanager
def _leases(made: BucketJob) -> Iterator[set[tuple[int, str]]]:
    """Every (epoch, result) that the lease names while the block runs, and at its end."""
    seen: set[tuple[int, str]] = set()
    over = threading.Event()

    def look() -> None:
        held = made.remote.lease()
        if held and held.lease.result:
            seen.add((held.lease.epoch, held.lease.result))

    def watch() -> None:
        while not over.wait(0.05):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join(30)
        look()


def _is_whole(made: BucketJob, target: Path) -> bool:
    """Is the accepted result there, and its adapter as its manifest says?"""
    made.remote.fetch_adapter(target)
    result = made.remote.result()
    return bool(result and result["status"] == "ok" and result["steps"] == STEPS)


@pytest.mark.parametrize("seed", range(10))
def test_of_a_frozen_trainer_and_its_successor_one_result_is_accepted(
    s3: WeedServer, tmp_path: Path, seed: int
) -> None:
    outcome = takeover(s3.settings(f"takeover/{tmp_path.name}"), tmp_path, random.Random(seed))
    assert holds(outcome), (outcome, [each.read_text() for each in tmp_path.glob("*/log.txt")])


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    dice, found, began = random.Random(seed), [], time.monotonic()
    with weed_server() as s3:
        for number in range(count):
            with tempfile.TemporaryDirectory() as name:
                found.append(takeover(s3.settings(f"takeover/{number}"), Path(name), dice))
    print(json.dumps({
        "races": count, "seed": seed, "one_result": sum(map(holds, found)),
        "second_won": sum(each.codes == (TAKEN, OK) for each in found),
        "woken": Counter(each.woken for each in found), "broken": [str(each) for each in found if not holds(each)],
        "seconds": round(time.monotonic() - began, 1),
    }))  # fmt: skip
    sys.exit(0 if all(map(holds, found)) else 1)


if __name__ == "__main__":
    main()
