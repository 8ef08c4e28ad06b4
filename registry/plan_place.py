"""Where a plan is for: a card with what is free on it and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from registry.card_profiles import CardProfile
from registry.train_time import Interval


@dataclass(frozen=True)
class Place:
    """A card that could do it. `available`: bytes that are free for us, None where only the profile is known;
    `total`: bytes of the card as the driver counts them."""

    name: str
    profile: CardProfile
    available: int | None = None
    usd_per_hour: float | None = None
    storage_usd_per_hour: float = 0.0
    start: Interval = field(default_factory=lambda: Interval(0, 0, 0))
    total: int | None = None

    @property
    def bytes(self) -> int:
        return self.profile.usable if self.available is None else self.available

    @property
    def whole(self) -> int:
        return self.profile.visible if self.total is None else self.total
