"""The plan of a training: fits or not, what limits it, which knob helps, how long and for how much."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.card_profiles import GIB, PROFILES, profile_of
from registry.geometry import KNOWN
from registry.plan import Measured, Place, Verdict, Wish, plan_training
from registry.recipe import Train
from registry.train_memory import Training, train_memory
from registry.train_time import Interval, step_time

LENGTHS = ((128, 500), (256, 900), (512, 400), (1024, 100), (2048, 20))


def on(name: str, **more: Any) -> Place:
    profile = profile_of(name)
    assert profile
    return Place(name, profile, **more)


def wish(model: str = "llama-3.1-8b", lengths: tuple[tuple[int, int], ...] = LENGTHS, **train: Any) -> Wish:
    return Wish(KNOWN[model], Train.model_validate({"max_length": 2048, **train}), lengths, model)


def turned(given: Wish, verdict: Verdict, number: int = 0) -> Wish:
    """The wish with a knob of the verdict applied, as a person would write it into the recipe."""
    change = dict(verdict.knobs[number].change)
    lengths = tuple(pair for pair in given.lengths if pair[0] <= change.get("max_length", math.inf))
    stack = change.pop("backend", given.stack)
    train = Train.model_validate({**given.train.model_dump(), **change, "effective_batch": None})
    return replace(given, train=train, lengths=lengths, stack=stack)


def test_qlora_of_an_8b_fits_on_12_gb_row_by_row_and_not_with_a_batch_of_eight() -> None:
    auto = plan_training(wish(batch="auto", effective_batch=8), on("RTX 4070 SUPER"))
    assert (auto.fits, auto.batch, auto.accumulate) == (True, 1, 8)
    fixed = plan_training(wish(batch=8), on("RTX 4070 SUPER"))
    assert not fixed.fits
    assert fixed.limit.startswith("memory: 2")
    best = fixed.knobs[0]
    assert best.change == {"batch": 1, "accumulate": 8}
    assert best.then_fits
    assert best.saves_bytes == fixed.memory.total - auto.memory.total
    assert "effective batch stays 8" in best.text


def test_an_8b_does_not_fit_on_8_gb_with_our_stack_and_another_stack_is_the_knob() -> None:
    given = replace(wish(batch="auto"), other_stacks=("unsloth",), lengths=((512, 100),))
    verdict = plan_training(given, on("RTX 3070"))
    assert not verdict.fits
    assert "base is" in verdict.limit
    assert verdict.knobs[0].change == {"backend": "unsloth"}
    assert verdict.knobs[0].saves_bytes > 1.5 * GIB


@pytest.mark.parametrize(
    ("model", "card", "train"),
    [
        ("llama-3.1-8b", "RTX 4070 SUPER", {"batch": 8}),
        ("qwen2.5-3b", "RTX 3070", {"batch": 8, "quantize": "none"}),
        ("qwen2.5-3b", "RTX 3070", {"batch": 4, "checkpointing": False}),
        ("qwen2.5-14b", "RTX 5090", {"batch": 16, "lora": {"rank": 256}}),
        ("llama-3.1-8b", "A40", {"batch": 32, "quantize": "none", "checkpointing": False, "lora": {"rank": 128}}),
        ("qwen2.5-1.5b", "RTX 3060", {"batch": 64}),
    ],
)
def test_a_knob_that_is_said_to_suffice_does(model: str, card: str, train: dict[str, Any]) -> None:
    given, place = wish(model, **train), on(card)
    verdict = plan_training(given, place)
    assert not verdict.fits
    assert any(knob.then_fits for knob in verdict.knobs)
    for number, knob in enumerate(verdict.knobs):
        then = plan_training(turned(given, verdict, number), place)
        assert then.fits == knob.then_fits, knob.text
        saved = verdict.memory.total - then.memory.total
        if "max_length" in knob.change:  # no row may be just as long as that
            assert saved >= knob.saves_bytes
        else:
            assert saved == pytest.approx(knob.saves_bytes, abs=2)


def test_knobs_that_suffice_come_first_and_useless_ones_not_at_all() -> None:
    knobs = plan_training(wish(batch=8), on("RTX 4070 SUPER")).knobs
    assert [knob.then_fits for knob in knobs] == sorted((knob.then_fits for knob in knobs), reverse=True)
    assert all(knob.saves_bytes > 0 for knob in knobs)
    assert not any("checkpointing" in knob.change or "quantize" in knob.change for knob in knobs)  # they are on already


def test_what_fits_needs_no_knob_and_says_what_holds_it_up() -> None:
    verdict = plan_training(wish(batch=8, lengths=((2048, 900),)), on("NVIDIA A40"))
    assert verdict.fits
    assert verdict.knobs == []
    assert verdict.limit == "speed: arithmetic"


def test_the_longest_row_that_there_is_counts_and_not_the_longest_that_may_be() -> None:
    short = plan_training(wish(lengths=((100, 1000),), batch=8), on("RTX 4070 SUPER"))
    assert short.fits
    assert short.memory.total < plan_training(wish(batch=8), on("RTX 4070 SUPER")).memory.total
    assert short.usual_memory == short.memory.total
    mixed = plan_training(wish(batch=8), on("RTX 4090"))
    assert mixed.usual_memory < mixed.memory.total


def test_rows_that_the_trainer_would_refuse_are_told_and_not_planned() -> None:
    verdict = plan_training(wish(max_length=512, batch=4), on("RTX 4090"))
    assert verdict.notes == ["120 rows are longer than max_length 512: the trainer refuses them"]


def test_a_card_without_bf16_gets_a_note() -> None:
    assert any("bf16" in note for note in plan_training(wish(), on("T4")).notes)


def test_a_dataset_whose_lengths_are_not_known_is_planned_at_its_limit() -> None:
    verdict = plan_training(wish(lengths=(), batch=2), on("NVIDIA A40"))
    assert verdict.fits
    assert verdict.memory == plan_training(wish(lengths=((2048, 9),), batch=2), on("NVIDIA A40")).memory


def test_on_a_cpu_nothing_is_recomputed_and_the_hosts_memory_counts() -> None:
    verdict = plan_training(wish("smollm2-135m", batch=8, max_length=64), on("cpu", available=8 * GIB))
    assert verdict.fits
    assert "python and torch" in verdict.memory.parts
    assert "context" not in verdict.memory.parts
    assert not plan_training(wish("smollm2-135m", batch=8, max_length=64), on("cpu", available=GIB)).fits


def test_steps_are_counted_as_transformers_counts_them() -> None:
    place = on("NVIDIA A40")
    assert plan_training(wish(batch=8, accumulate=2), place).steps == 120
    assert plan_training(wish(batch=8, accumulate=2, epochs=2.5), place).steps == 300
    assert plan_training(wish(batch=7, accumulate=3), place).steps == 92  # 275 batches
    limited = plan_training(wish(batch=8, max_steps=10), place)
    assert (limited.steps, limited.tokens) == (10, round(sum(length * rows for length, rows in LENGTHS) * 80 / 1920))


def test_money_is_price_times_time_and_nothing_without_a_price() -> None:
    place = on("NVIDIA A40", usd_per_hour=0.36, storage_usd_per_hour=0.04, start=Interval(60, 120, 600))
    verdict = plan_training(wish(batch=8), place)
    assert verdict.usd
    assert verdict.usd.mid == pytest.approx(verdict.seconds.mid / 3600 * 0.40)
    assert verdict.seconds.low < verdict.seconds.mid < verdict.seconds.high
    assert plan_training(wish(batch=8), on("NVIDIA A40")).usd is None
    started = plan_training(wish(batch=8), replace(place, start=Interval(0, 0, 0)))
    assert started.seconds.mid == verdict.seconds.mid - 120


def test_the_batch_is_the_fastest_that_fits_and_its_effective_batch_exact() -> None:
    roomy = plan_training(wish(batch="auto", effective_batch=12), on("H100"))
    assert roomy.batch * roomy.accumulate == 12
    same_length = plan_training(wish(batch="auto", effective_batch=12, lengths=((64, 999),)), on("H100"))
    assert same_length.batch == 12  # no padding, so more rows at once cost nothing


def test_a_verdict_is_plain_json() -> None:
    verdict = plan_training(wish(batch=8), on("RTX 3070", usd_per_hour=0.2))
    told = json.loads(json.dumps(verdict.as_dict()))
    assert told["memory"]["total"] == verdict.memory.total
    assert told["knobs"][0]["change"] == verdict.knobs[0].change
    assert set(told["usd"]) == {"low", "mid", "high"}


def run(card: str, model: str, memory: float, time: float) -> Measured:
    """A finished run that took `memory` and `time` times what the formulas say."""
    profile, training = profile_of(card), Training(4, 1024)
    assert profile
    formula = train_memory(KNOWN[model], training, profile)
    step = step_time(KNOWN[model], training, profile, 600).total
    return Measured(card, model, "trl", KNOWN[model], training, round(formula.reserved * memory), step * time, 600)


def test_a_measured_run_of_the_same_corrects_and_narrows() -> None:
    place, given = on("RTX 4090"), wish(batch=4)
    before = plan_training(given, place)
    after = plan_training(given, place, [run("NVIDIA GeForce RTX 4090", given.model, 1.1, 1.3)])
    assert after.memory.total == pytest.approx(1.1 * before.memory.total, rel=0.001)
    assert after.memory.high / after.memory.total < before.memory.high / before.memory.total
    wide, narrow = (each.seconds.high - each.seconds.low for each in (before, after))
    assert after.seconds.mid > before.seconds.mid
    assert narrow / after.seconds.mid < wide / before.seconds.mid


def test_more_runs_narrow_further_and_one_odd_run_moves_little() -> None:
    place, given = on("RTX 4090"), wish(batch=4)
    rows = [run("RTX 4090", given.model, factor, factor) for factor in (1.0, 1.02, 1.01, 1.0, 1.9)]
    one, many = plan_training(given, place, rows[:1]), plan_training(given, place, rows)
    assert many.memory.total == pytest.approx(one.memory.total, rel=0.02)
    assert many.memory.high - many.memory.low < one.memory.high - one.memory.low


@pytest.mark.parametrize(
    "change", [{"card": "RTX 3090"}, {"stack": "unsloth"}, {"peak": 1, "step_seconds": 900.0}, {"card": "some card"}]
)
def test_a_run_of_another_card_or_stack_or_an_impossible_one_says_nothing(change: dict[str, Any]) -> None:
    place, given = on("RTX 4090"), wish(batch=4)
    rows = [replace(run("RTX 4090", given.model, 1.2, 1.2), **change)]
    assert plan_training(given, place, rows) == plan_training(given, place)


def test_a_run_of_another_model_says_less_than_one_of_the_same() -> None:
    place, given = on("RTX 4090"), wish(batch=4)
    spread = [
        each.memory.high - each.memory.total
        for rows in ([], [run("RTX 4090", "qwen2.5-3b", 1, 1)], [run("RTX 4090", given.model, 1, 1)])
        if (each := plan_training(given, place, rows))
    ]
    assert spread[0] > spread[1] > spread[2]


@given(
    model=st.sampled_from(sorted(KNOWN)), card=st.sampled_from([each.name for each in PROFILES if not each.is_cpu]),
    effective=st.integers(1, 64), quantize=st.sampled_from(["nf4", "none"]), checkpointing=st.booleans(),
    lengths=st.dictionaries(st.integers(1, 4096), st.integers(1, 500), min_size=1, max_size=6),
)  # fmt: skip
def test_any_plan_keeps_the_effective_batch_and_never_fits_beyond_the_card(
    model: str, card: str, effective: int, quantize: str, checkpointing: bool, lengths: dict[int, int]
) -> None:
    given = wish(model, tuple(sorted(lengths.items())), batch="auto", effective_batch=effective, quantize=quantize,
                 checkpointing=checkpointing)  # fmt: skip
    place = on(card, usd_per_hour=1.0)
    verdict = plan_training(given, place)
    assert verdict.batch * verdict.accumulate == effective
    assert verdict.fits == (verdict.memory.high <= place.bytes)
    assert not (verdict.fits and verdict.tight)
    assert 0 < verdict.seconds.low < verdict.seconds.mid < verdict.seconds.high
    assert verdict.usd
    assert verdict.steps >= 1
    assert 0 <= verdict.tokens <= given.tokens
    if not verdict.fits:
        assert verdict.limit.startswith("memory")
