"""Pods: what was ordered, what becomes of it, which local processes it is, and what it costs."""

from __future__ import annotations

import asyncio
import random
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.fakes.runpod.billing import DISK_USD_PER_GB_HOUR, Span, rfc
from tests.fakes.runpod.container import Container, Log, pod_environment
from tests.fakes.runpod.contract import CreatePod, Problem
from tests.fakes.runpod.faults import Fault

Status = Literal["PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR", "TERMINATED"]
ACTIONS = {
    "PROVISIONING": ["stop", "terminate"], "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"], "EXITED": ["start", "terminate"], "ERROR": ["start", "terminate"],
    "TERMINATED": [],
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class Pace:
    """Seconds: until STARTING, until RUNNING, until a container that restarts itself is there again, from SIGTERM to
    SIGKILL. `restarts`: every container starts again when its process ends."""

    provision: float = 0.1
    start: float = 0.1
    again: float = 0.2
    grace: float = 1.0
    restarts: bool = False


@dataclass
class Pod:
    id: str
    key: str
    order: CreatePod
    gpu: str
    usd_per_hour: float
    data_center: str
    created: float
    folder: Path
    log: Log
    faults: dict[str, Fault]
    spans: list[Span]
    status: Status = "PROVISIONING"
    started: float | None = None
    ended: float | None = None
    container: Container | None = None
    life: asyncio.Task[None] | None = None
    starts: int = 0
    busy_until: float = 0.0

    @property
    def volume(self) -> str | None:
        return self.order.mounts.network[0].volumeId if self.order.mounts.network else None

    def pids(self) -> list[int]:
        return self.container.pids() if self.container else []

    def usd(self, now: float) -> float:
        return sum(each.usd(now) for each in self.spans)

    def seconds(self, now: float) -> float:
        return sum(each.seconds(now) for each in self.spans)


