"""What the gateway's request log keeps: `log:` of a serve recipe. Written by serving/request_log.py."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from registry.recipe_part import Part, Text


def _pattern(text: str) -> str:
    try:
        found = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {text[:80]!r}: {error}") from None
    # `x*` would put a mark between any two characters.
    if found.match("") or found.search(" "):
        raise ValueError(f"it would redact nothing in particular: {text[:80]!r} fits an empty text or a space")
    return text


Pattern = Annotated[Text, Field(min_length=1, max_length=500), AfterValidator(_pattern)]


class RequestLog(Part):
    """One JSON line for each request, off by default. Headers and answers are never in it."""

    on: bool = Field(False, description="Write it")
    max_mb: int = Field(64, ge=1, le=10_240, description="The file is set aside when it has grown so large")
    keep: int = Field(4, ge=0, le=100, description="So many files that were set aside are kept, the newest ones")
    prompt_characters: int = Field(
        200, ge=0, le=4_000, description="So much of the last message, after redaction; 0 for nothing"
    )
    redact: list[Pattern] = Field(
        default_factory=list, max_length=32,
        description="Regular expressions of what else is not written, beside keys, addresses and people's numbers",
        examples=[["EMP-[0-9]{6}"]],
    )  # fmt: skip
