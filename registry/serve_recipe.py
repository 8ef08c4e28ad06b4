"""`kind: serve`: which engines answer, on which cards, and which public names lead where."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from registry.answer_schema import compiled
from registry.durations import Duration, Span
from registry.objectives import Objectives
from registry.recipe import NAME, Base
from registry.recipe_file import read_recipe
from registry.recipe_part import Part, Text
from registry.request_log_terms import RequestLog

Name = Annotated[str, Field(pattern=NAME)]
ANY_NAME = "auto"
A_VARIABLE = re.compile(r"\$\{\w+\}")


class Volume(Part):
    """So many requests within a time."""

    requests: int = Field(ge=1)
    within: Span = "5m"
    keywords: list[Text] = Field([], description="Count only requests with one of these words")


class EngineTerms(Part):
    """One engine: a vLLM of ours (`base`), or someone's OpenAI-compatible address (`url`)."""

    base: Base | None = Field(None, description="The model that a vLLM of ours is started with")
    url: str | None = Field(None, description="An engine that somebody else runs, without /v1",
                            examples=["http://desk.local:8000", "${BIG_URL}"])  # fmt: skip
    key: str | None = Field(None, description="Its key", examples=["${BIG_KEY}"])
    local: bool | None = Field(
        None, description="Does it run on machines of ours? Of a `url`, loopback does, and all others do not"
    )
    as_: Text | None = Field(None, alias="as", description="The model's name there; of a vLLM of ours its base")
    adapters: bool = Field(True, description="With `url`: a vLLM for `base`, into which adapters are loaded")

    card: Text = Field("auto", description="auto, cpu, or a card of this host as `ft cards` names it")
    precision: Literal["auto", "bf16", "bitsandbytes"] = Field(
        "auto", description="How the base is held; auto: in 16 bits where the plan says that fits, else in 4"
    )
    max_context: int = Field(2048, ge=64, description="Tokens of prompt and answer together")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests that the engine batches")
    memory_gb: float = Field(1.0, gt=0, description="KV cache on a CPU; on a GPU the planner's share is used")
    max_loras: int = Field(4, ge=1, le=64, description="Adapters at once in a batch")
    max_cpu_loras: int = Field(16, ge=1, le=1024, description="Adapters in host memory; the least used makes room")
    pin: list[Name] = Field([], description="Models whose champion is never unloaded to make room")

    start: Literal["always", "demand"] = Field("always", description="demand: started when a request wants it")
    idle: Span = Field("15m", description="With `start: demand`: stopped after so long without a request")
    residence: Span = Field("2m", description="At least so long up before another engine may take its card")
    hold: Duration = Field("120s", description="So long a request waits for the engine to come up")
    sleep: bool = Field(False, description="Put to sleep in place of stopped (vLLM's sleep mode; GPU only)")
    volume: Volume | None = Field(None, description="Started by itself when this many requests came, before they wait")

    @model_validator(mode="after")
    def _is_one_kind(self) -> EngineTerms:
        if self.base is None and self.url is None:
            raise ValueError("an engine has a `base` (ours) or a `url` (somebody's)")
        if self.url is None and (self.key or self.as_):
            raise ValueError("`key` and `as` belong to an engine with a `url`")
        if self.key and not A_VARIABLE.fullmatch(self.key):
            # The recipe goes into the database, to other gateways, and onto the server's command line.
            raise ValueError("a key is not written out in a recipe: write `key: ${BIG_KEY}`, and set BIG_KEY in .env")
        if self.url is not None and self.start == "demand":
            raise ValueError("an engine with a `url` is not ours to start")
        if self.volume is not None and self.start != "demand":
            raise ValueError("`volume` starts an engine with `start: demand`; this one is always up")
        if self.url is not None and (useless := [name for name in OF_OURS if getattr(self, name) != _default(name)]):
            raise ValueError(f"{', '.join(useless)}: only of an engine of ours, and this one has a `url`")
        if self.max_cpu_loras < self.max_loras:
            raise ValueError("max_cpu_loras is at least max_loras")
        return self


# What somebody else's engine was started with is not ours to say.
OF_OURS = ("card", "precision", "memory_gb", "idle", "residence", "hold", "sleep")


def _default(name: str) -> object:
    return EngineTerms.model_fields[name].default


class Target(Part):
    """Where a request can go: a registered model's champion, or an engine's own model, or OpenAI's."""

    model: Name | None = Field(None, description="A registered model: its champion answers")
    engine: Text | None = Field(None, description="An engine of `engines`; that of the model's base otherwise")
    openai: Text | None = Field(None, description="A model of OpenAI's (OPENAI_BASE_URL, OPENAI_API_KEY)",
                                examples=["gpt-4o-mini"])  # fmt: skip
    as_: Text | None = Field(None, alias="as", description="The model's name on that engine")

    @model_validator(mode="after")
    def _leads_somewhere(self) -> Target:
        if not (self.model or self.engine or self.openai):
            raise ValueError("say where it leads: `model`, `engine` or `openai`")
        if self.openai and (self.model or self.engine or self.as_):
            raise ValueError("`openai` stands alone")
        if self.model and self.as_:
            raise ValueError("a registered model goes by its own name; `as` belongs to an engine alone")
        return self


class Limits(Part):
    """What a caller may ask for. Beyond it: 400, 413 or 429, before anything is sent to an engine."""

    max_tokens: int | None = Field(
        None, ge=1, description="Largest max_tokens, also set where a request has none; the engine's context otherwise"
    )
    n: int = Field(8, ge=1, le=128, description="Answers to one request")
    body_mb: float = Field(8.0, gt=0, le=64)
    media: bool = Field(False, description="Take images and sound, as data: URLs; addresses are never fetched")
    concurrent: int = Field(64, ge=1, description="Requests under way at once; more wait")
    queue: int = Field(128, ge=0, description="Requests that wait; more are told to come again (429)")
    wait: Duration = Field("20s", description="How long one waits at most")
    timeout: Span = Field("10m", description="For a whole answer")
    first_token: Span = Field("2m", description="Until the answer begins; then the next of `fallbacks` is asked")


