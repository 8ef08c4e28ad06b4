"""`ft init`: a project of one's own, with an example that runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

DOT = "dot."  # begins the names of template files that get a dot: packagers tend to leave dot files out


def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Make a project: recipes/, datasets/, git, DVC with a local remote, and an example that runs.

    Inside a git repository the project becomes a part of it, and the commit is yours to make.

    Example: ft init shop && cd shop && ft run recipes/tickets.yaml
    """
    root = folder.expanduser().absolute()
    with _whole_or_nothing(root):
        own_git = _start_git(root)
        _start_dvc(root, subdir=not own_git)
        _copy_templates(root)
        hash_ = _make_data(root)
        if own_git:
            _commit(root)
    _print(folder, hash_, own_git, as_json)


@contextmanager
def _whole_or_nothing(root: Path) -> Iterator[None]:
    """Refuse a folder with something in it; remove what was made if the block fails."""
    from registry.errors import Trouble, WrongInput

    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise WrongInput("is not an empty folder", place=str(root), fix="name a new one: `ft init DIR`")
    made = next((each for each in [*reversed(root.parents), root] if not each.exists()), None)
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for each in [made] if made else list(root.iterdir()):
            shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Trouble(f"cannot be made: {error.strerror or error}", place=str(root)) from error
        raise


def _start_git(root: Path) -> bool:
    """A repository of its own, unless the folder lies in one that does not ignore it."""
    inside = _run_git(root, "rev-parse", "--is-inside-work-tree").stdout.strip() == "true"
    if inside and _run_git(root, "check-ignore", "--quiet", ".").returncode != 0:
        return False
    _git(root, "-c", "init.defaultBranch=main", "init", "--quiet")
    return True


def _start_dvc(root: Path, *, subdir: bool) -> None:
    from registry.dvc_repo import quiet, translated

    quiet()
    from dvc.repo import Repo

    with translated(root):
        Repo.init(str(root), subdir=subdir).close()


def _copy_templates(root: Path) -> None:
    from registry.recipe_kinds import recipe_schema

    with as_file(files("cli") / "templates" / "project") as source:
        for each in source.rglob("*"):
            if each.is_file() and "__pycache__" not in each.parts:
                target = root / each.relative_to(source).as_posix().replace(DOT, ".")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(each, target)
    schema = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    (root / "docs").mkdir()
    (root / "docs" / "recipe.schema.json").write_text(schema, encoding="utf-8")


def _make_data(root: Path) -> str:
    """Run the stage that makes the demo data, push to the project's own remote; the version's hash."""
    from registry.dataset_versions import pin
    from registry.dvc_repo import opened
    from registry.project import find_project

    with contextlib.chdir(root), opened(root) as repo:  # DVC takes the stages of the folder where it is called
        repo.reproduce()
        repo.push()
    return pin(find_project(root), "datasets/tickets").hash


def _commit(root: Path) -> None:
    """The first commit, under the person's name where git knows it."""
    known = all(_run_git(root, "config", key).returncode == 0 for key in ("user.name", "user.email"))
    named = [] if known else ["-c", "user.name=ft", "-c", "user.email=ft@localhost"]
    _git(root, "add", "--all")
    # A person's hooks may fail, and a signing key may ask for input: neither belongs to this commit.
    _git(root, *named, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "--message", "A new ft project")


def _git(root: Path, *arguments: str) -> None:
    from registry.errors import Trouble

    done = _run_git(root, *arguments)
    if done.returncode != 0:
        raise Trouble(f"git {' '.join(arguments)}: {done.stderr.strip()}", place=str(root))


def _run_git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    from registry.errors import MissingPart

    # Called from a git hook, GIT_DIR would lead to that hook's repository.
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("GIT_DIR", "GIT_WORK", "GIT_INDEX"))
    }
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False, env=env)
    except FileNotFoundError as error:
        raise MissingPart("git is not installed", fix="install git, then try again") from error


def _print(folder: Path, hash_: str, own_git: bool, as_json: bool) -> None:
    from cli.console import print_json, say

    if as_json:
        print_json({"project": str(folder.absolute()), "dataset": "datasets/tickets", "hash": hash_, "git": own_git})
        return
    say(f"made {folder}: recipes/tickets.yaml, and datasets/tickets as version {hash_}")
    if not own_git:
        say("it lies in a git repository that was there: commit it yourself")
    say(f"next: cd {folder} && ft run recipes/tickets.yaml")
