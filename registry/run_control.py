"""Parts of a recipe that say how a run is controlled, not what is trained: approval, retries, timeouts."""

from __future__ import annotations

from pydantic import Field

from registry.durations import Span, seconds
from registry.recipe_part import Part


class ApprovalTerms(Part):
    """`promote: approve`: how long a person may take."""

    timeout: Span = Field("7d", description="Nobody's answer in this time counts as no", examples=["24h"])


class Retries(Part):
    """How often a job is tried again by itself, by what went wrong. Bad data and a full disk never are."""

    out_of_memory: int = Field(
        3, ge=0, le=16, description="With the next smaller train.batch, and train.accumulate so that a step stays equal"
    )
    lost: int = Field(3, ge=0, le=100, description="Trainers in a row that died without getting any further")
    crash: int = Field(1, ge=0, le=100, description="After an error that we do not know, from the last checkpoint")
    diverged: int = Field(0, ge=0, le=16, description="From the beginning, with half of train.learning_rate")


class Timeouts(Part):
    """How long a step may take: 30m, 12h. Without one there is no limit."""

    pin: Span | None = None
    plan: Span | None = Field(None, description="With the download of the base model")
    train: Span | None = Field(
        None,
        description="Of trainers at work, without waiting for the card; then a checkpoint, and `ft resume` goes on",
    )
    evaluate: Span | None = Field(None, description="With waiting for the engine's card")

    def of(self, step: str) -> int | None:
        """Seconds, for a step by its name; None without a limit."""
        limit: str | None = getattr(self, step, None)
        return seconds(limit) if limit else None
