"""`ft data`: import data sets, list them, check them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.chat_data import Row
    from registry.data_import import Mapping, Splits
    from registry.dataset_versions import Pinned
    from registry.project import Project

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@app.command()
def add(  # noqa: PLR0913, PLR0917
    name: Annotated[str, typer.Argument(help="The data set will be datasets/NAME")],
    file: Annotated[Path, typer.Argument(help="JSONL (chats, or plain objects) or CSV with a header")],
    prompt: Annotated[str, typer.Option(help="Column that holds the question")] = "",
    answer: Annotated[str, typer.Option(help="Column that holds the answer")] = "",
    template: Annotated[str, typer.Option(help="Question built of columns, as '{title}: {text}'")] = "",
    system: Annotated[str, typer.Option(help="System message put before every chat")] = "",
    keep: Annotated[list[str] | None, typer.Option(help="COLUMN=V1,V2: only rows with these values")] = None,
    test_file: Annotated[Path | None, typer.Option(help="File that holds the whole test split")] = None,
    eval_part: Annotated[float, typer.Option(min=0, max=0.5, help="Part of the rows for eval")] = 0.1,
    test_part: Annotated[float, typer.Option(min=0, max=0.5, help="Part of the rows for test")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed splits otherwise")] = 17,
    replace: Annotated[bool, typer.Option("--replace", help="Make a new version of a data set")] = False,
    as_json: Json = False,
) -> None:
    """Import a file as datasets/NAME: validate, split, track with DVC. Nothing changes if anything is wrong.

    Example: ft data add support tickets.csv --prompt text --answer category --system "Name the category."
    """
    from registry.data_import import Mapping
    from registry.dataset_versions import store_version
    from registry.project import find_project

    project = find_project()
    _check_name(name)
    mapping = Mapping(prompt or None, answer or None, template or None, system or None, _keep(keep or []))
    _refuse_no_number({"--eval-part": eval_part, "--test-part": test_part})
    splits = _split(file, test_file, mapping, {"eval_part": eval_part, "test_part": test_part, "seed": seed})
    facts = _facts(splits, file, test_file, {**asdict(mapping), "seed": seed})
    version = store_version(project, name, lambda folder: _write(folder, splits, facts), replace=replace)
    remote = _announce(project, version)
    _print(version, facts, remote, as_json)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the project's data sets with DVC's hash, and whether the folder is as DVC knows it.

    Example: ft data list
    """
    from cli.console import print_json, say, table
    from registry.dataset_versions import content, hash_of
    from registry.project import find_project
    from registry.tracked_data import tracked_datasets

    project = find_project()
    rows = []
    for each in tracked_datasets(project):
        folder = project.root / each.path
        state = "not pulled" if not folder.is_dir() else "ok" if hash_of(content(folder)) == each.hash else "changed"
        rows.append({"path": each.path, "hash": each.hash, "by": each.by, "state": state})
    if as_json:
        print_json(rows)
    elif rows:
        table(["data set", "hash", "tracked in", "state"], [list(row.values()) for row in rows])
    else:
        say("no data sets yet; `ft data add NAME FILE` imports one")


@app.command()
def push(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Data sets; default: all")] = None,
    as_json: Json = False,
) -> None:
    """Track changed folders as new versions, copy them to DVC's default remote, and let recipes with `on:` know.

    Example: ft data push support
    """
    from cli.console import print_json, say
    from registry.dataset_versions import track
    from registry.project import find_project
    from registry.tracked_data import tracked_datasets

    project = find_project()
    paths = [f"datasets/{name.removeprefix('datasets/')}" for name in names or []]
    rows = []
    for path in paths or [each.path for each in tracked_datasets(project)]:
        version = track(project, path)
        rows.append({"path": path, "hash": version.hash, "rows": version.rows, "remote": _announce(project, version)})
    if as_json:
        print_json(rows)
        return
    for row in rows:
        where = f"pushed to {row['remote']}" if row["remote"] else "there is no default remote (`dvc remote add -d`)"
        say(f"{row['path']}: {row['hash']}, {where}")
    if not rows:
        say("no data sets yet; `ft data add NAME FILE` imports one")


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="A data set's name, or a JSONL file or folder")],
    as_json: Json = False,
) -> None:
    """Validate a data set or a file of chats without changing anything.

    Example: ft data check support
    """
    from cli.console import print_json, say
    from registry.chat_data import check_dataset, load_rows
    from registry.errors import NotFound
    from registry.project import find_project

    path = Path(what)
    if not path.exists():
        path = find_project().root / "datasets" / what
    if not path.exists():
        raise NotFound("no such data set or file", place=what, fix="`ft data list` lists the data sets")
    rows = check_dataset(path) if path.is_dir() else {path.name: len(load_rows(path))}
    print_json({"path": str(path), "rows": rows}) if as_json else say(f"{path}: ok, {_counted(rows)}")


