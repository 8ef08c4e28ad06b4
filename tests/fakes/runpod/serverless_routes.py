"""`/v2/serverless`, and the job API `/v2/{endpoint}/...`, which the real one has at another address."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from tests.fakes.runpod.contract import CreateEndpoint, Problem, UpdateEndpoint, checked
from tests.fakes.runpod.pod_routes import read_json
from tests.fakes.runpod.serverless import (
    Endpoint,
    Serverless,
    endpoint_json,
    health_json,
    job_json,
    stream_json,
    workers_json,
)
from tests.fakes.runpod.state import STATE

routes = web.RouteTableDef()


@routes.get("/v2/serverless")
async def list_endpoints(request: web.Request) -> web.Response:
    alive = [each for each in _serverless(request).by_id.values() if each.ended is None]
    return web.json_response({"endpoints": [endpoint_json(each, _origin(request)) for each in alive]})


@routes.post("/v2/serverless")
async def create_endpoint(request: web.Request) -> web.Response:
    made = _serverless(request).create(checked(CreateEndpoint, await read_json(request)))
    return web.json_response(endpoint_json(made, _origin(request)), status=201)


@routes.get("/v2/serverless/{id}")
async def get_endpoint(request: web.Request) -> web.Response:
    return web.json_response(endpoint_json(_endpoint(request), _origin(request)))


@routes.patch("/v2/serverless/{id}")
async def update_endpoint(request: web.Request) -> web.Response:
    endpoint = _endpoint(request)
    _serverless(request).update(endpoint, checked(UpdateEndpoint, await read_json(request)))
    return web.json_response(endpoint_json(endpoint, _origin(request)))


@routes.delete("/v2/serverless/{id}")
async def delete_endpoint(request: web.Request) -> web.Response:
    _serverless(request).delete(_endpoint(request))
    return web.Response(status=204)


@routes.get("/v2/serverless/{id}/workers")
async def list_workers(request: web.Request) -> web.Response:
    return web.json_response(workers_json(_endpoint(request)))


@routes.post("/v2/{id}/run")
async def run(request: web.Request) -> web.Response:
    job = _serverless(request).submit(_endpoint(request), await read_json(request))
    return web.json_response({"id": job.id, "status": job.status})


@routes.post("/v2/{id}/runsync")
async def run_and_wait(request: web.Request) -> web.Response:
    try:
        wait = min(max(int(request.query.get("wait", 90000)), 1000), 300000)
    except ValueError:
        raise Problem(400, "wait is no number") from None
    job = _serverless(request).submit(_endpoint(request), await read_json(request), prefix="sync-")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(job.done.wait(), wait / 1000)
    return web.json_response(job_json(job))


@routes.get("/v2/{id}/status/{job}")
async def status(request: web.Request) -> web.Response:
    return web.json_response(job_json(_serverless(request).job(_endpoint(request), request.match_info["job"])))


@routes.get("/v2/{id}/stream/{job}")
async def stream(request: web.Request) -> web.Response:
    return web.json_response(stream_json(_serverless(request).job(_endpoint(request), request.match_info["job"])))


@routes.post("/v2/{id}/cancel/{job}")
async def cancel(request: web.Request) -> web.Response:
    return web.json_response(job_json(_serverless(request).cancel(_endpoint(request), request.match_info["job"])))


@routes.post("/v2/{id}/retry/{job}")
async def retry(request: web.Request) -> web.Response:
    return web.json_response(job_json(_serverless(request).retry(_endpoint(request), request.match_info["job"])))


@routes.post("/v2/{id}/purge-queue")
async def purge(request: web.Request) -> web.Response:
    return web.json_response({"removed": _serverless(request).purge(_endpoint(request)), "status": "completed"})


@routes.get("/v2/{id}/health")
async def health(request: web.Request) -> web.Response:
    return web.json_response(health_json(_endpoint(request)))


@routes.route("*", "/v2/{id}/openai/{path:v1/.*}")
async def openai(request: web.Request) -> web.StreamResponse:
    return await _serverless(request).forward(_endpoint(request), request, f"/{request.match_info['path']}")


@routes.route("*", "/lb/{id}/{path:.*}")
async def balanced(request: web.Request) -> web.StreamResponse:
    """What the real one has at https://{id}.api.runpod.ai/."""
    endpoint = _endpoint(request)
    if endpoint.spec["type"] != "LOAD_BALANCER":
        raise Problem(404, "endpoint not found")
    return await _serverless(request).forward(endpoint, request, f"/{request.match_info['path']}")


def _serverless(request: web.Request) -> Serverless:
    return request.app[STATE].serverless


def _endpoint(request: web.Request) -> Endpoint:
    return _serverless(request).found(request.match_info["id"])


def _origin(request: web.Request) -> str:
    return f"http://{request.host}"
