"""What counting costs a request, and what a scrape costs: `python -m tests.bench.bench_metrics`, a few seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from registry.objectives import Objectives
from serving.metrics import Metrics
from serving.objectives import Judge

ROUNDS, REQUESTS = 7, 20_000
USAGE = {"prompt_tokens": 40, "completion_tokens": 60, "total_tokens": 100}


def main() -> None:
    terms = {"tickets": Objectives(p95="3s", error_rate=0.01, concurrent=100)}
    plain, judged = (
        Metrics(["tickets"], ["shop"]),
        Metrics(["tickets"], ["shop"], [3.0], Judge(terms, time.monotonic())),
    )

    def one(metrics: Metrics) -> None:
        began = metrics.begin("tickets", "shop")
        began.first()
        began.done(200, "tickets@3", 60, USAGE)

    figures = {
        "request_us": _microseconds(lambda: one(plain)),
        "request_with_objectives_us": _microseconds(lambda: one(judged)),
    }
    many = Metrics([f"route{n}" for n in range(10)], [f"key{n}" for n in range(10)])
    for n in range(100):
        began = many.begin(f"route{n // 10}", f"key{n % 10}")
        began.first()
        began.done(200, f"route{n // 10}@1", 60, USAGE)
    start = time.thread_time()
    lines = len(many.text().splitlines())
    figures |= {"scrape_lines": lines, "scrape_ms": round((time.thread_time() - start) * 1000, 1)}
    print(json.dumps(figures, indent=1))


def _microseconds(work: Callable[[], None]) -> float:
    """The median round, each request alone; of this thread's own time, since other programs may run."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(REQUESTS):
            work()
        rounds.append((time.thread_time() - start) / REQUESTS * 1e6)
    return round(sorted(rounds)[ROUNDS // 2], 2)


if __name__ == "__main__":
    main()
