"""A serve recipe with the base models of its engines, as they lie in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from registry.base_models import BaseModel, read_base
from registry.cards import Card, as_set, pick_card, refuse_serving
from registry.errors import BaseModelError, WrongInput
from registry.project import Project
from registry.recipe import Base, Serve
from registry.serve_recipe import EngineTerms, ServeRecipe
from registry.settings import Settings
from serving.vllm_process import ONLY, EngineConfig

# The name of the recipe that nobody has written: that of `ft serve up MODEL`.
IMPLIED = "implied"


@dataclass(frozen=True)
class ToServe:
    """`bases` by engine: of every engine that has a `base`."""

    recipe: ServeRecipe
    bases: Mapping[str, BaseModel]

    def own(self) -> dict[str, EngineTerms]:
        """The engines that we start ourselves, the first one first."""
        return {name: each for name, each in self.recipe.engines.items() if each.url is None}

    def lent(self) -> dict[str, EngineTerms]:
        """The vLLMs that somebody else runs, and into which adapters are loaded."""
        engines = self.recipe.engines.items()
        return {name: each for name, each in engines if each.url is not None and each.adapters and name in self.bases}


def only_engine(base: BaseModel, serve: Serve, card: Card) -> ToServe:
    """What `ft serve up MODEL` means: one engine, and every registered model by its own name."""
    terms = EngineTerms(
        base=Base(model=base.source, revision=base.revision), card=card.name, max_context=serve.max_context,
        concurrency=serve.concurrency, memory_gb=serve.memory_gb,
    )  # fmt: skip
    return ToServe(ServeRecipe(kind="serve", name=IMPLIED, engines={ONLY: terms}), {ONLY: base})


def with_bases(project: Project, recipe: ServeRecipe, folders: Mapping[str, str]) -> ToServe:
    """`folders`: by engine, names in the cache of base models. Raises BaseModelError for one that is not there."""
    bases = {}
    for engine, folder in folders.items():
        found = read_base(project.models / folder)
        if found is None:
            raise BaseModelError("no such base model in the cache", place=folder, fix="`ft run` fetches it")
        bases[engine] = found
    return ToServe(recipe, bases)


def refuse_cards(settings: Settings, what: ToServe) -> None:
    """Raises WrongInput where an engine's card is not on this host, or not for serving."""
    for each in what.own().values():
        refuse_serving(pick_card(each.card), settings.cards)


def config_of(settings: Settings, name: str, terms: EngineTerms, base: BaseModel) -> EngineConfig:
    """What vLLM is started for, as long as no plan says more. Raises WrongInput for a card that is not here."""
    [card] = as_set([pick_card(terms.card)], settings.cards)
    if terms.precision == "bitsandbytes" and card.is_cpu:
        raise WrongInput("4 bits (bitsandbytes) need a GPU", place=f"engines.{name}.precision",
                         fix="leave `precision` out: a CPU holds the base in bf16")  # fmt: skip
    serve = Serve(max_context=terms.max_context, concurrency=terms.concurrency, memory_gb=terms.memory_gb)
    return EngineConfig(
        base, serve, card, name=name, precision=terms.precision, max_loras=terms.max_loras,
        max_cpu_loras=terms.max_cpu_loras, sleeps=terms.sleep and not card.is_cpu,
    )  # fmt: skip
