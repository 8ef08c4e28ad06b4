"""From the rounds of each gateway to figures and a table. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

TIMES = ("p50", "p99", "first_p50", "first_p99")
HEAD = ["", "added p50 / p99, c=1 (ms)", "requests/s, c=16 (quartiles)", "p50 / p99, c=16 (ms)",
        "added time to first event p50 / p99 (ms)", "events/s, 64 streams (events a piece)",
        "CPU: a request / an event / an event alone (us)"]  # fmt: skip


@dataclass
class Target:
    """Something that answers completions; `rounds` has a value of each measurement for each round, times in ms."""

    name: str
    port: int
    headers: dict[str, str]
    session: int
    # What it said instead of a stream; "" where it can.
    no_streams: str = ""
    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def note(self, **measured: float) -> None:
        for name, value in measured.items():
            self.rounds[name].append(value)


def figures(target: Target, direct: Target) -> dict[str, float]:
    """Medians over the rounds; `added_*` is the median of the rounds' differences to the direct way."""
    found = {name: statistics.median(values) for name, values in target.rounds.items()}
    for name in TIMES:
        if name in target.rounds:
            pairs = zip(target.rounds[name], direct.rounds[name], strict=True)
            found[f"added_{name}"] = statistics.median(ours - theirs for ours, theirs in pairs)
    if rates := target.rounds.get("rate"):
        found |= {"rate_q1": quantile(rates, 0.25), "rate_q3": quantile(rates, 0.75)}
    found |= {name: sum(target.rounds[name]) for name in ("not_200", "broken_streams") if name in target.rounds}
    return {name: round(value, 4) for name, value in found.items()}


def table(targets: Sequence[Target]) -> list[str]:
    return [_row(HEAD), "|" + "---|" * len(HEAD), *(_row(_cells(each, targets[0])) for each in targets)]


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _cells(target: Target, direct: Target) -> list[str]:
    found = figures(target, direct)
    rate = events = "-"
    if "rate" in found:
        rate = f"{found['rate']:,.0f} ({found['rate_q1']:,.0f} to {found['rate_q3']:,.0f})"
    if "events" in found:
        events = f"{found['events']:,.0f} ({found['events_a_piece']:.1f})"
    return [
        target.name,
        _joined(found, "added_p50", "added_p99"),
        rate,
        _joined(found, "p50_16", "p99_16"),
        _joined(found, "added_first_p50", "added_first_p99"),
        events,
        _joined(found, "cpu_us_a_request", "cpu_us_an_event", "cpu_us_an_event_alone"),
    ]


def _joined(found: dict[str, float], *names: str) -> str:
    return " / ".join(f"{found[name]:,.2f}" if name in found else "-" for name in names)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
