"""What RunPod's REST API v2 answers and takes, as far as ft uses it. Unknown fields are ignored, clouds are lower case.

Field names: `api-reference-v2/openapi.json` of github.com/runpod/docs, August 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from registry.errors import CloudError

VOLUME_PATH = "/runpod-volume"


@dataclass(frozen=True)
class Pod:
    """`usd_per_hour` is 0 when it is EXITED or TERMINATED. `created` is Unix time by RunPod's clock, `uptime_s` seconds
    since its container started, `utilisation` 0 to 100, of its busiest GPU; None: RunPod says nothing about it.

    Status: PROVISIONING, STARTING, RUNNING, EXITED, ERROR, TERMINATED. No exit code is ever told."""

    id: str
    name: str
    status: str
    gpu: str
    cloud: str
    usd_per_hour: float
    created: float | None
    uptime_s: float | None
    utilisation: float | None


@dataclass(frozen=True)
class GpuOffer:
    """One GPU type: `id` is what a PodOrder takes. Prices are USD per hour, None where that cloud does not have it.
    `availability` is NONE, LOW, MEDIUM or HIGH, '' if not told; `data_centers` are those that have some now. `pool` is
    what an EndpointOrder takes, `serverless_usd` the price of one worker's GPU there."""

    id: str
    name: str
    memory_gb: int
    secure_usd: float | None
    community_usd: float | None
    availability: str
    data_centers: tuple[str, ...]
    pool: str | None = None
    serverless_usd: float | None = None


@dataclass(frozen=True)
class PodOrder:
    """One pod with one GPU of one type. `args` replaces the image's command: one string, split like a shell does."""

    name: str
    image: str
    gpu: str
    cloud: str
    env: dict[str, str]
    args: str
    disk_gb: int
    data_centers: tuple[str, ...] = ()
    network_volume: str | None = None
    min_cuda: str = ""

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.name, "image": self.image, "gpu": {"id": self.gpu, "count": 1}, "cloud": self.cloud.upper(),
            "env": dict(self.env), "args": self.args, "disk": self.disk_gb,
        }  # fmt: skip
        if self.data_centers:
            found["dataCenterIds"] = list(self.data_centers)
        if self.min_cuda:
            found["gpu"]["minCudaVersion"] = self.min_cuda
        if self.network_volume:
            found["mounts"] = {"network": [{"volumeId": self.network_volume, "path": VOLUME_PATH}]}
        return found


@dataclass(frozen=True)
class LogLine:
    """`cursor` resumes the log behind this line."""

    cursor: str
    ts: str
    source: str
    text: str


@dataclass(frozen=True)
class Endpoint:
    """A serverless endpoint. `kind` is QUEUE or LOAD_BALANCER; `url` what RunPod says for requests: of the job API
    without /run, or the base of a load balancer; '' if it says none."""

    id: str
    name: str
    kind: str
    image: str
    env: dict[str, str]
    workers_min: int
    workers_max: int
    pools: tuple[str, ...]
    created: float | None
    url: str


@dataclass(frozen=True)
class EndpointOrder:
    """`pools` are GpuOffer.pool of cards that will do. `requests_per_worker` scales by requests in flight, which a
    LOAD_BALANCER must; otherwise a queue is scaled by `queue_seconds` of waiting."""

    name: str
    image: str
    pools: tuple[str, ...]
    env: dict[str, str]
    kind: Literal["QUEUE", "LOAD_BALANCER"] = "QUEUE"
    args: str = ""
    disk_gb: int = 20
    ports: tuple[str, ...] = ()
    workers_min: int = 0
    workers_max: int = 1
    idle_seconds: int = 10
    queue_seconds: float = 4.0
    requests_per_worker: int | None = None
    data_centers: tuple[str, ...] = ()
    network_volumes: tuple[str, ...] = ()
    flashboot: Literal["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"] = "OFF"
    timeout_s: int = 300

    def body(self) -> dict[str, Any]:
        workers: dict[str, int] = {"min": self.workers_min, "max": self.workers_max}
        by_requests = self.requests_per_worker is not None or self.kind == "LOAD_BALANCER"
        if not (by_requests and self.kind == "QUEUE"):  # RunPod rejects idleTimeout on a queue scaled by requests
            workers["idleTimeout"] = self.idle_seconds
        found: dict[str, Any] = {
            "name": self.name, "image": self.image, "type": self.kind, "gpu": {"pools": list(self.pools), "count": 1},
            "env": dict(self.env), "args": self.args, "disk": self.disk_gb, "workers": workers,
            "scaling": {"type": "REQUEST_COUNT", "requestCount": self.requests_per_worker or 4} if by_requests
                       else {"type": "QUEUE_DELAY", "queueDelay": self.queue_seconds},
            "flashboot": self.flashboot, "timeout": self.timeout_s * 1000,
        }  # fmt: skip
        more = {
            "dataCenterIds": self.data_centers, "networkVolumes": self.network_volumes, "ports": self.ports,
        }  # fmt: skip
        return found | {name: list(value) for name, value in more.items() if value}


