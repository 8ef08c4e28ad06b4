"""Durations as recipes write them: a number and s, m, h or d."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from registry.recipe_part import Text

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(duration: str) -> int:
    return int(duration[:-1]) * UNITS[duration[-1]]


def _duration(text: str) -> str:
    # Nine digits: more would be a time that no clock can show.
    if not re.fullmatch(r"[0-9]{1,9}[smhd]", text):
        raise ValueError(f"a duration is a number and s, m, h or d, like 30m: {text!r}")
    return text


def _some(text: str) -> str:
    if not seconds(text):
        raise ValueError(f"no time at all: {text!r}")
    return text


Duration = Annotated[Text, AfterValidator(_duration)]
Span = Annotated[Duration, AfterValidator(_some)]
