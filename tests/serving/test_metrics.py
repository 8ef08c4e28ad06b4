"""What the gateway counts: each figure where it belongs, names bounded, and cheap enough for every request."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from registry.objectives import Objectives
from serving.metrics import Metrics
from serving.objectives import Judge, Standing
from serving.request_series import MOST_SERIES

LABELS = {"route": "tickets", "adapter": "tickets@3", "key": "shop"}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(["tickets", "notes"], ["shop"], [3.0, 0.8])


def read(metrics: Metrics, name: str, **labels: str) -> float | None:
    """The sample of that name whose labels have these among them; their sum where there are several."""
    samples = [
        each.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for each in family.samples
        if each.name == name and labels.items() <= each.labels.items()
    ]
    return sum(samples) if samples else None


def ask(metrics: Metrics, status: int = 200, route: str = "tickets", key: str = "shop", **done: Any) -> None:
    metrics.begin(route, key).done(status, **{"adapter": f"{route}@3", **done})


def test_requests_are_counted_by_status_and_errors_by_code(metrics: Metrics) -> None:
    for status, code in ((200, ""), (201, ""), (404, "model_not_found"), (503, "engine_away"), (499, "")):
        ask(metrics, status, code=code)
    found = {each: read(metrics, "ft_requests_total", **LABELS, status=each) for each in ("2xx", "4xx", "5xx", "gone")}
    assert found == {"2xx": 2, "4xx": 1, "5xx": 1, "gone": 1}
    assert read(metrics, "ft_errors_total", route="tickets", key="shop", code="engine_away") == 1
    assert read(metrics, "ft_errors_total", code="499") == 1
    assert read(metrics, "ft_request_seconds_count", **LABELS) == 2  # a quick refusal is no quick answer


def test_all_classes_of_status_are_there_before_the_first_error(metrics: Metrics) -> None:
    ask(metrics)
    assert read(metrics, "ft_requests_total", **LABELS, status="5xx") == 0


def test_a_stream_has_its_first_token_and_the_time_between_tokens(metrics: Metrics) -> None:
    start = time.monotonic()
    began = metrics.begin("tickets", "shop")
    time.sleep(0.03)
    began.first()
    middle = time.monotonic()
    time.sleep(0.05)
    began.first()  # changes nothing
    began.done(200, "tickets@3", events=6)
    first, between = (read(metrics, f"ft_{name}_seconds_sum", **LABELS) for name in ("first_token", "token_interval"))
    assert first is not None
    assert 0.03 <= first <= middle - start
    assert between is not None
    assert 0.05 <= between * 5 <= time.monotonic() - start - first


def test_tokens_are_better_known_than_events(metrics: Metrics) -> None:
    start = time.monotonic()
    began = metrics.begin("tickets", "shop")
    began.first()
    time.sleep(0.05)
    began.done(200, "tickets@3", events=2, usage={"prompt_tokens": 7, "completion_tokens": 51})
    between = read(metrics, "ft_token_interval_seconds_sum", **LABELS)
    assert between is not None
    assert 0.05 <= between * 50 <= time.monotonic() - start
    assert read(metrics, "ft_prompt_tokens_total", **LABELS) == 7
    assert read(metrics, "ft_completion_tokens_total", **LABELS) == 51


def test_an_answer_that_is_no_stream_has_no_first_token(metrics: Metrics) -> None:
    ask(metrics, usage={"prompt_tokens": 7, "completion_tokens": 51})
    assert read(metrics, "ft_first_token_seconds_count", **LABELS) == 0
    assert read(metrics, "ft_token_interval_seconds_count", **LABELS) == 0


@pytest.mark.parametrize("tokens", [-1, None, "7", True, 10**12, 1.5, [], float("nan")])
def test_what_an_upstream_says_of_tokens_may_be_anything(metrics: Metrics, tokens: object) -> None:
    ask(metrics, usage={"prompt_tokens": tokens, "completion_tokens": 2})
    assert read(metrics, "ft_prompt_tokens_total", **LABELS) == 0
    assert read(metrics, "ft_completion_tokens_total", **LABELS) == 2


def test_under_way_is_what_has_begun_and_not_ended(metrics: Metrics) -> None:
    first, second = metrics.begin("tickets", "shop"), metrics.begin("tickets", "")
    assert read(metrics, "ft_requests_under_way", route="tickets") == 2
    first.done(200)
    first.done(500)  # counts once
    assert read(metrics, "ft_requests_under_way", route="tickets") == 1
    second.done(499)
    assert read(metrics, "ft_requests_under_way", route="tickets") == 0
    assert read(metrics, "ft_requests_total", status="5xx") == 0


def test_what_callers_make_up_is_other_or_none(metrics: Metrics) -> None:
    for n in range(1000):
        ask(metrics, 404, route=f"made up {n}", key=f"stolen {n}", adapter="")
    ask(metrics, route="", key="", adapter="")
    text = metrics.text()
    assert b"made up" not in text
    assert b"stolen" not in text
    assert read(metrics, "ft_requests_total", route="other", adapter="none", key="other", status="4xx") == 1000
    assert read(metrics, "ft_requests_total", route="none", key="none", status="2xx") == 1


def test_codes_of_errors_are_bounded(metrics: Metrics) -> None:
    for n in range(500):
        ask(metrics, 500, code=f"code {n}")
    assert len([each for each in metrics.text().splitlines() if each.startswith(b"ft_errors_total")]) <= 65
    assert read(metrics, "ft_errors_total") == 500


def test_versions_come_for_ever_and_the_longest_unused_makes_room(metrics: Metrics) -> None:
    for n in range(MOST_SERIES + 100):
        ask(metrics, adapter=f"tickets@{n}")
        ask(metrics, adapter="tickets@kept")
    found = {
        each.labels["adapter"]
        for family in text_string_to_metric_families(metrics.text().decode())
        for each in family.samples
        if each.name == "ft_requests_total"
    }
    assert len(found) == MOST_SERIES
    assert {"tickets@kept", f"tickets@{MOST_SERIES + 99}"} <= found
    assert "tickets@0" not in found
    assert read(metrics, "ft_requests_total", adapter="tickets@kept", status="2xx") == MOST_SERIES + 100


def test_names_that_leave_the_recipe_leave_the_figures(metrics: Metrics) -> None:
    under_way = metrics.begin("tickets", "shop")
    ask(metrics, route="notes")
    metrics.know(["notes"], ["shop"])
    ask(metrics)
    assert read(metrics, "ft_requests_total", route="tickets") is None
    assert read(metrics, "ft_requests_under_way", route="tickets") is None
    under_way.done(200, "tickets@3")  # ends without harm
    assert read(metrics, "ft_requests_total", route="notes", status="2xx") == 1
    assert read(metrics, "ft_requests_total", route="other", status="2xx") == 1


def test_the_limits_of_objectives_are_bounds_of_buckets(metrics: Metrics) -> None:
    ask(metrics)
    assert read(metrics, "ft_request_seconds_bucket", **LABELS, le="0.8") == 1
    assert read(metrics, "ft_request_seconds_bucket", **LABELS, le="3.0") == 1


def test_what_happens_beside_requests(metrics: Metrics) -> None:
    with metrics.queued("tickets"):
        assert read(metrics, "ft_queue_waiting", route="tickets") == 1
    metrics.swapped("tickets", {"load": 1.5, "probe": 0.4, "flip": 0.0001})
    metrics.refused("tickets")
    metrics.started("big", 12.0)
    metrics.started("big", 60.0, ok=False)
    metrics.engine_up("big", True)
    metrics.fell_back("tickets", "openai")
    metrics.breaker("openai", "open")
    metrics.repaired("tickets", ok=True)
    for rating in (1.0, -1.0, 0, None):
        metrics.rated("tickets@3", rating)
    metrics.dropped(4)
    assert read(metrics, "ft_queue_waiting", route="tickets") == 0
    assert read(metrics, "ft_queue_wait_seconds_count", route="tickets") == 1
    assert read(metrics, "ft_swap_seconds_sum", route="tickets", part="load") == 1.5
    assert read(metrics, "ft_swaps_total", route="tickets", outcome="refused") == 1
    assert read(metrics, "ft_on_demand_starts_total", engine="big", outcome="failed") == 1
    assert read(metrics, "ft_on_demand_start_seconds_sum", engine="big") == 12
    assert read(metrics, "ft_engine_up", engine="big") == 1
    assert read(metrics, "ft_fallbacks_total", route="tickets", upstream="openai") == 1
    assert read(metrics, "ft_breaker_state", upstream="openai") == 2
    assert read(metrics, "ft_answer_repairs_total", route="tickets", outcome="ok") == 1
    assert read(metrics, "ft_feedback_total", adapter="tickets@3", rating="bad") == 2
    assert read(metrics, "ft_request_log_dropped_total") == 4


def test_what_stands_replaces_what_stood(metrics: Metrics) -> None:
    metrics.serves({"tickets": "tickets@3", "notes": "notes@1"})
    metrics.serves({"tickets": "tickets@4"})
    assert read(metrics, "ft_route_serves", adapter="tickets@3") is None
    assert read(metrics, "ft_route_serves", route="tickets", adapter="tickets@4") == 1
    metrics.answering({"tickets": True, "notes": False})
    assert read(metrics, "ft_route_up", route="notes") == 0
    metrics.answering({"tickets": True})
    assert read(metrics, "ft_route_up", route="notes") is None
    standing = Standing("tickets", "p95", 3.5, 3.0, 300, 40, judged=True, broken=True)
    metrics.stand([standing])
    assert read(metrics, "ft_objective_broken", route="tickets", objective="p95") == 1
    assert read(metrics, "ft_objective_value", route="tickets", objective="p95") == 3.5
    metrics.stand([])
    assert read(metrics, "ft_objective_limit") is None


def test_the_judge_hears_of_each_request() -> None:
    judge = Judge({"tickets": Objectives(error_rate=0.1, concurrent=1, requests=2)}, time.monotonic())
    metrics = Metrics(["tickets"], ["shop"], judge=judge)
    both = [metrics.begin("tickets", "shop") for _ in range(2)]
    for each in both:
        each.done(503)
    found = {each.objective: each for each in judge.turned(time.monotonic())}
    assert (found["error_rate"].value, found["concurrent"].value) == (1.0, 2.0)


def test_a_scrape_in_a_thread_beside_requests_sees_whole_lines(metrics: Metrics) -> None:
    over, wrong = threading.Event(), []

    def scrape() -> None:
        while not over.is_set():
            try:
                list(text_string_to_metric_families(metrics.text().decode()))
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=scrape)
    thread.start()
    for n in range(3000):
        ask(metrics, adapter=f"tickets@{n % (MOST_SERIES + 50)}")
    over.set()
    thread.join(20)
    assert not wrong


def test_a_request_costs_microseconds(metrics: Metrics) -> None:
    """Of the thread's own time: some 6, and twice that on a slow machine. The figure: tests/bench/bench_metrics.py."""
    best = float("inf")
    for _ in range(20):
        start = time.thread_time()
        for _ in range(500):
            began = metrics.begin("tickets", "shop")
            began.first()
            began.done(200, "tickets@3", 60, {"prompt_tokens": 40, "completion_tokens": 60})
        best = min(best, (time.thread_time() - start) / 500)
    assert best < 15e-6
