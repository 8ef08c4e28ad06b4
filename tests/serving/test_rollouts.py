"""Canaries: what is judged of which numbers, and the real reconciler that goes on, back, or over a restart."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import adapters, rollouts
from registry.events import append, new_event, read
from registry.rollout_terms import Rollout, parse_canary
from serving.reconciler import Reconciler
from serving.rollout_keeper import RolloutKeeper, seen_of, split_here
from serving.rollout_watch import ArmCounts, Ratings, Seen, judge, lowest
from serving.serve_plan import load_plan, plan
from serving.wanted import wanted_models
from tests.fakes.answering_engine import AnsweringEngine
from tests.fakes.reconciled import Site, make_site

TERMS = parse_canary("5%:10m,50%:30m")
OVER = 1e6  # seconds: the step's time is over


def arm(requests: int, errors: int = 0, seconds: float = 1.0, slow: int = 0) -> ArmCounts:
    """`slow` of the answers take ten times as long."""
    found = ArmCounts()
    for number in range(requests):
        found.add(seconds * (10 if number < slow else 1), failed=number >= requests - errors)
    return found


@pytest.mark.parametrize(
    ("case", "step", "held", "seen", "outcome", "why"),
    [
        ("its time is not over", 0, 599, Seen(arm(500), arm(500)), "hold", "599 of 600 s"),
        ("its time is over", 0, 600, Seen(arm(500), arm(500)), "advance", "held with 500 requests"),
        ("the last step's is", 1, 1800, Seen(arm(500), arm(500)), "finish", "held with"),
        ("too few requests", 0, OVER, Seen(arm(19), arm(500)), "hold", "19 of 20 requests"),
        ("all fail, and they are too few", 0, 1, Seen(arm(19, 19), arm(500)), "hold", "1 of 600 s"),
        ("all fail", 0, 1, Seen(arm(20, 20), arm(500)), "roll back", "20 of 20 requests failed"),
        ("one of twenty may be chance", 0, OVER, Seen(arm(20, 1), arm(500)), "hold", "too few requests to be sure"),
        ("the same share of many is not", 0, 1, Seen(arm(2000, 100), arm(500)), "roll back", "100 of 2000"),
        ("as many as the champion's", 0, OVER, Seen(arm(1000, 10), arm(1000, 10)), "advance", "held"),
        ("the champion fails too", 0, OVER, Seen(arm(100, 50), arm(100, 50)), "hold", "the champion's do too"),
        ("nobody asks the champion", 0, 1, Seen(arm(100, 50), arm(0)), "roll back", "50 of 100"),
        ("slower than the champion", 0, 1, Seen(arm(100, slow=30), arm(100)), "roll back", "30 of 100 answers took"),
        ("slower, but as is allowed", 0, OVER, Seen(arm(100, seconds=1.3), arm(100)), "advance", "held"),
        ("a few slow ones", 0, OVER, Seen(arm(100, slow=4), arm(100)), "advance", "held"),
        ("slow, and the sample is small", 0, OVER, Seen(arm(20, slow=2), arm(100)), "hold", "too few requests"),
        ("rated worse", 0, 1, Seen(arm(5), arm(5), Ratings(10, 2.0), Ratings(30, 4.5)), "roll back", "rated 2.00"),
        ("too few ratings", 0, 1, Seen(arm(5), arm(5), Ratings(9, 2.0), Ratings(30, 4.5)), "hold", "1 of 600 s"),
    ],
)  # fmt: skip
def test_judge(case: str, step: int, held: float, seen: Seen, outcome: str, why: str) -> None:
    judged = judge(TERMS, step, held, seen)
    assert judged.outcome == outcome, (case, judged)
    assert why in judged.reason
    assert judged.numbers["new_requests"] == seen.new.requests


arms = st.builds(
    arm, st.integers(0, 60), st.integers(0, 60), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 60)
).filter(lambda each: each.errors <= each.requests)


@given(arms, arms, st.floats(0, 2000), st.integers(0, 1))
def test_nothing_is_decided_of_too_few_requests(new: ArmCounts, stable: ArmCounts, held: float, step: int) -> None:
    judged = judge(TERMS, step, held, Seen(new, stable))
    if new.requests < TERMS.min_requests:
        assert judged.outcome == "hold"
    if judged.outcome in ("advance", "finish"):
        assert held >= TERMS.seconds_of(step)
        assert new.error_rate <= TERMS.max_error_rate
    if judged.outcome == "roll back":
        assert new.errors or new.p95 is not None


@given(st.lists(st.floats(0.0005, 500), min_size=1, max_size=200))
def test_the_histogram_knows_the_95th_percentile_to_a_tenth(seconds: list[float]) -> None:
    counts = ArmCounts()
    for each in seconds:
        counts.add(each, failed=False)
    real = sorted(seconds)[max(0, -(-95 * len(seconds) // 100) - 1)]
    assert counts.p95 is not None
    assert max(real, 0.001) <= counts.p95 * 1.0001
    assert counts.p95 <= max(real, 0.001) * 1.1001
    assert ArmCounts.of(counts.as_dict()) == counts


def test_the_interval_of_a_share() -> None:
    assert lowest(0, 0) == lowest(0, 50) == 0.0
    assert 0.005 < lowest(1, 20) < 0.05 < lowest(100, 1000) < 0.1


# The real reconciler on a loopback engine.


def canary_site(root: Path, terms: Rollout, **more: Any) -> Site:
    """a@1 is champion, and a@2 on its way."""
    site = make_site(root)
    site.add("a", 1)
    site.add("a", 2, **more)
    site.promote("a", 1)
    rollouts.start(site.store, site.judge("a", 2), terms, by_whom="test")
    return site


def terms_of(percent: float = 20, seconds: int = 1, **more: Any) -> Rollout:
    return Rollout.model_validate({"steps": [{"percent": percent, "for": f"{seconds}s"}], "min_requests": 5, **more})


def ask(here: Reconciler, count: int, failed: str = "") -> Counter[str]:
    """So many callers, each once, as the gateway would have them answered; `failed` fails every request."""
    found: Counter[str] = Counter()
    split = here.board.routes.splits.get("a")
    for number in range(count):
        route = split.pick(f"user-{number}") if split else here.board.routes.public["a"]
        with here.board.counted(route):
            found[route.adapter] += 1
        here.board.note(route, 0.1, failed=route.adapter == failed)
    return found


async def rounds(here: Reconciler, seconds: float) -> None:
    for _ in range(int(seconds / 0.05)):
        await here.step()
        await asyncio.sleep(0.05)


async def with_keeper(here: Reconciler) -> None:
    here.rollouts = RolloutKeeper(here.store, here.board, every=0.1)
    await here.step()


def test_a_canary_answers_its_part_and_becomes_champion(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of())

    async def canary() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                await with_keeper(here)
                assert set(canned.loaded) == {"a@1", "a@2"}
                assert here.board.routes.public["a"].adapter == "a@1"
                answered = ask(here, 1000)
                assert 140 < answered["a@2"] < 260
                assert ask(here, 1000) == answered, "each caller stays with its version"
                await rounds(here, 1.5)
                assert rollouts.get(site.store, 1).state == "done"
                assert here.board.routes.splits == {}
                assert here.board.routes.public["a"].adapter == "a@2"

    asyncio.run(canary())
    assert adapters.aliases(site.store, "a")["champion"] == 2
    assert [each.subject for each in read(site.store, type_="adapter.served")] == ["a@1", "a@2"]


def test_one_that_fails_goes_back_by_itself(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of(50, 600))

    async def canary() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                await with_keeper(here)
                ask(here, 100, failed="a@2")
                await rounds(here, 0.5)
                assert here.board.routes.splits == {}
                assert set(ask(here, 100)) == {"a@1"}

    asyncio.run(canary())
    (event,) = read(site.store, type_="rollout.rolled_back")
    assert event.data["numbers"]["new_errors"] > 20
    assert "requests failed" in event.data["reason"]
    assert adapters.get_version(site.store, "a", 2).rolled_back


def test_bad_ratings_take_it_back(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of(50, 600))
    for number in range(20):
        name, rating = (("a@1", 4.5), ("a@2", 2.0))[number % 2]
        append(site.store, new_event("ft/feedback", "feedback.received", name, {"rating": rating}))

    async def canary() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                await with_keeper(here)
                await rounds(here, 0.5)

    asyncio.run(canary())
    assert rollouts.get(site.store, 1).reason == "rated 2.00 by 10; the champion 4.50 by 10"


def test_a_restart_in_the_middle_loses_neither_step_nor_time_nor_samples(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of(30, 3))

    async def half() -> Counter[str]:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                await with_keeper(here)
                answered = ask(here, 200)
                await rounds(here, 0.5)
                return answered

    before = asyncio.run(half())
    at_the_end = rollouts.get(site.store, 1)
    assert at_the_end.state == "running"
    assert 0.3 < at_the_end.held < 2.0
    seen = seen_of(site.store, at_the_end)
    assert (seen.new.requests, seen.stable.requests) == (before["a@2"], before["a@1"])
    assert asyncio.run(half()) == before, "the same callers get the new version"
    after = seen_of(site.store, rollouts.get(site.store, 1))
    assert after.new.requests == 2 * before["a@2"]
    assert rollouts.get(site.store, 1).held > at_the_end.held


def test_another_gateways_counts_are_added_and_it_decides_nothing(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of(50, 600))

    async def canary() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here, site.reconciler(canned) as there:
                await with_keeper(here)
                other = RolloutKeeper(site.store, there.board, every=0.05, decides=False)
                there.board.put("published", here.board.routes)
                await other.look(split_here(site.store, there.board), {})
                ask(there, 100, failed="a@2")
                await asyncio.sleep(0.1)
                await other.look(split_here(site.store, there.board), {})
                found = rollouts.get(site.store, 1)
                assert (found.state, found.held) == ("running", 0.0)
                assert seen_of(site.store, found).new.errors > 20
                await rounds(here, 0.5)

    asyncio.run(canary())
    assert rollouts.get(site.store, 1).state == "rolled_back"


def test_a_version_that_the_engine_refuses_ends_its_rollout(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of(), wrong=True)

    async def canary() -> None:
        with AnsweringEngine(lambda *_: "hello") as canned:
            async with site.reconciler(canned) as here:
                await rounds(here, 0.2)
                assert set(ask(here, 50)) == {"a@1"}

    asyncio.run(canary())
    ended = rollouts.get(site.store, 1)
    assert ended.state == "rolled_back"
    assert "it was refused: a@2 failed the parity probe" in ended.reason


def test_the_plan_says_what_would_be_done(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of())
    site.add("b", 1)
    site.promote("b", 1)
    site.add("c", 1)
    models = wanted_models(site.store, site.base)
    found = plan(models, {"a": "a@1"}, ["a@1", "old@7"], {}, 16)
    lines = {each.model: each for each in found.lines}
    assert lines["a"].todo == ("load and probe a@2",)
    assert lines["a"].notes == ("canary a@2 at 20%",)
    assert lines["b"].todo == ("load and probe b@1", "lead b to b@1")
    assert (lines["c"].todo, lines["c"].notes) == ((), ("it has no champion yet",))
    assert found.unload == ("old@7",)
    assert not found.in_step
    small = {each.model: each for each in plan(models, {"a": "a@1"}, ["a@1", "a@2"], {}, 2).lines}
    assert (small["b"].todo, small["b"].notes) == ((), ("b@1 is loaded when it is asked for",))
    assert plan(models, {"a": "a@1"}, ["a@1", "a@2"], {}, 2).in_step


def test_the_plan_knows_what_is_pinned_and_what_may_answer_unjudged(tmp_path: Path) -> None:
    site = canary_site(tmp_path, terms_of())
    site.add("b", 1)
    site.promote("b", 1)
    site.add("c", 1)
    models = wanted_models(site.store, site.base)
    small = {each.model: each for each in plan(models, {"a": "a@1"}, ["a@1"], {}, 1, pinned=["b"]).lines}
    assert small["b"].todo == ("load and probe b@1", "lead b to b@1")
    assert small["a"].notes[0] == "a@2 is loaded when it is asked for"
    lines = {each.model: each for each in load_plan(site.store, None, site.base, 16, unjudged=["c"]).lines}
    assert lines["c"].todo == ("load and probe c@1", "lead c to c@1")
