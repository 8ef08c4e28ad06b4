"""What the serve recipe says, made ready for the gateway: routes, rules, limits. Replaced whole, by one assignment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from registry.serve_recipe import Limits, RouteTerms, ServeRecipe
from serving.routes import Routes
from serving.rules import Question, Rules

MOST_NAMES = 1024


@dataclass(frozen=True)
class Policy:
    """`models`: registered models also answer by their own names, with `limits`."""

    routes: Mapping[str, RouteTerms] = field(default_factory=dict)
    rules: Rules = field(default_factory=lambda: Rules([]))
    models: bool = True
    limits: Limits = field(default_factory=Limits)
    keys_required: bool = False
    # Terms of registered models by their names, as they were asked for.
    _named: dict[str, RouteTerms] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, recipe: ServeRecipe | None, *, beyond_loopback: bool = False) -> Policy:
        """Without a recipe every registered model answers. Beyond loopback nobody asks without a key."""
        if recipe is None:
            return cls(keys_required=beyond_loopback)
        required = beyond_loopback or recipe.keys == "required"
        return cls(dict(recipe.routes), Rules(recipe.rules), recipe.models, recipe.limits, required)

    def terms(self, route: str) -> RouteTerms | None:
        """Of a route, or of a registered model by its own name (also `model@N`)."""
        found = self.routes.get(route)
        if found is None and self.models:
            return self._named.get(route) or self._name(route)
        return found

    def _name(self, model: str) -> RouteTerms:
        if len(self._named) >= MOST_NAMES:  # a caller can make up any number
            self._named.clear()
        return self._named.setdefault(model, RouteTerms.model_construct(model=model, limits=self.limits))

    @property
    def body_limit(self) -> int:
        """Of any route: which one it is, only the body tells. Bytes."""
        return int(max([self.limits.body_mb, *(each.limits.body_mb for each in self.routes.values())]) * (1 << 20))

    def led(self, question: Question) -> tuple[str, int, str]:
        """(route, number of the rule or 0, why)."""
        if self.rules.concern(question.name) and (chosen := self.rules.choose(question)):
            return chosen.route, chosen.rule, chosen.why
        return question.name, 0, "by its name"

    def may_lead(self, names: Collection[str] | None, model: str) -> bool:
        """Can one of these names (all where None) lead to the registered model?"""
        if names is None or model in names or any(self.rules.concern(name) for name in names):
            return True
        return any(name in self.routes and self.routes[name].model == model for name in names)

    def public(self, routes: Routes) -> dict[str, str]:
        """Public names and what answers there now ('' while that is away)."""
        named = dict.fromkeys([*self.rules.names, *self.routes], "")
        models = {name: route.adapter for name, route in routes.public.items()} if self.models else {}
        for name, terms in self.routes.items():
            found = routes.public.get(terms.model or "") or (routes.engines.get(terms.engine) if terms.engine else None)
            named[name] = getattr(found, "adapter", "") or (f"openai/{terms.openai}" if terms.openai else "")
        return {**models, **named}
