"""RunPod's REST API v2, as thin as it can be: pods, the catalogue, bills and serverless endpoints.

Every call may raise CloudError, and WrongKey of it. Reads and ends are repeated with growing waits for `patience_s`;
a create only after 429, because that alone says that nothing was made. v2 has no way to ask for the account's credit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

from registry.errors import AnswerLost, CloudError
from registry.runpod_calls import Calls, Query
from registry.runpod_shapes import (
    Endpoint,
    EndpointOrder,
    GpuOffer,
    LogLine,
    Pod,
    PodOrder,
    billed,
    endpoint_of,
    items,
    offer_of,
    pod_of,
    rfc_time,
)
from registry.settings import Settings

__all__ = ["Endpoint", "EndpointOrder", "GpuOffer", "LogLine", "Pod", "PodOrder", "RunPod", "open_runpod"]

T = TypeVar("T")


def open_runpod(settings: Settings, *, patience_s: float = 60.0, timeout_s: float = 60.0) -> RunPod:
    """Raises WrongKey if there is no key. Close it, or use it in a `with`."""
    return RunPod(settings.runpod_url, _key(settings), patience_s=patience_s, timeout_s=timeout_s)


def has_key(settings: Settings) -> bool:
    """Is there anybody to be asked at all?"""
    return bool(_key(settings))


def _key(settings: Settings) -> str:
    return settings.runpod_api_key or os.environ.get("RUNPOD_API_KEY", "")


class RunPod:
    """May be used by several threads at once."""

    def __init__(self, url: str, key: str, *, patience_s: float = 60.0, timeout_s: float = 60.0) -> None:
        self._calls = Calls(url, key.strip(), patience_s=patience_s, timeout_s=timeout_s)

    def pods(self) -> list[Pod]:
        """All pods of the account, also those that are not ours. The list may lag behind by seconds."""
        return [pod_of(each) for each in items(self._calls.ask("GET", "/v2/pods"), "pods")]

    def pod(self, id: str) -> Pod | None:
        """None when there is no such pod (any more)."""
        answer = self._calls.ask("GET", f"/v2/pods/{quote(id, safe='')}", may_be_gone=True)
        return None if answer is None else pod_of(answer)

    def create(self, order: PodOrder) -> Pod:
        """Raises NoCapacity (try another card; the reason is RunPod's `detail`), NoCredit, AnswerLost (it may have been
        made: look for its name), WrongKey, and CloudError where nothing was made. Its price may be another than the
        catalogue's: look at it."""
        return _made(self._calls.create("/v2/pods", order.body()), pod_of, "/v2/pods")

    def terminate(self, id: str) -> None:
        """Delete the pod and what is on its disk. Fine when it is gone already. A yes is no proof: look again."""
        self._calls.ask("DELETE", f"/v2/pods/{quote(id, safe='')}", may_be_gone=True)

    def logs(
        self, id: str, *, tail: int = 200, cursor: str = "", source: str = "container", quiet_s: float = 2.0
    ) -> list[LogLine]:
        """The last `tail` (to 5000) lines, or all behind `cursor` (LogLine.cursor). RunPod holds the stream open: it is
        taken for read to its end when nothing has come for `quiet_s`. Empty for a pod without any."""
        params: Query = {"source": source, "tail": tail}
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": cursor} if cursor else {})
        with self._calls.lines(f"/v2/pods/{quote(id, safe='')}/logs", params, headers, quiet_s) as lines:
            return list(_log_lines(lines))

    def gpus(self, cloud: str = "secure") -> list[GpuOffer]:
        """Every GPU type, with both clouds' prices, and what `cloud` has free of it. No reservation."""
        params: Query = {"include": "AVAILABILITY", "product": "POD", "cloud": cloud.upper()}
        return [offer_of(each) for each in items(self._calls.ask("GET", "/v2/catalog/gpus", params=params), "gpus")]

    def billing(self, since: float | None = None, pod: str | None = None) -> dict[str, float]:
        """US dollars really charged, by pod id, of the days from `since` (Unix time; 30 days ago otherwise) on.
        What was used in the last hours may not be in it yet."""
        return billed(self._calls.ask("GET", "/v2/billing/pods", params=_period(since, "podId", pod)), "podId")

    def endpoints(self) -> list[Endpoint]:
        return [endpoint_of(each) for each in items(self._calls.ask("GET", "/v2/serverless"), "endpoints")]

    def endpoint(self, id: str) -> Endpoint | None:
        answer = self._calls.ask("GET", f"/v2/serverless/{quote(id, safe='')}", may_be_gone=True)
        return None if answer is None else endpoint_of(answer)

    def create_endpoint(self, order: EndpointOrder) -> Endpoint:
        """Raises what `create` raises."""
        return _made(self._calls.create("/v2/serverless", order.body()), endpoint_of, "/v2/serverless")

    def update_endpoint(
        self, id: str, *, image: str | None = None, env: dict[str, str] | None = None, workers_min: int | None = None,
        workers_max: int | None = None, idle_seconds: int | None = None,
    ) -> Endpoint:  # fmt: skip
        """Change what is given and nothing else; `env` replaces the whole of it. Workers that run keep the image and
        the env that they were started with. Raises CloudError if there is no such endpoint."""
        given_workers = (("min", workers_min), ("max", workers_max), ("idleTimeout", idle_seconds))
        workers = {name: value for name, value in given_workers if value is not None}
        given = {"image": image, "env": env, "workers": workers or None}
        body = {name: value for name, value in given.items() if value is not None}
        return endpoint_of(self._calls.ask("PATCH", f"/v2/serverless/{quote(id, safe='')}", body=body))

    def delete_endpoint(self, id: str) -> None:
        """Fine when it is gone already. Its workers end, its waiting jobs are lost."""
        self._calls.ask("DELETE", f"/v2/serverless/{quote(id, safe='')}", may_be_gone=True)

    def stale_workers(self, id: str) -> int:
        """Workers of the endpoint that still run with the image or env of before the last update."""
        found = items(self._calls.ask("GET", f"/v2/serverless/{quote(id, safe='')}/workers"), "workers")
        return sum(1 for each in found if isinstance(each, dict) and each.get("isStale"))

    def endpoint_billing(self, since: float | None = None, endpoint: str | None = None) -> dict[str, float]:
        """As `billing`, by endpoint id."""
        params = _period(since, "serverlessId", endpoint)
        return billed(self._calls.ask("GET", "/v2/billing/serverless", params=params), "serverlessId")

    def close(self) -> None:
        self._calls.close()

    def __enter__(self) -> RunPod:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _made(answer: Any, read: Callable[[Any], T], path: str) -> T:
    """It was made: an answer that cannot be understood is a lost one, or it would be made a second time."""
    try:
        return read(answer)
    except CloudError as error:
        raise AnswerLost(
            f"made, but {error.what}", place=f"RunPod, POST {path}", fix="`ft pods` shows what is there"
        ) from error


def _period(since: float | None, key: str, owner: str | None) -> Query:
    found: Query = {"bucketSize": "day"}
    if since is not None:
        found["startTime"] = rfc_time(since)
    if owner:
        found[key] = owner
    return found


def _log_lines(lines: Iterable[str]) -> Iterator[LogLine]:
    """Server-sent events: `id:` and `data:` lines, an empty line behind each event."""
    cursor = ""
    for line in lines:
        field, _, value = line.partition(":")
        if field == "id":
            cursor = value.strip()
        elif field == "data":
            try:
                said = json.loads(value)
                yield LogLine(cursor or said["ts"], said["ts"], said.get("source", ""), said["line"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
