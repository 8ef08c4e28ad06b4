"""`/v2/pods`, `/v2/catalog` and `/v2/billing`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

from aiohttp import web

from tests.fakes.runpod import billing
from tests.fakes.runpod.catalog import BY_ID, DATA_CENTERS, GPU_TYPES, data_center_json, gpu_json
from tests.fakes.runpod.contract import CreatePod, PodAction, Problem, checked
from tests.fakes.runpod.pods import Pod, pod_json
from tests.fakes.runpod.state import STATE, State

routes = web.RouteTableDef()


@routes.get("/v2/pods")
async def list_pods(request: web.Request) -> web.Response:
    state, skew = _state(request), _state(request).faults.seconds("clock_skew")
    listed = state.pods.listed(state.faults.seconds("list_lag"))
    return web.json_response({"pods": [pod_json(pod, status, skew) for pod, status in listed]})


@routes.post("/v2/pods")
async def create_pod(request: web.Request) -> web.Response:
    state = _state(request)
    pod = state.create(checked(CreatePod, await read_json(request)), request["faults"])
    return _shown(request, pod, 201)


@routes.get("/v2/pods/{id}")
async def get_pod(request: web.Request) -> web.Response:
    return _shown(request, _pod(request))


@routes.delete("/v2/pods/{id}")
async def delete_pod(request: web.Request) -> web.Response:
    _state(request).pods.terminate(_pod(request))
    return web.Response(status=204)


@routes.post("/v2/pods/{id}/action")
async def act(request: web.Request) -> web.Response:
    pod = _pod(request)
    asked = checked(PodAction, await read_json(request))
    _state(request).pods.act(pod, asked.action)
    return web.Response(status=204) if asked.action == "terminate" else _shown(request, pod)


@routes.get("/v2/pods/{id}/logs")
async def logs(request: web.Request) -> web.StreamResponse:
    """Server-sent events; the stream stays open until the pod is terminated or the reader goes."""
    pod, wanted = _pod(request), request.query.get("source")
    after = _log_start(request, pod)
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await stream.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            for number, at, source, text in pod.log.behind(after):
                after = number
                if wanted in (None, source):
                    said = json.dumps({"ts": billing.rfc(at), "source": source, "line": text}, ensure_ascii=False)
                    await stream.write(f"id: {billing.rfc(at)}/{number:012d}\ndata: {said}\n\n".encode())
            if pod.ended is not None or request.transport is None or request.transport.is_closing():
                break
            await asyncio.sleep(0.1)
    return stream


@routes.get("/v2/catalog/gpus")
async def gpus(request: web.Request) -> web.Response:
    stock, factor = _stock(request), _state(request).config.price_factor
    found = [gpu_json(each, factor, stock[each.id] if stock else None) for each in GPU_TYPES]
    return web.json_response({"gpus": found})


@routes.get("/v2/catalog/gpus/{id}")
async def gpu(request: web.Request) -> web.Response:
    if request.match_info["id"] not in BY_ID:
        raise Problem(404, "resource not found")
    found, stock = BY_ID[request.match_info["id"]], _stock(request)
    return web.json_response(gpu_json(found, _state(request).config.price_factor, stock[found.id] if stock else None))


@routes.get("/v2/catalog/datacenters")
async def data_centers(request: web.Request) -> web.Response:
    stock = _all_stock(_state(request)) if "GPU_AVAILABILITY" in request.query.get("include", "") else None
    return web.json_response({"dataCenters": [data_center_json(each, stock) for each in DATA_CENTERS]})


@routes.get("/v2/billing/pods")
async def pod_bills(request: web.Request) -> web.Response:
    owners = {each.id: each.spans for each in _state(request).pods.by_id.values()}
    return bills(request, owners, "podId")


@routes.get("/v2/billing/serverless")
async def serverless_bills(request: web.Request) -> web.Response:
    owners = {each.id: [*each.spans, *each.always] for each in _state(request).serverless.by_id.values()}
    return bills(request, owners, "serverlessId")


def bills(request: web.Request, owners: dict[str, list[billing.Span]], key: str) -> web.Response:
    state, wanted = _state(request), request.query.get(key)
    period = billing.period_of(request.query, time.time())
    chosen = {owner: spans for owner, spans in owners.items() if wanted in (None, owner)}
    found = [
        each for owner, spans in chosen.items() for each in billing.records(owner, spans, period, state.known_until())
    ]
    return web.json_response(billing.answer(found, period, key, wanted))


async def read_json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except ValueError:
        raise Problem(400, "the body is no JSON") from None


def _state(request: web.Request) -> State:
    return request.app[STATE]


def _pod(request: web.Request) -> Pod:
    return _state(request).pod(request.match_info["id"])


def _shown(request: web.Request, pod: Pod, status: int = 200) -> web.Response:
    skew = _state(request).faults.seconds("clock_skew")
    return web.json_response(pod_json(pod, pod.status, skew), status=status)


def _stock(request: web.Request) -> dict[str, str] | None:
    """Each type's availability, if it was asked for with the product that it is asked for."""
    asked, product = "AVAILABILITY" in request.query.get("include", ""), request.query.get("product")
    if asked != (product is not None):
        raise Problem(400, "include=AVAILABILITY and product go together")
    return _all_stock(_state(request)) if asked else None


def _all_stock(state: State) -> dict[str, str]:
    return {each.id: "NONE" if state.faults.sold_out(each.id) else "HIGH" for each in GPU_TYPES}


def _log_start(request: web.Request, pod: Pod) -> int:
    """The number of the last line that is not wanted: behind Last-Event-ID, from `since`, or the `tail` (100)."""
    try:
        if cursor := request.headers.get("Last-Event-ID"):
            return int(cursor.rpartition("/")[2])
        if since := request.query.get("since"):
            later = [each[0] for each in pod.log.behind(0) if billing.rfc(each[1]) >= since]
            return later[0] - 1 if later else pod.log.count
        wanted = request.query.get("source")
        lines = [each[0] for each in pod.log.behind(0) if wanted in (None, each[2])]
        tail = min(int(request.query.get("tail", 100)), 5000)
    except ValueError:
        raise Problem(422, "Request validation failed.") from None
    return pod.log.count if not tail else lines[-tail] - 1 if len(lines) > tail else 0
