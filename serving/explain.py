"""Why a request would go where it goes: the rule, what it rests on, and who would be asked in turn. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.serve_recipe import RouteTerms, Target
from serving.policy import Policy
from serving.rules import Question


@dataclass(frozen=True)
class Explained:
    """`rule` counts from 1, 0 where none decided; `passed_over`: what was not so of each rule before it; `asks`: who
    is asked in turn. Without `terms` nothing answers by that name."""

    model: str
    route: str
    rule: int
    why: str
    passed_over: tuple[str, ...]
    tokens: int
    terms: RouteTerms | None
    asks: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        terms = self.terms
        return {
            "model": self.model, "route": self.route, "rule": self.rule, "why": self.why,
            "passed_over": list(self.passed_over), "tokens": self.tokens, "answers": bool(self.asks),
            "asks": list(self.asks), "local_only": bool(terms and terms.local_only),
            "limits": terms.limits.model_dump() if terms else {},
        }  # fmt: skip


def explain(
    policy: Policy, question: Question, *, provider: str = "local", champions: Mapping[str, str] | None = None
) -> Explained:
    """`provider`: FT_PROVIDER, for routes that do not say. `champions`: what answers each model's name now, where
    that is known; a model that is not among them does not answer."""
    name, _, version = question.name.partition("@")
    asked = Question(name, question.request, question.headers, question.key)
    route, rule, why = policy.led(asked)
    if not rule and policy.rules.concern(name):
        why = "no rule fits, so by its name"
    terms = policy.terms(route)
    asks = asked_in_turn(terms, provider, champions, version) if terms else ()
    over = tuple(f"rule {number} -> {to}: {_missed(miss, asked)}" for number, to, miss in _misses(policy, asked))
    return Explained(question.name, route, rule, why, over, asked.tokens, terms, asks)


def asked_in_turn(
    terms: RouteTerms, provider: str, champions: Mapping[str, str] | None = None, version: str = ""
) -> tuple[str, ...]:
    """The route's own place, then its fallbacks; of a version that was asked for by its number nobody else."""
    if version:
        return (f"{terms.model}@{version}",) if terms.model else ()
    wants_openai = (terms.provider or provider) == "openai" or not (terms.model or terms.engine)
    first = f"OpenAI's {terms.openai}" if terms.openai and wants_openai else _place(terms, champions)
    return tuple(filter(None, (first, *(_place(each, champions) for each in terms.fallbacks))))


def _place(to: RouteTerms | Target, champions: Mapping[str, str] | None) -> str:
    if isinstance(to, Target) and to.openai:
        return f"OpenAI's {to.openai}"
    on = f" on engine {to.engine}" if to.engine else ""
    if to.model is None:
        return f"{to.as_}{on}" if to.as_ else f"the model of engine {to.engine}"
    if champions is None:
        return f"{to.model}'s champion{on}"
    return f"{champions[to.model]}{on}" if to.model in champions else ""


def _misses(policy: Policy, question: Question) -> list[tuple[int, str, str]]:
    return policy.rules.misses(question) if policy.rules.concern(question.name) else []


def _missed(part: str, question: Question) -> str:
    """What is so, in place of what the rule asks for."""
    found = {
        "model": f"the model is {question.name}", "key": f"the key is {question.key or 'none'}",
        "user": f"the user is {question.user or 'none'}", "header": "a header is missing or another",
        "min_tokens": f"the prompt has only about {question.tokens} tokens",
        "max_tokens": f"the prompt has about {question.tokens} tokens",
        "keywords": "none of its words is in the last message",
    }  # fmt: skip
    return found[part]
