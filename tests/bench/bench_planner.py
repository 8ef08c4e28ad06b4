"""`python -m tests.bench.bench_planner [--peers]`: our planner beside published figures and two other estimators.

The peers run in an environment of their own (made on first use in .ft/peers), in one process, on the points that they
can take; what they cannot take is said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import yaml

from registry.card_profiles import GIB, CardProfile, profile_of
from registry.geometry import Geometry, known_geometry
from registry.train_memory import SPREAD_HIGH, SPREAD_LOW, Training, train_memory
from registry.train_time import tokens_per_second

POINTS = Path(__file__).with_name("planner_points.yaml")
PEERS = Path(".ft/peers")
PEER_PACKAGES = ("fitcheck-llm==0.3.1", "canifinetune==0.4.1")
UNIT = {"GB": 1e9, "GiB": float(GIB)}
SETTINGS = ("batch", "longest", "rank", "quantize", "optimizer", "checkpointing", "double_quant", "attention", "stack")
Saying = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Point:
    """A published row. `measured` in bytes, None where only the verdict is known; `size`: the card's bytes."""

    id: str
    model: str
    card: str
    geometry: Geometry
    training: Training
    size: int
    measured: float | None
    allocated: bool
    fits: bool
    holdout: bool
    rate: float | None

    @property
    def profile(self) -> CardProfile | None:
        return profile_of(self.card)

    @property
    def ours(self) -> int:
        """Bytes, counted as the source counts them."""
        memory = train_memory(self.geometry, self.training)
        return memory.allocated if self.allocated else memory.total

    @property
    def saying(self) -> Saying:
        memory = train_memory(self.geometry, self.training)
        there = self.profile.usable if self.profile else int(self.size * 0.98)
        return "fits" if memory.high <= there else "tight" if memory.total <= there else "does not fit"

    def error(self, estimate: float) -> float:
        """Relative; only of measured points."""
        assert self.measured
        return estimate / self.measured - 1


def load_points(path: Path = POINTS) -> list[Point]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [_point(row, content["models"], content["targets"]) for row in content["points"]]


def mean_error(points: Iterable[Point]) -> float:
    """Mean absolute relative error of our estimates."""
    return mean(abs(point.error(point.ours)) for point in points if point.measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", action="store_true", help="also fitcheck-llm and canifinetune")
    given = parser.parse_args()
    points = load_points()
    peers = ask_peers(points) if given.peers else {}
    print("\n".join([*table(points, peers), "", *summary(points, peers), "", *by_source(points)]))


def table(points: list[Point], peers: dict[str, dict[str, Any]]) -> list[str]:
    """Every point: measured and estimated GiB, and the errors; verdicts where the card is known."""
    names = list(peers)
    head = ["point", "measured", "ours", "error", "verdict", *names]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [_line(point, {name: peers[name].get(point.id, {}) for name in names}) for point in points]


def summary(points: list[Point], peers: dict[str, dict[str, Any]]) -> list[str]:
    measured = [point for point in points if point.measured]
    ours = {point.id: {"bytes": point.ours, "fits": point.saying == "fits"} for point in points}
    lines = ["| who | points | mean abs. error | median | worst under | worst over | says fits, did not |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines.append(_score("ours, all", measured, points, ours))
    lines.append(_score("ours, holdout", [point for point in measured if point.holdout], points, ours))
    lines.append(_score("ours, the others", [point for point in measured if not point.holdout], points, ours))
    for name, answers in peers.items():
        taken = [point for point in measured if "bytes" in answers.get(point.id, {})]
        lines.append(_score(f"{name}, those that it takes", taken, points, answers))
        stock = [point for point in taken if point.training.stack in ("hf", "hf32")]
        lines.append(_score(f"{name}, of these on transformers' own loss", stock, points, answers))
        lines.append(_score("ours, the same", stock, [point for point in points if point.id in answers], ours))
        lines.append(_score("ours, all that it takes", taken, [point for point in points if point.id in answers], ours))
    said = Counter(point.saying for point in points if point.fits)
    counts = ", ".join(f"{name} {count}" for name, count in said.items())
    lines += ["", f"Of {sum(said.values())} points that fit, ours says: {counts}."]
    within = mean(
        1 - SPREAD_LOW <= point.measured / point.ours <= 1 + SPREAD_HIGH for point in measured if point.measured
    )
    return [*lines, f"Measured peaks within our interval: {within:.0%}.", _speeds(points)]


def by_source(points: list[Point]) -> list[str]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.measured:
            groups.setdefault(point.training.stack, []).append(point)
    lines = ["| stack | points | mean abs. error |", "|---|---|---|"]
    return lines + [f"| {name} | {len(group)} | {mean_error(group):.1%} |" for name, group in groups.items()]


def ask_peers(points: list[Point]) -> dict[str, dict[str, Any]]:
    """What each peer answers for each point: {"bytes", "fits"}; it lacks points that it cannot take."""
    python = PEERS / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "uv", "venv", "-q", str(PEERS / "venv")], check=True)
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python), *PEER_PACKAGES],
                       check=True)  # fmt: skip
    asked = json.dumps([_question(point) for point in points])
    script = str(Path(__file__).with_name("peer_planners.py"))
    answer = subprocess.run([python, script], input=asked, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, dict[str, Any]] = json.loads(answer.stdout)
    return found


