"""`rollout:` of a recipe, `--canary` of a promotion: by which steps a version reaches all callers, what stops it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from registry.durations import Span, seconds
from registry.errors import WrongInput
from registry.recipe_part import Part

STEP = re.compile(r"([0-9]+(?:\.[0-9]+)?)%:([0-9]{1,9}[smhd])")


class Step(Part):
    """So many percent of the callers, for so long."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    percent: float = Field(gt=0, le=100)
    for_: Span = Field(alias="for", description="At least so long, while the server answers with both versions")


class Rollout(Part):
    """A canary: the new version answers a growing part of the callers before `champion` moves.

    Each step looks at its own requests alone. It is over when its time is, and `min_requests` have come to the new
    version; a rollback needs the requests alone.
    """

    steps: list[Step] = Field(min_length=1, max_length=20, examples=[[{"percent": 5, "for": "10m"}]])
    by: Literal["user", "conversation", "request"] = Field(
        "user", description="Who stays with one version: the request's `user`, its first message, or nobody"
    )
    min_requests: int = Field(20, ge=1, description="Answers of the new version in a step, before it is judged")
    max_error_rate: float = Field(0.05, ge=0, le=1, description="Part of the new version's requests that may fail")
    max_error_rise: float = Field(0.02, ge=0, le=1, description="Failed part that may be above the champion's")
    max_latency_ratio: float = Field(1.5, ge=1, description="95th percentile of an answer's time, in the champion's")
    max_rating_drop: float = Field(0.5, ge=0, description="Mean rating below the champion's, in the ratings' own unit")
    min_ratings: int = Field(10, ge=1, description="Ratings of each version, before they are compared")

    @model_validator(mode="after")
    def _grows(self) -> Rollout:
        percents = [each.percent for each in self.steps]
        if percents != sorted(set(percents)):
            raise ValueError("each step has more percent than the one before it")
        return self

    def seconds_of(self, step: int) -> int:
        return seconds(self.steps[step].for_)


def parse_canary(text: str) -> Rollout:
    """The steps of `5%:10m,50%:30m`, with the usual limits. Raises WrongInput."""
    found = [STEP.fullmatch(part.strip()) for part in text.split(",")]
    steps = [{"percent": float(each[1]), "for": each[2]} for each in found if each]
    if len(steps) != len(found):
        raise WrongInput(f"no steps of a canary: {text!r}", place="--canary", fix='write --canary "5%:10m,50%:30m"')
    try:
        return Rollout.model_validate({"steps": steps})
    except ValidationError as error:
        wrong = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise WrongInput(wrong, place=f"--canary {text}", fix='write --canary "5%:10m,50%:30m"') from None
