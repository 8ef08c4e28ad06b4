"""One request on its way through the gateway: what is asked, by whom, and what goes with the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from registry.serve_recipe import RouteTerms
from serving.http_messages import Headers
from serving.rules import first_message


@dataclass
class Ask:
    """`name` is the model that the caller asked for, `route` where the rules led it (a route of the serve recipe, or a
    registered model's own name), `user` whose request it is and `conversation` of which it is a part, as far as the
    caller says so, `headers` those of the answer, the request's id first."""

    path: str
    request: dict[str, Any]
    name: str
    route: str
    terms: RouteTerms
    internal: bool
    headers: Headers
    key: str = ""
    user: str = ""
    conversation: str = ""
    may: Callable[[str], bool] = lambda _: True  # ask for that name: the caller's key has a say

    def subject(self, by: str) -> str:
        """For which a canary's version stays the same, `by` user, conversation or request."""
        if by == "conversation":
            told = self.conversation or self._first_message() or self.user or self.key
        else:
            told = "" if by == "request" else self.user or self.conversation or self.key
        return told or self.headers[0][1].decode()

    def _first_message(self) -> str:
        """It comes again with each request of a conversation. Others may begin with the same words."""
        first = first_message(self.request)
        return f"{self.key}:{self.user}:{first}" if first else ""
