"""How much of a card vLLM takes to serve a base with adapters: arithmetic on the model's shape. Bytes throughout.

vLLM holds the weights, a slot for each adapter that is loaded at once, what one batch needs, its CUDA graphs and
context; whatever `--gpu-memory-utilization` (a part of the whole card) leaves beyond these becomes KV cache.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry.card_profiles import GIB, CardProfile
from registry.geometry import Geometry
from registry.train_memory import CONTEXT, MIB, NF4, WORKSPACE, Memory

Precision = Literal["bf16", "bitsandbytes"]
# Tokens of one batch: vLLM's own defaults of its API server, by the size of the card (V1, get_batch_defaults).
BATCHED, BATCHED_LARGE, LARGE = 2048, 8192, 70 * GIB
# Tokens of one block of KV cache.
BLOCK = 16
# A captured graph keeps its buffers and its launch list: some for each layer, over all sizes that are captured; with
# LoRA all of them twice.
GRAPHS_PER_LAYER = 16 * MIB
# What comes and goes beside the tensors that are counted: PyTorch's blocks that are not full.
FRAGMENTS = 0.10
# Weights, adapters and cache are exact but for padding; the rest depends on vLLM's version, driver and kernels.
SPREAD_EXACT, SPREAD_REST = 0.01, 0.35
EXACT = ("weights", "adapters", "kv cache")


@dataclass(frozen=True)
class Serving:
    """What the engine is started with. `max_context`: tokens of a prompt with its answer; `concurrency`: requests at
    once; `max_loras` adapters of at most `rank` loaded at once (0: none)."""

    precision: Precision
    max_context: int
    concurrency: int
    max_loras: int = 0
    rank: int = 16
    eager: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def serve_memory(geometry: Geometry, serving: Serving, card: CardProfile | None = None) -> Memory:
    """The whole engine, with KV cache for every request at its longest."""
    tokens = BATCHED_LARGE if card and card.visible >= LARGE and card.compute != "8.0" else BATCHED
    batch = _batch_bytes(geometry, serving, min(tokens, serving.max_context * serving.concurrency))
    parts = {
        "weights": weight_bytes(geometry, serving.precision),
        "adapters": 2 * serving.max_loras * geometry.adapter(serving.rank) if serving.max_loras else 0,
        "kv cache": serving.concurrency * context_bytes(geometry, serving.max_context),
        "one batch": batch,
        "graphs": 0 if serving.eager else GRAPHS_PER_LAYER * geometry.layers * (2 if serving.max_loras else 1),
        "workspace": WORKSPACE,
        "fragments": round(FRAGMENTS * batch),
        "context": CONTEXT,
    }
    spread = sum(value * (SPREAD_EXACT if name in EXACT else SPREAD_REST) for name, value in parts.items())
    total = sum(parts.values())
    return Memory(parts, round(total - spread), round(total + spread))


def weight_bytes(geometry: Geometry, precision: Precision) -> int:
    """bitsandbytes takes the layers' matrices only, and vLLM undoes its double quantization when it loads."""
    if precision == "bf16":
        return 2 * geometry.parameters
    return round(NF4 * (geometry.linear - geometry.vision)) + 2 * (
        geometry.embeddings + geometry.norms + geometry.vision
    )


def kv_bytes(geometry: Geometry) -> int:
    """Of one token in all layers, 16-bit."""
    return 2 * geometry.layers * geometry.kv_width


def context_bytes(geometry: Geometry, tokens: int) -> int:
    """KV cache of one request of that length, in whole blocks; a sliding window bounds it."""
    within = min(tokens, geometry.window) if geometry.window else tokens
    return math.ceil(within / BLOCK) * BLOCK * kv_bytes(geometry)


def _batch_bytes(geometry: Geometry, serving: Serving, tokens: int) -> int:
    inner = geometry.intermediate * geometry.active_experts
    attention = (geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim
    # The stream and its norm, q, k, v, attention's answer, and gate and up with their product; sampling in 32 bits.
    passed = 2 * tokens * (4 * geometry.hidden + attention + 3 * inner)
    sampled = serving.concurrency * geometry.vocab * (2 + 4 + 4)
    # gate and up are one matrix in vLLM, and unpacked as one.
    unpacked = 2 * geometry.hidden * 2 * geometry.intermediate if serving.precision == "bitsandbytes" else 0
    return passed + sampled + unpacked
