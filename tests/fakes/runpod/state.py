"""Everything that the stand-in knows: the account, its pods and endpoints, the faults, and what was asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.fakes.runpod.billing import DISK_USD_PER_GB_HOUR
from tests.fakes.runpod.catalog import BY_ID, price
from tests.fakes.runpod.contract import CreatePod, Problem
from tests.fakes.runpod.faults import Fault, Faults
from tests.fakes.runpod.pods import Pace, Pod, Pods
from tests.fakes.runpod.serverless import Serverless

NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. Please refresh and try again."
)


@dataclass(frozen=True)
class Config:
    """`balance` in USD before anything was spent; prices are multiplied by `price_factor`; `rate_per_minute` 0: no
    limit (RunPod's is 60); `billing_lag`, `latency`, `cold_start` in seconds."""

    folder: Path
    key: str
    seed: int = 0
    balance: float = 1000.0
    price_factor: float = 1.0
    rate_per_minute: int = 0
    billing_lag: float = 0.0
    latency: float = 0.0
    cold_start: float = 0.3
    upstream: str = ""
    image_env: dict[str, str] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


@dataclass
class State:
    config: Config
    faults: Faults
    pods: Pods
    serverless: Serverless
    balance: float
    requests: list[dict[str, Any]] = field(default_factory=list)
    minute: tuple[int, int] = (0, 0)

    @classmethod
    def new(cls, config: Config) -> State:
        # Ids are always new, also with the same seed: what was terminated must not come back under its old name.
        pods = Pods(config.folder, config.pace, random.Random(), config.image_env)
        serverless = Serverless(random.Random(), config.price_factor, config.cold_start, config.upstream)
        return cls(config, Faults(config.seed), pods, serverless, config.balance)

    def create(self, order: CreatePod, faults: list[Fault]) -> Pod:
        """Raises Problem as the real one does: the body's rules, then the money, then whether there is any."""
        gpu, names = order.gpu, {each.name: each for each in faults}
        if (gpu is None) == (order.cpu is None):
            raise Problem(400, "exactly one of gpu and cpu must be set")
        if order.mounts.persistent and order.mounts.network:
            raise Problem(400, "persistent and network mounts are mutually exclusive")
        if gpu is None or order.templateId:
            raise Problem(400, "the stand-in has no CPU pods and no templates")
        found = BY_ID.get(gpu.id)
        usd = price(found, order.cloud, self.config.price_factor) if found else 0.0
        if self.left() < usd * gpu.count or self.left() <= 0:
            raise Problem(402, "insufficient balance: you need credit for one hour at least")
        if "no_capacity" in names:
            raise Problem(400, names["no_capacity"].rule.detail or NO_CAPACITY)
        if found is None or not usd or self.faults.sold_out(gpu.id):
            raise Problem(400, NO_CAPACITY)
        places = [each for each in found.data_centers if each in order.dataCenterIds or not order.dataCenterIds]
        if not places:
            raise Problem(400, NO_CAPACITY)
        pods = [self.pods.create(order, usd, places[0], faults) for _ in range(2 if "duplicate" in names else 1)]
        return pods[0]

    def pod(self, id: str) -> Pod:
        """One that has not ended. Raises Problem 404."""
        pod = self.pods.by_id.get(id)
        if pod is None or pod.ended is not None:
            raise Problem(404, "pod not found")
        return pod

    def spent(self) -> float:
        now = time.time()
        pods = sum(each.usd(now) for each in self.pods.by_id.values())
        return pods + sum(each.usd(now) for each in self.serverless.by_id.values())

    def left(self) -> float:
        return self.balance - self.spent()

    def known_until(self) -> float:
        """Up to when the bills are written."""
        return time.time() - max(self.config.billing_lag, self.faults.seconds("billing_lag"))

    def over_limit(self) -> int:
        """Seconds until the next minute begins, if this one's requests are used up; 0 otherwise."""
        if not self.config.rate_per_minute:
            return 0
        minute = int(time.time() // 60)
        count = self.minute[1] + 1 if self.minute[0] == minute else 1
        self.minute = (minute, count)
        return 60 - int(time.time() % 60) if count > self.config.rate_per_minute else 0

    async def watch_the_balance(self) -> None:
        """At 0, pods are terminated, or stopped if they have a network volume."""
        while True:
            await asyncio.sleep(0.5)
            if self.left() > 0:
                continue
            for pod in self.pods.by_id.values():
                if pod.ended is None and pod.status not in ("EXITED", "ERROR"):
                    with contextlib.suppress(Problem):
                        self.pods.act(pod, "stop" if pod.volume else "terminate")

    def truth(self) -> dict[str, Any]:
        """For tests alone: what no API tells."""
        now = time.time()
        pods = [_pod_truth(each, now) for each in self.pods.by_id.values()]
        endpoints = [
            {"id": each.id, "name": each.spec["name"], "alive": each.ended is None, "usd": each.usd(now),
             "jobs": {job.id: job.status for job in each.jobs.values()}}
            for each in self.serverless.by_id.values()
        ]  # fmt: skip
        return {
            "now": now, "pods": pods, "endpoints": endpoints, "usd": self.spent(), "balance": self.left(),
            "faults": self.faults.shown(), "requests": self.requests,
        }  # fmt: skip


def _pod_truth(pod: Pod, now: float) -> dict[str, Any]:
    return {
        "id": pod.id, "name": pod.order.name, "gpu": pod.gpu, "cloud": pod.order.cloud, "status": pod.status,
        "alive": pod.ended is None, "charged": pod.spans[-1].end is None, "created": pod.created, "ended": pod.ended,
        "seconds": pod.seconds(now), "usd": pod.usd(now), "usd_per_hour": pod.usd_per_hour, "starts": pod.starts,
        "disk_usd_per_hour": pod.order.disk * DISK_USD_PER_GB_HOUR, "processes": pod.pids(), "log": str(pod.log.path),
        "data_center": pod.data_center, "env": sorted(pod.order.env), "args": pod.order.args,
    }  # fmt: skip


STATE = web.AppKey("state", State)
