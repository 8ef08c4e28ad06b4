"""What can be rented: GPU types, prices per hour (about what they were, not RunPod's today) and data centers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GpuType:
    id: str
    name: str
    memory: int
    secure: float
    community: float
    pool: str | None
    serverless: float | None = None
    data_centers: tuple[str, ...] = ("EU-RO-1", "US-KS-2", "US-TX-3")


GPU_TYPES = (
    GpuType("NVIDIA GeForce RTX 3070", "RTX 3070", 8, 0.16, 0.13, None),
    GpuType("NVIDIA GeForce RTX 4070 Ti", "RTX 4070 Ti", 12, 0.24, 0.19, None),
    GpuType("NVIDIA GeForce RTX 3090", "RTX 3090", 24, 0.43, 0.22, "AMPERE_24", 0.68),
    GpuType("NVIDIA L4", "L4", 24, 0.44, 0.0, "AMPERE_24", 0.68),
    GpuType("NVIDIA GeForce RTX 4090", "RTX 4090", 24, 0.44, 0.34, "ADA_24", 1.12),
    GpuType("NVIDIA GeForce RTX 5090", "RTX 5090", 32, 0.89, 0.69, None),
    GpuType("NVIDIA A40", "A40", 48, 0.40, 0.35, "AMPERE_48", 1.22),
    GpuType("NVIDIA L40S", "L40S", 48, 0.86, 0.79, "ADA_48_PRO", 1.91),
    GpuType("NVIDIA L40", "L40", 48, 0.99, 0.69, "ADA_48_PRO", 1.91),
    GpuType("NVIDIA A100 80GB PCIe", "A100 PCIe", 80, 1.64, 1.19, "AMPERE_80", 2.74),
    GpuType("NVIDIA A100-SXM4-80GB", "A100 SXM", 80, 1.74, 1.39, "AMPERE_80", 2.74, ("US-KS-2",)),
    GpuType("NVIDIA H100 PCIe", "H100 PCIe", 80, 2.39, 1.99, "ADA_80_PRO", 4.18),
    GpuType("NVIDIA H100 80GB HBM3", "H100 SXM", 80, 2.99, 2.69, "ADA_80_PRO", 4.18, ("US-KS-2",)),
    GpuType("NVIDIA H200", "H200 SXM", 141, 3.99, 3.59, "HOPPER_141", 5.58, ("US-KS-2",)),
)  # fmt: skip
BY_ID = {each.id: each for each in GPU_TYPES}
DATA_CENTERS = {
    "EU-RO-1": ("EU Romania 1", "EUROPE"),
    "US-KS-2": ("US Kansas 2", "NORTH_AMERICA"),
    "US-TX-3": ("US Texas 3", "NORTH_AMERICA"),
}


def price(gpu: GpuType, cloud: str, factor: float) -> float:
    """USD per hour; 0 where that cloud does not have it."""
    return round((gpu.secure if cloud == "SECURE" else gpu.community) * factor, 6)


def gpu_json(gpu: GpuType, factor: float, stock: str | None) -> dict[str, Any]:
    """`stock` is the availability to tell; None: it was not asked for."""
    prices: dict[str, float] = {
        "secure": price(gpu, "SECURE", factor),
        "community": price(gpu, "COMMUNITY", factor),
    }
    if gpu.serverless:
        prices["serverless"] = round(gpu.serverless * factor, 6)
    found: dict[str, Any] = {
        "id": gpu.id, "name": gpu.name, "pool": gpu.pool, "manufacturer": "NVIDIA", "memory": gpu.memory,
        "secure": gpu.secure > 0, "community": gpu.community > 0, "price": prices,
        "maxCount": {"secure": 8 if gpu.secure else 0, "community": 4 if gpu.community else 0},
    }  # fmt: skip
    if stock is None:
        return found
    centers = [
        {"id": each, "name": DATA_CENTERS[each][0], "availability": stock}
        for each in gpu.data_centers
        if stock != "NONE"
    ]
    return found | {"availability": stock, "dataCenters": centers, "cudaVersions": []}


def data_center_json(id: str, stock: dict[str, str] | None) -> dict[str, Any]:
    """`stock` is each GPU type's availability; None: it was not asked for."""
    name, region = DATA_CENTERS[id]
    found: dict[str, Any] = {
        "id": id, "name": name, "region": region, "globalNetwork": False,
        "networkVolumeTypes": ["STANDARD"], "compliance": [],
    }  # fmt: skip
    if stock is None:
        return found
    here = [each for each in GPU_TYPES if id in each.data_centers]
    return found | {
        "gpuAvailability": [{"id": each.id, "name": each.name, "availability": stock[each.id]} for each in here]
    }
