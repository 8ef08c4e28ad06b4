"""`ft feedback`: what people said of answers, by version, and as a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from registry.events import Event

JSON = typer.Option("--json", help="Print as JSON")
SINCE = typer.Option("--since", metavar="7d", help="Only the newest: 30m, 12h, 7d")


class OrModel(TyperGroup):
    """`ft feedback tickets` is `ft feedback show tickets`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if known else ["show", *args])


app = typer.Typer(cls=OrModel, add_completion=False, rich_markup_mode=None)


@app.command()
def show(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only of this model")] = "",
    since: Annotated[str, SINCE] = "",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Add up feedback by version: how much, the mean rating, corrections, tags. `show` may be left out.

    Example: ft feedback show tickets --since 7d
    """
    from cli.console import ago, print_json, say, table
    from registry.feedback_log import add_up

    found = add_up(_feedback(model, since))
    if as_json:
        print_json([each.as_dict() for each in found])
        return
    if not found:
        say(f"no feedback{f' on {model}' if model else ''} yet; applications post it to the gateway's /v1/feedback")
        return
    rows = [
        [each.adapter, str(each.count), "-" if each.mean is None else f"{each.mean:.2f} of {each.rated}",
         str(each.corrections), ", ".join(f"{tag} {n}" for tag, n in each.tags.most_common(5)) or "-", ago(each.last)]
        for each in found
    ]  # fmt: skip
    table(["version", "feedback", "mean rating", "corrections", "tags", "last"], rows)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Whose feedback")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, one JSON object a line")],
    since: Annotated[str, SINCE] = "",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write feedback to a file: adapter, request, rating, correction, tags. The questions are the application's own:
    `request` is what it knows them by.

    Example: ft feedback export tickets corrections.jsonl
    """
    from cli.console import print_json, say
    from registry.feedback_log import rows

    _refuse_existing(file)
    count = _write(file, rows(_feedback(model, since)))
    if as_json:
        print_json({"file": str(file), "rows": count})
    else:
        say(f"{count} rows in {file}")


def _feedback(model: str, since: str) -> Iterator[Event]:
    import time

    from registry.feedback_log import feedback_on
    from registry.project import find_project
    from registry.store import open_store

    after = time.time() - _seconds(since) if since else 0.0
    return feedback_on(open_store(find_project()), model, after)


def _seconds(text: str) -> int:
    import re

    from registry.durations import seconds
    from registry.errors import WrongInput

    if not re.fullmatch(r"[0-9]{1,9}[smhd]", text):
        raise WrongInput(f"not a time: {text[:40]!r}", place="--since", fix="write it like 30m, 12h or 7d")
    return seconds(text)


def _refuse_existing(file: Path) -> None:
    from registry.errors import Conflict

    if file.exists():
        raise Conflict("there is such a file already", place=str(file), fix="give another name, or remove it")


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Beside it first: half a file would look like all there is. Raises Trouble."""
    import json

    from registry.errors import Trouble

    count, beside = 0, file.with_name(file.name + ".part")
    try:
        with beside.open("w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        beside.rename(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Trouble(f"cannot be written: {error.strerror}", place=str(file)) from error
    return count
