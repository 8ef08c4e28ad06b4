"""What an endpoint of a model shall be, decided before anything is made: what its worker loads, on which cards, for how
much. `plan_endpoint` looks and costs nothing; serving/serverless.py does what its plan says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from registry import endpoints
from registry.adapters import Version, find_version, get_version
from registry.endpoints import ADAPTER_PATH, WORKER_IMAGE, Deployed, Loaded
from registry.errors import BudgetError, CloudError, Conflict, DoesNotFit, NotFound, WrongInput
from registry.project import Project
from registry.recipe import Serve
from registry.rentals import installation
from registry.runpod_api import Endpoint, EndpointOrder, GpuOffer, RunPod
from registry.settings import Settings
from registry.store import Store
from serving.endpoint_bills import refuse_spent

# What an update cannot change.
FIXED = ("pools", "volume", "data_centers", "disk_gb")
GIB = 1 << 30
# vLLM takes nine tenths of a card; beside the weights it needs its own buffers and some room for answers.
USABLE, ROOM = 0.9, 2 * GIB
# Of the environment, what an update may take away again.
OPTIONAL = frozenset({"VLLM_EXTRA_ARGS", "MODEL_REVISION", "HF_TOKEN"})


@dataclass(frozen=True)
class Terms:
    """What a person may say of an endpoint; kept with it, so that the next deploy needs to say nothing."""

    adapter_path: str = ADAPTER_PATH
    base_path: str = ""
    volume: str = ""
    pools: tuple[str, ...] = ("ADA_24",)
    data_centers: tuple[str, ...] = ()
    disk_gb: int = 60
    image: str = WORKER_IMAGE
    workers_min: int = 0
    workers_max: int = 1
    idle_seconds: int = 60
    max_usd_per_hour: float = 2.0
    hf_secret: str = ""


@dataclass(frozen=True)
class Plan:
    """What `deploy` will do. `usd_per_hour` is what all workers cost at once, `idle_usd_per_hour` what the endpoint
    costs while nobody asks; `before` is the version that answers until the new one does."""

    order: EndpointOrder
    terms: Terms
    version: Version
    before: Version | None
    paths: dict[str, str]
    usd_per_hour: float
    found: Endpoint | None
    changes: tuple[str, ...]

    @property
    def idle_usd_per_hour(self) -> float:
        return self.usd_per_hour * self.terms.workers_min / max(self.terms.workers_max, 1)

    @property
    def does(self) -> str:
        """'create', 'update' or 'nothing'."""
        if self.found is None:
            return "create"
        return "update" if self.changes else "nothing"


def plan_endpoint(
    project: Project, store: Store, runpod: RunPod, settings: Settings, model: str, given: Mapping[str, Any]
) -> Plan:
    """`given`: the Terms that were said now; others stay as they were. Changes nothing.

    Raises WrongInput for what cannot work, DoesNotFit, BudgetError (the price, or a budget that is used up), Conflict
    for what an update cannot change, NotFound without a champion, CloudError.
    """
    if "@" in model:
        raise WrongInput(
            "an endpoint serves a model's champion", place=model, fix="`ft promote` makes one the champion"
        )
    version = find_version(store, model)
    row = _row(store, model)
    terms = replace(kept_terms(row), **given)
    _refuse_terms(terms, row)
    name = endpoints.endpoint_name(installation(store), model)
    found = of_name(runpod.endpoints(), name)
    offers = _of_pools(runpod.gpus(), terms)
    usd_per_hour = _price(offers, terms)
    _refuse_small(project, offers, version, terms)
    refuse_spent(store, runpod, settings)
    before = _before(store, row, version) if found and row and found.id == row.id else None
    paths = _paths(row, version, before, terms)
    order = _order(name, version, before, paths, terms, found)
    return Plan(order, terms, version, before, paths, usd_per_hour, found, _changes(found, row, order))


def kept_terms(row: Deployed | None) -> Terms:
    """What was said at earlier deploys."""
    said: dict[str, Any] = dict(row.body["terms"]) if row else {}
    known = {each.name for each in fields(Terms)}
    return Terms(**{name: _tuple(value) for name, value in said.items() if name in known})


def of_name(there: Sequence[Endpoint], name: str) -> Endpoint | None:
    """The oldest one: all who look at the same time choose the same."""
    named = [each for each in there if endpoints.is_named(each.name, name)]
    return min(named, key=lambda each: (each.created or 0.0, each.id), default=None)


def _row(store: Store, model: str) -> Deployed | None:
    return next((each for each in endpoints.deployed(store) if each.model == model), None)


def _refuse_terms(terms: Terms, row: Deployed | None) -> None:
    if terms.workers_min > terms.workers_max or terms.workers_max < 1:
        raise WrongInput(f"from {terms.workers_min} to {terms.workers_max} workers", place="--max-workers",
                         fix="at least one worker; `ft endpoints scale ID 0` stops all of them")  # fmt: skip
    changed = [name for name in FIXED if row and getattr(terms, name) != getattr(kept_terms(row), name)]
    if row and changed:
        raise Conflict(f"{', '.join(changed)} of an endpoint cannot be changed", place=row.name,
                       fix=f"`ft endpoints delete {row.id}`, then deploy it again")  # fmt: skip


def _price(offers: Sequence[GpuOffer], terms: Terms) -> float:
    """Of all workers at once, on the dearest card that RunPod may choose."""
    prices = [each.serverless_usd for each in offers if each.serverless_usd is not None]
    if not prices:
        raise CloudError(
            f"RunPod names no price for {', '.join(terms.pools)}", place="--pool", fix="choose another pool"
        )
    dearest = max(prices) * terms.workers_max
    if dearest > terms.max_usd_per_hour:
        raise BudgetError(
            f"{terms.workers_max} worker(s) on {', '.join(terms.pools)} cost up to ${dearest:.2f} an hour, more than "
            f"the allowed ${terms.max_usd_per_hour:.2f}", place="--max-usd-per-hour",
            fix=f"choose a cheaper pool, fewer workers, or --max-usd-per-hour {dearest:.2f}",
        )  # fmt: skip
    return dearest


def _of_pools(offers: Sequence[GpuOffer], terms: Terms) -> list[GpuOffer]:
    known = sorted({each.pool for each in offers if each.pool})
    if unknown := [each for each in terms.pools if each not in known]:
        raise WrongInput(f"no such pool: {', '.join(unknown)}", place="--pool", fix=f"there is: {', '.join(known)}")
    return [each for each in offers if each.pool in terms.pools]


def _refuse_small(project: Project, offers: Sequence[GpuOffer], version: Version, terms: Terms) -> None:
    """By the weights that lie in the cache here; nothing is known of a base model that does not."""
    folder = project.models / version.body["base"]["folder"]
    weights = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    smallest = min(offers, key=lambda each: each.memory_gb)
    if weights and weights + ROOM > smallest.memory_gb * GIB * USABLE:
        raise DoesNotFit(
            f"{version.body['base']['source']} has {weights / GIB:.1f} GiB of weights, too many for {smallest.name} "
            f"({smallest.memory_gb} GB)", place=f"--pool {smallest.pool}", fix="choose a pool of larger cards",
        )  # fmt: skip


def _before(store: Store, row: Deployed, version: Version) -> Version | None:
    if row.version == version.version or str(row.version) not in row.body["paths"]:
        return None
    try:
        found = get_version(store, row.model, row.version)
    except NotFound:
        return None
    return found if found.body["base"]["digest"] == version.body["base"]["digest"] else None


def _paths(row: Deployed | None, version: Version, before: Version | None, terms: Terms) -> dict[str, str]:
    own = terms.image != WORKER_IMAGE
    path = endpoints.adapter_path(
        terms.adapter_path, version.model, version.version, volume=terms.volume, own_image=own
    )
    kept = {str(before.version): row.body["paths"][str(before.version)]} if row and before else {}
    return {**kept, str(version.version): path}


def _order(
    name: str, version: Version, before: Version | None, paths: dict[str, str], terms: Terms, found: Endpoint | None
) -> EndpointOrder:  # fmt: skip
    base = version.body["base"]
    own = terms.image != WORKER_IMAGE
    model = endpoints.model_name(base["source"], terms.base_path, volume=terms.volume, own_image=own)
    loaded = [
        Loaded(each.model, each.version, int(each.body["rank"]), paths[str(each.version)])
        for each in (version, before) if each
    ]  # fmt: skip
    serve = Serve(**version.body.get("recipe", {}).get("serve", {}))
    env = endpoints.worker_env(
        model, base["revision"], serve, loaded, token=os.environ.get("HF_TOKEN", ""), secret=terms.hf_secret
    )
    return EndpointOrder(
        name=name, image=terms.image, pools=terms.pools, env=_steady(env, found), disk_gb=terms.disk_gb,
        workers_min=terms.workers_min, workers_max=terms.workers_max, idle_seconds=terms.idle_seconds,
        data_centers=terms.data_centers, network_volumes=(terms.volume,) if terms.volume else (),
    )  # fmt: skip


def _steady(env: dict[str, str], found: Endpoint | None) -> dict[str, str]:
    """What was larger than need be stays so, and a version that is no longer asked for stays loaded: a change restarts
    every worker."""
    if found is None or found.env.get("LORA_MODULES") != env["LORA_MODULES"]:
        return env
    kept: dict[str, str] = {name: found.env[name] for name in ("VLLM_EXTRA_ARGS", "MAX_LORA_RANK") if name in found.env}
    return {**env, **kept}


def _changes(found: Endpoint | None, row: Deployed | None, order: EndpointOrder) -> tuple[str, ...]:
    """Names of what differs, never a value: one of them is a token."""
    if found is None:
        return ()
    env = sorted(
        name for name in order.env.keys() | (found.env.keys() & OPTIONAL) if order.env.get(name) != found.env.get(name)
    )
    workers = (found.workers_min, found.workers_max) != (order.workers_min, order.workers_max)
    terms = kept_terms(row)
    return (
        *(["image"] if found.image != order.image else []),
        *env,
        *(["workers"] if workers else []),
        *(["idle timeout"] if terms.idle_seconds != order.idle_seconds else []),
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