def _point(row: dict[str, Any], models: dict[str, list[Any]], targets: dict[str, Any]) -> Point:
    chosen = targets[row.get("targets", "all")]
    settings = {name: row[name] for name in SETTINGS if name in row}
    settings["targets"] = chosen if isinstance(chosen, str) else tuple(chosen)
    profile = profile_of(row["card"])
    size = profile.memory_gib if profile else float(row["card"].removesuffix(" GB"))
    return Point(
        id=row["id"],
        model=row["model"],
        card=row["card"],
        geometry=_geometry(row["model"], models),
        training=Training(**settings),
        size=int(size * GIB),
        measured=row["measured"] * UNIT[row["unit"]] if "measured" in row else None,
        allocated=row.get("counts") == "allocated",
        fits=row.get("fits", True),
        holdout=row.get("holdout", False),
        rate=row.get("tokens_per_second"),
    )


def _geometry(model: str, models: dict[str, list[Any]]) -> Geometry:
    if model in models:
        return Geometry(*models[model])
    found = known_geometry(model)
    assert found, f"no shape of {model}"
    return found


def _question(point: Point) -> dict[str, Any]:
    return {"id": point.id, "geometry": asdict(point.geometry), "parameters": point.geometry.parameters,
            "training": asdict(point.training), "size": point.size, "allocated": point.allocated}  # fmt: skip


def _line(point: Point, answers: dict[str, dict[str, Any]]) -> str:
    measured = f"{point.measured / GIB:.1f}" if point.measured else "" if point.fits else "OOM"
    error = f"{point.error(point.ours):+.1%}" if point.measured else ""
    cells = [
        point.id + (" (holdout)" if point.holdout else ""),
        measured,
        f"{point.ours / GIB:.1f}",
        error,
        point.saying,
    ]
    return f"| {' | '.join([*cells, *(_cell(point, answer) for answer in answers.values())])} |"


def _cell(point: Point, answer: dict[str, Any]) -> str:
    if "bytes" not in answer:
        return "-"
    error = f" ({point.error(answer['bytes']):+.0%})" if point.measured else f" ({'fits' if answer['fits'] else 'no'})"
    return f"{answer['bytes'] / GIB:.1f}{error}"


def _score(who: str, measured: list[Point], points: list[Point], answers: dict[str, dict[str, Any]]) -> str:
    errors = [point.error(answers[point.id]["bytes"]) for point in measured]
    failed = [point for point in points if not point.fits and point.id in answers]
    wrong = sum(bool(answers[point.id]["fits"]) for point in failed)
    sizes = [abs(error) for error in errors]
    cells = [who, str(len(errors)), f"{mean(sizes):.1%}", f"{median(sizes):.1%}", f"{min(errors):+.1%}"]
    return f"| {' | '.join([*cells, f'{max(errors):+.1%}', f'{wrong} of {len(failed)}'])} |"


def _speeds(points: list[Point]) -> str:
    ratios = [
        tokens_per_second(point.geometry, point.training, point.profile, point.training.longest) / point.rate
        for point in points
        if point.rate and point.profile
    ]
    within = mean(0.7 <= 1 / ratio <= 1.45 for ratio in ratios)
    return (f"Speed, {len(ratios)} points: mean abs. error {mean(abs(ratio - 1) for ratio in ratios):.0%}, "
            f"estimate between {min(ratios):.2f} and {max(ratios):.2f} of the measured; "
            f"measured time within our interval: {within:.0%}.")  # fmt: skip


if __name__ == "__main__":
    main()
