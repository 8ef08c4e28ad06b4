"""One request on its way through the gateway: what is asked, by whom, and what goes with the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registry.serve_recipe import RouteTerms
from serving.http_messages import Headers


@dataclass
class Ask:
    """`name` is the model that the caller asked for, `route` where the rules led it (a route of the serve recipe, or a
    registered model's own name), `subject` whose request it is for a canary, `headers` those of the answer."""

    path: str
    request: dict[str, Any]
    name: str
    route: str
    terms: RouteTerms
    internal: bool
    subject: str
    headers: Headers
    key: str = ""
