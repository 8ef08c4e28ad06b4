"""The plan of serving on one card: which precision of the base, how many adapters, how much context at once.

It fits what is wished beside what others hold: first the 16-bit base, then the 4-bit one, then fewer requests at once,
no CUDA graphs, fewer adapters in memory, and at last a shorter context. Several engines share a card in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from registry.card_profiles import GIB
from registry.geometry import Geometry
from registry.plan_place import Place
from registry.serve_memory import Precision, Serving, context_bytes, kv_bytes, serve_memory
from registry.train_memory import Memory

# champion, candidate and previous are loaded at once during a swap.
MAX_LORAS = 3
SHORTEST_CONTEXT = 512
# vLLM refuses to start where less is free than it is told to take; what is free moves by this much meanwhile.
MARGIN = 128 * 1024**2


@dataclass(frozen=True)
class ServeWish:
    """`max_context` and `concurrency` as in the recipe's `serve`. `precisions`: those allowed, the best first.
    `least_concurrency`: fewer requests at once than this are no service in 16 bits where 4 bits give more."""

    geometry: Geometry
    max_context: int = 2048
    concurrency: int = 16
    max_loras: int = MAX_LORAS
    rank: int = 16
    precisions: tuple[Precision, ...] = ("bf16", "bitsandbytes")
    least_concurrency: int = 4
    name: str = "model"


@dataclass(frozen=True)
class Served:
    """What to start vLLM with. `utilization`: --gpu-memory-utilization; `kv_tokens`: tokens that its cache holds;
    `given_up`: what of the wish is not there."""

    name: str
    fits: bool
    serving: Serving
    memory: Memory
    available: int
    utilization: float
    kv_tokens: int
    limit: str
    given_up: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory.as_dict()}

    def vllm_options(self) -> dict[str, Any]:
        """As vLLM's command line names them."""
        four_bit = {"quantization": "bitsandbytes"} if self.serving.precision == "bitsandbytes" else {}
        return four_bit | {
            "gpu-memory-utilization": self.utilization, "max-model-len": self.serving.max_context,
            "max-num-seqs": self.serving.concurrency, "max-loras": max(1, self.serving.max_loras),
            "max-lora-rank": self.serving.rank, "enforce-eager": self.serving.eager,
        }  # fmt: skip


def plan_serving(wish: ServeWish, place: Place) -> Served:
    """The best engine that fits, or the smallest one, with `fits` False."""
    options = [_served(wish, place, each) for each in _steps(wish)]
    return next((each for each in options if each.fits), options[-1])


def plan_servings(wishes: Sequence[ServeWish], place: Place) -> list[Served]:
    """Several engines on one card. Each leaves the least that the later ones need, where it can itself."""
    found: list[Served] = []
    left = place.bytes
    for number, wish in enumerate(wishes):
        kept = sum(_least(each, place).high for each in wishes[number + 1 :])
        served = plan_serving(wish, replace(place, available=max(0, left - kept)))
        if not served.fits:  # those before go first
            served = plan_serving(wish, replace(place, available=left))
        found.append(served)
        left -= _taken(served, place) if served.fits else 0
    return found


def _steps(wish: ServeWish) -> Iterator[Serving]:
    """From the whole wish down; each precision with enough requests at once before the next one."""
    context = min(wish.max_context, wish.geometry.max_positions)
    enough = [each for each in _halves(wish.concurrency) if each >= min(wish.least_concurrency, wish.concurrency)]
    fewer = [each for each in _halves(wish.concurrency) if each not in enough]
    loras = list(range(wish.max_loras, min(1, wish.max_loras) - 1, -1))
    for eager in (False, True):
        for precision in wish.precisions:
            for concurrency in enough:
                yield Serving(precision, context, concurrency, wish.max_loras, wish.rank, eager)
    for concurrency in fewer or [1]:
        for slots in loras:
            for precision in wish.precisions:
                yield Serving(precision, context, concurrency, slots, wish.rank, eager=True)
    for shorter in _halves(context)[1:]:
        if shorter >= SHORTEST_CONTEXT:
            yield Serving(wish.precisions[-1], shorter, 1, loras[-1], wish.rank, eager=True)


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(number.bit_length()) if number >> shift]


def _served(wish: ServeWish, place: Place, serving: Serving) -> Served:
    memory = serve_memory(wish.geometry, serving, place.profile)
    fits = memory.high + MARGIN <= place.bytes
    utilization = _utilization(memory, place)
    # What the planner set aside for its own error becomes KV cache.
    spare = max(0, round(utilization * place.whole) - memory.total)
    tokens = (memory.parts["kv cache"] + spare) // max(1, kv_bytes(wish.geometry))
    return Served(
        name=wish.name,
        fits=fits,
        serving=serving,
        memory=memory,
        available=place.bytes,
        utilization=utilization,
        kv_tokens=tokens,
        limit=_limit(wish, memory, place, fits),
        given_up=_given_up(wish, serving),
    )


def _utilization(memory: Memory, place: Place) -> float:
    """Up to what the plan needs at worst, and never more than is free."""
    most = max(0, place.bytes - MARGIN) / place.whole
    return min(math.ceil(memory.high / place.whole * 1000) / 1000, math.floor(most * 1000) / 1000)


def _limit(wish: ServeWish, memory: Memory, place: Place, fits: bool) -> str:
    if fits:
        return f"{context_bytes(wish.geometry, wish.max_context) / GIB:.2f} GiB of KV cache for each request"
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    return (f"memory: {memory.high / GIB:.1f} GiB needed at worst, {place.bytes / GIB:.1f} there; "
            f"{largest} {'are' if largest.endswith('s') else 'is'} {memory.parts[largest] / GIB:.1f}")  # fmt: skip


def _given_up(wish: ServeWish, serving: Serving) -> list[str]:
    found = []
    if serving.precision != wish.precisions[0]:
        found.append("the base is held in 4 bits (bitsandbytes), and answers a little slower")
    if serving.max_context < wish.max_context:
        found.append(f"context {serving.max_context} in place of {wish.max_context}")
    if serving.concurrency < wish.concurrency:
        found.append(f"{serving.concurrency} requests at once in place of {wish.concurrency}; others wait")
    if serving.max_loras < wish.max_loras:
        found.append(f"{serving.max_loras} adapters at once in place of {wish.max_loras}")
    return found + (["no CUDA graphs: the first token comes later"] if serving.eager else [])


def _least(wish: ServeWish, place: Place) -> Memory:
    context = min(wish.max_context, wish.geometry.max_positions)
    smallest = Serving(wish.precisions[-1], context, 1, min(1, wish.max_loras), wish.rank, eager=True)
    memory = serve_memory(wish.geometry, smallest, place.profile)
    return replace(memory, high=memory.high + MARGIN)


def _taken(served: Served, place: Place) -> int:
    return round(served.utilization * place.whole)
