"""The routes as they are published: as JSON, without a key of an engine, and back on a gateway's own board.

Only vLLMs into which adapters are loaded are in it. Serverless endpoints are in the store and other providers in the
serve recipe, where each gateway finds them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from registry.gateways import Ref
from registry.recipe_part import Part
from registry.serve_recipe import ServeRecipe
from registry.store import dump
from serving.engine import Engine
from serving.routes import Away, Route, Routes, Split, Upstream

Terms = dict[str, Any]
# Of a name that is away: it comes when somebody wants it.
COMES = "comes"
NO_KEY = Away("this gateway has no key for its engine: FT_ENGINE_KEY here and where it runs", 30, hold=False)


class PublishedRoute(Part):
    """`engine`: the address of one of `engines`."""

    adapter: str
    engine: str


class PublishedSplit(Part):
    """`terms`: all of a Split that is not a route."""

    stable: PublishedRoute
    new: PublishedRoute
    terms: Terms


class PublishedEngine(Part):
    """`start` tells two starts at one address apart. `name`: in the serve recipe, of somebody else's engine."""

    start: str
    name: str = ""
    local: bool = True


class Published(Part):
    """`engines` by their addresses; `named` are those that the serve recipe names, each with its own model."""

    engines: dict[str, PublishedEngine]
    public: dict[str, PublishedRoute]
    internal: dict[str, PublishedRoute]
    away: dict[str, Terms]
    closed: dict[str, str]
    splits: dict[str, PublishedSplit]
    named: dict[str, PublishedRoute | Terms]
    recipe: dict[str, Any] | None = None


def leads_to(routes: Routes, *, internal: bool = True) -> set[Route]:
    """Every route that a request could take. Pure."""
    split = {each for pair in routes.splits.values() for each in (pair.stable, pair.new)}
    named = {each for each in routes.engines.values() if isinstance(each, Route)}
    return {*routes.public.values(), *split, *named, *(routes.internal.values() if internal else ())}


def ended(routes: Routes, why: Away) -> Routes:
    """Every name of these is away. Pure."""
    away = dict.fromkeys([*routes.public, *routes.away], why)
    return Routes(away=away, closed=routes.closed, engines=dict.fromkeys(routes.engines, why))


def refs(routes: Iterable[Route]) -> frozenset[Ref]:
    return frozenset((each.adapter, each.engine.url) for each in routes)


def write_published(
    routes: Routes, recipe: ServeRecipe | None, retiring: Collection[Route], start_of: Callable[[Upstream], str]
) -> str:
    """As JSON; equal routes are equal text. `retiring`: not to be reached by the internal key either. Pure."""

    def kept(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _written(each) for name, each in found.items() if _is_published(each)}

    internal = {name: each for name, each in routes.internal.items() if each not in retiring}
    engines = {each.engine for each in leads_to(routes) if _is_published(each)}
    body = Published(
        engines={
            each.url: PublishedEngine(start=start_of(each), name=_name_of(each, routes, recipe), local=each.local)
            for each in engines
        },
        public=kept(routes.public),
        internal=kept(internal),
        away=kept(routes.away),
        closed=dict(routes.closed),
        splits=kept(routes.splits),
        named=kept(routes.engines),
        recipe=recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True) if recipe else None,
    )
    return dump(body.model_dump(mode="json", by_alias=True))


def read_routes(
    published: Published, upstreams: Mapping[str, Upstream], want: Callable[[str], None] = lambda _: None
) -> Routes:
    """What a gateway puts up that reaches these engines. What leads to another is away. `want`: what who waits for an
    engine on demand calls with its name. Pure."""
    public, away = published.public, {name: _away(name, each, want) for name, each in published.away.items()}
    unreached = {name for name, each in public.items() if each.engine not in upstreams}

    def route(each: PublishedRoute) -> Route:
        return Route(each.adapter, upstreams[each.engine])

    def reached(found: Mapping[str, PublishedRoute]) -> dict[str, Route]:
        return {name: route(each) for name, each in found.items() if each.engine in upstreams}

    return Routes(
        public=reached(public),
        internal=reached(published.internal),
        away={**away, **dict.fromkeys(unreached, NO_KEY)},
        closed=published.closed,
        splits={
            name: Split(route(each.stable), route(each.new), **each.terms)
            for name, each in published.splits.items()
            if {each.stable.engine, each.new.engine} <= upstreams.keys()
        },
        engines={
            name: Away(**each) if isinstance(each, dict) else (route(each) if each.engine in upstreams else NO_KEY)
            for name, each in published.named.items()
        },
    )


def _away(name: str, terms: Terms, want: Callable[[str], None]) -> Away:
    found = Away(**{field: value for field, value in terms.items() if field != COMES})
    return replace(found, want=partial(want, found.engine or name)) if found.engine or COMES in terms else found


def _is_published(each: Any) -> bool:
    if isinstance(each, Split):
        return _is_published(each.stable) and _is_published(each.new)
    return not isinstance(each, Route) or isinstance(each.engine, Engine)


def _written(each: Route | Away | Split) -> PublishedRoute | PublishedSplit | Terms:
    if isinstance(each, Route):
        return _route(each)
    if isinstance(each, Split):
        return PublishedSplit(stable=_route(each.stable), new=_route(each.new), terms=_plain(each))
    return {**_plain(each), **({COMES: True} if each.want else {})}


def _route(each: Route) -> PublishedRoute:
    return PublishedRoute(adapter=each.adapter, engine=each.engine.url)


def _plain(each: Away | Split) -> Terms:
    """The fields that are words, numbers, yes or no; what is to be called stays with the leader."""
    values = {one.name: getattr(each, one.name) for one in fields(each)}
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool)}


def _name_of(engine: Upstream, routes: Routes, recipe: ServeRecipe | None) -> str:
    """Its name in the recipe if somebody else runs it: each gateway then takes its key from its own surroundings."""
    for name, each in routes.engines.items():
        terms = recipe.engines.get(name) if recipe else None
        if isinstance(each, Route) and each.engine is engine and terms and terms.url:
            return name
    return ""
