"""Routes to serverless endpoints: RunPod's OpenAI passthrough as an upstream of the gateway.

A caller's key never goes there and ours never comes back: the session carries it, and answers of the platform itself
(a wrong key, no credit, a deleted endpoint) are turned into refusals of the gateway.
"""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any

import aiohttp

from registry.endpoints import Deployed, deployed
from registry.settings import Settings
from registry.store import Store
from serving.aside import aside
from serving.engine import TIMEOUT
from serving.http_messages import Refusal
from serving.routes import Route, Upstream

# What worker-vllm answers with status 200 when its vLLM has refused.
INNER = re.compile(r"vLLM returned HTTP (\d{3}): (.*)", re.DOTALL)
LOG = logging.getLogger("ft.gateway")
OURS = {401: "ft's RunPod key", 403: "ft's RunPod key", 402: "the RunPod account's credit", 404: "the endpoint itself"}


class EndpointUpstream:
    """One endpoint. Made inside a running event loop; close it."""

    local = False

    def __init__(self, url: str, key: str) -> None:
        self.url, self._health = f"{url}/openai", f"{url}/health"
        headers = {"Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}
        self.session = aiohttp.ClientSession(timeout=TIMEOUT, headers=headers)

    async def healthy(self, seconds: float) -> bool:
        """Does RunPod know it? Its workers may all be asleep. Never raises."""
        try:
            async with self.session.get(self._health, timeout=aiohttp.ClientTimeout(total=seconds)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, RuntimeError):
            return False

    def refusal(self, status: int, first: bytes) -> Refusal | None:
        return refusal_of(status, first)

    async def close(self) -> None:
        await self.session.close()


class EndpointRoutes:
    """The routes to all endpoints of the store; without a key there are none."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.runpod_serverless_url.rstrip("/")
        self._key = settings.runpod_api_key or os.environ.get("RUNPOD_API_KEY", "")
        self._upstreams: dict[str, EndpointUpstream] = {}

    async def look(self, store: Store) -> dict[str, Route]:
        """Model names and `model@N`. Upstreams stay the same from look to look, so equal routes are equal."""
        found = [each for each in await aside(deployed, store) if each.is_on] if self._key else []
        for gone in self._upstreams.keys() - {each.id for each in found}:
            await self._upstreams.pop(gone).close()
        for each in found:
            if each.id not in self._upstreams:
                self._upstreams[each.id] = EndpointUpstream(f"{self._url}/{each.id}", self._key)
        return remote_routes(found, dict(self._upstreams))

    async def close(self) -> None:
        for each in self._upstreams.values():
            await each.close()
        self._upstreams.clear()


def remote_routes(
    found: list[Deployed], upstreams: dict[str, Upstream] | dict[str, EndpointUpstream]
) -> dict[str, Route]:
    """Pure. Of two endpoints of one model the older one answers."""
    routes: dict[str, Route] = {}
    for each in found:
        route = Route(each.answers, upstreams[each.id])
        routes.setdefault(each.model, route)
        routes.setdefault(each.answers, route)
    return routes


def refusal_of(status: int, first: bytes) -> Refusal | None:
    """Pure. What the caller is told instead of the endpoint's answer; None: that is passed on."""
    if first.startswith(b"data:") or (status < 400 and b'"choices"' in first):
        return None
    body = _json(first)
    said = body.get("error")
    if status < 400:
        return _of_worker(said if isinstance(said, dict) else {}, body)
    if status in OURS and not _is_of_vllm(said):
        return Refusal(503, f"the endpoint is away: {OURS[status]} was refused", "endpoint_away", retry_after=60)
    if status == 429:
        return Refusal(429, "the endpoint takes no more requests just now", "endpoint_busy", retry_after=10)
    if _is_of_vllm(said):
        return None
    # An endpoint without workers says 400, which is no fault of the request: a fallback can still answer it.
    kind = 503 if status >= 500 or b"workers" in first else status
    return Refusal(kind, f"the endpoint answered {status}", "endpoint_away", retry_after=10 if kind == 503 else None)


def _of_worker(said: dict[str, Any], body: dict[str, Any]) -> Refusal | None:
    if not said:
        state = str(body.get("status", "no answer"))[:40]
        return Refusal(503, f"the endpoint has not answered: {state}", "endpoint_away", retry_after=10)
    message = str(said.get("message", ""))
    inner = INNER.match(message)
    if inner is None:
        return _failed("worker", message)
    told = _json(inner[2].encode()).get("error")
    text = str(told.get("message")) if isinstance(told, dict) else inner[2][:500]
    status = int(inner[1])
    if 400 <= status < 500:
        return Refusal(status, text, "endpoint_refused")
    return _failed("engine", text)


def _failed(part: str, said: str) -> Refusal:
    """What it said has had its own address, and pieces of a traceback: that is for the log alone."""
    LOG.warning("an endpoint's %s failed: %s", part, said[:500])
    return Refusal(503, f"the endpoint's {part} failed", "endpoint_away", retry_after=10)


def _is_of_vllm(said: Any) -> bool:
    """Is it an error in OpenAI's form? RunPod's own errors have a text, or nothing, in that place."""
    return isinstance(said, dict) and {"message", "type"} <= said.keys()


def _json(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
