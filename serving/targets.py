"""Where a request can go, and in which order."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from registry.serve_recipe import RouteTerms
from serving.providers import Provider


class Target(NamedTuple):
    """Where a request can go, as in the recipe: a model's champion, an engine's own model, or OpenAI's."""

    model: str | None
    engine: str | None
    as_: str | None
    openai: str | None

    @property
    def name(self) -> str:
        """For what is counted."""
        return "openai" if self.openai else self.model or self.engine or ""


def targets_of(terms: RouteTerms, default: Provider) -> list[Target]:
    """Pure. `provider:` wins over FT_PROVIDER (`default`), and a route without `openai:` stays local."""
    wants = (terms.provider or default) == "openai" or not (terms.model or terms.engine)
    own = Target(None, None, None, terms.openai) if terms.openai and wants else None
    first = own or Target(terms.model, terms.engine, terms.as_, None)
    return [first, *(Target(each.model, each.engine, each.as_, each.openai) for each in terms.fallbacks)]


@lru_cache(maxsize=4096)
def label_of(target: Target, adapter: str) -> bytes:
    """Who answers, for a header: what is no visible ASCII could be taken for the header's end."""
    text = _named(target, adapter)
    return "".join(each if " " < each <= "~" else "?" for each in text).encode()


def _named(target: Target, adapter: str) -> str:
    if target.openai:
        return f"openai/{adapter}"
    return f"engine:{target.engine}/{adapter}" if target.engine and not target.model else adapter