def _check_name(name: str) -> None:
    from registry.errors import WrongInput
    from registry.recipe import NAME

    if not re.fullmatch(NAME.strip("^$"), name):
        fix = "use lower-case letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit"
        raise WrongInput(f"'{name}' is no name for a data set", fix=fix)
    if name.endswith(".dvc"):
        raise WrongInput(f"'{name}' is the name of one of DVC's records", fix=f"call it {name.removesuffix('.dvc')}")


def _keep(texts: list[str]) -> dict[str, list[str]]:
    from registry.errors import WrongInput

    kept: dict[str, list[str]] = {}
    for text in texts:
        column, sign, values = text.partition("=")
        if not sign or not column or not values:
            raise WrongInput(f"--keep {text}: not of the form COLUMN=V1,V2", fix="--keep category=refund,delivery")
        kept.setdefault(column, []).extend(value.strip() for value in values.split(","))
    return kept


def _refuse_no_number(parts: dict[str, float]) -> None:
    from registry.errors import WrongInput

    for option, part in parts.items():
        if math.isnan(part):  # it passes min and max
            raise WrongInput("is no number", place=option, fix="give a part like 0.1")


def _split(file: Path, test_file: Path | None, mapping: Mapping, how: dict[str, Any]) -> Splits:
    from registry.data_import import import_rows, split_rows

    tests: list[Row] | None = import_rows(test_file, mapping) if test_file else None
    return split_rows(import_rows(file, mapping), **how, test_rows=tests)


def _facts(splits: Splits, file: Path, test_file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    from registry.manifest import sha256_of

    return {
        "rows": {name: len(rows) for name, rows in splits.by_name().items()},
        "labels": splits.labels,
        "repeated": splits.repeated,
        "sources": {path.name: sha256_of(path) for path in (file, test_file) if path},
        "options": {key: value for key, value in options.items() if value not in (None, {})},
    }


def _write(folder: Path, splits: Splits, facts: dict[str, Any]) -> None:
    import json

    from registry.chat_data import write_rows

    for name, rows in splits.by_name().items():
        write_rows(folder / f"{name}.jsonl", rows)
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")


def _announce(project: Project, version: Pinned) -> str | None:
    """Copy the version to the default remote and append the event; the remote's name."""
    from cli.waking import noticing
    from registry.dataset_versions import push
    from registry.seen import DATASET, git_branch, note_value
    from registry.store import open_store

    remote = push(project, version)
    data, branch = {"hash": version.hash, "rows": version.rows}, git_branch(project.root) or ""
    with noticing(project):
        note_value(open_store(project), "dataset", version.path, version.hash, DATASET, data, branch)
    return remote


def _print(version: Pinned, facts: dict[str, Any], remote: str | None, as_json: bool) -> None:
    from cli.console import print_json, say

    if as_json:
        print_json({"path": version.path, "hash": version.hash, "remote": remote, **facts})
        return
    say(f"{version.path}: {_counted(version.rows)}")
    if facts["labels"]:
        say(f"  labels    {len(facts['labels'])}: {', '.join(facts['labels'])}")
    if facts["repeated"]:
        say(f"  left out  {facts['repeated']} rows whose question was there already")
    say(f"  version   {version.hash}{f', pushed to {remote}' if remote else ''}")
    say(f"  next      git add {version.path}.dvc, and a recipe with data.path: {version.path}")


def _counted(rows: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in rows.items())
