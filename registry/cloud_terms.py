"""What people write of cards, clouds and money: parts of recipes (`cloud`, `budget`, `escalate`) and of ft.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from registry.durations import Span
from registry.recipe_part import Part, Text

WHEN = re.compile(r"score\s*<\s*(?P<factor>\d+(?:\.\d+)?)(?:\s*\*\s*(?P<reference>reference))?")


def _condition(text: str) -> str:
    if not WHEN.fullmatch(text.strip()):
        raise ValueError(f"a condition is `score < 0.7` or `score < 0.7 * reference`: {text!r}")
    return text.strip()


class CloudTerms(Part):
    """`cloud`: where and how a run may rent. Without this section nothing is ever rented."""

    provider: Literal["runpod"] = "runpod"
    gpus: list[Text] = Field(
        [], description="RunPod's names of the cards that may be rented; any that the plan says fits otherwise",
        examples=[["NVIDIA A40", "NVIDIA GeForce RTX 4090"]],
    )  # fmt: skip
    cloud: Literal["secure", "community", "any"] = "secure"
    data_centers: list[Text] = Field([], description="RunPod's data centers, `EU-RO-1`; any otherwise")
    network_volume: Text | None = Field(None, description="Id of a network volume, which keeps base models")
    max_usd_per_hour: float = Field(1.0, gt=0, description="A pod that turns out dearer is ended at once")
    disk_gb: int = Field(60, ge=5, le=4000, description="Container disk of the pod")
    min_cuda: Text = Field("13.0", description="Least CUDA version of the host's driver; our image needs 13.0")
    image: Text | None = Field(None, description="The setting `runpod_image` otherwise")


class RunBudget(Part):
    """`budget`: what one run may cost."""

    max_usd: float | None = Field(None, gt=0, description="Reserved before anything is rented; `budgets.run_usd` else")


class ReferenceModel(Part):
    """A model behind an OpenAI-compatible API, asked the same test rows."""

    model: Text
    url: str = Field(description="Base URL with /v1", examples=["https://api.openai.com/v1"])
    key: str | None = Field(None, examples=["${OPENAI_API_KEY}"])
    usd_per_million_input: float | None = Field(
        None, ge=0, description="With usd_per_million_output: what it costs is reserved and counts in budgets"
    )
    usd_per_million_output: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _both_prices_or_none(self) -> ReferenceModel:
        if (self.usd_per_million_input is None) != (self.usd_per_million_output is None):
            raise ValueError("write both usd_per_million_input and usd_per_million_output, or neither")
        return self

    @property
    def has_prices(self) -> bool:
        return self.usd_per_million_input is not None

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        """0 without prices."""
        paid = input_tokens * (self.usd_per_million_input or 0.0) + output_tokens * (self.usd_per_million_output or 0.0)
        return paid / 1e6


# The tags' brackets keep them out of error messages (registry/recipe.py).
Reference = Annotated[
    Annotated[float, Tag("[number]"), Field(ge=0, le=1)] | Annotated[ReferenceModel, Tag("[model]")],
    Discriminator(lambda given: "[model]" if isinstance(given, dict | ReferenceModel) else "[number]"),
]


class Escalation(Part):
    """`escalate`: another recipe of the same model that is run when this one's version is not good enough."""

    when: Annotated[str, AfterValidator(_condition)] = "score < 0.7 * reference"
    reference: Reference | None = Field(None, description="A score (0 to 1), or a model that is asked the same rows")
    to: Text = Field(description="The other recipe's file", examples=["recipes/plans-a100.yaml"])
    max_usd: float = Field(gt=0, description="What the other run may cost, whatever its own budget says")
    approve: bool = Field(False, description="Ask a person first (`ft approve`)")
    timeout: Span = Field("7d", description="Nobody's answer in this time counts as no")

    @model_validator(mode="after")
    def _reference_is_given(self) -> Escalation:
        if "reference" in self.when and self.reference is None:
            raise ValueError("`when` compares with reference, and there is none: a score, or a model")
        return self


class Budgets(Part):
    """`budgets` in ft.yaml, US dollars. Day and month are UTC; None: no cap, but a run always needs one."""

    run_usd: float | None = Field(None, gt=0)
    day_usd: float | None = Field(None, gt=0)
    month_usd: float | None = Field(None, gt=0)


class CardSetting(Part):
    """`cards.NAME` in ft.yaml: what ft cannot know, or shall not believe, of a card of this host."""

    profile: Text | None = Field(None, description="Take it for this card: `RTX 4070 SUPER`")
    memory_gb: float | None = Field(None, gt=0, description="Use no more than so much (GiB)")
    keep_free_gb: float = Field(0.0, ge=0, description="For other programs, beside what they hold already (GiB)")
    serve: Literal["evict", "share", "never"] = Field(
        "evict",
        description="When a trainer wants the card: serving gives it up, stays beside it, or is not on it at all",
    )
