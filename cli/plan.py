"""`ft plan`: on which cards a recipe fits, how long it takes, what it costs, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jobs.token_histogram import Looked
    from registry.candidates import Around, Judged
    from registry.errors import FtError
    from registry.plan import Wish
    from registry.plan_evaluation import Evaluated, EvaluationPlan
    from registry.recipe import Recipe

SHOWN_KNOBS = 3


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe file")],
    everything: Annotated[
        bool, typer.Option("--all", help="Also RunPod's cards that the recipe does not allow")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON")] = False,
) -> None:
    """Say on which cards a recipe fits, how long it takes, what it costs, and what would make it fit. Changes nothing.

    Exit code 2: it fits on no card that the recipe allows.

    Example: ft plan recipes/tickets.yaml
    """
    from cli.console import print_json, say
    from jobs.token_histogram import look
    from registry.base_models import refuse_use
    from registry.candidates import choose, judge, look_around, wish_of
    from registry.errors import WrongInput
    from registry.plan_evaluation import plan_evaluation
    from registry.project import find_project
    from registry.recipe import load_recipe
    from registry.settings import load_settings
    from registry.store import open_store

    project, loaded = find_project(), load_recipe(recipe)
    refuse_use(loaded.use, loaded.base.model, loaded.base.licence or "")
    settings = load_settings(project)
    looked = look(project, loaded, python=settings.trainer_python, say=(lambda _: None) if as_json else say)
    wish = wish_of(loaded, looked.histogram, looked.config)
    around = look_around(open_store(project), settings, prices=everything or loaded.cloud is not None)
    judged = judge(loaded, wish, around)
    chosen: Judged | None = None
    evaluation: EvaluationPlan | None = None
    error: FtError | None = None
    try:
        chosen = choose(loaded, judged)
        evaluation = plan_evaluation(loaded, wish, looked.histogram, judged, chosen)
    except WrongInput as none:
        error = none
    shown = [each for each in judged if _concerns(loaded, each)]
    if everything:
        shown = _with_others(shown, judged)
    if as_json:
        found = _as_dict(loaded, looked, wish, around, shown, chosen)
        evaluate = evaluation.as_dict() if evaluation else None
        print_json({**found, "evaluate": evaluate, "refusal": error.as_dict() if error else None})
        raise typer.Exit(2 if error else 0)
    _print(loaded, looked, wish, around, shown, chosen)
    if evaluation and evaluation.rented:
        say(_evaluation_line(evaluation.rented[0]))
    if error:
        raise error


def _concerns(recipe: Recipe, judged: Judged) -> bool:
    """Own cards, and what the recipe lets be rented or names."""
    here = judged.candidate
    named = recipe.cloud.gpus if recipe.cloud else []
    return here.kind == "card" or not here.why_not or here.gpu in named


def _with_others(shown: Sequence[Judged], judged: Sequence[Judged]) -> list[Judged]:
    """And each of RunPod's other cards where it costs least."""
    cheapest: dict[str, Judged] = {}
    for each in judged:
        cheapest.setdefault(each.candidate.gpu or each.candidate.name, each)
    return [each for each in judged if each in shown or each in cheapest.values()]


def _as_dict(
    recipe: Recipe, looked: Looked, wish: Wish, around: Around, shown: Sequence[Judged], chosen: Judged | None
) -> dict[str, Any]:
    train = looked.histogram.splits["train"]
    return {
        "recipe": recipe.name, "base": recipe.base.model, "dataset": looked.histogram.dataset,
        "tokens": {
            "rows": wish.rows, "of_rows": train.rows, "in_an_epoch": wish.tokens, "longest": train.longest,
            "median": train.quantile(0.5), "p95": train.quantile(0.95), "over_max_length": train.over(
                recipe.train.max_length), "estimated": looked.histogram.estimated,
            "packs": wish.count if recipe.train.packing else None,
        },
        "candidates": [_candidate(recipe, wish, each) for each in shown],
        "chosen": chosen.candidate.name if chosen else None,
        "prices": {"asked": around.prices.asked, "note": around.prices.note}, "note": looked.note,
    }  # fmt: skip


def _candidate(recipe: Recipe, wish: Wish, judged: Judged) -> dict[str, Any]:
    from registry.candidates import served_on

    is_own = judged.candidate.kind == "card" and judged.candidate.serve != "never"
    return {**judged.as_dict(), "serving": served_on(recipe, wish, judged.candidate).as_dict() if is_own else None}


def _print(
    recipe: Recipe, looked: Looked, wish: Wish, around: Around, shown: Sequence[Judged], chosen: Judged | None
) -> None:
    from cli.console import say, table

    say(_about(recipe, looked, wish))
    names = ["", "card", "", "fits", "memory", "time", "cost", "waiting", ""]
    table(names, [_row(recipe, each, chosen, shown) for each in shown])
    for line in (*_lines(looked, around, shown, chosen), *_serving_lines(recipe, wish, shown)):
        say(line)


