"""`ft models`: list models, versions and aliases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from registry.adapters import Version
    from registry.store import Store


def models(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only of this model")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """List models and their versions: aliases, what the gate said, scores, where they come from.

    Example: ft models tickets
    """
    from cli.console import ago, print_json, say, table
    from registry.adapters import versions
    from registry.errors import NotFound
    from registry.project import find_project
    from registry.store import open_store

    store = open_store(find_project())
    found = versions(store, model)
    if model and not found:
        raise NotFound(f"no model '{model}'", fix="`ft models` lists all; `ft run` makes one")
    rows = [_facts(store, version) for version in found]
    if as_json:
        print_json(rows)
        return
    if not rows:
        say("no models yet; make one with `ft run recipes/NAME.yaml`")
        return
    table(
        ["version", "is", "gate", "score", "base", "created", "run"],
        [
            [
                row["name"],
                ", ".join(row["aliases"]),
                row["outcome"],
                _score(row),
                row["base"],
                ago(row["created"]),
                row["run"],
            ]
            for row in rows
        ],
    )


def _facts(store: Store, version: Version) -> dict[str, Any]:
    from registry.adapters import aliases, last_verdict

    named = [alias for alias, number in aliases(store, version.model).items() if number == version.version]
    verdict = last_verdict(store, version.model, version.version)
    body = verdict.body if verdict else {}
    return {
        "name": version.name,
        "model": version.model,
        "version": version.version,
        "aliases": [
            *named,
            *(["rolled back"] if version.rolled_back else []),
            *(["pruned"] if version.pruned is not None else []),
        ],
        "outcome": verdict.outcome if verdict else "not judged",
        "metric": body.get("metric"),
        "scores": body.get("scores", {}),
        "base": version.body["base"]["source"],
        "created": version.created,
        "run": version.run_id,
    }


def _score(row: dict[str, Any]) -> str:
    got = row["scores"].get("candidate", {}).get(row["metric"])
    return "-" if got is None else f"{got:.3f} {row['metric']}"
