"""Base models: what a recipe's `base:` means, what is in the cache, and what its licence allows.

Getting one (download, conversion) takes time and torch, and so lives in `jobs/fetch_base.py`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from registry.errors import BaseModelError
from registry.manifest import manifest_digest, read_manifest
from registry.project import Project
from registry.recipe import Base

# Non-commercial bases: name pattern, licence, reason. Read 2026-11 (model cards and licence files on the hub).
NON_COMMERCIAL = [
    (
        r"exaone-3\.5",
        "EXAONE AI Model License 1.1 - NC",
        "it bars commercial use of the model, derivatives and outputs",
    ),
    (r"solar-10\.7b-instruct", "CC-BY-NC-4.0", "CC BY-NC allows no commercial use"),
    (r"qwen2\.5-3b", "Qwen Research License", "of Qwen2.5, the 3B is licensed for research only"),
]
NON_COMMERCIAL_LICENCE = re.compile(r"(^|[-_ ])(nc|non-?commercial|research)([-_ ]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """`base.model` taken apart. `slug` is the folder name in the cache."""

    kind: Literal["hub", "pypi", "local"]
    name: str
    slug: str


@dataclass(frozen=True)
class BaseModel:
    """One immutable base model in the cache. `digest` is the sha256 of its manifest, `folder` its name there."""

    source: str
    revision: str
    licence: str
    digest: str
    folder: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_reference(model: str, root: Path) -> Reference:
    """Raises BaseModelError for text that can be no reference, and for a directory that is not there."""
    if model.startswith("pypi:"):
        name = model.removeprefix("pypi:")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!]+)?", name):
            raise BaseModelError(f"'{model}' names no wheel", place="base.model", fix="write pypi:NAME==VERSION")
        return Reference("pypi", name, "pypi-" + name.replace("==", "-"))
    if model.startswith(("./", "../", "/", "~")):
        folder = (root / Path(model).expanduser()).resolve()
        if not (folder / "config.json").is_file():
            raise BaseModelError("no base model here (no config.json)", place=str(folder), fix="check base.model")
        return Reference("local", str(folder), f"local-{folder.name}")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        return Reference("hub", model, "hub-" + model.replace("/", "--"))
    raise BaseModelError(
        f"'{model}' is no base model",
        place="base.model",
        fix="write a hub id (ORG/NAME), pypi:NAME==VERSION, or a directory that begins with ./ or /",
    )


def refuse_use(use: str, model: str, licence: str) -> None:
    """Raises BaseModelError where `use: commercial` meets a licence that forbids it."""
    if use != "commercial":
        return
    for pattern, name, reason in NON_COMMERCIAL:
        if re.search(pattern, model, re.IGNORECASE):
            raise BaseModelError(f"{model} is under {name}: {reason}", place="use: commercial", fix=_other_base())
    if NON_COMMERCIAL_LICENCE.search(licence):
        raise BaseModelError(f"{model} is under {licence}, which is non-commercial", place="use: commercial",
                             fix=_other_base())  # fmt: skip


def find_base(project: Project, base: Base, reference: Reference) -> BaseModel | None:
    """The cached model of that reference and revision; None if it must be fetched first."""
    for folder in sorted((project.models).glob(f"{reference.slug}@*"), key=_age, reverse=True):
        found = read_base(folder)
        if found and found.source == reference.name and base.revision in (None, found.revision):
            return found
    return None


def read_base(folder: Path) -> BaseModel | None:
    """The complete base model in a folder of the cache; None if it is not (or only half) there."""
    manifest = read_manifest(folder)
    if manifest is None or not {"source", "revision", "licence"} <= manifest.keys():
        return None
    facts = {name: str(manifest[name]) for name in ("source", "revision", "licence")}
    return BaseModel(**facts, digest=manifest_digest(folder), folder=folder.name)


def base_path(project: Project, base: BaseModel) -> Path:
    """Where the model's files lie. Raises BaseModelError if they are gone or no longer the same."""
    folder = project.models / base.folder
    found = read_base(folder)
    if found is None or found.digest != base.digest:
        raise BaseModelError(
            f"the base model {base.source} at {base.revision} is not in the cache (or was changed)",
            place=str(folder),
            fix="remove that folder; the next `ft run` of a recipe on it fetches it again",
        )
    return folder


def context_length(folder: Path) -> int:
    """Tokens that the model was made for (config.json)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings") or 2048)


def refuse_remote_code(config: dict[str, Any], place: str) -> None:
    """Raises BaseModelError for a model that brings code of its own: config `auto_map` runs it when loaded."""
    if "auto_map" in config:
        raise BaseModelError(
            "this model brings Python code of its own (auto_map in config.json), which is not run here",
            place=place,
            fix="use a model of an architecture that transformers and vLLM know, or a converted copy of it",
        )


def _age(folder: Path) -> float:
    return folder.stat().st_mtime


def _other_base() -> str:
    return "take another base, or write `use: research` if it is"
