"""The server: who may ask, what goes wrong, and the paths that only tests use (`/_faults`, `/_truth`, `/_account`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from tests.fakes.runpod import pod_routes, serverless_routes
from tests.fakes.runpod.contract import Problem
from tests.fakes.runpod.faults import REQUEST, Fault
from tests.fakes.runpod.state import STATE, Config, State

LONGEST_BODY = 20 << 20
KEPT_REQUESTS = 5000
ours = web.RouteTableDef()


def application(config: Config) -> web.Application:
    app = web.Application(middlewares=[recorded, problems, allowed, faulty], client_max_size=LONGEST_BODY)
    app[STATE] = State.new(config)
    app.cleanup_ctx.append(_alive)
    app.add_routes([*ours, *pod_routes.routes, *serverless_routes.routes])
    return app


@web.middleware
async def recorded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep what was asked, and what came of it. The clock may go wrong, also in the Date header."""
    state, begun = request.app[STATE], time.time()
    request["faults"], request["said"] = [], 0
    try:
        answer = await handler(request)
        request["said"] = answer.status
        return answer
    finally:
        if not request.path.startswith("/_"):
            names = [each.name for each in request["faults"]]
            row = {
                "at": begun,
                "method": request.method,
                "path": request.path,
                "status": request["said"],
                "faults": names,
            }
            state.requests = [*state.requests[-KEPT_REQUESTS:], row]


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        answer = await handler(request)
    except Problem as problem:
        answer = problem.answer()
    except web.HTTPException as error:
        answer = Problem(error.status, error.reason).answer()
    if not answer.prepared:
        skew = request.app[STATE].faults.seconds("clock_skew")
        answer.headers["Date"] = formatdate(time.time() + skew, usegmt=True)
    return answer


@web.middleware
async def allowed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The account's key may do all, a pod's key only what concerns that pod."""
    state, key = request.app[STATE], request.headers.get("Authorization", "").removeprefix("Bearer ")
    if request.path.startswith("/_"):
        return await handler(request)
    if not key:
        raise Problem(401, "missing bearer token")
    if key != state.config.key:
        pod = next((each for each in state.pods.by_id.values() if each.key == key), None)
        if pod is None:
            raise Problem(401, "invalid bearer token")
        if request.match_info.get("id") != pod.id or not request.path.startswith("/v2/pods/"):
            raise Problem(403, "access denied")
    if wait := state.over_limit():
        raise Problem(429, "rate limit exceeded for the minute window", retry_after=str(wait))
    return await handler(request)


@web.middleware
async def faulty(request: web.Request, handler: Handler) -> web.StreamResponse:
    """At most one fault of the request, before or after it is done. Faults of pods are for who makes them."""
    state = request.app[STATE]
    if request.path.startswith("/_"):
        return await handler(request)
    if state.config.latency:
        await asyncio.sleep(state.config.latency)
    request["faults"] = state.faults.of(request.method, request.path, await _ordered_gpu(request))
    fault = next((each for each in request["faults"] if each.name in REQUEST), None)
    if fault is None:
        return await handler(request)
    return await _instead(request, fault) or await _afterwards(request, fault, await handler(request))


@ours.get("/_truth")
async def truth(request: web.Request) -> web.Response:
    return web.json_response(request.app[STATE].truth())


@ours.get("/_faults")
async def faults(request: web.Request) -> web.Response:
    return web.json_response(request.app[STATE].faults.shown())


@ours.put("/_faults")
async def set_faults(request: web.Request) -> web.Response:
    state = request.app[STATE]
    state.faults.replace(await pod_routes.read_json(request))
    return web.json_response(state.faults.shown())


@ours.post("/_faults")
async def add_faults(request: web.Request) -> web.Response:
    state = request.app[STATE]
    state.faults.add(await pod_routes.read_json(request))
    return web.json_response(state.faults.shown())


@ours.post("/_account")
async def account(request: web.Request) -> web.Response:
    """`{"left": 5.0}` sets what is left; `{"upstream": "http://127.0.0.1:1", "endpoint": id}` who answers jobs."""
    state, given = request.app[STATE], await pod_routes.read_json(request)
    if "left" in given:
        state.balance = float(given["left"]) + state.spent()
    if "upstream" in given:
        chosen = [given["endpoint"]] if "endpoint" in given else list(state.serverless.by_id)
        state.serverless.upstream = state.serverless.upstream if "endpoint" in given else str(given["upstream"])
        for id in chosen:
            state.serverless.found(id).upstream = str(given["upstream"])
    return web.json_response({"left": state.left()})


@ours.post("/_pods/{id}/{fate}")
async def fate(request: web.Request) -> web.Response:
    """What befalls a machine: `die`, `hang`, or `end` (terminated behind everybody's back)."""
    state = request.app[STATE]
    pod = state.pod(request.match_info["id"])
    if request.match_info["fate"] == "end":
        state.pods.terminate(pod)
    elif pod.container is None:
        raise Problem(409, "it has no container yet")
    elif request.match_info["fate"] == "hang":
        pod.container.freeze()
        pod.busy_until = 0.0
    else:
        pod.container.kill()
    return web.json_response({"id": pod.id})


async def _instead(request: web.Request, fault: Fault) -> web.StreamResponse | None:
    """The answer of a fault with which nothing is done."""
    rule = fault.rule
    if fault.name == "rate_limit":
        detail = rule.detail or "rate limit exceeded for the minute window"
        raise Problem(429, detail, retry_after=f"{rule.seconds:g}")
    if fault.name == "error":
        raise Problem(rule.status, rule.detail or "transient upstream failure")
    if fault.name == "timeout":
        await asyncio.sleep(rule.seconds)
        raise Problem(504, "upstream timed out")
    if fault.name == "reset":
        return _cut(request)
    return web.Response(status=204) if fault.name == "ignore" else None


async def _afterwards(request: web.Request, fault: Fault, answer: web.StreamResponse) -> web.StreamResponse:
    """It was done, and whoever asked does not learn of it."""
    if fault.name == "error_after":
        raise Problem(fault.rule.status, fault.rule.detail or "upstream failed")
    if fault.name == "timeout_after":
        await asyncio.sleep(fault.rule.seconds)
    if fault.name == "reset_after":
        return _cut(request)
    return web.Response(status=answer.status, text='{"id": ') if fault.name == "garbage" else answer


def _cut(request: web.Request) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _ordered_gpu(request: web.Request) -> str:
    if (request.method, request.path) != ("POST", "/v2/pods"):
        return ""
    with contextlib.suppress(Problem, AttributeError):
        return str((await pod_routes.read_json(request)).get("gpu", {}).get("id", ""))
    return ""


async def _alive(app: web.Application) -> AsyncIterator[Any]:
    watch = asyncio.create_task(app[STATE].watch_the_balance())
    yield
    watch.cancel()
    await app[STATE].pods.close()
