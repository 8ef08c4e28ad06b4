"""Serverless endpoints and their jobs. A "worker" is a clock that is charged, in front of a local server (`upstream`).

A job's input `{"route", "body", "method"}` or `{"openai_route", "openai_input"}` goes to the upstream, as worker-vllm
does it; any other comes back as it is. Without an upstream nothing but that is possible. One worker per endpoint does
all jobs; it is cold at first, and again when nothing came for `idleTimeout`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.fakes.runpod.billing import Span, rfc
from tests.fakes.runpod.catalog import GPU_TYPES
from tests.fakes.runpod.contract import CreateEndpoint, Problem, UpdateEndpoint

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
POOLS = {each.pool: each.serverless or 1.0 for each in GPU_TYPES if each.pool}


@dataclass
class Job:
    id: str
    input: Any
    created: float
    status: str = "IN_QUEUE"
    started: float | None = None
    ended: float | None = None
    output: Any = None
    error: str | None = None
    streamed: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)
    work: asyncio.Task[None] | None = None

    def end(self, status: str, **more: Any) -> None:
        if self.status not in FINAL:
            self.status, self.ended = status, time.time()
            self.output, self.error = more.get("output"), more.get("error")
            self.done.set()


@dataclass
class Endpoint:
    id: str
    spec: dict[str, Any]
    created: float
    usd_per_hour: float
    version: int = 1
    ended: float | None = None
    upstream: str = ""
    jobs: dict[str, Job] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    always: list[Span] = field(default_factory=list)
    warm_until: float = 0.0
    busy: int = 0
    stale_until: float = 0.0
    warming: asyncio.Lock = field(default_factory=asyncio.Lock)

    def usd(self, now: float) -> float:
        return sum(each.usd(now) for each in [*self.spans, *self.always])


@dataclass
class Serverless:
    chance: random.Random
    price_factor: float = 1.0
    cold_start: float = 0.3
    upstream: str = ""
    by_id: dict[str, Endpoint] = field(default_factory=dict)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def create(self, order: CreateEndpoint) -> Endpoint:
        if (order.gpu is None) == (order.cpu is None):
            raise Problem(400, "exactly one of gpu and cpu must be set")
        unknown = [each for each in order.gpu.pools if each not in POOLS] if order.gpu else []
        if unknown:
            raise Problem(400, f"unknown GPU pool: {', '.join(unknown)}")
        price = min((POOLS[each] for each in order.gpu.pools), default=0.0) * order.gpu.count if order.gpu else 0.1
        workers = {"min": 0, "max": 3, "idleTimeout": 10} | order.workers.model_dump(exclude_none=True)
        spec = order.model_dump() | {"workers": workers}
        if order.gpu:
            spec |= {"gpu": order.gpu.model_dump(), "cpu": None}
        made = Endpoint(self._id(), spec, time.time(), price * self.price_factor, upstream=self.upstream)
        self.by_id[made.id] = made
        self._keep_minimum(made)
        return made

    def update(self, endpoint: Endpoint, change: UpdateEndpoint) -> None:
        given = change.model_dump(exclude_unset=True, exclude_none=True)
        if "cpu" in given or ("gpu" in given and endpoint.spec["gpu"] is None):
            raise Problem(400, "the compute family of an endpoint cannot be changed")
        given["workers"] = endpoint.spec["workers"] | given.get("workers", {})
        if {"image", "args", "env", "disk", "ports"} & set(given):
            endpoint.version += 1
            # Its workers are replaced one by one, as fast as they start.
            endpoint.stale_until = time.time() + self.cold_start if _has_worker(endpoint) else 0.0
        endpoint.spec |= given
        self._keep_minimum(endpoint)

    def delete(self, endpoint: Endpoint) -> None:
        """All workers end, all jobs are cancelled."""
        now = time.time()
        for job in endpoint.jobs.values():
            self._cancel(job)
        for span in [*endpoint.spans, *endpoint.always]:
            span.end = min(span.end if span.end is not None else now, now)
        endpoint.ended, endpoint.warm_until = now, 0.0

    def found(self, id: str) -> Endpoint:
        endpoint = self.by_id.get(id)
        if endpoint is None or endpoint.ended is not None:
            raise Problem(404, "endpoint not found")
        return endpoint

    def submit(self, endpoint: Endpoint, body: Any, prefix: str = "") -> Job:
        if not isinstance(body, dict) or "input" not in body:
            raise Problem(400, "missing `input`")
        if endpoint.spec["workers"]["max"] == 0:
            raise Problem(400, "the endpoint has no workers: workers.max is 0")
        job = Job(prefix + self._id(24), body["input"], time.time())
        endpoint.jobs[job.id] = job
        job.work = asyncio.create_task(self._work(endpoint, job))
        self.background.add(job.work)
        job.work.add_done_callback(self.background.discard)
        return job

    def cancel(self, endpoint: Endpoint, id: str) -> Job:
        job = self.job(endpoint, id)
        self._cancel(job)
        return job

    def job(self, endpoint: Endpoint, id: str) -> Job:
        if id not in endpoint.jobs:
            raise Problem(404, "job not found")
        return endpoint.jobs[id]

    def retry(self, endpoint: Endpoint, id: str) -> Job:
        job = self.job(endpoint, id)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise Problem(400, f"a job that is {job.status} cannot be tried again")
        again = self.submit(endpoint, {"input": job.input})
        del endpoint.jobs[again.id]
        again.id = id
        endpoint.jobs[id] = again
        return again

    def purge(self, endpoint: Endpoint) -> int:
        waiting = [each for each in endpoint.jobs.values() if each.status == "IN_QUEUE"]
        for job in waiting:
            self._cancel(job)
        return len(waiting)

    async def warm(self, endpoint: Endpoint) -> None:
        """Come back when there is a worker."""
        async with endpoint.warming:
            if not endpoint.spec["workers"]["min"] and time.time() > endpoint.warm_until and not endpoint.busy:
                endpoint.spans.append(Span(time.time(), endpoint.usd_per_hour))
                await asyncio.sleep(self.cold_start)
            self._used(endpoint)

    def _used(self, endpoint: Endpoint) -> None:
        endpoint.warm_until = time.time() + endpoint.spec["workers"].get("idleTimeout", 10)
        if endpoint.spans and endpoint.ended is None:
            endpoint.spans[-1].end = endpoint.warm_until

    async def forward(self, endpoint: Endpoint, request: web.Request, path: str) -> web.StreamResponse:
        """Pass a request through to the upstream, streams as they come."""
        if not endpoint.upstream:
            raise Problem(502, "the stand-in has no upstream for this endpoint")
        await self.warm(endpoint)
        endpoint.busy += 1
        try:
            return await _passed(request, endpoint.upstream + path)
        except aiohttp.ClientError as error:
            raise Problem(502, f"the worker does not answer: {error}") from None
        finally:
            endpoint.busy -= 1
            self._used(endpoint)

    async def _work(self, endpoint: Endpoint, job: Job) -> None:
        await self.warm(endpoint)
        endpoint.busy += 1
        job.status, job.started = "IN_PROGRESS", time.time()
        try:
            async with asyncio.timeout(endpoint.spec["timeout"] / 1000):
                job.end("COMPLETED", output=await self._output(endpoint, job.input))
        except TimeoutError:
            job.end("TIMED_OUT", error="execution timeout")
        except (aiohttp.ClientError, Problem, ValueError) as error:
            job.end("FAILED", error=str(error))
        finally:
            endpoint.busy -= 1
            self._used(endpoint)

    async def _output(self, endpoint: Endpoint, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        route = given.get("route") or given.get("openai_route")
        if not route:
            return given
        if not endpoint.upstream:
            raise Problem(502, "the stand-in has no upstream for this endpoint")
        body = given.get("body", given.get("openai_input"))
        method = given.get("method", "POST" if body is not None else "GET")
        url = endpoint.upstream + route
        async with aiohttp.ClientSession() as session, session.request(method, url, json=body) as answer:
            text = await answer.text()
            if answer.status >= 400:
                raise Problem(answer.status, text)
            return json.loads(text) if "json" in answer.content_type else text

    def _cancel(self, job: Job) -> None:
        job.end("CANCELLED")
        if job.work:
            job.work.cancel()

    def _keep_minimum(self, endpoint: Endpoint) -> None:
        now, wanted = time.time(), endpoint.spec["workers"]["min"]
        running = [each for each in endpoint.always if each.end is None]
        for span in running[wanted:]:
            span.end = now
        endpoint.always += [Span(now, endpoint.usd_per_hour) for _ in range(wanted - len(running))]

    def _id(self, length: int = 14) -> str:
        return "".join(self.chance.choices(LETTERS, k=length))


def endpoint_json(endpoint: Endpoint, origin: str) -> dict[str, Any]:
    spec = {name: value for name, value in endpoint.spec.items() if value is not None and name != "templateId"}
    base = f"{origin}/v2/{endpoint.id}"
    queue = {
        "run": "run", "runSync": "runsync", "status": "status/{job_id}", "stream": "stream/{job_id}",
        "cancel": "cancel/{job_id}", "retry": "retry/{job_id}", "purgeQueue": "purge-queue", "health": "health",
    }  # fmt: skip
    urls = {name: f"{base}/{path}" for name, path in queue.items()}
    if spec["type"] == "LOAD_BALANCER":
        urls = {"base": f"{origin}/lb/{endpoint.id}", "health": f"{origin}/lb/{endpoint.id}/ping"}
    return spec | {
        "id": endpoint.id,
        "requestUrls": urls,
        "registry": spec.get("registry"),
        "createdAt": rfc(endpoint.created),
    }


def job_json(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {"id": job.id, "status": job.status}
    if job.started is not None:
        found["delayTime"] = int(1000 * (job.started - job.created))
    if job.started is not None and job.ended is not None:
        found["executionTime"] = int(1000 * (job.ended - job.started))
    if job.output is not None:
        found["output"] = job.output
    return found | ({"error": job.error} if job.error else {})


def stream_json(job: Job) -> dict[str, Any]:
    """Each piece once."""
    if job.streamed or job.output is None:
        return {"status": job.status, "stream": []}
    job.streamed = True
    pieces = job.output if isinstance(job.output, list) else [job.output]
    return {"status": job.status, "stream": [{"output": each, "metrics": {}} for each in pieces]}


def workers_json(endpoint: Endpoint) -> dict[str, Any]:
    stale = time.time() < endpoint.stale_until
    version = endpoint.version - stale
    worker = {"id": f"{endpoint.id}-w", "status": "RUNNING" if endpoint.busy else "IDLE", "isStale": stale,
              "version": version, "gpuCount": 1}  # fmt: skip
    workers = [worker] if _has_worker(endpoint) else []
    return {"workers": workers, "endpointVersion": endpoint.version, "summary": {"total": len(workers)}}


def health_json(endpoint: Endpoint) -> dict[str, Any]:
    count = dict.fromkeys(("COMPLETED", "FAILED", "IN_PROGRESS", "IN_QUEUE"), 0)
    for job in endpoint.jobs.values():
        count[job.status] = count.get(job.status, 0) + 1
    warm = int(time.time() < endpoint.warm_until) or endpoint.spec["workers"]["min"]
    running = min(endpoint.busy, 1)
    jobs = {"completed": count["COMPLETED"], "failed": count["FAILED"], "inProgress": count["IN_PROGRESS"],
            "inQueue": count["IN_QUEUE"], "retried": 0}  # fmt: skip
    return {"jobs": jobs, "workers": {"idle": max(0, warm - running), "running": running}}


def _has_worker(endpoint: Endpoint) -> bool:
    return bool(endpoint.busy or endpoint.spec["workers"]["min"] or time.time() < endpoint.warm_until)


async def _passed(request: web.Request, url: str) -> web.StreamResponse:
    kept = ("content-type", "accept")
    headers = {name: value for name, value in request.headers.items() if name.lower() in kept}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        body = await request.read()
        async with session.request(request.method, url, params=request.query, data=body, headers=headers) as answer:
            reply = web.StreamResponse(
                status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "")}
            )
            await reply.prepare(request)
            async for piece in answer.content.iter_any():
                await reply.write(piece)
            await reply.write_eof()
            return reply
