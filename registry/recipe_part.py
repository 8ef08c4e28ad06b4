"""What every part of a recipe is: strict, frozen, and without environment variables but where they belong."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _no_variable(text: str) -> str:
    if VARIABLE.search(text):
        raise ValueError("an environment variable belongs only where a secret or an address does")
    return text


Text = Annotated[str, AfterValidator(_no_variable)]


class Part(BaseModel):
    # Infinite numbers would come back from JSON as null.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
