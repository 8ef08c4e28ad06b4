"""`ft gate`: judge a version again."""

from __future__ import annotations

import sys
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.adapters import Verdict
    from registry.gate_report import Form


def gate(
    reference: Annotated[str, typer.Argument(metavar="MODEL[@N|@ALIAS]", help="What to judge; @candidate otherwise")],
    report: Annotated[
        list[str] | None, typer.Option("--report", help="markdown, junit or json; may be repeated")
    ] = None,
    out: Annotated[list[Path] | None, typer.Option("--out", "-o", help="File of the first --report, and so on")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON")] = False,
) -> None:
    """Judge a version again and keep the verdict; nothing is promoted.

    Exit code 0: it passes. 3: it fails, or cannot be decided. 1: it could not be judged.

    Example: ft gate tickets@candidate --report junit --out gate.xml
    """
    import asyncio

    from cli.asking import asking
    from cli.champion import tell_mlflow
    from jobs.evaluation.judge_version import judge_version
    from registry.adapters import add_verdict, find_version
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    reports = _reports(report or [], out or [], as_json)
    project = find_project()
    store, settings = open_store(project), load_settings(project)
    version = find_version(store, reference if "@" in reference else f"{reference}@candidate")
    with asking(f"judge {version.name}", quiet=as_json) as progress:
        judged = asyncio.run(judge_version(project, store, settings, version, progress))
    verdict = add_verdict(store, version.model, version.version, judged.outcome, judged.body, None)
    _show(verdict, reports, as_json)
    tell_mlflow(project, version.model)
    _leave(verdict, as_json)


def _reports(forms: list[str], files: list[Path], as_json: bool) -> list[tuple[Form, Path | None]]:
    """What to write where (None: to standard output). Wrong options are refused before anything is asked."""
    from registry.errors import WrongInput

    known: dict[str, Form] = {"markdown": "markdown", "junit": "junit", "json": "json"}
    for form in forms:
        if form not in known:
            raise WrongInput(f"no report '{form}'", place="--report", fix=f"there is: {', '.join(known)}")
    if len(files) > len(forms):
        raise WrongInput("--out needs a form", place="--out", fix=f"add --report {', --report '.join(known)}")
    for file in files:
        if not file.absolute().parent.is_dir():
            raise WrongInput("no such folder", place=str(file.absolute().parent), fix="make it first")
    if len(forms) - len(files) + as_json > 1:
        raise WrongInput("only one report can be printed", place="--report", fix="write the others with --out FILE")
    return [(known[form], file) for form, file in zip_longest(forms, files)]


def _show(verdict: Verdict, reports: list[tuple[Form, Path | None]], as_json: bool) -> None:
    from dataclasses import asdict

    from cli.console import print_json, say
    from registry.gate_report import report

    for form, file in reports:
        if file is None:
            print(report(verdict, form), end="")
        else:
            file.write_text(report(verdict, form), encoding="utf-8")
    if as_json:
        print_json(asdict(verdict))
    elif all(file for _, file in reports):
        for check in verdict.body["checks"]:
            say(f"  {check['outcome']:9} {check['name']}: {check['text']}")
        say(f"{verdict.model}@{verdict.version}: {verdict.outcome}")


def _leave(verdict: Verdict, as_json: bool) -> None:
    from registry.errors import GateClosed

    if verdict.outcome == "pass":
        return
    if as_json:  # the verdict is the one JSON document on standard output
        sys.exit(GateClosed.exit_code)
    name = f"{verdict.model}@{verdict.version}"
    says = "fails" if verdict.outcome == "fail" else "cannot be decided"
    raise GateClosed(
        f"the gate stays closed: {name} {says}",
        fix=f"`ft models {verdict.model}` shows what answers now; a person may still `ft promote {name} --force`",
    )
