"""A training's memory: every published point, and that each setting moves it the way it should.

`python -m tests.bench.bench_planner` prints the points one by one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.card_profiles import GIB, profile_of
from registry.geometry import KNOWN
from registry.recipe import Train
from registry.train_memory import STACKS, Training, base_bytes, train_memory, training_of
from tests.bench.bench_planner import load_points, mean_error, summary, table

LLAMA, USUAL = KNOWN["llama-3.1-8b"], Training(batch=4, longest=1024)
POINTS = load_points()


def test_published_peaks_are_met_within_eight_percent_on_average_and_so_is_the_holdout() -> None:
    measured = [point for point in POINTS if point.measured]
    assert len(measured) >= 60
    assert mean_error(measured) < 0.06
    assert mean_error(point for point in measured if point.holdout) < 0.06


def test_no_published_peak_is_underestimated_by_more_than_a_sixth() -> None:
    worst = min((point.error(point.ours), point.id) for point in POINTS if point.measured)
    assert worst[0] > -1 / 6, worst


def test_nothing_is_said_to_fit_that_ran_out_of_memory() -> None:
    failed = [point for point in POINTS if not point.fits]
    assert len(failed) >= 10
    assert [point.id for point in failed if point.saying == "fits"] == []


def test_what_ran_with_memory_to_spare_is_said_to_fit() -> None:
    roomy = [point for point in POINTS if point.measured and point.measured < 0.8 * point.size]
    assert len(roomy) >= 40
    assert [point.id for point in roomy if point.saying != "fits"] == []


def test_the_bench_prints_every_point_and_says_what_a_peer_cannot_take() -> None:
    peers = {"other": {POINTS[0].id: {"bytes": 2 * POINTS[0].ours, "fits": True}}}
    lines = table(POINTS, peers)
    assert len(lines) == len(POINTS) + 2
    assert lines[2].endswith(f"{2 * POINTS[0].ours / GIB:.1f} ({2 * (1 + POINTS[0].error(POINTS[0].ours)) - 1:+.0%}) |")
    assert lines[3].endswith("| - |")
    assert any(line.startswith("| ours, holdout | 23 |") for line in summary(POINTS, {}))


def test_our_own_stack_holds_embeddings_and_head_in_32_bits_beside_a_4_bit_base() -> None:
    held = base_bytes(LLAMA, USUAL)
    linear, embeddings = LLAMA.linear, LLAMA.embeddings + LLAMA.norms
    assert held == pytest.approx(0.516 * linear + 4 * embeddings, rel=0.001)
    assert base_bytes(LLAMA, replace(USUAL, stack="unsloth")) == pytest.approx(
        0.516 * linear + 2 * embeddings, rel=0.001
    )
    assert base_bytes(LLAMA, replace(USUAL, quantize="none")) == 2 * LLAMA.parameters


def test_full_logits_cost_gigabytes_that_a_fused_loss_does_not() -> None:
    full, fused = train_memory(LLAMA, replace(USUAL, stack="hf32")), train_memory(LLAMA, USUAL)
    assert full.parts["logits and loss"] == 4 * 1024 * 128_256 * 16
    assert full.total - fused.total > 3 * GIB


def test_optimizers_and_precisions_of_the_adapter_have_their_bytes() -> None:
    size = LLAMA.adapter(16)
    parts = train_memory(LLAMA, replace(USUAL, stack="hf")).parts
    assert (parts["adapter"], parts["gradients"], parts["optimizer"]) == (4 * size, 4 * size, 8 * size)
    ours = train_memory(LLAMA, USUAL).parts  # TRL makes the adapter of a 4-bit base bf16, and Adam's moments with it
    assert (ours["adapter"], ours["gradients"], ours["optimizer"]) == (2 * size, 2 * size, 4 * size)
    eighth = train_memory(LLAMA, replace(USUAL, optimizer="adamw_8bit")).parts
    assert eighth["optimizer"] == pytest.approx(2 * size, rel=0.02)


def test_a_process_on_the_cpu_has_no_parts_of_cuda() -> None:
    cpu = profile_of("cpu")
    assert not {"context", "workspace", "fragments"} & train_memory(LLAMA, USUAL, cpu).parts.keys()


def test_a_recipes_settings_are_taken_over() -> None:
    train = Train.model_validate({"lora": {"rank": 64, "targets": ["q_proj"]}, "optimizer": "adamw_8bit",
                                  "quantize": "none", "checkpointing": False})  # fmt: skip
    assert training_of(train, batch=2, longest=300) == Training(2, 300, 64, ("q_proj",), "none", "adamw_8bit", False)


@given(
    batch=st.integers(1, 64), longest=st.integers(1, 16384), rank=st.sampled_from([8, 16, 64, 256]),
    stack=st.sampled_from(sorted(STACKS)), model=st.sampled_from(sorted(KNOWN)), checkpointing=st.booleans(),
    quantize=st.sampled_from(["nf4", "none"]),
)  # fmt: skip
def test_more_of_anything_never_takes_less(
    batch: int, longest: int, rank: int, stack: str, model: str, checkpointing: bool, quantize: str
) -> None:
    shape = KNOWN[model]
    training = Training(batch, longest, rank, stack=stack, checkpointing=checkpointing, quantize=quantize)  # type: ignore[arg-type]
    memory = train_memory(shape, training)
    assert memory.low < memory.total < memory.high
    assert memory.allocated < memory.reserved < memory.total
    assert all(part >= 0 for part in memory.parts.values())
    for more in (
        replace(training, batch=batch + 1),
        replace(training, longest=longest + 100),
        replace(training, rank=2 * rank),
    ):
        assert train_memory(shape, more).total >= memory.total
    for less in (replace(training, optimizer="adamw_8bit"), replace(training, optimizer="paged_adamw_8bit")):
        assert train_memory(shape, less).total <= memory.total
