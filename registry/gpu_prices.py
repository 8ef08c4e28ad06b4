"""What RunPod's cards cost an hour: its catalogue, kept in `.ft` for an hour, or a dated table without it.

A price is never more than what it was when it was asked: what a pod really costs stands in RunPod's answer to its
creation, and `cloud.max_usd_per_hour` is checked against that.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.card_profiles import by_runpod_id
from registry.errors import CloudError
from registry.runpod_api import GpuOffer, open_runpod
from registry.settings import Settings

HOUR = 3600.0
# A plan is not worth waiting for: the table does then.
PATIENCE_SECONDS = 5.0
CLOUDS = ("secure", "community")
SEED_DATE = "March 2026"
# USD an hour by RunPod's id, without a promise: others' lists of that month, which name the lowest price on demand (the
# secure cloud asks more of some). No source had an A40, an RTX 3070 or a 4070 Ti.
SEED = {
    "NVIDIA GeForce RTX 4090": 0.34,
    "NVIDIA GeForce RTX 5090": 0.69,
    "NVIDIA L4": 0.44,
    "NVIDIA L40": 0.69,
    "NVIDIA L40S": 0.79,
    "NVIDIA A100 80GB PCIe": 1.19,
    "NVIDIA A100-SXM4-80GB": 1.39,
    "NVIDIA H100 PCIe": 1.99,
    "NVIDIA H100 80GB HBM3": 2.69,
    "NVIDIA H200": 3.59,
}


@dataclass(frozen=True)
class GpuPrice:
    """One GPU type in one cloud (secure, community). `availability` and `data_centers` are '' and () if not told."""

    gpu: str
    name: str
    memory_gb: int
    cloud: str
    usd_per_hour: float
    availability: str = ""
    data_centers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prices:
    """`asked` is when RunPod was (Unix time), None for the table; `note` says why it is the table."""

    of: tuple[GpuPrice, ...]
    asked: float | None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gpu_prices(home: Path, settings: Settings) -> Prices:
    """RunPod's own, at most an hour old; else the table, with the reason. `home` is the project's state folder."""
    kept = _kept(home / "runpod-prices.json")
    if kept and 0 <= time.time() - (kept.asked or 0) < HOUR:
        return kept
    try:
        with open_runpod(settings, patience_s=PATIENCE_SECONDS) as cloud:
            found = Prices(tuple(each for name in CLOUDS for each in priced(cloud.gpus(name), name)), time.time())
    except CloudError as error:
        return Prices(kept.of, kept.asked, error.what) if kept else seed_prices(error.what)
    _keep(home / "runpod-prices.json", found)
    return found


def priced(offers: Iterable[GpuOffer], cloud: str) -> list[GpuPrice]:
    """The catalogue's types that this cloud has. Pure."""
    found = []
    for each in offers:
        usd = each.secure_usd if cloud == "secure" else each.community_usd
        if usd:
            found.append(GpuPrice(each.id, each.name, each.memory_gb, cloud, usd, each.availability, each.data_centers))
    return found


def seed_prices(note: str = "") -> Prices:
    """The table. Pure."""
    found = []
    for gpu, usd in SEED.items():
        profile = by_runpod_id(gpu)
        assert profile is not None, gpu
        found += [GpuPrice(gpu, profile.name, int(profile.memory_gib), cloud, usd) for cloud in CLOUDS]
    return Prices(tuple(found), None, note)


def source(prices: Prices, now: float) -> str:
    """For people: where the prices come from, and how old they are."""
    if prices.asked is None:
        return f"the lowest of {SEED_DATE}, not today's ({prices.note or 'RunPod was not asked'})"
    age = max(0, round((now - prices.asked) / 60))
    old = f"{age} min ago" if age < 120 else f"{age // 60} h ago"
    return f"RunPod's catalogue, {old}{f' ({prices.note})' if prices.note else ''}"


def _kept(file: Path) -> Prices | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [{**each, "data_centers": tuple(each["data_centers"])} for each in content["of"]]
        return Prices(tuple(GpuPrice(**each) for each in rows), float(content["asked"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(file: Path, prices: Prices) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(prices.as_dict()), encoding="utf-8")
        partial.replace(file)
    except OSError:  # the next plan asks again
        partial.unlink(missing_ok=True)
