"""Where things lie: the project's root, its `.ft`, and the cache that all projects of a person share.

Standard library only, because every command, the fastest too, starts here.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from registry.errors import NotFound, WrongInput

FROM_DOTENV = "FT_FROM_DOTENV"
ON = re.compile(r"""^["']?on["']?\s*:""", re.MULTILINE)


@dataclass(frozen=True)
class Project:
    """One folder with recipes/, datasets/ and dvc.yaml; its state is in `home` (normally `.ft`)."""

    root: Path
    home: Path
    cache: Path

    @property
    def database(self) -> Path:
        return self.home / "ft.db"

    @property
    def database_url(self) -> str:
        """Of a Postgres instead, which several hosts may share; '' for SQLite. Never printed: it has a password."""
        return os.environ.get("FT_DATABASE_URL", "")

    @property
    def runs_database(self) -> Path:
        return self.home / "dbos.db"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    @property
    def models(self) -> Path:
        return self.cache / "models"

    @property
    def envs(self) -> Path:
        return self.cache / "envs"

    @property
    def cards(self) -> Path:
        return self.cache / "cards"

    def job_folder(self, run_id: str) -> Path:
        return self.home / "jobs" / run_id

    def adapter_folder(self, model: str, version: int) -> Path:
        return self.home / "adapters" / model / str(version)


def find_project(start: Path | None = None) -> Project:
    """The project that `start` (default: here) lies in. Raises NotFound outside of any."""
    try:
        load_dotenv((start or Path.cwd()).resolve())
        here = (start or Path(os.environ.get("FT_PROJECT") or Path.cwd())).resolve()
    except FileNotFoundError:
        raise NotFound("the folder that you are in is gone", fix="`cd` to one that is there") from None
    for folder in [here, *here.parents]:
        if (folder / "recipes").is_dir() and ((folder / ".dvc").is_dir() or (folder / "dvc.yaml").is_file()):
            return Project(root=folder, home=_home(folder), cache=cache_folder())
    raise NotFound(
        "this is not an ft project: no folder with recipes/ and dvc.yaml here or above",
        place=str(here),
        fix="make one with `ft init DIR`, then `cd DIR`",
    )


def recipe_files(project: Project) -> list[Path]:
    """The project's recipes: files only (a FIFO keeps its reader), without the hidden links that editors make."""
    found = sorted((project.root / "recipes").glob("*.y*ml"))
    return [path for path in found if not path.name.startswith(".") and _is_file(path)]


def has_triggers(text: str) -> bool:
    """Does a recipe's text have a line that begins with `on:`? Quick, and true of a broken one too."""
    return bool(ON.search(text))


def text_of(path: Path) -> str:
    """What is there, for a look at a file that may be anything; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def user_name() -> str:
    """Who works here, for what is written down of a run or a promotion."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def cache_folder() -> Path:
    """Base models, environments and card locks, shared by all projects (`$FT_CACHE`)."""
    return _expanded("FT_CACHE", os.environ.get("FT_CACHE") or "~/.cache/ft").resolve()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a link to itself
        return False


def _home(root: Path) -> Path:
    named = os.environ.get("FT_HOME")
    return (root / _expanded("FT_HOME", named)).resolve() if named else root / ".ft"


def _expanded(variable: str, path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody, or a person without a home folder
        raise WrongInput("there is no such home folder", place=f"{variable}={path}", fix="give a whole path") from None


def load_dotenv(start: Path) -> None:
    """Put the nearest `.env` above `start` into the environment; what is set already wins.

    FROM_DOTENV names what came from there: programs that we start inherit both, and `serving/env_file.py` reads the
    file again when it changes, which must not lose against what an older one of it has said.
    """
    if file := dotenv_file(start):
        new = {key: value for key, value in dotenv_pairs(file).items() if key not in os.environ}
        os.environ.update(new)
        os.environ[FROM_DOTENV] = ",".join(sorted({*from_dotenv(), *new}))


def dotenv_file(start: Path) -> Path | None:
    """The nearest `.env` above `start`."""
    return next((each / ".env" for each in [start, *start.parents] if (each / ".env").is_file()), None)


def dotenv_pairs(file: Path) -> dict[str, str]:
    """What it sets. Raises WrongInput if it is no text."""
    # Of a name that is there twice the first line has always counted.
    return dict(reversed(list(_pairs(_text(file)))))


def from_dotenv() -> set[str]:
    """Variables of this process that a `.env` has set, and nobody else."""
    return set(filter(None, os.environ.get(FROM_DOTENV, "").split(",")))


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongInput(f"cannot be read: {error}", place=str(file), fix="save it as UTF-8") from error
    if "\0" in text:
        raise WrongInput("is no text: it has a zero byte", place=str(file), fix="save it as UTF-8")
    return text


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    # python-dotenv costs 40 ms per command; the plain KEY=VALUE form is all that .env.example promises.
    for line in text.splitlines():
        key, sign, value = line.strip().removeprefix("export ").partition("=")
        if sign and key.strip() and not key.startswith("#"):
            yield key.strip(), value.strip().strip("\"'")
