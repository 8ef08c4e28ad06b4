"""How long a training takes: arithmetic on floating point operations, bytes read and kernels started. Seconds.

A step on the card is the products (operations over what the card reaches), the unpacking of 4-bit weights and the
reading and writing of activations (bytes over bandwidth); but never less than it takes to start its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.card_profiles import CardProfile
from registry.geometry import Geometry
from registry.train_memory import Training, layer_bytes, on_card

# What large products reach of the data sheet's number, by compute capability: the newer the data center card, the
# sooner its power limit or its memory holds it back; GeForce cards come near their (halved) number.
ATTAINED = {"7.0": 0.65, "7.5": 0.40, "8.0": 0.78, "9.0": 0.62, "": 0.8}
ATTAINED_ELSE = 0.88
# 4-bit weights are read (half a byte), written in 16 bits and read again by the product.
UNPACKING = 0.5 + 2 + 2
# Each kept number is written once and read about once, in the forward pass, its repetition and the backward pass.
TOUCHES = 4
# Without bf16 the tensor cores are not used for it: PyTorch calculates in 32 bits.
WITHOUT_BF16 = 0.25
# Measured rates of the same settings lie so far from these formulas.
SPREAD_LOW, SPREAD_HIGH = 0.70, 1.45


@dataclass(frozen=True)
class Interval:
    """What is likely: between `low` and `high`, and `mid` most of all."""

    low: float
    mid: float
    high: float

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.mid + other.mid, self.high + other.high)

    def times(self, factor: float) -> Interval:
        return Interval(self.low * factor, self.mid * factor, self.high * factor)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the card (one batch, there and back), and the part that takes most of them."""

    products: float
    unpacking: float
    activations: float
    launching: float

    @property
    def total(self) -> float:
        return max(self.products + self.unpacking + self.activations, self.launching)

    @property
    def limit(self) -> str:
        if self.launching >= self.products + self.unpacking + self.activations:
            return "starting kernels (the batch is small)"
        parts = {"arithmetic": self.products, "unpacking 4-bit weights": self.unpacking,
                 "memory bandwidth": self.activations}  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def step_time(geometry: Geometry, training: Training, card: CardProfile, length: float) -> StepTime:
    """Of one batch whose rows are padded to `length` tokens."""
    training = on_card(training, card)
    tokens, passes = training.batch * length, 3 if training.checkpointing else 2
    rate = card.tflops * 1e12 * ATTAINED.get(card.compute, ATTAINED_ELSE) * training.layout.attained
    if not (card.is_cpu or card.bf16):
        rate *= WITHOUT_BF16
    bandwidth = card.bandwidth_gbs * 1e9
    width = UNPACKING if training.quantize == "nf4" else 2
    return StepTime(
        products=tokens * operations(geometry, training, length) / rate,
        unpacking=passes * width * geometry.linear / bandwidth if training.quantize == "nf4" else 0.0,
        activations=TOUCHES * tokens * geometry.layers * layer_bytes(geometry, training) / bandwidth,
        launching=0.0 if card.is_cpu else geometry.layers * training.layout.launch * passes / 3,
    )


def operations(geometry: Geometry, training: Training, length: float) -> float:
    """Floating point operations for each token, of forward and backward pass: no gradients of the base's weights."""
    passes = 3 if training.checkpointing else 2
    targets = training.targets if isinstance(training.targets, str) else list(training.targets)
    # Causal attention looks back over half of the row on average; its backward pass costs twice its forward pass. With
    # packs everything in the batch is calculated, and the mask takes most of it away.
    seen = training.batch * length if training.packed else length / 2
    attention = 4 * geometry.layers * geometry.heads * geometry.head_dim * seen * (passes + 1)
    return 2 * passes * geometry.active + attention + 6 * geometry.adapter(training.rank, targets)


def tokens_per_second(geometry: Geometry, training: Training, card: CardProfile, length: float) -> float:
    """Tokens in padded batches, which is what measured rates of packed data are."""
    return training.batch * length / step_time(geometry, training, card, length).total


def padded_length(lengths: Sequence[tuple[int, int]], batch: int) -> float:
    """The expected longest row of a random batch: (tokens, rows) pairs, ascending."""
    rows = sum(count for _, count in lengths)
    if not rows:
        return 0.0
    expected, below, seen = 0.0, 0.0, 0
    for length, count in lengths:
        seen += count
        upto = math.pow(seen / rows, batch)
        expected, below = expected + length * (upto - below), upto
    return expected