def pod_of(answer: Any) -> Pod:
    """Raises CloudError, which names the field, when id, name, status or cost is missing."""
    runtime = answer.get("runtime") if isinstance(answer, dict) else None
    runtime = runtime if isinstance(runtime, dict) else {}
    loads = [each.get("util") for each in runtime.get("gpus") or [] if isinstance(each, dict)]
    known = [float(each) for each in loads if isinstance(each, int | float)]
    return Pod(
        id=_text(answer, "id", "a pod"),
        name=_text(answer, "name", "a pod"),
        status=_text(answer, "status", "a pod"),
        gpu=str((answer.get("gpu") or {}).get("id", "")),
        cloud=str(answer.get("cloud") or "").lower(),
        usd_per_hour=_number(answer, "cost", "a pod"),
        created=unix_time(answer.get("createdAt")),
        uptime_s=float(runtime["uptime"]) if isinstance(runtime.get("uptime"), int | float) else None,
        utilisation=max(known) if known else None,
    )


def offer_of(answer: Any) -> GpuOffer:
    prices = answer.get("price") if isinstance(answer, dict) else None
    if not isinstance(prices, dict):
        raise missing("price", "a GPU type")
    return GpuOffer(
        id=_text(answer, "id", "a GPU type"),
        name=str(answer.get("name") or answer["id"]),
        memory_gb=int(_number(answer, "memory", "a GPU type")),
        secure_usd=_price(prices.get("secure"), answer.get("secure", True)),
        community_usd=_price(prices.get("community"), answer.get("community", True)),
        availability=str(answer.get("availability") or ""),
        data_centers=tuple(
            each["id"]
            for each in answer.get("dataCenters") or []
            if isinstance(each, dict) and each.get("id") and each.get("availability") != "NONE"
        ),
        pool=answer.get("pool") or None,
        serverless_usd=_price(prices.get("serverless"), bool(answer.get("pool"))),
    )


def endpoint_of(answer: Any) -> Endpoint:
    workers = answer.get("workers") if isinstance(answer, dict) else None
    workers = workers if isinstance(workers, dict) else {}
    urls = answer.get("requestUrls") if isinstance(answer, dict) else None
    urls = urls if isinstance(urls, dict) else {}
    return Endpoint(
        id=_text(answer, "id", "an endpoint"),
        name=_text(answer, "name", "an endpoint"),
        kind=str(answer.get("type") or "QUEUE"),
        image=str(answer.get("image") or ""),
        env={str(name): str(value) for name, value in (answer.get("env") or {}).items()},
        workers_min=int(_number(workers, "min", "an endpoint's workers")),
        workers_max=int(_number(workers, "max", "an endpoint's workers")),
        pools=tuple((answer.get("gpu") or {}).get("pools") or ()),
        created=unix_time(answer.get("createdAt")),
        url=str(urls.get("base") or str(urls.get("run") or "").removesuffix("/run")),
    )


def billed(answer: Any, key: str) -> dict[str, float]:
    """US dollars by `podId` or `serverlessId`, over all time buckets of the answer."""
    found: dict[str, float] = {}
    for record in items(answer, "records"):
        owner = _text(record, key, "a billing record")
        found[owner] = found.get(owner, 0.0) + _number(record, "totalAmount", "a billing record")
    return found


def items(answer: Any, name: str) -> list[Any]:
    """The list that an answer consists of."""
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise missing(name, "the answer")
    return found


def unix_time(text: Any) -> float | None:
    """Of an RFC 3339 time; None if it is none."""
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def rfc_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def missing(name: str, of: str) -> CloudError:
    return CloudError(
        f"{of} comes without `{name}`, or with a strange one", place="RunPod's answer", fix="is ft too old for its API?"
    )


def _text(answer: Any, name: str, of: str) -> str:
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, str) or not found:
        raise missing(name, of)
    return found


def _number(answer: Any, name: str, of: str) -> float:
    found = answer.get(name) if isinstance(answer, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise missing(name, of)
    return float(found)


def _price(found: Any, offered: Any) -> float | None:
    """A type that a cloud does not have is priced 0 there."""
    return float(found) if offered and isinstance(found, int | float) and found > 0 else None
