"""`ft gate`: judge a version again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.adapters import Verdict, Version
    from registry.gate_report import Form
    from registry.project import Project


def gate(
    reference: Annotated[str, typer.Argument(metavar="MODEL[@N|@ALIAS]", help="What to judge; @candidate otherwise")],
    report: Annotated[str, typer.Option("--report", help="markdown, junit or json")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON")] = False,
) -> None:
    """Judge a version again and keep the verdict; nothing is promoted.

    Exit code 0: it passes. 3: it fails, or cannot be decided. 1: it could not be judged.

    Example: ft gate tickets@candidate --report junit --out gate.xml
    """
    import asyncio

    from cli.asking import asking
    from jobs.evaluation.judge_version import judge_version
    from registry.adapters import add_verdict, find_version
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    form = _form(report, out, as_json)
    project = find_project()
    store, settings = open_store(project), load_settings(project)
    version = find_version(store, reference if "@" in reference else f"{reference}@candidate")
    with asking(f"judge {version.name}", quiet=as_json) as progress:
        judged = asyncio.run(judge_version(project, store, settings, version, progress))
    verdict = add_verdict(store, version.model, version.version, judged.outcome, judged.body, None)
    _mirror(project, version, verdict)
    _show(verdict, form, out, as_json)
    _leave(verdict, as_json)


def _form(report: str, out: Path | None, as_json: bool) -> Form | None:
    """Before anything is asked: evaluation takes minutes, a wrong option none."""
    from registry.errors import WrongInput

    forms: dict[str, Form] = {"markdown": "markdown", "junit": "junit", "json": "json"}
    if report and report not in forms:
        raise WrongInput(f"no report '{report}'", place="--report", fix=f"there is: {', '.join(forms)}")
    if out is not None and not report:
        raise WrongInput(
            "--out needs a form", place="--out", fix="add --report markdown, --report junit or --report json"
        )
    if out is not None and not out.absolute().parent.is_dir():
        raise WrongInput("no such folder", place=str(out.absolute().parent), fix="make it first")
    if report and out is None and as_json:
        raise WrongInput(
            "--json and --report would both print", place="--report", fix="write the report with --out FILE"
        )
    return forms.get(report)


def _mirror(project: Project, version: Version, verdict: Verdict) -> None:
    """MLflow shows the verdict as well; our store has it in any case."""
    from jobs.evaluation.judge_version import recipe_of
    from registry.errors import TrackerError
    from registry.mlflow_store import tracker_for

    try:
        tracker_for(project, recipe_of(version)).tag_verdict(
            version.model, version.version, verdict.outcome, verdict.body
        )
    except TrackerError as error:
        print(f"the verdict is kept, but MLflow was not told: {error}", file=sys.stderr)


def _show(verdict: Verdict, form: Form | None, out: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from cli.console import print_json, say
    from registry.gate_report import report

    if form and out:
        out.write_text(report(verdict, form), encoding="utf-8")
    if as_json:
        print_json(asdict(verdict))
    elif form and not out:
        print(report(verdict, form), end="")
    else:
        for check in verdict.body["checks"]:
            say(f"  {check['outcome']:9} {check['name']}: {check['text']}")
        say(f"{verdict.model}@{verdict.version}: {verdict.outcome}" + (f"; report in {out}" if out else ""))


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
