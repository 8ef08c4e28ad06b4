"""What a route of a serve recipe promises, `objectives:`. serving/objectives.py judges it, Prometheus alerts on it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from registry.durations import Span, seconds
from registry.recipe_part import Part, Text

SHORTEST, LONGEST = 30, 86_400
LIMITS = ("p95", "error_rate", "availability", "concurrent")


def _latency(text: str) -> str:
    # Up to a day: the histograms that are asked for it end there.
    if not re.fullmatch(r"[1-9][0-9]{0,7}(ms|s|m|h)", text) or latency_seconds(text) > LONGEST:
        raise ValueError(f"a time to answer is a number and ms, s, m or h, like 800ms or 3s: {text!r}")
    return text


def latency_seconds(text: str) -> float:
    return int(text[:-2]) / 1000 if text.endswith("ms") else float(seconds(text))


Latency = Annotated[Text, AfterValidator(_latency)]


class Objectives(Part):
    """What a route promises over the last `window`. A limit that is not given is not judged."""

    p95: Latency | None = Field(
        None, description="95 of 100 answers are complete within this time", examples=["800ms", "3s"]
    )
    error_rate: float | None = Field(
        None, ge=0, lt=1, description="Largest share of requests that end in an error of ours (status 5xx)"
    )
    availability: float | None = Field(
        None, gt=0, le=1, description="Least share of the time in which something can answer the route"
    )
    concurrent: int | None = Field(None, ge=1, le=100_000, description="Most requests under way at once")
    window: Span = Field("5m", description="30s to 1d; at least four times Prometheus' scrape interval")
    requests: int = Field(
        20, ge=1, le=1_000_000, description="With fewer in the window, p95 and error_rate are not judged"
    )

    @model_validator(mode="before")
    @classmethod
    def _says_something(cls, given: Any) -> Any:
        # `objectives: {window: 5m}` would pass for a promise, and nothing would ever be judged.
        if isinstance(given, dict) and all(given.get(name) is None for name in LIMITS):
            raise ValueError(f"give at least one of {', '.join(LIMITS)}")
        return given

    @model_validator(mode="after")
    def _window_fits(self) -> Objectives:
        if not SHORTEST <= self.window_seconds <= LONGEST:
            raise ValueError(f"window is {SHORTEST}s to 1d: {self.window!r}")
        return self

    @property
    def window_seconds(self) -> int:
        return seconds(self.window)

    @property
    def limits(self) -> dict[str, float]:
        """Those that were given, by their names; p95 in seconds."""
        given = {"error_rate": self.error_rate, "availability": self.availability, "concurrent": self.concurrent}
        found = {name: float(value) for name, value in given.items() if value is not None}
        return {"p95": latency_seconds(self.p95), **found} if self.p95 else found
