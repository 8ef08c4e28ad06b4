"""Money: by the second from a pod's creation until it is stopped or ended, in time buckets as `/v2/billing` answers.

A second that has begun is charged. The container's disk costs 0.10 USD per GB and month of 730 hours while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.fakes.runpod.contract import Problem

DISK_USD_PER_GB_HOUR = 0.10 / 730
BUCKETS = ("hour", "day", "week", "month", "year")


@dataclass
class Span:
    """What was used from `start` to `end` (None: still) at these prices per hour."""

    start: float
    gpu_usd_per_hour: float
    disk_usd_per_hour: float = 0.0
    end: float | None = None

    def seconds(self, now: float) -> float:
        until = now if self.end is None else min(self.end, now)
        return float(math.ceil(max(0.0, until - self.start)))

    def usd(self, now: float) -> float:
        return self.seconds(now) * (self.gpu_usd_per_hour + self.disk_usd_per_hour) / 3600


@dataclass(frozen=True)
class Period:
    """[start, end) in Unix time, both at bounds of buckets."""

    start: float
    end: float
    bucket: str


def records(owner: str, spans: Iterable[Span], period: Period, known_until: float) -> list[dict[str, Any]]:
    """One per bucket in which there is something. What was used after `known_until` is not in it yet."""
    found: dict[float, tuple[float, float]] = {}
    for span in spans:
        until = span.start + span.seconds(known_until)
        start = max(span.start, period.start)
        while start < min(until, period.end):
            bucket = floor(start, period.bucket)
            hours = (min(until, period.end, following(bucket, period.bucket)) - start) / 3600
            gpu, disk = found.get(bucket, (0.0, 0.0))
            found[bucket] = (gpu + hours * span.gpu_usd_per_hour, disk + hours * span.disk_usd_per_hour)
            start = following(bucket, period.bucket)
    return [_record(owner, start, period.bucket, *found[start]) for start in sorted(found)]


def period_of(query: Any, now: float) -> Period:
    """Of `startTime`, `endTime`, `bucketSize` and `lastN`. Raises Problem."""
    bucket = query.get("bucketSize", "day")
    if bucket not in BUCKETS:
        raise Problem(422, "Request validation failed.", [f"bucketSize: not one of {', '.join(BUCKETS)}"])
    if "lastN" in query:
        if "startTime" in query or "endTime" in query:
            raise Problem(400, "lastN and startTime/endTime are mutually exclusive")
        start = floor(now, bucket)
        for _ in range(_positive(query["lastN"]) - 1):
            start = floor(start - 1, bucket)
        return Period(start, following(floor(now, bucket), bucket), bucket)
    start = floor(_time(query.get("startTime"), now - 30 * 86400), bucket)
    end = _time(query.get("endTime"), now)
    return Period(start, end if end == floor(end, bucket) else following(floor(end, bucket), bucket), bucket)


def answer(found: list[dict[str, Any]], period: Period, key: str, owner: str | None) -> dict[str, Any]:
    """As documented for pods (`podId`) and endpoints (`serverlessId`, which have a fee as well)."""
    names = ["totalAmount", "gpuAmount", "cpuAmount", "diskAmount", *(["feeAmount"] if key == "serverlessId" else [])]
    told = [{key: each["owner"], "feeAmount": 0.0} | each for each in found]
    shown = [
        {name: value for name, value in each.items() if name in (key, "startTime", "endTime", *names)} for each in told
    ]
    query = {"startTime": rfc(period.start), "endTime": rfc(period.end), "bucketSize": period.bucket, key: owner}
    unique = "uniquePodCount" if key == "podId" else "uniqueServerlessCount"
    totals = {name: sum(each[name] for each in shown) for name in names}
    metadata = {"query": query, "recordCount": len(shown), unique: len({each[key] for each in shown}), "totals": totals}
    return {"records": shown, "metadata": metadata}


def rfc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def floor(seconds: float, bucket: str) -> float:
    at = datetime.fromtimestamp(seconds, UTC).replace(minute=0, second=0, microsecond=0)
    if bucket != "hour":
        at = at.replace(hour=0)
    if bucket == "week":
        at -= timedelta(days=at.weekday())
    if bucket in ("month", "year"):
        at = at.replace(day=1)
    if bucket == "year":
        at = at.replace(month=1)
    return at.timestamp()


def following(start: float, bucket: str) -> float:
    """The start of the bucket behind the one that starts at `start`."""
    days = {"hour": 1 / 24, "day": 1, "week": 7, "month": 32, "year": 367}[bucket]
    return floor(start + days * 86400, bucket)


def _record(owner: str, start: float, bucket: str, gpu: float, disk: float) -> dict[str, Any]:
    amounts = {"totalAmount": gpu + disk, "gpuAmount": gpu, "cpuAmount": 0.0, "diskAmount": disk}
    return {"startTime": rfc(start), "endTime": rfc(following(start, bucket)), "owner": owner} | amounts


def _time(text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise Problem(422, "Request validation failed.", [f"not a date-time: {text}"]) from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise Problem(422, "Request validation failed.", ["lastN: at least 1"])
    return int(text)
