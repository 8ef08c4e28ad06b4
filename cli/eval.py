"""`ft eval`: score versions on a test split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from registry.scores import Scored


def eval_(
    references: Annotated[list[str], typer.Argument(metavar="MODEL[@N|@ALIAS]...", help="@champion otherwise")],
    base: Annotated[bool, typer.Option("--base", help="The bare base model too, with the task spelt out")] = False,
    dataset: Annotated[str, typer.Option("--dataset", help="Another dataset than the first version's")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Score versions on the test split of a dataset, by the first one's task. Nothing is judged or promoted.

    Example: ft eval tickets@1 tickets@2 --base
    """
    import asyncio

    from cli.asking import asking
    from jobs.evaluation.judge_version import dataset_of, score_versions
    from registry.adapters import find_version
    from registry.dataset_versions import pin
    from registry.project import find_project
    from registry.settings import load_settings
    from registry.store import open_store

    project = find_project()
    store, settings = open_store(project), load_settings(project)
    versions = list({version.name: version for version in (find_version(store, each) for each in references)}.values())
    pinned = pin(project, dataset) if dataset else dataset_of(versions[0])
    with asking("evaluate", quiet=as_json) as progress:
        scored = asyncio.run(score_versions(project, store, settings, versions, pinned, progress, with_base=base))
    _show(scored, pinned.path, pinned.hash, as_json)


def _show(scored: dict[str, Scored], path: str, digest: str, as_json: bool) -> None:
    from cli.console import print_json, table

    if as_json:
        scores = {name: {"metrics": each.metrics, "rows": each.count, "failed": len(each.failed), "detail": each.detail}
                  for name, each in scored.items()}  # fmt: skip
        print_json({"dataset": {"path": path, "hash": digest}, "scores": scores})
        return
    metrics = list(dict.fromkeys(metric for each in scored.values() for metric in each.metrics))
    rows = [
        [name, *(f"{each.metrics[metric]:.3f}" for metric in metrics), str(each.count), str(len(each.failed))]
        for name, each in scored.items()
    ]
    table(["", *metrics, "rows", "unanswered"], rows, title=f"test split of {path} at {digest}")
