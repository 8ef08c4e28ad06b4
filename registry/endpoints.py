"""Serverless endpoints of ours as the store knows them, and what one must be told so that it answers as `model@N`.

A row is written when RunPod has said yes; what is there without a row bears our name (`endpoint_name`) and is adopted.
Facts of the worker: github.com/runpod-workers/worker-vllm v2.25.2 (vLLM 0.27.1), read in August 2026.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry.admission import RANKS
from registry.errors import NotFound, WrongInput
from registry.recipe import Serve
from registry.store import Connection, Store, dump

WORKER_IMAGE = "runpod/worker-v1-vllm:v2.25.2"
VOLUME = "/runpod-volume/"
ADAPTER_PATH = "/runpod-volume/adapters/{model}/{version}"
# The name under which every engine of ours serves its bare base model (serving/engine.py).
BASE = "base"
# The version that answers, and the one before it while workers are being replaced.
MAX_LORAS = 2
HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SECRET_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Deployed:
    """One endpoint. `version` is what it is asked for; `body` has paths (version -> where its adapter lies there),
    wanted (the version being brought in), pools, workers_min, workers_max, usd_per_hour (one worker) and volume."""

    id: str
    name: str
    model: str
    version: int
    created: float
    ended: float | None
    billed_usd: float
    body: dict[str, Any]

    @property
    def answers(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def is_on(self) -> bool:
        """May it have a worker?"""
        return self.ended is None and int(self.body.get("workers_max", 1)) > 0

    @property
    def awake_usd_per_hour(self) -> float:
        """What its workers cost that never sleep, on the dearest card that they may get."""
        return float(self.body.get("usd_per_worker", 0.0)) * int(self.body.get("workers_min", 0)) if self.is_on else 0.0


@dataclass(frozen=True)
class Loaded:
    """An adapter version and where a worker finds it: a path, or a hub id."""

    model: str
    version: int
    rank: int
    path: str

    @property
    def module(self) -> str:
        return json.dumps({"name": f"{self.model}@{self.version}", "path": self.path}, separators=(",", ":"))


def endpoint_name(installation: str, model: str) -> str:
    return f"ft-{installation}-ep-{model}"


def is_named(found: str, name: str) -> bool:
    """RunPod itself writes ` -fb` behind the name of an endpoint with FlashBoot."""
    return found.removesuffix(" -fb") == name


def adapter_path(template: str, model: str, version: int, *, volume: str, own_image: bool) -> str:
    """Where a worker finds the version: `{model}` and `{version}` are filled in. Raises WrongInput for what vLLM in
    a worker cannot load, or would load wrongly."""
    path = template.replace("{model}", model).replace("{version}", str(version))
    place = f"--adapter-path {template}"
    if "://" in path:
        raise WrongInput(
            "a worker cannot load an adapter from an address: vLLM takes a folder or a hub id",
            place=place,
            fix=f"copy the adapter to a network volume ({ADAPTER_PATH}) or to a hub repository",
        )
    if not path.startswith("/") and not HUB.fullmatch(path):
        raise WrongInput("is neither an absolute path in the worker nor a hub id (ORG/NAME)", place=place,
                         fix=f"write {ADAPTER_PATH} or ORG/{{model}}-{{version}}")  # fmt: skip
    if not re.search(rf"(^|[^0-9]){version}([^0-9]|$)", path.rstrip("/").rpartition("/")[2]):
        # vLLM asks the hub for the default branch, and caches prompts by (name, path): new bytes go unnoticed.
        raise WrongInput(f"the last part does not name the version ({version}), so two versions would share one place",
                         place=place, fix="write {version} into it")  # fmt: skip
    _refuse_unmounted(path, place, volume, own_image)
    return path


def model_name(source: str, base_path: str, *, volume: str, own_image: bool) -> str:
    """What a worker calls the base model. Raises WrongInput for one that it cannot get."""
    if base_path:
        if not base_path.startswith("/") and not HUB.fullmatch(base_path):
            raise WrongInput("is neither an absolute path in the worker nor a hub id", place=f"--base-path {base_path}")
        _refuse_unmounted(base_path, f"--base-path {base_path}", volume, own_image)
        return base_path
    if HUB.fullmatch(source):
        return source
    raise WrongInput(
        f"the base model {source} is not on a hub, so a worker cannot fetch it", place="base.model",
        fix="copy its folder to a network volume and give --volume ID --base-path /runpod-volume/...",
    )  # fmt: skip


def worker_env(
    model: str, revision: str, serve: Serve, loaded: list[Loaded], *, token: str = "", secret: str = ""
) -> dict[str, str]:
    """Pure. The environment of worker-vllm; the first of `loaded` answers, a second is still there for old requests.

    `secret` is the name of a RunPod secret that holds the hub's token; otherwise `token` itself is given, if any.
    """
    env = {
        "MODEL_NAME": model,
        "OPENAI_SERVED_MODEL_NAME_OVERRIDE": BASE,
        "ENABLE_LORA": "true",
        "MAX_LORAS": str(MAX_LORAS),
        "MAX_CPU_LORAS": str(2 * MAX_LORAS),
        "MAX_LORA_RANK": str(min(each for each in RANKS if each >= max(8, *(each.rank for each in loaded)))),
        # One JSON object: vLLM's parser (0.27 to 0.32) ends at the list that the worker's documentation shows.
        "LORA_MODULES": loaded[0].module,
        "MAX_MODEL_LEN": str(serve.max_context),
        "MAX_NUM_SEQS": str(serve.concurrency),
        "MAX_CONCURRENCY": str(serve.concurrency),
        "DTYPE": "bfloat16",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if HUB.fullmatch(model) and revision:
        env["MODEL_REVISION"] = revision
    if len(loaded) > 1:
        # One variable gives one argument, so several objects need the worker's passthrough, which wins.
        env["VLLM_EXTRA_ARGS"] = "--lora-modules " + " ".join(shlex.quote(each.module) for each in loaded)
    if secret or token:
        env["HF_TOKEN"] = f"{{{{ RUNPOD_SECRET_{_secret(secret)} }}}}" if secret else token
    return env


def deployed(store: Store, *, ended: bool = False) -> list[Deployed]:
    """Endpoints that are on, the oldest first; with those that have ended if asked for."""
    rows = store.read("SELECT * FROM endpoints WHERE ? = 1 OR ended IS NULL ORDER BY created, id", (int(ended),))
    return [_deployed(row) for row in rows]


def find_deployed(store: Store, reference: str) -> Deployed:
    """By id, name or model. Raises NotFound."""
    found = next((each for each in deployed(store) if reference in (each.id, each.name, each.model)), None)
    if found is None:
        raise NotFound(
            f"no endpoint '{reference}'", fix="`ft endpoints` lists them; `ft endpoints deploy MODEL` makes one"
        )
    return found


def note_deployed(store: Store, endpoint: Deployed) -> None:
    """Write it down, or what has changed of it. A row of its name that RunPod no longer has is taken for ended."""
    with store.writing() as connection:
        for row in connection.execute(
            "SELECT id, name FROM endpoints WHERE name = ? AND id <> ?", (endpoint.name, endpoint.id)
        ):
            _end(connection, row["id"])
        connection.execute(
            "INSERT INTO endpoints (id, name, model, version, created, body) VALUES (?,?,?,?,?,?) ON CONFLICT (id) "
            "DO UPDATE SET version = excluded.version, body = excluded.body, ended = NULL, name = excluded.name",
            (endpoint.id, endpoint.name, endpoint.model, endpoint.version, endpoint.created, dump(endpoint.body)),
        )


def note_ended(store: Store, id: str) -> None:
    with store.writing() as connection:
        _end(connection, id)


def note_billed(store: Store, bills: Mapping[str, float]) -> None:
    """US dollars by endpoint id, all that was billed since it was made. Bills come late, so they only grow."""
    with store.writing() as connection:
        for id, usd in bills.items():
            connection.execute("UPDATE endpoints SET billed_usd = ? WHERE id = ? AND billed_usd < ?", (usd, id, usd))


def _end(connection: Connection, id: str) -> None:
    # The name is unique, and the next endpoint of the model gets it.
    connection.execute(
        "UPDATE endpoints SET ended = ?, name = name || '~' || id WHERE id = ? AND ended IS NULL", (time.time(), id)
    )


def _deployed(row: dict[str, Any]) -> Deployed:
    return Deployed(**{**row, "body": json.loads(row["body"])})


def _refuse_unmounted(path: str, place: str, volume: str, own_image: bool) -> None:
    if path.startswith(VOLUME) and not volume:
        raise WrongInput("lies on a network volume, and none is given", place=place,
                         fix="give --volume ID (RunPod's console, Storage), or a hub id instead of a path")  # fmt: skip
    if path.startswith("/") and not path.startswith(VOLUME) and not own_image:
        raise WrongInput(
            "is a path that the worker's image does not have",
            place=place,
            fix=f"put it on a network volume under {VOLUME}, or into an image of your own (--image)",
        )


def _secret(name: str) -> str:
    if not SECRET_NAME.fullmatch(name):
        raise WrongInput(f"no name of a RunPod secret: {name!r}", place="--hf-secret", fix="write its name: hf_token")
    return name