class StructuredAnswer(Part):
    """Answers held to a JSON schema: the engine is told, the answer is checked, and asked for once more."""

    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema (draft 2020-12)")
    repair: bool = Field(True, description="Ask once more, with the fault named, when an answer does not fit")

    @model_validator(mode="after")
    def _can_be_compiled(self) -> StructuredAnswer:
        compiled(self.schema_)
        return self


class RouteTerms(Part):
    """A public name."""

    model: Name | None = Field(None, description="A registered model: its champion answers")
    engine: Text | None = Field(None, description="An engine of `engines`; that of the model's base otherwise")
    as_: Text | None = Field(None, alias="as", description="The model's name on that engine")
    openai: Text | None = Field(None, description="OpenAI's model for this route, when the provider is openai")
    provider: Literal["local", "openai"] | None = Field(
        None, description="Which of the two answers; FT_PROVIDER of .env otherwise, which is read again when it changes"
    )
    fallbacks: list[Target] = Field([], description="Asked in turn when what comes before fails, is full or too slow")
    local_only: bool = Field(False, description="Nothing of it leaves our machines, fallbacks included")
    unjudged: bool = Field(False, description="Also a version without a passing verdict may answer here")
    answer: StructuredAnswer | None = Field(None, description="Hold answers to a JSON schema")
    limits: Limits = Limits()
    objectives: Objectives | None = Field(None, description="What the route promises (docs/monitoring.md)")

    @model_validator(mode="after")
    def _stays_local(self) -> RouteTerms:
        if self.local_only and (
            self.openai or self.provider == "openai" or any(each.openai for each in self.fallbacks)
        ):
            raise ValueError("local_only forbids OpenAI, as a provider and as a fallback")
        if self.provider == "openai" and not self.openai:
            raise ValueError("`provider: openai` needs OpenAI's model: `openai: gpt-4o-mini`")
        if not (self.model or self.engine or self.openai):
            raise ValueError("say where it leads: `model`, `engine` or `openai`")
        if self.unjudged and not self.model:
            raise ValueError("`unjudged` is about versions of a registered model: say which with `model`")
        return self


def _words(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Words = Annotated[list[Text], BeforeValidator(_words)]


class When(Part):
    """All that is given must be so."""

    model: Words = Field([ANY_NAME], description="The name that the caller asked for is one of these")
    keywords: Words = Field([], description="One of these is in the last user message; case, width and spaces alike")
    min_tokens: int | None = Field(None, ge=0, description="The prompt has at least so many tokens")
    max_tokens: int | None = Field(None, ge=0, description="The prompt has at most so many tokens")
    header: dict[str, Text] = Field({}, description="Request headers with these values")
    user: Words = Field([], description="The request's `user` is one of these")
    key: Words = Field([], description="The caller's key has one of these names")


class Rule(Part):
    """The first rule that fits decides."""

    when: When = When()
    route: Name


class ServeRecipe(Part):
    """Engines, and what leads to them."""

    kind: Literal["serve"]
    name: str = Field("", pattern=NAME, description="The file's name otherwise")
    description: Text = ""
    engines: dict[Name, EngineTerms] = Field(min_length=1)
    routes: dict[Name, RouteTerms] = Field({}, description="Public names, beside those of all registered models")
    models: bool = Field(True, description="Every registered model also answers by its own name")
    rules: list[Rule] = Field([], description=f"What a request for `{ANY_NAME}` (or `when.model`) leads to")
    keys: Literal["required", "optional"] = Field(
        "optional", description="optional: without any key in the store, loopback may ask without one"
    )
    limits: Limits = Field(Limits(), description="Of registered models that have no route of their own")
    log: RequestLog = Field(RequestLog(), description="Log of requests; off otherwise (docs/monitoring.md)")

    @model_validator(mode="after")
    def _leads_to_what_is_there(self) -> ServeRecipe:
        wrong = list(self._wrong())
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong(self) -> Iterator[str]:
        for name, route in self.routes.items():
            for engine in filter(None, (route.engine, *(each.engine for each in route.fallbacks))):
                if engine not in self.engines:
                    yield f"routes.{name}: no engine '{engine}'; there are: {', '.join(self.engines)}"
                elif route.local_only and not is_local(self.engines[engine]):
                    yield f"routes.{name}: local_only, and engine '{engine}' is not local"
        for number, rule in enumerate(self.rules, start=1):
            if rule.route not in self.routes and not self.models:
                yield f"rules[{number}]: no route '{rule.route}'"
        if ANY_NAME in self.routes:
            yield f"routes.{ANY_NAME}: `{ANY_NAME}` is what rules lead from"


def is_local(engine: EngineTerms) -> bool:
    """Does what is sent to it stay on machines of ours?"""
    if engine.local is not None or engine.url is None:
        return engine.local is not False
    return is_loopback(engine.url)


def is_loopback(url: str) -> bool:
    """Does the address lead to this machine alone? A name that only begins like one of those does not."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def unjudged_in(recipe: ServeRecipe) -> frozenset[str]:
    """Models of which a route takes versions that no gate has passed."""
    return frozenset(route.model for route in recipe.routes.values() if route.unjudged and route.model)


def load_serve_recipe(path: Path) -> ServeRecipe:
    """Raises RecipeError with every error of the file, each with its line."""
    found = read_recipe(path, {"serve": ServeRecipe})
    assert isinstance(found, ServeRecipe)
    return found