def _about(recipe: Recipe, looked: Looked, wish: Wish) -> str:
    train, about = looked.histogram.splits["train"], "about " if looked.histogram.estimated else ""
    size = f"{wish.geometry.parameters / 1e9:.2g}B parameters"
    lengths = f"median {train.quantile(0.5)}, longest {train.longest}"
    packed = f" in {about}{wish.count} packs of at most {recipe.train.max_length}" if recipe.train.packing else ""
    return (f"{recipe.base.model} ({size}), {recipe.train.quantize}, LoRA rank {recipe.train.lora.rank}; "
            f"{wish.rows} rows with {about}{wish.tokens} tokens ({about}{lengths}){packed}")  # fmt: skip


def _row(recipe: Recipe, judged: Judged, chosen: Judged | None, shown: Sequence[Judged]) -> list[str]:
    here, verdict = judged.candidate, judged.verdict
    return [
        ">" if judged is chosen else "",
        here.name,
        here.place.profile.name if here.kind == "card" else "",
        "yes" if verdict.fits else "tight" if verdict.tight else "no",
        f"{_gib(verdict.memory.low)}-{_gib(verdict.memory.high)} of {_gib(verdict.available)} GiB",
        time_span(verdict.seconds.low, verdict.seconds.high),
        f"${verdict.usd.low:.2f}-{verdict.usd.high:.2f}" if verdict.usd else "",
        str(here.queue) if here.kind == "card" else "",
        ", ".join(_remarks(recipe, judged, shown)),
    ]


def _remarks(recipe: Recipe, judged: Judged, shown: Sequence[Judged]) -> Iterator[str]:
    from registry.candidates import too_slow

    if too_slow(recipe, judged, shown):
        yield "too slow for `card: auto`"
    if judged.candidate.paused:
        yield "paused"
    if judged.candidate.availability:
        yield f"stock: {judged.candidate.availability.lower()}"
    if judged.candidate.why_not:
        yield judged.candidate.why_not


def _lines(looked: Looked, around: Around, shown: Sequence[Judged], chosen: Judged | None) -> Iterator[str]:
    import time

    from registry.gpu_prices import source

    if chosen:
        verdict = chosen.verdict
        yield f"`ft run` takes {chosen.candidate.name}: batch {verdict.batch} x accumulate {verdict.accumulate}, " \
              f"{verdict.steps} steps; limited by {verdict.limit}"  # fmt: skip
        yield from (f"  {knob.text}" for knob in verdict.knobs if verdict.fits)
    for each in shown:
        if not each.verdict.fits and not each.candidate.why_not:
            yield f"{each.candidate.name}: {each.verdict.limit}"
            yield from (f"  {knob.text}" for knob in each.verdict.knobs[:SHOWN_KNOBS])
    notes = dict.fromkeys(note for each in shown for note in each.verdict.notes)
    yield from (f"note: {note}" for note in notes)
    if looked.note:
        what = "token lengths are estimated" if looked.histogram.estimated else "not all is known"
        yield f"note: {what}: {looked.note}"
    if any(each.verdict.usd for each in shown):
        yield f"prices: {source(around.prices, time.time())}; waiting for a pod is in time and cost"


def _serving_lines(recipe: Recipe, wish: Wish, shown: Sequence[Judged]) -> Iterator[str]:
    from registry.candidates import served_on

    for each in shown:
        here = each.candidate
        if here.kind != "card":
            continue
        if here.serve == "never":
            yield f"serving on {here.name}: not at all (ft.yaml)"
            continue
        found = served_on(recipe, wish, here)
        size = f"{_gib(found.memory.low)}-{_gib(found.memory.high)} GiB"
        if found.fits:
            yield f"serving on {here.name}: {', '.join(['yes, ' + size, *found.given_up])}"
        else:
            yield f"serving on {here.name}: no; {found.limit}"


def _evaluation_line(best: Evaluated) -> str:
    assert best.usd is not None
    took = time_span(best.seconds.low, best.seconds.high)
    return (f"no own card can serve the base, so the evaluation is in a pod as well: {best.candidate.name}, {took}, "
            f"${best.usd.low:.2f}-{best.usd.high:.2f} more")  # fmt: skip


def time_span(low: float, high: float) -> str:
    """An interval of seconds in one unit, as fine as it means anything."""
    for size, unit, digits in ((86400 * 2, "d", 86400), (7200, "h", 3600), (120, "min", 60), (0, "s", 1)):
        if high >= size:
            places = 1 if high / digits < 10 and digits >= 3600 else 0
            return f"{low / digits:.{places}f}-{high / digits:.{places}f} {unit}"
    return ""


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"