@dataclass
class Pods:
    """All that ever were. One event loop owns them; only containers have threads."""

    folder: Path
    pace: Pace
    chance: random.Random
    image_env: dict[str, str] = field(default_factory=dict)
    by_id: dict[str, Pod] = field(default_factory=dict)
    ending: set[asyncio.Task[None]] = field(default_factory=set)

    def create(self, order: CreatePod, usd_per_hour: float, data_center: str, faults: list[Fault]) -> Pod:
        id = "".join(self.chance.choices(LETTERS, k=14))
        folder = self.folder / "pods" / id
        folder.mkdir(parents=True)
        assert order.gpu is not None
        price = usd_per_hour * order.gpu.count
        dearer = next((each.rule.factor for each in faults if each.name == "price"), 1.0)
        pod = Pod(
            id=id, key="rpa_pod_" + "".join(self.chance.choices(LETTERS, k=24)), order=order, gpu=order.gpu.id,
            usd_per_hour=round(price * dearer, 6), data_center=data_center, created=time.time(), folder=folder,
            log=Log(folder.with_suffix(".log")), faults={each.name: each for each in faults}, spans=[],
        )  # fmt: skip
        self.by_id[id] = pod
        self._begin(pod)
        return pod

    def act(self, pod: Pod, action: str) -> None:
        """Raises Problem 409 for an action that this status does not allow."""
        if action not in ACTIONS[pod.status]:
            raise Problem(409, f"cannot {action} a pod that is {pod.status}")
        {"start": self._begin, "stop": self._stop, "restart": self._restart, "terminate": self.terminate}[action](pod)

    def terminate(self, pod: Pod) -> None:
        self._halt(pod, "TERMINATED")
        pod.ended = time.time()

    async def close(self) -> None:
        """Kill everything at once, and wait until it is gone."""
        for pod in self.by_id.values():
            if pod.life:
                pod.life.cancel()
            if pod.container:
                self._later(asyncio.to_thread(pod.container.stop, 0))
        await asyncio.gather(*self.ending, return_exceptions=True)

    def listed(self, lag: float) -> list[tuple[Pod, Status]]:
        """As the list shows them: what is younger than `lag` is not in it yet, what ended since then still is."""
        now = time.time()
        found: list[tuple[Pod, Status]] = []
        for pod in self.by_id.values():
            if lag and pod.created > now - lag:
                continue
            if pod.ended is None:
                found.append((pod, pod.status))
            elif pod.ended > now - lag:
                found.append((pod, "RUNNING"))
        return found

    def _begin(self, pod: Pod) -> None:
        self._rest(pod, "PROVISIONING")
        pod.started = None
        pod.spans.append(Span(time.time(), pod.usd_per_hour, pod.order.disk * DISK_USD_PER_GB_HOUR))
        pod.life = asyncio.create_task(self._live(pod))

    def _stop(self, pod: Pod) -> None:
        self._halt(pod, "EXITED")

    def _restart(self, pod: Pod) -> None:
        self._halt(pod, "EXITED")
        self._begin(pod)

    def _halt(self, pod: Pod, status: Status) -> None:
        if pod.life:
            pod.life.cancel()
        if pod.container:
            self._later(asyncio.to_thread(pod.container.stop, self.pace.grace))
        self._rest(pod, status)

    def _rest(self, pod: Pod, status: Status) -> None:
        """No longer in use, so no longer charged."""
        pod.status = status
        if pod.spans and pod.spans[-1].end is None:
            pod.spans[-1].end = time.time()

    async def _live(self, pod: Pod) -> None:
        await asyncio.sleep(self.pace.provision)
        if "stuck" in pod.faults:
            return
        pod.status = "STARTING"
        pod.log.add(f"create container {pod.order.image}", "system")
        await asyncio.sleep(self.pace.start)
        while True:
            ended = asyncio.Event()
            if "breaks" in pod.faults or not self._run(pod, ended):
                pod.status = "ERROR"  # charged on: RunPod says that cost is 0 when EXITED or TERMINATED
                return
            self._haunt(pod)
            await ended.wait()
            pod.log.add("container exited", "system")
            if not (self.pace.restarts or "restarts" in pod.faults):
                self._rest(pod, "EXITED")
                return
            await asyncio.sleep(self.pace.again)

    def _run(self, pod: Pod, ended: asyncio.Event) -> bool:
        loop = asyncio.get_running_loop()

        def gone() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        try:
            env = pod_environment(self.image_env, pod.order.env, self._own_environment(pod), pod.folder)
            pod.container = Container(pod.order.args, env, pod.folder, pod.log, gone)
        except (ValueError, OSError) as error:
            pod.log.add(f"cannot start the container: {error}", "system")
            return False
        pod.status, pod.started, pod.starts = "RUNNING", time.time(), pod.starts + 1
        pod.log.add(f"start container, {shlex.quote(pod.order.args)}", "system")
        return True

    def _haunt(self, pod: Pod) -> None:
        """Let the container die or hang after its time."""
        container = pod.container
        assert container is not None
        fates: dict[str, Callable[[], None]] = {"dies": container.kill, "hangs": container.freeze}
        for name, fate in fates.items():
            if name in pod.faults:
                asyncio.get_running_loop().call_later(pod.faults[name].rule.seconds, fate)
        busy_until = pod.faults["hangs"].rule.seconds if "hangs" in pod.faults else float("inf")
        pod.busy_until = 0.0 if "idle" in pod.faults else container.started + busy_until

    def _own_environment(self, pod: Pod) -> dict[str, str]:
        own = {
            "RUNPOD_POD_ID": pod.id, "RUNPOD_API_KEY": pod.key, "RUNPOD_DC_ID": pod.data_center,
            "RUNPOD_POD_HOSTNAME": f"{pod.id}-host", "RUNPOD_CPU_COUNT": "8", "RUNPOD_PUBLIC_IP": "127.0.0.1",
            "RUNPOD_GPU_COUNT": str(pod.order.gpu.count if pod.order.gpu else 0),
        }  # fmt: skip
        return own | ({"RUNPOD_VOLUME_ID": pod.volume} if pod.volume else {})

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.ending.add(task)
        task.add_done_callback(self.ending.discard)


def pod_json(pod: Pod, status: Status, skew: float) -> dict[str, Any]:
    """As documented; `status` may be an old one."""
    order, now = pod.order, time.time()
    running = status == "RUNNING" and pod.started is not None
    util = 90 if now < pod.busy_until else 0
    mounts = order.mounts.model_dump(exclude_none=True, exclude_defaults=True)
    runtime = {
        "uptime": int(now - (pod.started or now)), "gpus": [{"util": util, "memoryUtil": 50}],
        "cpu": {"util": 10}, "memory": {"util": 20}, "ports": [],
    }  # fmt: skip
    return {
        "id": pod.id, "name": order.name, "status": status, "actions": ACTIONS[status], "image": order.image or "",
        "args": order.args, "disk": order.disk, "mounts": mounts,
        "ports": order.ports, "env": order.env, "registry": order.registry,
        "gpu": {"id": pod.gpu, "count": order.gpu.count if order.gpu else 0}, "cloud": order.cloud,
        "dataCenterId": pod.data_center, "cudaVersion": "12.8", "ssh": {"proxy": None, "direct": None},
        "template": order.templateId, "cost": 0.0 if status in ("EXITED", "TERMINATED") else pod.usd_per_hour,
        "locked": False, "globalNetworking": {"enabled": order.globalNetworking},
        "runtime": runtime if running else None, "createdAt": rfc(pod.created + skew),
        "startedAt": rfc(pod.started + skew) if pod.started else None,
    }  # fmt: skip
